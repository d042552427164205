"""Train ASFT on images or point clouds: python train.py, or torchrun --nproc_per_node=8 train.py --dataset imagenet256

One optimizer step reads one global batch; what is drawn for sample i of it (time, noise, condition drop, decoded
pairs) is a function of (seed, step, i) alone, and so is the data order. One process, several processes and
accumulated micro-batches therefore do the same arithmetic, and a resumed run continues exactly.

What goes wrong from outside costs no work: see "Faults" in README.md, and tests/chaos.py, which tries it.

Alphabet and conventions are those of model.py. A run directory holds config.json, log.jsonl, loss.png,
samples-STEP.png (upper half EMA weights, lower half raw ones, always the same seeds), and ckpt.pt.
"""
import argparse
import copy
import errno
import gc
import inspect
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
import model as asft
from data import InputError, message, write_atomic
from sample import (RANK, SOLVERS, WORLD, autocast, checkpoints, fail, fits, generate, generator, grid_picture, make_directory,
                    natural, pick_device, pick_dtype, picture, positive, print0, read_checkpoint, same_everywhere, start_processes,
                    unlike)

# ---------------------------------------------------------------------------------------------------------
# Recipes: every value is a default that a flag of the same name overrides

PAPER = dict(lr=1e-4, warmup=0, schedule="constant", ema=0.999, clip=2.0, drop=0.1, path="linear", times="uniform",
             beta2=0.999, flip=False, solver="euler", sampling_steps=100, guidance=1.0)       # App. A
IMAGENET = dict(PAPER, loader="folder", model="XL", batch_size=512, steps=1_700_000, guidance=1.5, flip=True)
SCENES = dict(PAPER, loader="folder", model="B", res=256, decode=8192, batch_size=256, steps=1_000_000, flip=True, labels=False)
SMALL = dict(PAPER, model="tiny", decode=256, batch_size=16, steps=10_000, lr=2e-3, warmup=100, schedule="cosine",
             times="logit-normal", ema=0.999, sampling_steps=50, guidance=2.0)                # two CPU cores
SMALL_POINTS = dict(SMALL, model="point-tiny", times="uniform", steps=6000, points=512, decode=512, solver="sde", sampling_steps=250)

RECIPES = {
    "glyphs": dict(SMALL, loader="glyphs", res=32, lr=3e-3),
    "solids": dict(SMALL_POINTS, loader="solids"),
    "folder": dict(SMALL, loader="folder", res=32),
    "npz": dict(SMALL, loader="npz"),
    "imagenet128": dict(IMAGENET, res=128, decode=4096),
    "imagenet256": dict(IMAGENET, res=256, decode=8192),
    "ffhq256": dict(SCENES),
    "church256": dict(SCENES),
    "shapenet": dict(PAPER, loader="shapenet", model="point-B", points=2048, decode=2048, batch_size=16,
                     steps=800_000, solver="sde", sampling_steps=1000),
    "objaverse": dict(PAPER, loader="objaverse", model="point-objaverse", points=16384, decode=16384, batch_size=384,
                      steps=500_000, solver="sde", sampling_steps=500, guidance=5.0),
}
FILES = ("folder", "shapenet", "objaverse")                        # loaders that read a file for every item
ON_CPU = {name: dict(SMALL_POINTS, loader=name) for name in ("shapenet", "objaverse")}    # unless --model is given


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = lambda group, name, help, **kw: group.add_argument(name, help=help, default=None, **kw)
    g = p.add_argument_group("data")
    flag(g, "--dataset", "recipe and data set (default: glyphs)", choices=RECIPES)
    flag(g, "--data", "folder, packed set or file of the data set; glyphs and solids need none")
    flag(g, "--category", "shapenet: airplane, chair, car, ... or all (default: all)")
    flag(g, "--res", "images: training resolution", type=positive)
    flag(g, "--points", "clouds: points of a training sample", type=positive)
    flag(g, "--flip", "mirror images at random", action=argparse.BooleanOptionalAction)
    flag(g, "--labels", "read classes: sub-directories of folder (default: yes, but for ffhq256, church256), categories of shapenet "
         "(default: no)", action=argparse.BooleanOptionalAction)
    flag(g, "--skip-bad", "replace items that cannot be read by the next ones, and say how many", action="store_true")
    g = p.add_argument_group("model")
    flag(g, "--model", "preset", choices=asft.PRESETS)
    flag(g, "--encoder", "how the context is read", choices=sorted({e for es in asft.ENCODERS.values() for e in es}))
    for name, help in (("width", "D"), ("depth", "trunk blocks"), ("heads", "H"), ("latents", "L, on images a square number"),
                       ("levels", "K, decoder blocks")):
        flag(g, f"--{name}", help, type=positive)
    flag(g, "--rope", "rotary embedding of the latent grid", action=argparse.BooleanOptionalAction)
    flag(g, "--encoder-heads", "heads that read a window (0: as many as --heads)", type=natural)
    flag(g, "--interpolate", "queries start from the latents at their place, too", action=argparse.BooleanOptionalAction)
    g = p.add_argument_group("recipe (defaults: the data set's row in RECIPES)")
    flag(g, "--steps", "optimizer steps", type=positive)
    flag(g, "--batch-size", "samples of one optimizer step, over all processes", type=positive)
    flag(g, "--decode", "decoded pairs M of a sample", type=positive)
    flag(g, "--lr", "learning rate", type=float)
    flag(g, "--warmup", "steps of linear warm-up", type=natural)
    flag(g, "--schedule", "learning rate after it", choices=SCHEDULES)
    flag(g, "--beta2", "of AdamW", type=float)
    flag(g, "--clip", "largest gradient norm", type=float)
    flag(g, "--ema", "decay of the averaged weights", type=float)
    flag(g, "--drop", "probability of dropping the condition", type=float)
    flag(g, "--path", "between data and noise", choices=asft.PATHS)
    flag(g, "--times", "distribution of t", choices=asft.TIMES)
    flag(g, "--solver", "default of sample.py for this run", choices=SOLVERS)
    flag(g, "--sampling-steps", "default of sample.py for this run", type=positive)
    flag(g, "--guidance", "default of sample.py for this run", type=float)
    flag(g, "--seed", "of weights, data order, noise (default: 0)", type=natural)
    g = p.add_argument_group("machine")
    flag(g, "--device", "auto, cpu or cuda (default: auto)")
    flag(g, "--dtype", "auto: bfloat16 autocast where the processor has it", choices=("auto", "float32", "bfloat16"))
    flag(g, "--compile", "torch.compile (default: on CUDA)", action=argparse.BooleanOptionalAction)
    flag(g, "--accumulate", "micro-batches of one process and step (default: 1)", type=positive)
    flag(g, "--grad-checkpoint", "recompute blocks in the backward pass: less memory, more time", action="store_true")
    flag(g, "--workers", "data processes per training process (default: 4 on CUDA; on the CPU 1 for files, else 0)", type=natural)
    flag(g, "--deterministic", "the same bits in every run on this machine, slower on CUDA; no timings in log.jsonl", action="store_true")
    g = p.add_argument_group("what it will take")
    flag(g, "--plan", "print parameters, FLOPs, memory a GPU and days of this recipe, and stop; needs no data", action="store_true")
    flag(g, "--gpus", "of the plan (default: 8)", type=positive)
    flag(g, "--utilisation", "of the plan: share of an H100's 989 TFLOP/s that is reached (default: 0.4)", type=float)
    g = p.add_argument_group("run directory")
    flag(g, "--out", "run directory (default: runs/DATASET)")
    flag(g, "--resume", "auto: continue the run in --out if there is one; or a checkpoint, or a run directory")
    flag(g, "--log-every", "steps (default: 10)", type=positive)
    flag(g, "--save-every", "steps (default: 1000)", type=positive)
    flag(g, "--sample-every", "steps (default: 1000)", type=positive)
    flag(g, "--keep", "earlier checkpoints kept as ckpt-STEP.pt (default: 1)", type=natural)
    flag(g, "--max-bad-steps", "stop after so many non-finite steps in a row (default: 20)", type=positive)
    return p


DEFAULTS = dict(dataset="glyphs", data=None, category="all", res=None, points=None, labels=None, encoder=None, width=None, depth=None,
                heads=None, latents=None, levels=None, rope=None, encoder_heads=None, interpolate=None, seed=0, device="auto", dtype="auto", compile=None,
                accumulate=1, grad_checkpoint=False, workers=None, out=None, resume=None, log_every=10, save_every=1000,
                sample_every=1000, keep=1, max_bad_steps=20, skip_bad=False, deterministic=False, plan=False, gpus=8, utilisation=0.4)

SCHEDULES = {"constant": lambda progress: 1.0, "cosine": lambda progress: 0.5 + 0.5 * math.cos(math.pi * progress)}


def settings(argv=None, held=None):
    """Flags over the resumed run's settings over the recipe: a namespace, the flags given, the checkpoint to resume (or
    None), and where the run directory was there and is locked now, in the ExitStack `held`, what only_one yields (or None)."""
    given = {k: v for k, v in vars(parser().parse_args(argv)).items() if v is not None}
    resume, ckpt, source = given.get("resume"), None, None
    out = Path(given.get("out") or f"runs/{given.get('dataset', 'glyphs')}")
    if resume not in (None, "auto"):
        source = Path(resume) if Path(resume).is_dir() else Path(resume).parent
        out = out if "out" in given else source
    # before the checkpoint is read: a run that ends just now may be about to write a later one
    ours = held.enter_context(data.only_one(out)) if held is not None and RANK == 0 and "plan" not in given and out.is_dir() else None
    if resume == "auto":
        resume = source = out if checkpoints(out) else None
        if resume is None:
            print0(f"--resume auto: no checkpoint in {out}, starting at step 0")
    if "plan" not in given and checkpoints(out) and (source is None or source.resolve() != out.resolve()):
        raise InputError(f"{out} holds a run already: continue it with --resume auto, or give another --out")
    if resume is not None:
        ckpt = read_checkpoint(resume)
        if "optimizer" not in ckpt:
            raise InputError(f"--resume {resume}: the checkpoint has no optimizer state, it cannot be trained on")
    stored = stored_settings(ckpt) if ckpt else {}
    for name in ("dataset", "model", "batch_size", "seed"):            # on these the data order and the weights rest
        if name in stored and given.get(name, stored[name]) != stored[name]:
            raise InputError(f"--{name.replace('_', '-')} {given[name]}: the run to resume has {stored[name]}; "
                             f"drop the flag, or start a new run")
    dataset = given.get("dataset") or stored.get("dataset") or DEFAULTS["dataset"]
    recipe, device = RECIPES[dataset], pick_device(given.get("device", "auto"))
    if dataset in ON_CPU and device.type == "cpu" and not stored and "model" not in given and "plan" not in given:
        recipe = ON_CPU[dataset]
        print0(f"no CUDA device: the small recipe for {dataset}; --model {RECIPES[dataset]['model']} gives the paper's")
    args = argparse.Namespace(**{**DEFAULTS, **recipe, **stored, **given, "dataset": dataset, "out": str(out)})
    for name, low, high in (("ema", 0, 0.9999999), ("drop", 0, 1), ("beta2", 0, 0.999999), ("lr", 1e-12, 1), ("clip", 1e-6, 1e9),
                            ("guidance", 0, 1e3), ("seed", 0, 2 ** 62), ("utilisation", 1e-3, 1)):
        if not low <= getattr(args, name) <= high:
            raise InputError(f"--{name} {getattr(args, name)}: expected a number between {low:g} and {high:.10g}")
    return args, given, ckpt, ours


def same_data(ckpt, dataset):
    """Raises InputError where labels would mean other classes than before; says so where the data order is another one."""
    before = ckpt["config"]
    if before["class_names"] != dataset.class_names:
        raise InputError(f"--data: its {len(dataset.class_names)} classes are not the {len(before['class_names'])} of the run to resume, "
                         f"{ckpt['file'].name}; expected the same names in the same order")
    if before.get("items", len(dataset)) != len(dataset):
        print0(f"warning: the data set has {len(dataset)} items, {before['items']} when the checkpoint was written: the order in which "
               f"they are read is another one from here on")


def stored_settings(ckpt):
    """The settings in a checkpoint, each held to what the command line would take; what concerns one call alone is left out."""
    # a run from before there were encoder heads has none, whatever its preset has by now
    settings, stored = {**ckpt["config"]["settings"], "encoder_heads": ckpt["config"]["model"].get("encoder_heads", 0)}, {}
    known = {action.dest: action for action in parser()._actions if action.dest not in ("help", "resume", "out", "plan", "gpus", "utilisation")}
    for name in known.keys() & settings.keys():
        flag, value = known[name], settings[name]
        if value is None and DEFAULTS.get(name, 0) is None:
            continue
        try:
            if type(value) not in ((int, float) if flag.type is float else (bool,) if flag.nargs == 0 else (int,) if flag.type else (str,)):
                raise ValueError
            if flag.nargs != 0 and (flag.type or str)(str(value)) != value or flag.choices and value not in flag.choices:
                raise ValueError
        except (ValueError, argparse.ArgumentTypeError):
            raise InputError(f"{ckpt['file'].name}: its setting {name} is {value!r:.60}, which --{name.replace('_', '-')} does not take") from None
        stored[name] = value
    return stored


# ---------------------------------------------------------------------------------------------------------
# Processes

def any_rank(flag, device):
    """True where the flag is set on any process."""
    if WORLD == 1:
        return flag
    flag = torch.tensor(float(flag), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return flag.item() > 0


def bfloat16_cpu():
    """Whether this processor multiplies in bfloat16 (elsewhere it is emulated, slower than float32)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(f" {name}" in flags for name in ("avx512_bf16", "amx_bf16", "bf16"))


# ---------------------------------------------------------------------------------------------------------
# One step

def draw(seed, step, places, N, M, drop, device):
    """What the loss needs besides data for the samples at `places` of the global batch of `step`: uniforms (B,),
    noise (B, N, 3), condition drop (B,) bool, decoded pairs (B, M) int64; each a function of (seed, step, place)."""
    rows = []
    for place in places:
        g = generator(seed, step, place, device=device)
        u = torch.rand(2, generator=g, device=device)
        rows.append((u[0], torch.randn(N, 3, generator=g, device=device), u[1] < drop,
                     torch.randperm(N, generator=g, device=device)[:M]))
    return [torch.stack(column) for column in zip(*rows)]


def micro_loss(net, coords, batch, step, places, args, device, dtype):
    """CICFM loss of one micro-batch (values, labels) whose samples stand at `places` of the global batch."""
    x0 = data.decode_values(batch[0], device)                                            # (B, N, 3)
    u, eps, drop, query = draw(args.seed, step, places, x0.shape[1], args.decode, args.drop, device)
    label, *tokens = (x.to(device, non_blocking=True) for x in batch[1:])
    with autocast(device, dtype):
        return asft.cicfm_loss(net, coords, x0, eps, asft.TIMES[args.times](u), query, args.path, label, *tokens, drop=drop)


@torch.no_grad()
def update_ema(ema, model, step, decay, skipped=0.0):
    """ema <- d ema + (1-d) model with d = min(decay, (1+s)/(10+s)), 1 where the step was skipped (a scalar on the device);
    buffers are copied, not averaged."""
    d = min(decay, (1 + step) / (10 + step))
    averages, own = list(ema.parameters()), list(model.parameters())
    share = torch.as_tensor((1 - d) * (1 - skipped), dtype=torch.float32, device=own[0].device)
    torch._foreach_lerp_(averages, own, [share] * len(own))
    for average, own in zip(ema.buffers(), model.buffers()):
        average.copy_(own)


def update(model, ema, optimizer, step, args):
    """Clips, steps and averages; returns the gradient norm before clipping, a scalar on the device."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip, foreach=True)
    # a non-finite step is skipped by the fused optimizer on the device, so that the host need not wait for it
    optimizer.found_inf = (~norm.isfinite()).float()
    optimizer.step()
    optimizer.zero_grad()
    update_ema(ema, model, step, args.ema, optimizer.found_inf)
    return norm


def learning_rate(args, step):
    warmup = min(1.0, (step + 1) / max(1, args.warmup))
    return args.lr * warmup * SCHEDULES[args.schedule](min(1.0, step / args.steps))


# ---------------------------------------------------------------------------------------------------------
# Run directory

def read_log(path, step):
    """The records of log.jsonl up to a step; lines that a crash left broken are dropped, and that is said."""
    records, broken = [], 0
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            if not all(isinstance(record[key], kind) for key, kind in (("step", int), ("skipped", int), ("loss", (int, float, type(None))))):
                raise ValueError
            if record["step"] <= step:
                records.append(record)
        except (ValueError, TypeError, KeyError):
            broken += 1
    if broken:
        print0(f"{path}: {broken} unreadable lines dropped")
    return records


def append_log(path, records):
    """Appends lines, all or none: half a line would spoil the next one."""
    with open(path, "ab", buffering=0) as f:
        size, text = f.tell(), "".join(json.dumps(r) + "\n" for r in records).encode()
        try:
            if f.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            f.truncate(size)
            raise


def save_checkpoint(out, step, current, model, ema, optimizer, config, keep):
    """ckpt.pt, and the `keep` checkpoints before it as ckpt-STEP.pt (hard links: no second copy is written); `current` is the
    step of the ckpt.pt that is there, None where it is of no use. Until the new one is on disk nothing else is touched."""
    state = dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), step=step,
                 data_position=step * config["settings"]["batch_size"], rng=torch.get_rng_state(), config=config)

    def write(f):
        try:
            torch.save(state, f)
        except RuntimeError as e:                                      # torch's writer covers the disk's error with its own
            raise e.__context__ if isinstance(e.__context__, OSError) else e

    earlier = None if current is None or not keep else out / f"ckpt-{current:07d}.pt"
    if earlier and (out / "ckpt.pt").exists() and not earlier.exists():
        try:
            os.link(out / "ckpt.pt", earlier)
        except OSError:                                                # a file system without hard links
            with open(out / "ckpt.pt", "rb") as there:
                write_atomic(earlier, lambda f: shutil.copyfileobj(there, f))
    write_atomic(out / "ckpt.pt", write)
    earlier = checkpoints(out)[1:]                                     # later ones are of a future that was given up
    for old in {*earlier} - {*[p for p in earlier if int(p.stem[5:]) < step][:keep]}:
        old.unlink()


def attempt(what, write, *args):
    """Whether write(*args) could be done. A disk that is full or gone does not end a training; it is said."""
    try:
        write(*args)
        return True
    except (OSError, InputError) as e:                                 # InputError: of an object whose pictures condition a sample
        print0(f"warning: {message(e)}: {what}")
        return False


def draw_curve(path, records, width=720, height=360):
    """loss.png: the logged losses and their running mean over steps, logarithmic in loss."""
    points = [(r["step"], r["loss"]) for r in records if r["loss"]]
    if len(points) < 2:
        return
    smooth, mean = [], points[0][1]
    for i, (step, loss) in enumerate(points):
        mean += (loss - mean) * max(0.05, 1 / (i + 1))
        smooth.append((step, mean))
    low, high = (math.log(f(loss for _, loss in points)) for f in (min, max))
    first, final = points[0][0], points[-1][0]
    left, top, w, h = 60, 20, width - 80, height - 60
    place = lambda p: (left + w * (p[0] - first) / max(1, final - first),
                       top + h * (high - math.log(p[1])) / max(1e-9, high - low))
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((left, top, left + w, top + h), outline="#999999")
    for i in range(5):
        level = math.exp(low + (high - low) * i / 4)
        y = place((first, level))[1]
        pen.line((left, y, left + w, y), fill="#dddddd")
        pen.text((6, y - 6), f"{level:.4f}", fill="black")
        pen.text((left + w * i / 4 - 12, top + h + 6), f"{first + (final - first) * i // 4}", fill="black")
    pen.text((left + w / 2 - 60, height - 18), f"step (loss, last mean {mean:.4f})", fill="black")
    pen.line([place(p) for p in points], fill="#b9cbe8")
    pen.line([place(p) for p in smooth], fill="#1f4e9c", width=2)
    write_atomic(path, lambda f: sheet.save(f, format="PNG"))


def sample_picture(path, model, ema, args, dataset, device, dtype, n=16):
    """The same n seeds with EMA weights (upper half) and raw weights (lower half), in at most 25 Euler steps; of all
    classes in turn, or conditioned on objects from all over the set."""
    cfg, pictures, n_classes = model.cfg, [], len(dataset.class_names)
    label = torch.arange(n, device=device) % n_classes if n_classes else None
    tokens = torch.stack([torch.from_numpy(dataset.item(i * len(dataset) // n)[2]) for i in range(n)]).to(device) if cfg.token_dim else None
    guidance = args.guidance if n_classes or cfg.token_dim else 1.0
    for net in (ema, model):
        net.eval()
        with autocast(device, dtype):
            x, _ = generate(net, range(n), args.seed, label=label, tokens=tokens, guidance=guidance,
                            steps=min(25, args.sampling_steps), path=args.path)
        pictures += [picture(p, (cfg.res, cfg.res), cfg.domain == "image") for p in x]
    model.train()
    write_atomic(path, lambda f: grid_picture(pictures, columns=8).save(f, format="PNG"))


# ---------------------------------------------------------------------------------------------------------
# The run

def build(args, given):
    """Data set and model configuration, with the one line that says what does not fit."""
    preset = asft.PRESETS[args.model]
    image = preset.get("domain", "image") == "image"
    takes = inspect.signature(data.DATASETS[args.loader]).parameters
    for flag, name in (("data", "path"), ("res", "res"), ("points", "points"), ("category", "category"), ("flip", "flip"),
                       ("labels", "labels")):
        if name not in takes and flag in given:
            raise InputError(f"--{flag}: does not apply to --dataset {args.dataset}")
    if "path" in takes and args.data is None:
        raise InputError(f"--dataset {args.dataset}: --data is missing: it needs {data.DATASETS[args.loader].needs}")
    dataset = data.load(args.loader, args.data, res=args.res, points=args.points, category=args.category, flip=args.flip,
                        labels=args.labels)
    if (dataset.domain == "image") != image:
        raise InputError(f"--model {args.model} is for {'images' if image else 'points'}, "
                         f"--dataset {args.dataset} holds {dataset.domain}s".replace("pointss", "points"))
    size = dict(res=dataset.res) if image else dict(points=dataset.points)
    return dataset, configure(args, WORLD, n_classes=len(dataset.class_names), token_dim=getattr(dataset, "token_dim", 0), **size)


def configure(args, processes, **changes):
    """The model configuration; batch and decoded pairs must fit it and the number of processes."""
    changes.update({k: getattr(args, k) for k in ("width", "depth", "heads", "latents", "levels", "encoder", "rope", "encoder_heads", "interpolate")})
    try:
        cfg = asft.config(args.model, **{k: v for k, v in changes.items() if v is not None})
    except ValueError as e:
        raise InputError(str(e)) from e
    N = cfg.res ** 2 if cfg.domain == "image" else cfg.points
    if args.decode > N:
        raise InputError(f"--decode {args.decode}: a training sample has only {N} pairs")
    if args.batch_size % (processes * args.accumulate):
        raise InputError(f"--batch-size {args.batch_size} is not divisible by {processes} processes x "
                         f"{args.accumulate} micro-batches (--accumulate)")
    return cfg


def plan(args):
    """Prints what a recipe takes: estimates from counted FLOPs and counted tensors, without data and without a GPU."""
    image = asft.PRESETS[args.model].get("domain", "image") == "image"
    cfg = configure(args, args.gpus, **(dict(res=args.res) if image else dict(points=args.points)))
    flops, parameters = asft.forward_flops(cfg, args.decode)
    step_flops = (4 if args.grad_checkpoint else 3) * args.batch_size * flops        # backward: twice the forward
    micro = args.batch_size // (args.gpus * args.accumulate)
    state, activations = 20 * parameters, asft.activation_bytes(cfg, args.decode, micro, args.grad_checkpoint)
    days = args.steps * step_flops / (args.gpus * H100_FLOPS * args.utilisation) / 86400
    again = ", recomputed" if args.grad_checkpoint else ""
    print(f"""{args.dataset}: model {args.model} at {f"{cfg.res} x {cfg.res}" if image else f"{cfg.points} points"}, {args.decode} pairs decoded
parameters       {parameters / 1e6:.1f}M (class embeddings not counted: the data tell how many)
FLOPs            {flops / 1e9:.1f} GFLOP forward a sample, {step_flops / 1e9:,.0f} GFLOP a step of {args.batch_size} samples{again}
steps            {args.steps:,}, {args.steps * args.batch_size / 1e6:,.1f}M samples, {args.steps * step_flops / 1e18:,.1f} EFLOP
memory a GPU     {state / 1e9:.1f} GB weights, gradients, Adam and average in float32
                 {activations / 1e9:.1f} GB activations of {micro} samples{again}, uncompiled
                 {(state + activations) / 1e9:.1f} GB in all
time             {days:,.1f} days on {args.gpus} H100 at {100 * args.utilisation:g} % of {H100_FLOPS / 1e12:g} TFLOP/s in bfloat16
Estimates: FLOPs and activations are counted, the utilisation is assumed, data and communication are left out.""")
    if state + activations > 80e9:
        fits = [(k, again) for again in (False, True) for k in range(1, micro * args.accumulate + 1) if args.batch_size % (args.gpus * k) == 0
                and state + asft.activation_bytes(cfg, args.decode, args.batch_size // (args.gpus * k), again) <= 75e9][:1]
        print("That does not fit into 80 GB" + "".join(
            f"; --accumulate {k}{' --grad-checkpoint' if again else ''} would" for k, again in fits))


H100_FLOPS = 989e12               # dense bfloat16, NVIDIA's data sheet of the SXM card


def main(argv=None):
    with ExitStack() as held:                                          # the lock on the run directory
        args, given, ckpt, ours = settings(argv, held)
        if args.plan:
            plan(args)
        else:
            run(args, given, ckpt, ours, held)


def start_or_resume(args, cfg, ckpt, device):
    """Model, averaged model, optimizer, the step they are at, and the step of the ckpt.pt in the run directory, None where
    there is none that is of use."""
    if ckpt:
        file = ckpt["file"].name
        before = {**asdict(asft.Config()), **ckpt["config"]["model"]}
        if before != asdict(cfg):
            differ = [k for k in before if before[k] != asdict(cfg).get(k)]
            raise InputError(f"{file}: its model differs from that of the flags in {', '.join(differ)}; drop those flags")
        for weights in ("model", "ema"):
            fits(cfg, ckpt[weights], file)
    torch.manual_seed(args.seed)
    model = asft.ASFT(cfg).to(device)
    model.grad_checkpoint = args.grad_checkpoint
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, args.beta2), eps=1e-8, weight_decay=0.0,
                                  fused=True)
    if not ckpt:
        return model, ema, optimizer, 0, None
    model.load_state_dict(ckpt["model"])
    ema.load_state_dict(ckpt["ema"])
    load_optimizer(optimizer, ckpt["optimizer"], file)
    ckpt["file"].close()
    step = ckpt["step"]
    print0(f"resumed at step {step}")
    return model, ema, optimizer, step, step if Path(file).resolve() == Path(args.out, "ckpt.pt").resolve() else None


def open_run(out, config, ckpt, step, ours, held):
    """Makes and locks the run directory, clears away what a killed run left half written, and forgets what was logged after
    the checkpoint: the records that stay, and what only_one yields."""
    make_directory(out, "--out")
    ours = ours or held.enter_context(data.only_one(out))
    for name in ("ckpt*.pt", "config.json", "log.jsonl", "loss.png", "samples-*.png"):
        for unfinished in out.glob(f"{name}.tmp"):
            unfinished.unlink()
    records = read_log(out / "log.jsonl", step) if ckpt else []
    write_atomic(out / "config.json", lambda f: f.write(json.dumps(config, indent=1).encode()))
    write_atomic(out / "log.jsonl", lambda f: f.write("".join(json.dumps(r) + "\n" for r in records).encode()))
    return records, ours


def run(args, given, ckpt, ours, held):
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")    # cuBLAS asks for it, before its first product
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.enable_mem_efficient_sdp(False)            # its backward pass adds in any order
    dataset, cfg = build(args, given)
    device = start_processes(args.device)
    same_everywhere(ckpt)
    if ckpt:
        same_data(ckpt, dataset)
    dtype = pick_dtype(args.dtype, device, "bfloat16" if bfloat16_cpu() else "float32")
    compiled = args.compile if args.compile is not None else device.type == "cuda"
    # on a CPU a data process pays only where files are decoded: it takes time from the cores that train
    workers = args.workers if args.workers is not None else 4 if device.type == "cuda" else int(args.loader in FILES)
    micro = args.batch_size // (WORLD * args.accumulate)
    out = Path(args.out)

    model, ema, optimizer, step, current = start_or_resume(args, cfg, ckpt, device)
    net = torch.compile(model) if compiled else model                  # `net` is what is called, `model` what is saved
    if WORLD > 1:
        net = torch.nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)

    config = dict(model=asdict(cfg), class_names=dataset.class_names, items=len(dataset), path=args.path, settings=dict(vars(args)),
                  sampling=dict(solver=args.solver, steps=args.sampling_steps, guidance=args.guidance),
                  normalisation=None if cfg.domain == "image" else "box", tokens=getattr(dataset, "spec", None),
                  torch=str(torch.__version__))
    records, ours = open_run(out, config, ckpt, step, ours, held) if RANK == 0 else ([], None)
    print0(f"{args.dataset}: {len(dataset)} items, {len(dataset.class_names) or 'no'} classes; model {args.model}, "
           f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters; {device}, "
           f"{'float32' if dtype is None else 'bfloat16 autocast'}{', compiled' if compiled else ''}")
    print0(f"global batch {args.batch_size} = {WORLD} processes x {args.accumulate} micro-batches of {micro}; "
           f"{args.decode} of {cfg.res ** 2 if cfg.domain == 'image' else cfg.points} pairs decoded; "
           f"steps {step} to {args.steps}; run directory {out}")

    left_out = {} if args.skip_bad else None                           # items that cannot be read: {number: what is wrong}
    batches = iter(data.loader(dataset, args.seed, step, args.batch_size, micro, RANK, WORLD, workers,
                               pin=device.type == "cuda", left_out=left_out))
    coords = asft.image_coords(cfg.res, device=device) if cfg.domain == "image" else None
    first_place = RANK * micro * args.accumulate
    stop, fault = [], None                                             # signals seen; an item that cannot be read
    before = {n: signal.signal(n, lambda n, frame: stop.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    total, faults = torch.zeros(2, device=device), []                  # loss sum, count; which steps since the last log were skipped
    skipped, row = records[-1]["skipped"] if records else 0, 0         # steps in all, and in a row
    reported, unwritten = set(), []                                    # items left out that were told of; records not on disk yet
    saved, logged, started, told = step, step, time.time(), 0.0
    bar = tqdm(total=args.steps, initial=step, unit="step", disable=None if RANK == 0 else True, smoothing=0.05)

    while True:
        last = step >= args.steps
        interrupted = (bool(stop) or fault is not None) and WORLD == 1
        if (step % args.log_every == 0 or step % args.save_every == 0 or last or interrupted) and step > logged:
            if WORLD > 1:
                dist.all_reduce(total)
            loss, count = total.tolist()
            loss = loss / count if count else math.nan
            rate = (step - logged) / (time.time() - started)
            bad, row, longest = bad_steps(torch.stack(faults).tolist(), logged, row)
            skipped += len(bad)
            if args.skip_bad:
                report_left_out(left_out, reported)
            if RANK == 0:
                memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_resident()
                record = dict(step=step, loss=finite(loss), grad_norm=finite(norm.item()), lr=lr, skipped=skipped)
                if not args.deterministic:
                    record.update(steps_per_s=round(rate, 3), samples_per_s=round(rate * args.batch_size, 2), peak_gb=round(memory / 1e9, 3))
                if args.skip_bad:
                    record["left_out"] = len(reported)
                if bad:
                    record["bad"] = [dict(step=s + 1, items=[data.item_index(len(dataset), args.seed, k) for k in range(
                        s * args.batch_size, (s + 1) * args.batch_size)]) for s in bad]
                    print0(f"warning: non-finite loss or gradient, skipped: step {', '.join(str(s + 1) for s in bad)}; "
                           f"the items of their batches are in log.jsonl")
                records.append(record)
                unwritten.append(record)
                if not ours() and (out / data.LOCK).exists():          # removed, and begun anew
                    raise InputError(f"{out}: another training writes it now; this one ends at step {step}")
                if attempt("the log is not written, next attempt with its next line", append_log, out / "log.jsonl", unwritten):
                    unwritten.clear()
                bar.set_postfix_str(f"loss {loss:.4f}, {rate * args.batch_size:.1f} samples/s, {memory / 1e9:.2f} GB peak")
                if not sys.stderr.isatty() and (last or time.time() - told > 10):        # no bar there: a line now and then
                    told = time.time()
                    print0(f"step {step}/{args.steps}: {bar.postfix}, {rate:.2f} steps/s, "
                           f"{(args.steps - step) / rate / 60:.1f} min left")
            if longest >= args.max_bad_steps:
                raise InputError(f"{longest} steps in a row up to step {step} had a non-finite loss or gradient "
                                 f"(--max-bad-steps {args.max_bad_steps}); {kept(out, saved)}")
            total.zero_()
            faults.clear()
            logged, started = step, time.time()
        # processes may see a signal at different steps: they agree on it where they meet anyway
        stopping = interrupted or WORLD > 1 and step == logged and any_rank(bool(stop), device)
        if RANK == 0:
            if step > saved and (step % args.save_every == 0 or last or stopping):
                try:
                    save_checkpoint(out, step, current, model, ema, optimizer, config, args.keep)
                    saved = current = step
                except OSError as e:
                    failed = f"{message(e)}: step {step} is not saved, {kept(out, saved)}"
                    if last or stopping:
                        raise InputError(f"{f'{fault}; ' if fault else ''}{failed}; once that is mended, continue with --resume auto") from None
                    again = min(args.steps, (step // args.save_every + 1) * args.save_every)
                    print0(f"warning: {failed}; next attempt at step {again}")
                attempt("the curve is not drawn", draw_curve, out / "loss.png", records)
            if step > 0 and (step % args.sample_every == 0 or last) and not stopping:
                attempt("samples are not drawn", sample_picture, out / f"samples-{step:07d}.png", model, ema, args, dataset, device, dtype)
                started = time.time() if step == logged else started
        if last or stopping:
            break

        lr = learning_rate(args, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        try:
            for i in range(args.accumulate):
                places = range(first_place + i * micro, first_place + (i + 1) * micro)
                with net.no_sync() if WORLD > 1 and i + 1 < args.accumulate else nullcontext():
                    loss = micro_loss(net, coords, next(batches), step, places, args, device, dtype)
                    # 0 * inf: a loss that is not finite leaves no gradient finite, in any process
                    (loss / args.accumulate).backward(1 + 0 * loss.detach())
                total += torch.stack([loss.detach().nan_to_num(0, 0, 0), loss.isfinite().float()])
        except InputError as e:                                        # of an item: the weights are still those of this step
            if WORLD > 1:
                raise
            fault = e
            continue
        norm = update(model, ema, optimizer, step, args)
        faults.append(optimizer.found_inf)
        step += 1
        bar.update()

    bar.close()
    for number, handler in before.items():
        signal.signal(number, handler)
    if args.skip_bad and reported:
        print0(f"{len(reported)} of {len(dataset)} items could not be read and were replaced by others")
    if fault:
        raise InputError(f"{fault}; " + (f"step {step} is saved, continue with --resume auto" if saved else "nothing was trained yet"))
    if stopping and not saved:
        print0(f"stopped by signal {stop[0] if stop else ''} before the first step")
    elif stopping:
        print0(f"stopped by signal {stop[0] if stop else ''} at step {step}, saved; continue with --resume auto")
    else:
        print0(f"done at step {step}: {out}/ckpt.pt; sample it with: python sample.py --ckpt {out}")
    if dist.is_initialized():
        dist.barrier()
        del net                        # it holds the process group in a cycle of references: left to the interpreter's
        gc.collect()                   # exit, the group's threads may still run when their objects are destroyed
        dist.destroy_process_group()


def load_optimizer(optimizer, state, path):
    """Adam's moments of a checkpoint; learning rate and betas stay those of the flags. Fused Adam trusts every stride."""
    try:
        wanted, moments = [p for group in optimizer.param_groups for p in group["params"]], state["state"]
        whole = {}
        for i in moments:
            if not 0 <= i < len(wanted):
                raise ValueError(f"entry {i} of {len(wanted)}")
            shapes = dict(step=(), exp_avg=wanted[i].shape, exp_avg_sq=wanted[i].shape)
            if any(unlike(moments[i][k], shape) or not moments[i][k].isfinite().all() for k, shape in shapes.items()) or \
                    moments[i]["exp_avg_sq"].min() < 0:
                raise ValueError(f"entry {i}")
            whole[i] = {k: moments[i][k].float().contiguous() for k in shapes}
        optimizer.load_state_dict(dict(state=whole, param_groups=optimizer.state_dict()["param_groups"]))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as e:
        raise InputError(f"{path}: its optimizer state is not that of this model ({type(e).__name__}: {e})") from e


def kept(out, saved):
    return f"the checkpoint of step {saved} is kept" if checkpoints(out) else "and there is no checkpoint"


def bad_steps(flags, first, row):
    """Of the flags of steps first, first+1, ...: which steps were skipped, how many in a row the last ones are, and how many
    in a row there were at most; `row` were in a row before."""
    rows = list(itertools.accumulate(flags, lambda row, flag: (row + 1) * int(flag), initial=row))
    return [first + i for i, flag in enumerate(flags) if flag], rows[-1], max(rows)


def report_left_out(left_out, reported, shown=10):
    """Prints which items could not be read, each once, and adds their numbers to `reported`; of all processes."""
    everywhere = [left_out]
    if WORLD > 1:
        everywhere = [None] * WORLD
        dist.all_gather_object(everywhere, left_out)
    new = {i: problem for part in everywhere for i, problem in part.items() if i not in reported}
    for problem in list(new.values())[:shown]:
        print0(f"left out: {problem}")
    if len(new) > shown:
        print0(f"left out: {len(new) - shown} more; python data.py check lists them all")
    reported.update(new)


def finite(x):
    """None for what JSON cannot hold."""
    return x if math.isfinite(x) else None


def peak_resident():
    """Largest resident size of this process in bytes, 0 where the platform does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")                  # file names need not be text
    try:
        main()
    except (InputError, OSError) as e:
        fail("train.py", e)
    except KeyboardInterrupt:
        if RANK == 0:
            print("train.py: interrupted before the first step", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as e:
        if WORLD == 1 or "onnection" not in str(e):
            raise
        sys.exit(f"train.py: process {RANK} lost another one, whose own message or signal is the cause; "
                 f"continue with --resume auto ({message(e)[:200]})")
