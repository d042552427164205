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
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.utils._pytree import tree_map_only

import data
from model import ASFT, ENCODERS, PATHS, PRESETS, TIMES, cicfm_loss, config, image_coords
from sample import (RANK, SOLVERS, WORLD, autocast, check_compiler, checkpoints, draw_points, find_checkpoint,
                    generate, grid_image, natural, normals, positive, print0, progress_bar, random_words,
                    read_checkpoint, run_main, start_processes, to_pixels, write_atomic, write_json,
                    write_png)

# ---- Recipes: every value is a default that a flag of the same name overrides ------------------------------

# App. A of the paper
PAPER = dict(lr=1e-4, warmup=0, schedule="constant", ema=0.999, clip=2.0, drop=0.1, path="linear",
             times="uniform", beta2=0.999, flip=False, solver="euler", sampling_steps=100, guidance=1.0,
             noise="white", noise_length=4.0, refine=0.0)
IMAGENET = dict(PAPER, loader="folder", model="XL", batch_size=512, steps=1_700_000, guidance=1.5, flip=True)
SCENES = dict(PAPER, loader="folder", model="B", res=256, decode=8192, batch_size=256, steps=1_000_000,
              flip=True, labels=False)
SMALL = dict(PAPER, model="tiny", decode=256, batch_size=16, steps=10_000, lr=2e-3, warmup=100,
             schedule="cosine", times="logit-normal", sampling_steps=25, guidance=2.0, noise="coupled",
             noise_length=1.0, refine=0.1)                                                   # two CPU cores
SMALL_POINTS = dict(SMALL, model="point-tiny", times="uniform", steps=6000, points=512, decode=512,
                    solver="sde", sampling_steps=250, noise="white")
RECIPES = {
    "glyphs": dict(SMALL, loader="glyphs", res=32, lr=3e-3, noise_length=4.0),
    "solids": dict(SMALL_POINTS, loader="solids"),
    "folder": dict(SMALL, loader="folder", res=32),
    "npz": dict(SMALL, loader="npz"),
    "imagenet128": dict(IMAGENET, res=128, decode=4096),
    "imagenet256": dict(IMAGENET, res=256, decode=8192),
    "ffhq256": dict(SCENES),
    "church256": dict(SCENES),
    "shapenet": dict(PAPER, loader="shapenet", model="point-B", points=2048, decode=2048, batch_size=16,
                     steps=800_000, solver="sde", sampling_steps=1000),
    "objaverse": dict(PAPER, loader="objaverse", model="point-objaverse", points=16384, decode=16384,
                      batch_size=384, steps=500_000, solver="sde", sampling_steps=500, guidance=5.0),
}
ON_CPU = {name: dict(SMALL_POINTS, loader=name) for name in ("shapenet", "objaverse")}    # without --model
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
    "wandb": (None, str, "project of Weights & Biases to log to as well"),
    "tensorboard": (False, bool, "log to the run directory for TensorBoard as well"),
    "local_rank": (None, str, argparse.SUPPRESS),
}
ARCHITECTURE = "width", "depth", "heads", "latents", "levels", "encoder", "rope", "encoder_heads", "qk_norm"
RANGES = dict(ema=(0, 0.9999999), drop=(0, 1), beta2=(0, 0.999999), lr=(1e-12, 1), clip=(1e-6, 1e9),
              guidance=(0, 1e3))

def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
            raise ValueError(f"--{name} {given[name]}: the run to resume has {stored[name]}")
    if "local_rank" in given:
        raise ValueError("--local-rank: python -m torch.distributed.launch gives it; start with torchrun")
    dataset = given.get("dataset", stored.get("dataset", "glyphs"))
    if "init" in given:                                    # its architecture is the default
        old = read_checkpoint(find_checkpoint(given["init"]), mmap=True)["config"]["settings"]
        stored = {name: old[name] for name in ("model", *ARCHITECTURE)} | stored
    recipe, cpu = RECIPES[dataset], given.get("device") == "cpu" or not torch.cuda.is_available()
    if dataset in ON_CPU and cpu and not stored and "model" not in given:
        print0(f"no CUDA device: the small recipe for {dataset}; --model {recipe['model']} gives the paper's")
        recipe = ON_CPU[dataset]
    defaults = {name: default for name, (default, _, _) in FLAGS.items()}
    args = argparse.Namespace(**defaults | recipe | stored | given | dict(dataset=dataset, out=str(out)))
    for name, (low, high) in RANGES.items():
        if not low <= getattr(args, name) <= high:
            raise ValueError(f"--{name} {getattr(args, name)}: expected a number from {low:g} to {high:.10g}")
    return args, given, ckpt

# ---- One step ---------------------------------------------------------------------------------------------

def draw(seed, step, places, N, M, drop, device):
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
    u, eps, drop, query = draw(args.seed, step, places, x0.shape[1], args.decode, args.drop, device)
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
def update_ema(ema, model, step, decay, skipped=0.0):
    """ema <- d ema + (1-d) model with d = min(decay, (1+s)/(10+s)), d = 1 where the step was skipped."""
    share = (1 - min(decay, (1 + step) / (10 + step))) * (1 - skipped)
    averages, own = list(ema.parameters()), list(model.parameters())
    share = torch.as_tensor(share, dtype=torch.float32, device=own[0].device)
    torch._foreach_lerp_(averages, own, [share] * len(own))
    for average, buffer in zip(ema.buffers(), model.buffers()):
        average.copy_(buffer)

def learning_rate(args, step):
    warmup = min(1.0, (step + 1) / max(1, args.warmup))
    return args.lr * warmup * SCHEDULES[args.schedule](min(1.0, step / args.steps))

# ---- The loop ---------------------------------------------------------------------------------------------

def main(argv=None):
    args, given, ckpt = settings(argv)
    device, out = start_processes(args.device), Path(args.out)
    dataset, cfg = build(args, given)
    model, ema, optimizer, step = start(args, cfg, ckpt, dataset, device)
    net = wrap(model, args, device)                                    # `net` is called, `model` is saved
    run = describe(args, cfg, dataset)
    records, board = (open_run(out, run, ckpt), open_board(args, out, run)) if RANK == 0 else ([], None)
    workers = args.workers
    if workers is None:    # on a CPU a data process takes time from training, and pays where files are read
        workers = 4 if device.type == "cuda" else int(args.loader in ("folder", "shapenet", "objaverse"))
    coords = image_coords(cfg.res, device=device) if cfg.domain == "image" else None
    pieces = args.accumulate or fewest(args.batch_size // WORLD, fits, model, coords, dataset, args, device)
    micro, left_out = args.batch_size // WORLD // pieces, {} if args.skip_bad else None
    batches = data.loader(dataset, args.seed, step, args.batch_size, micro, RANK, WORLD, workers,
                          pin=device.type == "cuda", skip_bad=left_out)
    signals, fault, stop, row = [], None, False, []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    sums, skipped = torch.zeros(4, device=device), []      # loss, finite losses, stopping, items left out
    writer = Writer(out, step if ckpt and ckpt["path"].resolve() == (out / "ckpt.pt").resolve() else None)
    bar, logged, began = progress_bar(args.steps, "step", step), step, time.time()

    while True:
        last = step >= args.steps or stop
        scored = args.eval_every and step and (step % args.eval_every == 0 or last) and not stop
        if RANK == 0 and step not in (0, writer.saved) and (step % args.save_every == 0 or scored or last):
            writer.save(step, model, ema, optimizer, run, args.keep, wait=last)
        if step and not stop and (step % args.sample_every == 0 or last):
            sample_sheet(out, step, model, ema, args, dataset, device, board)
        if RANK == 0 and scored and {step} - {r["step"] for r in records if "eval" in r}:
            writer.wait()
            attempt(evaluate, out, args, step, device, records, board)
        if RANK == 0 and (step % args.save_every == 0 or scored or last):
            attempt(draw_curve, out / "loss.png", records)
        if last:
            break

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step)
        try:
            parts = [next(batches) for _ in range(pieces)]
        except ValueError as e:                            # an item; the weights are those of this step
            if WORLD > 1:
                raise
            fault, stop = e, True
            continue
        for i, part in enumerate(parts, RANK * pieces):
            with net.no_sync() if WORLD > 1 and part is not parts[-1] else nullcontext():
                loss = micro_loss(net, coords, part, step, range(i * micro, (i + 1) * micro), args, device)
                # 0 * inf: a loss that is not finite leaves no gradient finite, in any process
                (loss / pieces).backward(1 + 0 * loss.detach())
            sums[0] += loss.detach().nan_to_num(0, 0, 0)
            sums[1] += loss.detach().isfinite()
        norm = update(model, ema, optimizer, step, args)
        skipped.append(optimizer.found_inf)
        step += 1
        bar.update()

        due = step % args.log_every == 0 or step % args.save_every == 0 or step == args.steps
        if due or signals and WORLD == 1:
            sums[2:] += torch.tensor([len(signals), len(left_out or ())], device=device)
            if WORLD > 1:
                dist.all_reduce(sums)                      # processes see a signal at different steps
            total, finite, stopping, bad_items = sums.tolist()
            flags, stop = torch.stack(skipped).tolist(), stopping > 0
            record = dict(step=step, loss=total / finite if finite else None, grad_norm=norm.item(),
                          lr=group["lr"], skipped=int(sum(flags)), left_out=int(bad_items),
                          peak_gb=peak_memory(device),
                          samples_per_s=round((step - logged) * args.batch_size / (time.time() - began), 2))
            if RANK == 0:
                log(out, records, record, args, bar, board)
            row = (row + flags)[-args.max_bad_steps:]
            if sum(row) == args.max_bad_steps:
                raise ValueError(f"{len(row)} steps in a row up to {step} were not finite (--max-bad-steps)")
            sums.zero_()
            skipped.clear()
            logged, began = step, time.time()

    bar.close()
    if fault:
        raise ValueError(f"{fault}; step {step} is saved, continue with --resume auto")
    how = "stopped by a signal" if stop else "done"
    print0(f"{how} at step {step}; draw samples with: python sample.py --ckpt {out}")

# ---- Set-up -----------------------------------------------------------------------------------------------

def build(args, given):
    """Data set and model configuration. Raises ValueError for flags that do not fit them."""
    options = {name: getattr(args, name) for name in ("res", "points", "category", "flip", "labels")}
    takes = inspect.signature(data.DATASETS[args.loader]).parameters
    for name in given:
        if (name in options or name == "data") and name.replace("data", "path") not in takes:
            raise ValueError(f"--{name}: does not apply to --dataset {args.dataset}")
    dataset, domain = data.load(args.loader, args.data, **options), PRESETS[args.model].get("domain", "image")
    if dataset.domain != domain:
        raise ValueError(f"--model {args.model}: it is for {domain}, the data set for {dataset.domain}")
    size = {"res": dataset.res} if domain == "image" else {"points": dataset.points}
    return dataset, configure(args, WORLD, n_classes=len(dataset.class_names),
                              token_dim=getattr(dataset, "token_dim", 0), **size)

def configure(args, processes, **changes):
    """The model configuration. Raises ValueError where batch or decoded pairs do not fit it."""
    changes |= {name: getattr(args, name) for name in ARCHITECTURE if getattr(args, name) is not None}
    cfg = config(args.model, **changes)
    N = cfg.res ** 2 if cfg.domain == "image" else cfg.points
    if args.decode > N:
        raise ValueError(f"--decode {args.decode}: expected at most {N}, the pairs of a training sample")
    if args.batch_size % (processes * (args.accumulate or 1)):
        raise ValueError(f"--batch-size {args.batch_size}: expected a multiple of {processes} processes x "
                         f"{args.accumulate or 1} micro-batches (--accumulate)")
    return cfg

def start(args, cfg, ckpt, dataset, device):
    """Model, averaged model, optimizer and step: new ones, or those of the checkpoint."""
    if args.deterministic:
        make_deterministic()
    torch.manual_seed(args.seed)
    model = ASFT(cfg)
    if args.init and not ckpt:
        initialise(model, args.init, dataset.class_names)
    model.to(device).grad_checkpoint = args.grad_checkpoint
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, args.beta2), weight_decay=0.0, fused=True)
    classes, size = len(dataset.class_names), sum(p.numel() for p in model.parameters()) / 1e6
    print0(f"{args.dataset}: {len(dataset)} items, {getattr(dataset, 'about', f'{classes} classes')}; "
           f"{args.model}, {size:.1f}M parameters, on {device}; {args.out}")
    if not ckpt:
        return model, ema, optimizer, 0
    file, before, steps = ckpt["path"], ckpt["config"], [ckpt["step"]] * WORLD
    if WORLD > 1:
        dist.all_gather_object(steps, ckpt["step"])
    differ = [key for key, value in asdict(cfg).items() if before["model"].get(key) != value]
    if len({*steps}) > 1 or differ or before["class_names"] != dataset.class_names:
        raise ValueError(f"{file}: its run has other {', '.join(differ) or 'classes'} (or steps: {steps})")
    if before["items"] != len(dataset):
        print0(f"warning: {len(dataset)} items, {before['items']} before: the data order changes here")
    try:
        model.load_state_dict(ckpt["model"])
        ema.load_state_dict(ckpt["ema"])
        # learning rate and betas are those of the flags
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(ckpt["optimizer"] | dict(param_groups=groups))
    except (RuntimeError, KeyError, ValueError) as e:
        raise ValueError(f"{file}: not a checkpoint to train on ({str(e)[:300]})") from None
    print0(f"resumed at step {ckpt['step']}")
    rates = [learning_rate(argparse.Namespace(**before["settings"]), max(0, ckpt["step"] - 1)),
             learning_rate(args, ckpt["step"])]
    if max(rates) > 2 * min(rates):
        print0(f"warning: the learning rate jumps from {rates[0]:.3g} to {rates[1]:.3g} (--steps)")
    return model, ema, optimizer, ckpt["step"]

def initialise(model, path, class_names):
    """Averaged weights of any checkpoint; the embedding of other classes than its own stays newly drawn."""
    ckpt = read_checkpoint(find_checkpoint(path))
    old, state = ckpt["config"]["class_names"], dict(ckpt["ema"])
    if old != class_names and state.pop("classes.weight", None) is not None:
        print0(f"--init {path}: embeddings of {len(class_names)} classes are new, instead of its {len(old)}")
    try:
        missing, other = model.load_state_dict(state, strict=False)
    except RuntimeError as e:                              # shapes
        missing, other = [str(e)[:300]], []
    if {*missing, *other} - {"classes.weight"}:
        raise ValueError(f"--init {path}: does not fit --model: {', '.join([*missing, *other][:3])}")

def wrap(model, args, device):
    """The model, compiled and shared out among processes as the flags ask for."""
    net = model
    if args.compile or args.compile is None and device.type == "cuda":
        check_compiler(device)
        net = torch.compile(model)
    if WORLD > 1:
        net = torch.nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    return net

def fewest(items, fits, *task):
    """How many micro-batches a process's share of a step is cut into: as few as let every process fit it."""
    for pieces in (n for n in range(1, items + 1) if items % n == 0):
        enough = torch.tensor(float(fits(items // pieces, *task)), device=task[-1])
        if WORLD > 1:
            dist.all_reduce(enough, dist.ReduceOp.MIN)
        if enough or pieces == items:
            print0(f"a step: {WORLD} processes x {pieces} micro-batches x {items // pieces} items")
            return pieces

def fits(n, model, coords, dataset, args, device):
    """Whether n items, and the optimizer's state to come, take at most nine tenths of the GPU: it is tried."""
    if device.type != "cuda":
        return True
    cfg, images = model.cfg, model.cfg.domain == "image"
    values = torch.zeros(n, cfg.res ** 2 if images else cfg.points, 3)
    batch = [values, torch.zeros(n, dtype=torch.long)]
    if cfg.token_dim:
        batch.append(torch.zeros(n, dataset.n_tokens, cfg.token_dim))
    torch.cuda.reset_peak_memory_stats(device)
    try:
        micro_loss(model, coords, batch, 0, range(n), args, device).backward()
        state = 12 * sum(p.numel() for p in model.parameters())       # two moments, and DDP's gradients
        return torch.cuda.max_memory_allocated(device) + state < 0.9 * torch.cuda.mem_get_info(device)[1]
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad()
        torch.cuda.empty_cache()

def describe(args, cfg, dataset):
    """What config.json and every checkpoint say of a run."""
    names = "solver", "guidance", "noise", "noise_length", "refine"
    sampling = {name: getattr(args, name) for name in names}
    return dict(model=asdict(cfg), class_names=dataset.class_names, items=len(dataset), path=args.path,
                sampling=sampling | dict(steps=args.sampling_steps), tokens=getattr(dataset, "spec", None),
                normalisation="box" if cfg.domain == "points" else None, settings=vars(args))

def make_deterministic():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")        # cuBLAS asks for it
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_mem_efficient_sdp(False)                # its backward pass adds in any order

def cpu_dtype():
    """bfloat16 where this processor multiplies in it; elsewhere it is emulated, slower than float32."""
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"

def peak_memory(device):
    """Largest memory of this process so far in GB: of the GPU, or resident; 0 where Windows does not tell."""
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    if device.type != "cuda" and sys.platform != "win32":
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return round(peak / 1e9, 3)

# ---- Run directory ----------------------------------------------------------------------------------------

def open_run(out, run, ckpt):
    """Makes the run directory and config.json; returns the records of log.jsonl up to the checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", run)
    path, records = out / "log.jsonl", []
    for line in path.read_bytes().splitlines() if ckpt and path.exists() else []:
        try:
            records += [r for r in [json.loads(line)] if r["step"] <= ckpt["step"]]
        except (ValueError, TypeError, KeyError):                      # cut by a crash
            print0(f"{path}: an unreadable line is dropped")
    write_atomic(path, lambda f: f.writelines(json.dumps(r).encode() + b"\n" for r in records))
    return records

def open_board(args, out, run):
    """TensorBoard's writer for --tensorboard; --wandb uploads what it is told. None without either."""
    if not (args.wandb or args.tensorboard):
        return None
    with data.reading("--wandb, --tensorboard", "these packages, and an account for the first"):
        from torch.utils.tensorboard import SummaryWriter
        if args.wandb:
            import wandb
            wandb.init(project=args.wandb, name=out.name, id=re.sub(r"\W+", "-", str(out)), resume="allow",
                       dir=out, config=run, sync_tensorboard=True)
        return SummaryWriter(out)

def tell(board, step, numbers, sheet=None):
    """Numbers and a sheet of samples to the board, if there is one."""
    for name, number in numbers.items() if board else ():
        board.add_scalar(name, number, step)
    if board and sheet:
        board.add_image("samples", np.asarray(sheet), step, dataformats="HWC")
        board.flush()

def log(out, records, record, args, bar, board):
    """Adds a record to log.jsonl. `skipped` then counts from the start of the run."""
    bar.set_postfix_str(f"loss {record['loss'] or math.nan:.4f}, {record['samples_per_s']} samples/s, "
                        f"{record['peak_gb']} GB")
    if record["skipped"]:
        print0(f"warning: {record['skipped']} steps up to {record['step']} were not finite and were skipped")
    record["skipped"] += next((r["skipped"] for r in records[::-1] if "skipped" in r), 0)
    if not math.isfinite(record["grad_norm"]):
        record["grad_norm"] = None                                     # JSON has no NaN
    absent = dict(samples_per_s=args.deterministic, peak_gb=args.deterministic, left_out=not args.skip_bad)
    attempt(add, out, records, {key: value for key, value in record.items() if not absent.get(key)})
    tell(board, record["step"], {k: v for k, v in records[-1].items() if k != "step" and v is not None})

def add(out, records, record):
    records.append(record)
    with open(out / "log.jsonl", "a") as f:
        f.write(json.dumps(record) + "\n")

def attempt(write, *args):
    """write(*args). A disk that is full or gone does not end a training; it is said."""
    try:
        return write(*args)
    except (OSError, RuntimeError) as e:                               # torch's writer raises RuntimeError
        print0(f"warning: {e}; the next interval tries again")

class Writer:
    """Writes checkpoints from a copy in host memory, in a thread, while training goes on. saved: the step of
    ckpt.pt, None where there is none of use."""

    def __init__(self, out, saved):
        self.out, self.saved, self.thread, self.future = out, saved, ThreadPoolExecutor(1), None

    def save(self, step, model, ema, optimizer, run, keep, wait):
        """Starts to write a step. Where it must `wait`, a disk that is full or gone ends the training."""
        self.wait()
        state = dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
                     step=step, config=run)
        state = tree_map_only(torch.Tensor, lambda x: x.detach().to("cpu", copy=True), state)
        self.future = self.thread.submit(save, self.out, state, self.saved, keep)
        try:
            if wait:
                self.saved, self.future = self.future.result(), None
        except (OSError, RuntimeError) as e:
            raise ValueError(f"{e}: the last step is not saved; continue with --resume auto") from None

    def wait(self):
        """Until what is being written is on disk."""
        if self.future:
            self.saved, self.future = attempt(self.future.result) or self.saved, None

def save(out, state, saved, keep):
    """ckpt.pt, and the `keep` before it as ckpt-STEP.pt; returns the step. Until the new one is on disk
    nothing else is touched."""
    write_atomic(out / "next.pt", lambda f: torch.save(state, f))
    if saved and keep:
        os.replace(out / "ckpt.pt", out / f"ckpt-{saved:07d}.pt")
    os.replace(out / "next.pt", out / "ckpt.pt")
    earlier = checkpoints(out)[1:]                         # later ones are of a future that was given up
    for old in {*earlier} - {*[p for p in earlier if int(p.stem[5:]) < state["step"]][:keep]}:
        old.unlink()
    return state["step"]

def evaluate(out, args, step, device, records, board):
    """Adds the scores of ckpt.pt to log.jsonl, by evaluate.py, in a process of its own: training's randomness
    is left alone."""
    image = PRESETS[args.model].get("domain", "image") == "image"
    metric = "1nna_cd" if not image else "fd" if "--features" in args.eval_flags else "fid"
    flags = dict(dataset=args.dataset, data=args.data, category=args.category, n=256, metrics=metric,
                 device=device, seed=args.seed, **{"res": args.res} if image else {"points": args.points})
    words = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    with tempfile.TemporaryDirectory() as work:
        words += ["--fake", out / "ckpt.pt", "--out", f"{work}/samples", "--json", f"{work}/scores.json",
                  *shlex.split(args.eval_flags)]
        done = subprocess.run([sys.executable, Path(__file__).with_name("evaluate.py"), *words], env=alone,
                              capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"--eval-every: {done.stderr.strip().splitlines()[-1]}")
        scores = json.loads(Path(work, "scores.json").read_text())["metrics"]
    print0(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    add(out, records, dict(step=step, eval=scores))
    tell(board, step, scores)

def draw_curve(path, records, width=720, height=360):
    """loss.png: the logged losses and their running mean, logarithmic, and in red the scores of --eval-every
    on a scale of their own, from 0."""
    losses = [(r["step"], math.log(r["loss"])) for r in records if r.get("loss")]
    scores = [(r["step"], value) for r in records for value in [*r.get("eval", {}).values()][:1]]
    if not losses:
        return
    sheet, mean, steps = Image.new("RGB", (width, height), "white"), [losses[0]], losses[-1][0]
    pen, wide, tall = ImageDraw.Draw(sheet), width - 120, height - 60
    for step, loss in losses[1:]:
        mean.append((step, mean[-1][1] + 0.05 * (loss - mean[-1][1])))
    low, high = min(loss for _, loss in losses), max(loss for _, loss in losses)
    top, span = max([value for _, value in scores], default=1), max(1e-9, high - low)
    for curve, bottom, extent, colour in ((losses, low, span, "#b9cbe8"), (mean, low, span, "#1f4e9c"),
                                          (scores, 0, top, "#c0392b")):
        pen.line([(60 + wide * step / steps, 20 + tall * (1 - (y - bottom) / extent)) for step, y in curve],
                 fill=colour, width=2)
    for i in range(5):
        y = height - 46 - tall * i / 4
        pen.text((6, y), f"{math.exp(low + span * i / 4):.4f}", "black")
        pen.text((48 + wide * i / 4, height - 24), str(steps * i // 4), "black")
        pen.text((width - 54, y), f"{top * i / 4:.4g}" if scores else "", "#c0392b")
    write_png(path, sheet)

def sample_sheet(out, step, model, ema, args, dataset, device, board, n=16):
    """samples-STEP.png: the same n seeds with EMA weights (upper half) and raw weights (lower half), 25 Euler
    steps at most, all classes in turn, or objects from all over the set. The processes share them out."""
    cfg, tiles, classes, tokens, mine = model.cfg, {}, len(dataset.class_names), None, range(RANK, n, WORLD)
    label = torch.tensor([i % classes for i in mine], device=device) if classes else None
    if cfg.token_dim:
        found = [dataset.item(i * len(dataset) // n)[2] for i in mine]
        tokens = torch.stack([torch.from_numpy(x) for x in found]).to(device) if found else None
    for half, net in enumerate((ema.eval(), model.eval()) if mine else ()):
        with autocast(device, args.dtype, cpu_dtype()):
            x, _ = generate(net, mine, args.seed, label=label, tokens=tokens, guidance=args.guidance,
                            steps=min(25, args.sampling_steps), noise=args.noise,
                            noise_length=args.noise_length)
        for i, values in zip(mine, x.float().cpu()):
            points = cfg.domain == "points"
            tile = draw_points(values.numpy()) if points else to_pixels(values, cfg.res, cfg.res)
            tiles[half * n + i] = tile
    model.train()
    shares = [tiles]
    if WORLD > 1:
        shares *= WORLD
        dist.all_gather_object(shares, tiles)
    if RANK == 0:
        tiles = {i: tile for share in shares for i, tile in share.items()}
        sheet = grid_image([tiles[i] for i in sorted(tiles)], columns=8)
        attempt(write_png, out / f"samples-{step:07d}.png", sheet)
        tell(board, step, {}, sheet)

if __name__ == "__main__":
    run_main(main)
