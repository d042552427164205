"""Train ASFT: python train.py, or torchrun --nproc_per_node=8 train.py --dataset imagenet256 --data DIR

What is drawn for sample i of an optimizer step (time, noise, condition drop, decoded pairs) is a function of
(seed, step, i) alone, and so is the data order: any number of processes and micro-batches does the same
arithmetic, and a resumed run continues exactly. In this order: recipes; flags; one step; the loop; set-up;
the run directory. Alphabet and conventions are those of model.py.
"""
import argparse
import copy
import inspect
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.utils._pytree import tree_map_only

import data
from model import ASFT, ENCODERS, PATHS, PRESETS, TIMES, cicfm_loss, config, image_coords
from sample import (RANK, SOLVERS, WORLD, autocast, check_compiler, checkpoints, draw_points, find_checkpoint,
                    flag_parser, generate, grid_image, natural, normals, positive, print0, progress_bar,
                    random_words, read_checkpoint, run_main, start_processes, to_pixels, write_atomic,
                    write_json, write_png)

# ---- Recipes: every value is a default that a flag of the same name overrides ------------------------------
PAPER = dict(lr=1e-4, warmup=0, schedule="constant", ema=0.999, clip=2.0, drop=0.1, path="linear",
             times="uniform", beta2=0.999, flip=False, solver="euler", sampling_steps=100, guidance=1.0,
             noise="white", noise_length=4.0, refine=0.0)                            # the paper's App. A
IMAGENET = dict(PAPER, loader="folder", model="XL", batch_size=512, steps=1_700_000, guidance=1.5, flip=True,
                labels=True)
SCENES = dict(PAPER, loader="folder", model="B", res=256, decode=8192, batch_size=256, steps=1_000_000,
              flip=True, labels=False)
SMALL = dict(PAPER, model="tiny", decode=256, batch_size=16, steps=10_000, lr=2e-3, warmup=100,
             schedule="cosine", times="logit-normal", sampling_steps=25, guidance=2.0, noise="coupled",
             noise_length=1.0, refine=0.1)                                                   # two CPU cores
SMALL_POINTS = dict(SMALL, model="point-tiny", times="uniform", steps=6000, points=512, decode=512,
                    noise="white", guidance=1.0)
RECIPES = {
    "glyphs": dict(SMALL, loader="glyphs", res=32, steps=5000, lr=3e-3, noise_length=4.0),
    "solids": dict(SMALL_POINTS, loader="solids"),
    "folder": dict(SMALL, loader="folder", model="tiny-linear", res=32),
    "npz": dict(SMALL, loader="npz", model="tiny-linear"),
    "imagenet128": dict(IMAGENET, res=128, decode=4096),
    "imagenet256": dict(IMAGENET, res=256, decode=8192),
    "ffhq256": dict(SCENES),
    "church256": dict(SCENES),
    "shapenet": dict(PAPER, loader="shapenet", model="point-B", points=2048, decode=2048, batch_size=16,
                     steps=800_000, solver="sde", sampling_steps=1000),
    "objaverse": dict(PAPER, loader="objaverse", model="point-objaverse", points=16384, decode=16384,
                      batch_size=384, steps=500_000, solver="sde", sampling_steps=500, guidance=5.0),
}
ON_CPU = {"shapenet": dict(SMALL_POINTS, loader="shapenet"),                                 # without CUDA
          "objaverse": dict(SMALL_POINTS, loader="objaverse", guidance=2.0)}
SCHEDULES = {"constant": lambda done: 1.0, "cosine": lambda done: 0.5 + 0.5 * math.cos(math.pi * done)}

# ---- Flags: name -> default (None: the recipe's or preset's), type or choices, help -----------------------
FLAGS = {
    "dataset": ("glyphs", RECIPES, "recipe and data set"),
    "data": (None, str, "folder, packed directory or file of the data set; glyphs and solids need none"),
    "category": ("all", str, "shapenet: airplane, chair, car, ... or all"),
    "res": (None, positive, "images: training resolution"),
    "points": (None, positive, "point clouds: points of a training sample"),
    "flip": (None, bool, "mirror images at random"),
    "labels": (None, bool, "class labels: sub-directories of a folder, categories of shapenet"),
    "skip_bad": (False, bool, "the next item stands in for one that cannot be read; they are counted"),
    "model": (None, PRESETS, "preset"),
    "encoder": (None, {**ENCODERS["image"], **ENCODERS["points"]}, "how the context is read"),
    "width": (None, positive, "D"),
    "depth": (None, positive, "trunk blocks"),
    "heads": (None, positive, "H"),
    "latents": (None, positive, "L, on images a square number"),
    "levels": (None, positive, "K, decoder blocks"),
    "encoder_heads": (None, natural, "heads that read a window, 0: as many as --heads"),
    "rope": (None, bool, "rotary embedding of the latent grid"),
    "qk_norm": (None, bool, "RMSNorm of queries and keys"),
    "steps": (None, positive, "optimizer steps"),
    "batch_size": (None, positive, "samples of one optimizer step, over all processes"),
    "decode": (None, positive, "decoded pairs M of a sample"),
    "lr": (None, float, "learning rate"),
    "warmup": (None, natural, "steps of linear warm-up"),
    "schedule": (None, SCHEDULES, "learning rate after the warm-up"),
    "beta2": (None, float, "of AdamW"),
    "clip": (None, float, "largest gradient norm"),
    "ema": (None, float, "decay of the averaged weights"),
    "drop": (None, float, "probability of dropping the condition"),
    "path": (None, PATHS, "between data and noise"),
    "times": (None, TIMES, "distribution of t"),
    "solver": (None, SOLVERS, "default of sample.py for this run"),
    "sampling_steps": (None, positive, "default of sample.py for this run"),
    "guidance": (None, float, "default of sample.py for this run"),
    "seed": (0, natural, "of weights, data order and noise"),
    "device": ("auto", str, "auto, cpu, cuda or cuda:N"),
    "dtype": ("auto", ("auto", "float32", "bfloat16"), "auto: bfloat16 autocast where the processor has it"),
    "compile": (None, bool, "torch.compile (default: on CUDA)"),
    "accumulate": (None, positive, "micro-batches of one process and step (default: as few as fit a GPU)"),
    "grad_checkpoint": (False, bool, "recompute blocks in the backward pass: less memory, more time"),
    "workers": (None, natural, "data processes of each process (default: 4 on CUDA; on a CPU 1 for files)"),
    "deterministic": (False, bool, "the same bits in every run on one machine; no timings in log.jsonl"),
    "out": (None, str, "run directory (default: runs/DATASET)"),
    "resume": (None, str, "auto: the run in --out, if there is one; or a checkpoint, or a run directory"),
    "log_every": (10, positive, "steps"),
    "save_every": (1000, positive, "steps"),
    "sample_every": (1000, positive, "steps"),
    "keep": (1, natural, "earlier checkpoints kept as ckpt-STEP.pt"),
    "max_bad_steps": (20, positive, "stop after so many non-finite steps in a row"),
    "init": (None, str, "start from the averaged weights of this checkpoint or shipped model"),
    "eval_every": (None, positive, "steps between scores of 256 samples: fid, or 1nna_cd of point clouds"),
    "eval_flags": ("", str, "more flags of evaluate.py for it, as in '--features module:callable --n 1000'"),
    "wandb": (None, str, "project of Weights & Biases to log to as well, by way of tensorboard"),
    "tensorboard": (False, bool, "log to the run directory for TensorBoard as well"),
    "local_rank": (None, str, argparse.SUPPRESS),
}
ARCHITECTURE = "width", "depth", "heads", "latents", "levels", "encoder", "rope", "encoder_heads", "qk_norm"
RANGES = dict(ema=(0, 0.9999999), drop=(0, 1), beta2=(0, 0.999999), lr=(1e-12, 1), clip=(1e-6, 1e9),
              guidance=(0, 1e3))

def parser():
    p = flag_parser(__doc__)
    for name, (default, kind, text) in FLAGS.items():
        how = dict(type=kind) if callable(kind) else dict(choices=kind)
        if kind is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        known = f" (default: {default})" if default else ""
        p.add_argument("--" + name.replace("_", "-"), default=None, help=text + known, **how)
    return p

def settings(argv=None):
    """Flags over a resumed run's settings over recipe over defaults; the flags given; the checkpoint."""
    given = {name: value for name, value in vars(parser().parse_args(argv)).items() if value is not None}
    if "local_rank" in given:
        raise ValueError("--local-rank: python -m torch.distributed.launch gives it; start with torchrun")
    resume, stored, ckpt = given.get("resume"), {}, None
    out = Path(given.get("out", f"runs/{given.get('dataset', 'glyphs')}"))
    if resume == "auto" and not checkpoints(out):
        print0(f"--resume auto: no checkpoint in {out}, starting at step 0")
    elif resume:
        ckpt = read_checkpoint(out if resume == "auto" else resume)
        out, stored = Path(given.get("out", ckpt["path"].parent)), ckpt["config"]["settings"]
    if checkpoints(out) and (ckpt is None or ckpt["path"].parent.resolve() != out.resolve()):
        raise ValueError(f"{out} holds a run already: continue it with --resume auto, or give another --out")
    for name in ("dataset", "model", "batch_size", "seed"):            # data order and weights rest on them
        if stored and given.get(name, stored[name]) != stored[name]:
            raise ValueError(f"{name} {given[name]}: the run to resume has {stored[name]}")
    if "init" in given:                                    # its architecture is the default
        old = read_checkpoint(find_checkpoint(given["init"], "--init"), mmap=True)["config"]["settings"]
        stored = {name: old[name] for name in ("model", *ARCHITECTURE)} | stored
    defaults = {name: default for name, (default, _, _) in FLAGS.items()}
    dataset = (defaults | stored | given)["dataset"]
    recipe, cpu = RECIPES[dataset], given.get("device") == "cpu" or not torch.cuda.is_available()
    if dataset in ON_CPU and cpu and not ckpt and "model" not in given:
        print0(f"no CUDA device: the small recipe for {dataset}; --model {recipe['model']} gives the paper's")
        recipe = ON_CPU[dataset]
    args = argparse.Namespace(**defaults | recipe | stored | given | dict(dataset=dataset, out=str(out)))
    for name, (low, high) in RANGES.items():
        if not low <= getattr(args, name) <= high:
            raise ValueError(f"--{name} {getattr(args, name)}: expected a number from {low:g} to {high:.10g}")
    return args, given, ckpt

# ---- One step ---------------------------------------------------------------------------------------------
def random_inputs(seed, step, places, N, M, drop, device):
    """What the loss needs besides data, each a function of (seed, step, place in the batch): uniforms (B,),
    noise (B, N, 3), condition drop (B,) bool, decoded pairs (B, M) int64."""
    counts = N, -(-N // 4), 1
    samples = torch.arange(places.start, places.stop, device=device)                     # (B,)
    words = random_words("training", seed, step, samples, sum(counts))                   # (4, B, n)
    noise, order, u = words.split(counts, 2)
    order = order.transpose(0, 1).flatten(1)[:, :N]                                      # (B, N)
    u = (u[:2, :, 0].float() + 0.5) * 2.0 ** -32                                         # (2, B)
    return u[0], normals(noise), u[1] < drop, order.topk(M, dim=1).indices

def micro_loss(net, coords, batch, step, places, args, device):
    """CICFM loss of one micro-batch (values, labels, perhaps tokens) at `places` of the global batch."""
    x0 = data.decode_values(batch[0], device)                                            # (B, N, 3)
    u, eps, drop, query = random_inputs(args.seed, step, places, x0.shape[1], args.decode, args.drop, device)
    label, *tokens = (x.to(device, non_blocking=True) for x in batch[1:])
    with autocast(device, args.dtype, cpu_dtype()):
        t = TIMES[args.times](u)                                                         # (B,)
        return cicfm_loss(net, coords, x0, eps, t, query, args.path, label, *tokens, drop=drop)

def update(model, ema, optimizer, step, args):
    """Clips, steps and averages; returns the gradient norm before clipping, a scalar on the device."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip, foreach=True)
    # a non-finite step is skipped by the fused optimizer on the device, so that the host need not wait for it
    optimizer.found_inf = (~norm.isfinite()).float()
    optimizer.step()
    optimizer.zero_grad()
    update_ema(ema, model, step, args.ema, optimizer.found_inf)
    return norm

@torch.no_grad()
def update_ema(ema, model, step, decay, skipped):
    """ema <- d ema + (1-d) model with d = min(decay, (1+s)/(10+s)), d = 1 where the step was skipped, which a
    tensor () on the device tells: 1 or 0."""
    share = (1 - min(decay, (1 + step) / (10 + step))) * (1 - skipped)
    averages, own = list(ema.parameters()), list(model.parameters())
    torch._foreach_lerp_(averages, own, [share] * len(own))
    for average, buffer in zip(ema.buffers(), model.buffers()):
        average.copy_(buffer)

def learning_rate(args, step):
    warmup = min(1.0, (step + 1) / max(1, args.warmup))
    return args.lr * warmup * SCHEDULES[args.schedule](min(1.0, step / args.steps))

# ---- The loop ---------------------------------------------------------------------------------------------
def main(argv=None):
    args, given, ckpt = settings(argv)
    device = start_processes(args.device)
    dataset, cfg = build(args, given)
    # what config.json and every checkpoint say of the run
    about = dict(model=vars(cfg), class_names=dataset.class_names, items=len(dataset), settings=vars(args),
                 tokens=getattr(dataset, "spec", None),
                 normalisation="box" if cfg.domain == "points" else None)
    model, ema, optimizer, net = start(args, cfg, ckpt, dataset, device)   # net is called, model is saved
    step = resume(ckpt, about, model, ema, optimizer) if ckpt else 0
    run_dir = RunDirectory(args, about, ckpt)
    del ckpt                                               # of XL some 12 GB
    coords = image_coords(cfg.res, device=device) if cfg.domain == "image" else None
    pieces = args.accumulate or micro_batches(args, model, coords, dataset, device)
    micro, left_out = args.batch_size // WORLD // pieces, {} if args.skip_bad else None
    workers = args.workers
    if workers is None:    # on a CPU a data process takes time from training, and pays where files are read
        workers = 4 if device.type == "cuda" else int(args.loader in ("folder", "shapenet", "objaverse"))
    batches = data.loader(dataset, args.seed, step, args.batch_size, micro, RANK, WORLD, workers,
                          pin=device.type == "cuda", skip_bad=left_out)
    signals, stop, failure, bad_row = [], None, None, 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    sums = torch.zeros(5, device=device)       # loss, finite losses, skipped steps, signals, items left out
    bar, logged, began = progress_bar(max(step, args.steps), "step", step), step, time.time()

    def due(every):
        return step > 0 and (last or step % every == 0)

    while True:
        last = stop or step >= args.steps
        scored = args.eval_every and due(args.eval_every) and not stop
        if (scored or due(args.save_every)) and RANK == 0:
            run_dir.save(step, model, ema, optimizer, last)
            if scored:
                attempt(run_dir.evaluate, step, device)
            attempt(run_dir.draw_curve)
        if due(args.sample_every) and not stop:
            sample_sheet(run_dir, step, model, ema, dataset)
        if last:
            break

        optimizer.param_groups[0]["lr"] = lr = learning_rate(args, step)
        try:
            parts = [next(batches) for _ in range(pieces)]
        except ValueError as e:                            # an item; the weights are those of this step
            if WORLD > 1:
                raise
            stop = failure = e
            continue
        for i, part in enumerate(parts, RANK * pieces):
            with net.no_sync() if WORLD > 1 and part is not parts[-1] else nullcontext():
                loss = micro_loss(net, coords, part, step, range(i * micro, (i + 1) * micro), args, device)
                # an infinite loss may have finite gradients; times 0 * inf they are NaN in every process
                (loss / pieces).backward(1 + 0 * loss.detach())
            sums[0] += loss.detach().nan_to_num(0, 0, 0)
            sums[1] += loss.detach().isfinite()
        norm = update(model, ema, optimizer, step, args)
        sums[2] += optimizer.found_inf
        bad_row = (bad_row + 1) * optimizer.found_inf      # skipped steps in a row
        step += 1
        bar.update()

        # also before a save: a resumed run would lose what was not logged
        logged_every = args.log_every, args.save_every, args.eval_every or args.steps, args.steps
        if any(step % every == 0 for every in logged_every) or signals and WORLD == 1:
            sums[3:] += torch.tensor([len(signals), len(left_out or ())], device=device)
            if WORLD > 1:
                dist.all_reduce(sums)                      # processes see a signal at different steps
            total, finite, skipped, stopping, missing = sums.tolist()
            stop = "stopped by a signal" if stopping else None
            rate = (step - logged) * args.batch_size / (time.time() - began)
            record = dict(step=step, loss=total / finite if finite else None,
                          grad_norm=norm.item() if norm.isfinite() else None, lr=lr,
                          skipped=int(skipped) // WORLD, left_out=int(missing), samples_per_s=round(rate, 2))
            bar.set_postfix(loss=record["loss"])
            if RANK == 0:
                run_dir.log(record, device)
            if bad_row >= args.max_bad_steps:
                raise ValueError(f"{bad_row:.0f} steps in a row up to {step} not finite (--max-bad-steps)")
            sums.zero_()
            logged, began = step, time.time()

    bar.close()
    if failure:
        advice = f"step {step} is saved, continue with --resume auto" if step else "see --skip-bad"
        raise ValueError(f"{failure}; {advice}")
    print0(f"{stop or 'done'} at step {step}; draw samples with: python sample.py --ckpt {args.out}")

# ---- Set-up -----------------------------------------------------------------------------------------------
def build(args, given):
    """Data set and model configuration. Raises ValueError for flags that do not fit them."""
    options = {name: getattr(args, name) for name in ("res", "points", "category", "flip", "labels")}
    takes = inspect.signature(data.DATASETS[args.loader]).parameters
    takes = {name.replace("path", "data") for name in takes}
    for name in given.keys() & {"data", *options} - takes:
        raise ValueError(f"--{name}: does not apply to --dataset {args.dataset}")
    dataset, domain = data.load(args.loader, args.data, **options), config(args.model).domain
    if dataset.domain != domain:
        raise ValueError(f"model {args.model} is for {domain}, the data set for {dataset.domain}")
    if args.labels and not dataset.class_names:
        raise ValueError(f"--data {args.data}: found no classes; expected a directory for each; "
                         "--no-labels trains without")
    size = {"res": dataset.res} if domain == "image" else {"points": dataset.points}
    return dataset, configure(args, WORLD, n_classes=len(dataset.class_names),
                              token_dim=getattr(dataset, "token_dim", 0), **size)

def configure(args, processes, **changes):
    """The model configuration. Raises ValueError where batch or decoded pairs do not fit it."""
    changes |= {name: getattr(args, name) for name in ARCHITECTURE if getattr(args, name) is not None}
    cfg, pieces = config(args.model, **changes), args.accumulate or 1
    if args.decode > cfg.pairs:
        raise ValueError(f"--decode {args.decode}: expected at most {cfg.pairs}, the pairs of a sample")
    if args.batch_size % (processes * pieces):
        raise ValueError(f"--batch-size {args.batch_size}: expected a multiple of {processes} processes x "
                         f"{pieces} micro-batches (--accumulate)")
    return cfg

def start(args, cfg, ckpt, dataset, device):
    """A new model, its average, its optimizer, and it compiled and shared out among processes."""
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")    # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
        torch.backends.cuda.enable_mem_efficient_sdp(False)            # its backward pass adds in any order
    torch.manual_seed(args.seed)
    model = ASFT(cfg)
    if args.init and not ckpt:
        initialise(model, args.init, dataset.class_names)
    model.to(device).grad_checkpoint = args.grad_checkpoint
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, args.beta2), weight_decay=0.0, fused=True)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print0(f"{args.dataset}: {len(dataset)} items, {dataset.about}; {args.model}, {size:.1f}M parameters, "
           f"on {device}; {args.out}")
    net = model
    if args.compile or args.compile is None and device.type == "cuda":
        check_compiler(device)
        net = torch.compile(model)
    if WORLD > 1:
        net = torch.nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True,
                                                        broadcast_buffers=False)       # they never change
    return model, ema, optimizer, net

def initialise(model, path, class_names):
    """Averaged weights of any checkpoint; embeddings of other classes are new, as large as its own were."""
    ckpt = read_checkpoint(find_checkpoint(path))
    old, state, res = ckpt["config"]["class_names"], ckpt["ema"], ckpt["config"]["model"]["res"]
    if model.cfg.domain == "image" and res != model.cfg.res:
        print0(f"warning: --init {path}: of {res} pixels; at --res {model.cfg.res} places look new to it")
    if old != class_names:
        print0(f"--init {path}: {len(class_names)} classes are new, its {len(old)} are left out")
        table, own = state.pop("classes.weight", None), model.classes and model.classes.weight
        if class_names:                                    # as large as what the other weights are used to
            std = 0.02 if table is None else table.float().std()
            state["classes.weight"] = own * (std / own.std())
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise ValueError(f"--init {path}: does not fit --model: {str(e)[:300]}") from None

def resume(ckpt, run, model, ema, optimizer):
    """Loads a checkpoint; returns its step. Raises ValueError where `run` is of another model or classes."""
    file, step, before, steps = ckpt["path"], ckpt["step"], ckpt["config"], gather(ckpt["step"])
    own, its = (dict(config["model"], classes=config["class_names"]) for config in (run, before))
    differ = [name for name in own if its.get(name) != own[name]]
    if differ or len({*steps}) > 1:
        found = f"its run has other {', '.join(differ)}" if differ else f"processes found steps {steps}"
        raise ValueError(f"{file}: {found}")
    if before["items"] != run["items"]:
        print0(f"warning: {run['items']} items, {before['items']} before: the data order changes here")
    groups = optimizer.state_dict()["param_groups"]                    # learning rate and betas of the flags
    try:
        model.load_state_dict(ckpt["model"])
        ema.load_state_dict(ckpt["ema"])
        optimizer.load_state_dict(dict(ckpt["optimizer"], param_groups=groups))
    except (RuntimeError, KeyError, ValueError) as e:                  # exported weights alone, or other code
        raise ValueError(f"{file}: not a checkpoint to resume ({str(e)[:300]}); see --init") from None
    print0(f"resumed at step {step}")
    old, new = (argparse.Namespace(**config["settings"]) for config in (before, run))
    rates = learning_rate(old, max(0, step - 1)), learning_rate(new, step)
    if max(rates) > 2 * min(rates):
        print0(f"warning: the learning rate jumps from {rates[0]:.3g} to {rates[1]:.3g} (--steps)")
    return step

def gather(thing):
    """What every process has, in a list."""
    things = [thing] * WORLD
    if WORLD > 1:
        dist.all_gather_object(things, thing)
    return things

def micro_batches(args, model, coords, dataset, device):
    """Into how many micro-batches a process's share of a step is cut: the fewest that fit in every process.
    Blocks are recomputed, as by --grad-checkpoint, only where not even single items fit otherwise."""
    items = args.batch_size // WORLD
    for again in (True,) if model.grad_checkpoint else (False, True):
        model.grad_checkpoint = again
        for pieces in (n for n in range(1, items + 1) if items % n == 0):
            if all(gather(fits(items // pieces, args, model, coords, dataset, device))):
                kind = ", blocks recomputed" if again else ""
                print0(f"a step: {WORLD} processes x {pieces} micro-batches x {items // pieces} items{kind}")
                return pieces
    raise ValueError("one item does not fit the GPU; expected a smaller --model or fewer pairs (--decode)")

def fits(n, args, model, coords, dataset, device):
    """Whether n items, and the optimizer's state to come, take at most 0.9 of the GPU, by one trial."""
    if device.type != "cuda":
        return True
    batch, _ = data.Run(dataset, args.seed, tries=100)[[0]]
    batch = [x.expand(n, *x.shape[1:]) for x in batch]
    try:
        micro_loss(model, coords, batch, 0, range(n), args, device).backward()
        state = 12 * sum(p.numel() for p in model.parameters())       # two moments, and DDP's gradients
        return torch.cuda.max_memory_allocated(device) + state < 0.9 * torch.cuda.mem_get_info(device)[1]
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

def cpu_dtype():
    """bfloat16 where this processor multiplies in it; elsewhere it is emulated, slower than float32."""
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"

# ---- Run directory ----------------------------------------------------------------------------------------
def attempt(write, *args, last=False):
    """write(*args). A full or missing disk is a warning, and an error only where the last step is lost."""
    try:
        return write(*args)
    except (OSError, RuntimeError) as e:                               # torch's writer raises RuntimeError
        if last:
            raise ValueError(f"{e}: the last step is not saved; continue with --resume auto") from None
        print0(f"warning: {e}; the next interval tries again")

def save(out, state, saved, keep):
    """ckpt.pt, and the `keep` before it as ckpt-STEP.pt, which change only once the new one is written."""
    write_atomic(out / "next.pt", lambda f: torch.save(state, f))
    if saved and keep:
        os.replace(out / "ckpt.pt", out / f"ckpt-{saved:07d}.pt")
    os.replace(out / "next.pt", out / "ckpt.pt")
    others = checkpoints(out)[1:]              # later ones are left by a run resumed from an earlier step
    kept = [p for p in others if int(p.stem[5:]) < state["step"]][:keep]
    for old in {*others} - {*kept}:
        old.unlink()
    return state["step"]

class RunDirectory:
    """What a run writes, by its first process. records: the lines of log.jsonl, up to the checkpoint where
    one is resumed. saved: the step of ckpt.pt, None where it is missing or damaged."""

    def __init__(self, args, run, ckpt):
        self.args, self.run, self.out, self.records, self.board = args, run, Path(args.out), [], None
        here = ckpt and ckpt["path"].resolve() == (self.out / "ckpt.pt").resolve()
        self.saved, self.thread, self.future = ckpt["step"] if here else None, ThreadPoolExecutor(1), None
        if RANK > 0:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        if args.wandb:                                     # a resumed run goes on in its old record
            run["wandb"] = ckpt and ckpt["config"].get("wandb") or os.urandom(4).hex()
        write_json(self.out / "config.json", run)
        path = self.out / "log.jsonl"
        for line in path.read_bytes().splitlines() if ckpt and path.exists() else []:
            try:
                self.records += [r for r in [json.loads(line)] if r["step"] <= ckpt["step"]]
            except (ValueError, TypeError, KeyError):                  # cut by a crash
                print0(f"{path}: an unreadable line is dropped")
        write_atomic(path, lambda f: f.writelines(json.dumps(r).encode() + b"\n" for r in self.records))
        if args.wandb or args.tensorboard:                 # W&B uploads what TensorBoard's writer is told
            with data.reading("--wandb, --tensorboard", "these packages, and an account for the first"):
                from torch.utils.tensorboard import SummaryWriter
                if args.wandb:
                    import wandb
                    wandb.init(project=args.wandb, name=self.out.name, id=run["wandb"], resume="allow",
                               dir=self.out, config=run, sync_tensorboard=True)
                self.board = SummaryWriter(self.out, purge_step=ckpt and ckpt["step"] + 1)

    def log(self, record, device):
        """Adds a line to log.jsonl, where `skipped` counts from the start of the run."""
        if self.args.deterministic:
            del record["samples_per_s"]
        elif device.type == "cuda":
            record["peak_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
        if record["skipped"]:
            print0(f"warning: {record['skipped']} non-finite steps up to {record['step']} were skipped")
        record["skipped"] += next((r["skipped"] for r in reversed(self.records) if "skipped" in r), 0)
        attempt(self.add, record)

    def add(self, record):
        self.records.append(record)
        with open(self.out / "log.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")
        for name, number in record.get("eval", record).items() if self.board else ():
            if name != "step" and number is not None:
                self.board.add_scalar(name, number, record["step"])

    def save(self, step, model, ema, optimizer, last):
        """Writes a checkpoint from a copy in host memory, in a thread, while training goes on."""
        self.wait()
        if step == self.saved:
            return
        state = dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
                     step=step, config=self.run)
        state = tree_map_only(torch.Tensor, lambda x: x.detach().to("cpu", copy=True), state)
        self.future = self.thread.submit(save, self.out, state, self.saved, self.args.keep)
        if last:
            self.wait(last)

    def wait(self, last=False):
        """Until what is being written is on disk."""
        if self.future:
            self.saved = attempt(self.future.result, last=last) or self.saved
            self.future = None

    def evaluate(self, step, device):
        """Scores ckpt.pt by evaluate.py, in a process of its own, which leaves training unaffected."""
        self.wait()
        if self.saved != step or any(r["step"] == step and "eval" in r for r in self.records):
            return                                 # the save failed, or it was scored before a resume
        if device.type == "cuda":
            torch.cuda.empty_cache()               # the other process needs some of it
        args, program = self.args, [sys.executable, Path(__file__).with_name("evaluate.py")]
        metric = "1nna_cd" if args.points else "fd" if "--features" in args.eval_flags else "fid"
        same = "dataset", "data", "category", "res", "points", "seed"
        flags = {name: getattr(args, name) for name in same} | dict(n=256, metrics=metric, device=device)
        alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        with tempfile.TemporaryDirectory() as work:
            flags |= dict(fake=self.out / "ckpt.pt", out=f"{work}/samples", json=f"{work}/scores.json")
            program += [f"--{name}={value}" for name, value in flags.items() if value is not None]
            program += shlex.split(args.eval_flags)
            done = subprocess.run(program, env=alone, capture_output=True, text=True)
            if done.returncode:
                raise OSError("--eval-every: " + done.stderr.strip().rpartition("\n")[2])
            scores = json.loads(Path(flags["json"]).read_text())["metrics"]
        print0(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        self.add(dict(step=step, eval=scores))

    def draw_curve(self):
        """loss.png: log losses and their running mean, and in red the scores on a scale of their own."""
        losses = [(r["step"], math.log(r["loss"])) for r in self.records if r.get("loss")]
        scores = [(r["step"], [*r["eval"].values()][0]) for r in self.records if r.get("eval")]
        if not losses:
            return
        mean = accumulate(losses, lambda old, new: (new[0], 0.95 * old[1] + 0.05 * new[1]))
        steps, low, high = losses[-1][0], min(y for _, y in losses), max(y for _, y in losses)
        span, top = high - low or 1, max([y for _, y in scores], default=1) or 1
        sheet = Image.new("RGB", (720, 360), "white")
        pen = ImageDraw.Draw(sheet)
        for curve, zero, unit, colour in ((losses, low, span, "#b9cbe8"), (mean, low, span, "#1f4e9c"),
                                          (scores, 0, top, "#c0392b")):
            places = [(60 + 600 * x / steps, 320 - 300 * (y - zero) / unit) for x, y in curve]
            pen.line(places, colour, width=2)
        for i in range(5):
            pen.text((48 + 150 * i, 336), str(steps * i // 4), "black")
            pen.text((6, 314 - 75 * i), f"{math.exp(low + span * i / 4):.4f}", "black")
            pen.text((666, 314 - 75 * i), f"{top * i / 4:.4g}" if scores else "", "#c0392b")
        write_png(self.out / "loss.png", sheet)

def sample_sheet(run_dir, step, model, ema, dataset, n=16):
    """samples-STEP.png: n seeds with EMA weights, below them the same with raw weights, at most 25 steps.
    Classes come in turn, objects from all over the set. The processes share them out."""
    args, cfg, classes, mine = run_dir.args, model.cfg, len(dataset.class_names), range(RANK, n, WORLD)
    options = {name: getattr(args, name) for name in ("guidance", "noise", "noise_length")}
    if classes:
        options["label"] = torch.tensor([i % classes for i in mine], device=model.device)
    if cfg.token_dim and mine:
        tokens = [torch.from_numpy(dataset.item(i * len(dataset) // n)[2]) for i in mine]
        options["tokens"] = torch.stack(tokens).to(model.device)                     # (B, T, token_dim)
    steps, tiles = min(25, args.sampling_steps), {}
    for half, net in enumerate((ema.eval(), model.eval()) if mine else ()):
        with autocast(model.device, args.dtype, cpu_dtype()):
            x, _ = generate(net, mine, args.seed, steps=steps, **options)            # (B, N, 3)
        for i, values in zip(mine, x.float().cpu()):
            image = cfg.domain == "image"
            tiles[half, i] = to_pixels(values, cfg.res, cfg.res) if image else draw_points(values)
    model.train()
    tiles = {place: tile for share in gather(tiles) for place, tile in share.items()}
    if RANK == 0:
        sheet = grid_image([tiles[place] for place in sorted(tiles)], columns=8)
        attempt(write_png, run_dir.out / f"samples-{step:07d}.png", sheet)
        if run_dir.board:
            run_dir.board.add_image("samples", np.asarray(sheet), step, dataformats="HWC")
            run_dir.board.flush()

if __name__ == "__main__":
    run_main(main)
