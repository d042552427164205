"""Sample images or point clouds from a checkpoint, at any resolution: python sample.py --res 512

The encoder always sees the training-resolution context: a grid (or a set of points) of its own noise, which is
integrated along with the queries. Queries are any other coordinates with their own Gaussian start; they never
feed back into the latents, so one seed gives the same content at every resolution, cost is linear in the number
of queries, and memory is bounded: queries are decoded in chunks, and large pictures drawn in bands of rows, each
of which integrates the small context anew. The noise of a query is a function of (seed, sample, size, its tile of
the picture, step), so neither batch, chunk, band, crop nor number of processes changes a sample beyond rounding.

Alphabet and conventions are those of model.py: B batch, N context pairs, M queries; time runs from t = 1 (noise)
to t = 0 (data); the state x is (B, N, 3), or (B, N + M, 3) where queries beyond the context are asked for.
"""
import argparse
import ctypes
import hashlib
import json
import math
import os
import re
import signal
import struct
import sys
import time
import warnings
import zipfile
import zlib
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
import model as asft
from data import InputError, encode_image, message, write_atomic
from metrics.weights import sha256


# ---------------------------------------------------------------------------------------------------------
# Processes: valid with and without torchrun

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def print0(text="", file=None):
    """Prints one line, of the first process; what names from outside would do to a terminal is shown instead."""
    if RANK == 0:
        print(data.printable(text), file=file, flush=True)


def fail(script, error):
    """Ends the process with status 2 and one line. What concerns every process is said by the first, whose end lets torchrun end
    the others; what only they know they say a little later."""
    if RANK > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    print(f"{script}: {message(error)}", file=sys.stderr, flush=True)
    sys.exit(2)


def start_processes(device, backend=None):
    """The device of this process; joins the process group where torchrun set one up. LOCAL_RANK picks the device,
    RANK the share of the work."""
    device = pick_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")                     # TF32 for what autocast leaves in float32
    if ("RANK" in os.environ or WORLD > 1) and not dist.is_initialized():
        missing = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - set(os.environ)
        if missing:
            raise InputError(f"several processes need {', '.join(sorted(missing))} in the environment: start with torchrun")
        # sampling and evaluation meet only where the slowest process ends: waiting there for days is no fault
        dist.init_process_group(backend or ("nccl" if device.type == "cuda" else "gloo"),
                                timeout=timedelta(days=7) if backend else None)
    return device


def keep_freed_memory():
    """Lets glibc use freed memory again, where it would hand every large tensor's pages back to the kernel, which then
    fills them with zeros one by one: a quarter of a training step of B at 256 on a CPU. Elsewhere: does nothing."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4                          # malloc.h
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def wait_for_all():
    """Returns once every process is here."""
    if dist.is_initialized():
        dist.barrier()


# ---------------------------------------------------------------------------------------------------------
# Checkpoints

def checkpoints(run):
    """The checkpoint files of a run directory, newest first: ckpt.pt, then the ckpt-STEP.pt kept from before it."""
    earlier = {p: int(p.stem[5:]) for p in Path(run).glob("ckpt-*.pt") if p.stem[5:].isdecimal()}
    return [p for p in (Path(run) / "ckpt.pt", *sorted(earlier, key=earlier.get, reverse=True)) if p.is_file()]


def read_checkpoint(path, mmap=False):
    """The checkpoint dict of a file as train.py writes it: tensors and JSON-like values only, read with weights_only=True,
    on the CPU; with mmap a tensor is read when it is used, so that a sampler never holds the optimizer's. Of a run directory
    the newest that is whole; what is broken is named in a warning. `file`: the open file that it is from, which stays what
    it was where training replaces it. Raises InputError naming the path."""
    path, broken = Path(path), []
    for file in checkpoints(path) if path.is_dir() else [path]:
        try:
            ckpt = read_file(file, mmap)
        except InputError as e:
            broken.append(str(e))
            continue
        for problem in broken:
            print0(f"warning: {problem}; {file} of step {ckpt['step']} is used instead", sys.stderr)
        return ckpt
    raise InputError("; ".join(broken) or f"{path}: no checkpoint in it; expected a ckpt.pt written by train.py")


def read_file(path, mmap):
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; expected a ckpt.pt written by train.py, or its run directory")
    try:
        mmap = mmap and bool(os.fspath(path).encode())     # torch maps no file whose name is not text
    except UnicodeEncodeError:
        mmap = False
    for mapped in (mmap, mmap, False):
        file = open(path, "rb")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")     # a foreign pickle also draws a warning; the one line below says it all
                with zipfile.ZipFile(file) as archive:         # torch compares no checksums: it would return damaged weights
                    if any(entry.file_size != entry.compress_size for entry in archive.infolist()) or archive.testzip():
                        raise zipfile.BadZipFile
                file.seek(0)
                ckpt = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as e:     # a broken file raises whatever its bytes provoke: zip, pickle, EOF, key errors
            file.close()
            raise InputError(f"{path}: not a readable checkpoint ({type(e).__name__}); "
                             f"expected a ckpt.pt written by train.py") from e
        # to be mapped a file is opened anew: training may have put its next checkpoint there
        if not mapped or path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            break
        file.close()
    config = ckpt.get("config") if isinstance(ckpt, dict) else None
    missing = {"model", "ema", "step", "config"} - set(ckpt if isinstance(ckpt, dict) else ())
    missing |= {"model", "class_names", "path", "settings", "sampling"} - set(config if isinstance(config, dict) else ())
    if missing:
        raise InputError(f"{path}: not a checkpoint of train.py: it lacks {', '.join(sorted(missing))}")
    kinds = [(ckpt, dict(model=dict, ema=dict, step=int)), (config, dict(model=dict, class_names=list, path=str, settings=dict)),
             (config["sampling"], dict(solver=str, steps=int, guidance=float))]
    wrong = [key for where, expected in kinds for key, kind in expected.items()
             if not isinstance(where.get(key) if isinstance(where, dict) else None, kind)]
    if not wrong:
        sampling, items, spec = config["sampling"], config.get("items", 0), config.get("tokens")
        fine = dict(step=ckpt["step"] >= 0, path=config["path"] in asft.PATHS, class_names=all(isinstance(n, str) for n in config["class_names"]),
                    items=isinstance(items, int), tokens=spec is None or data.is_spec(spec), solver=sampling["solver"] in SOLVERS,
                    steps=sampling["steps"] >= 1, guidance=0 <= sampling["guidance"] <= 1e3)
        wrong = [key for key, value in fine.items() if not value]
    if wrong:
        raise InputError(f"{path}: not a checkpoint of train.py: wrong entries for {', '.join(wrong)}")
    return dict(ckpt, file=file)


def same_everywhere(ckpt):
    """Raises InputError unless all processes hold the checkpoint of one step, or none: training may write while they read."""
    if dist.is_initialized():
        steps = [None] * WORLD
        dist.all_gather_object(steps, ckpt and ckpt["step"])
        if len(set(steps)) > 1:
            raise InputError(f"the processes found checkpoints of different steps ({', '.join(map(str, steps))}): one was written meanwhile, "
                             f"or they do not see the same directory")


def load_model(ckpt, path, weights="ema"):
    """The model of a checkpoint in evaluation mode, on the CPU. Raises InputError naming the path."""
    state = ckpt["ema" if weights == "ema" else "model"]
    try:
        cfg = asft.Config(**ckpt["config"]["model"])
    except TypeError as e:
        raise InputError(f"{path}: the model it describes is not one of model.py ({e})") from e
    fits(cfg, state, path)
    model = asft.ASFT(cfg)
    model.load_state_dict(state)
    return model.eval()


def fits(cfg, state, path):
    """Raises InputError unless the state is one of that model, in one line: what is missing, unexpected, or of another shape.
    What a file says need not be what it holds: the model is built without memory."""
    try:
        if max(cfg.depth, cfg.levels, cfg.first_self, cfg.self_layers) > len(state):
            raise ValueError(f"depth {cfg.depth}, {cfg.levels} levels, but {len(state)} tensors")
        with torch.device("meta"):
            own = asft.ASFT(cfg).state_dict()
    except (TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError) as e:
        raise InputError(f"{path}: the model it describes is not one of model.py ({e})") from e
    wrong = [f"missing {k}" for k in own if k not in state] + [f"unexpected {k}" for k in state if k not in own]
    wrong += [f"{k} is {what}, expected {tuple(own[k].shape)}" for k in own if k in state and (what := unlike(state[k], own[k].shape))]
    if wrong:
        raise InputError(f"{path}: weights of another model: {len(wrong)} of {len(own)} entries do not fit: "
                         + "; ".join(wrong[:6]) + ("; ..." if len(wrong) > 6 else ""))


def unlike(value, shape):
    """What a value is that is not a plain tensor of real numbers of this shape; None where it is."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu" or not value.is_floating_point():
        return f"no tensor of real numbers ({type(value).__name__})"
    return None if value.shape == shape else tuple(value.shape)


def newest_run(runs="runs"):
    found = sorted(Path(runs).glob("*/ckpt*.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise InputError(f"no checkpoint in {runs}/*/ckpt.pt: train one with `python train.py`, or give --ckpt")
    return found[-1].parent


# ---------------------------------------------------------------------------------------------------------
# Randomness: a function of (seed, sample, purpose, size, tile of queries, step), never of batch, chunk or crop

RUN, TILE = 4096, 64      # points share a generator in runs, the pixels of a picture in square tiles: a crop meets few


def generator(*key, device="cpu"):
    """A generator seeded by a hash of the key (ints and strings)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def gaussian(part, *key):
    """Standard normal (M, 3) of the queries in `part`: a run (start, stop) of points, or a box (x0, y0, x1, y1) of pixels,
    row by row. Always drawn on the CPU, so that any device and any part of the whole gets the same."""
    if len(part) == 2:
        start, stop = part
        tiles = range(start // RUN, math.ceil(stop / RUN))
        noise = [torch.randn(RUN, 3, generator=generator(*key, i)) for i in tiles]
        return torch.cat(noise)[start - tiles[0] * RUN:][:stop - start]
    x0, y0, x1, y1 = part
    noise = torch.empty(y1 - y0, x1 - x0, 3)
    for i in range(y0 // TILE, math.ceil(y1 / TILE)):
        for j in range(x0 // TILE, math.ceil(x1 / TILE)):
            tile = torch.randn(TILE, TILE, 3, generator=generator(*key, i, j))
            top, left = max(y0, i * TILE), max(x0, j * TILE)
            tile = tile[top - i * TILE:y1 - i * TILE, left - j * TILE:x1 - j * TILE]
            noise[top - y0:top - y0 + len(tile), left - x0:left - x0 + tile.shape[1]] = tile
    return noise.flatten(0, 1)


# ---------------------------------------------------------------------------------------------------------
# Solvers: plain functions of a velocity(x, t) and a start x at t = 1; they return x at t = 0

def euler(velocity, x, steps, **_):
    """Euler, `steps` equal steps, one evaluation each."""
    for i in range(steps):
        x = x - velocity(x, 1 - i / steps) / steps
    return x


def heun(velocity, x, steps, **_):
    """Heun's second-order method, `steps` equal steps, two evaluations each."""
    h = 1 / steps
    for i in range(steps):
        v = velocity(x, 1 - i * h)
        x = x - h / 2 * (v + velocity(x - h * v, max(0.0, 1 - (i + 1) * h)))
    return x


# Dormand & Prince 1980: stages, fifth-order weights (= last row), fifth minus fourth order
DP_C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
DP_A = ((1 / 5,), (3 / 40, 9 / 40), (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84))
DP_E = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def dopri5(velocity, x, steps, control=None, rtol=1e-3, atol=1e-3, **_):
    """Adaptive Dormand-Prince 5(4) with at most `steps` evaluations (at least 7: one step).

    control: number of leading pairs (the context) whose error sets the step, None for all. When the evaluations
    run out the remaining time is cut into the steps that are left, whatever their error, and that is said."""
    if steps < 7:
        raise InputError(f"--steps {steps}: dopri5 needs at least 7 evaluations")
    t, h, evaluations, forced = 1.0, 0.05, 1, 0
    k = [velocity(x, t)]
    while t > 1e-9:
        least = t / ((steps - evaluations) // 6)                       # what must be covered by each step left
        floor = h <= least
        h = min(max(h, least), t)
        for c, row in zip(DP_C, DP_A):
            y = x - h * sum(a * ki for a, ki in zip(row, k) if a)
            k.append(velocity(y, max(0.0, t - c * h)))
        evaluations += 6
        error = h * sum(e * ki for e, ki in zip(DP_E, k) if e)
        scale = atol + rtol * torch.maximum(x.abs(), y.abs())
        norm = (error / scale)[:, :control].square().mean().sqrt().item()
        if norm <= 1 or floor or (steps - evaluations) // 6 < 1:
            forced += norm > 1
            t, x, k = t - h, y, k[-1:]                                 # first stage of the next step = last of this
        else:
            k = k[:1]
        h *= min(5.0, max(0.2, 0.9 * max(norm, 1e-8) ** -0.2))
    if forced:
        print(f"dopri5: {forced} steps above the tolerance, the cap of {steps} evaluations forced them", file=sys.stderr)
    return x


def sbdm(a, s, da, ds):
    """Diffusion of score-based models, 2 (s s' - s^2 a'/a): on the linear path 2t/(1-t), unbounded at t = 1."""
    return 2 * (s * ds - s * s * da / a.clamp_min(1e-8))


def sigma(a, s, da, ds):
    """Diffusion 2 s(t): on the linear path 2t."""
    return 2 * s


DIFFUSIONS = {"sigma": sigma, "sbdm": sbdm}


def sde(velocity, x, steps, noise=None, path="linear", diffusion="sigma", last=0.004, **_):
    """Euler-Maruyama on the reverse SDE: f <- f - h (v - w score / 2) + sqrt(w h) z, `steps` evaluations.

    noise(i) gives z of step i. The last step, of size `last`, takes the mean, without noise. w h is kept below s^2,
    the variance of the noise in x: beyond it one step overshoots what it corrects (sbdm at t = 1)."""
    times = [1 + (last - 1) * i / (steps - 1) for i in range(steps)] + [0.0] if steps > 1 else [1.0, 0.0]
    for i, (t, end) in enumerate(zip(times, times[1:])):
        h, v = t - end, velocity(x, t)
        a, s, da, ds = asft.PATHS[path](torch.tensor(t, dtype=torch.float64))
        w = min(DIFFUSIONS[diffusion](a, s, da, ds).item(), s.item() ** 2 / h)
        a, s, da, ds = a.item(), s.item(), da.item(), ds.item()
        score = (da * x - a * v) / (s * (a * ds - da * s))             # -eps / s, with eps solved from x and v
        x = x - h * (v - w / 2 * score)
        if end > 0:
            x = x + math.sqrt(w * h) * noise(i)
    return x


SOLVERS = {"euler": euler, "heun": heun, "dopri5": dopri5, "sde": sde}


# ---------------------------------------------------------------------------------------------------------
# From a model to samples

class Velocity:
    """Guided velocity v_null + g (v_cond - v_null) of a state whose first N pairs are the context.

    Calls the encoder once per evaluation and the decoder in chunks; guidance 1 runs the conditional pass alone.
    `calls` counts evaluations (NFE); a guided one is two passes through the trunk. progress(share): called with the
    share of an evaluation that a chunk was."""

    def __init__(self, model, coords, label=None, tokens=None, guidance=1.0, chunk=None, context=None, progress=None):
        self.model, self.coords, self.guidance, self.progress = model, coords, guidance, progress
        # a CPU is fastest while a chunk's activations stay in its cache, a GPU when it is filled
        self.chunk = chunk or (4096 if model.latents.device.type == "cpu" else 65536)
        self.label, self.tokens, self.context, self.calls = label, tokens, context, 0
        self.guided = guidance != 1 and (label is not None or tokens is not None)

    def __call__(self, x, t):
        self.calls += 1
        B, halves, N = len(x), 1 + self.guided, self.context
        t = x.new_full((B * halves,), t)
        label, tokens = (None if z is None else z.repeat(halves, *[1] * (z.dim() - 1)) for z in (self.label, self.tokens))
        drop = torch.arange(B * halves, device=x.device) >= B if self.guided else None
        at = lambda cut: None if self.coords is None else self.coords[cut]
        levels = self.model.encode(at(slice(N)), x[:, :N], t, label, tokens, drop)
        memory = self.model.memory(levels, t, label, drop)
        out = torch.empty_like(x)
        m = max(1, self.chunk // B)
        for i in range(0, x.shape[1], m):
            cut = slice(i, i + m)
            v = self.model.decode(memory, at(cut), x[:, cut]).float()
            if self.guided:
                cond, null = v.chunk(2)
                v = null + self.guidance * (cond - null)
            out[:, cut] = v
            if self.progress is not None:
                self.progress(v.shape[1] / x.shape[1])
        return out


@torch.no_grad()
def generate(model, indices, seed=0, size=None, label=None, tokens=None, guidance=1.0, solver="euler", steps=100,
             chunk=None, path="linear", diffusion="sigma", part=None, progress=None):
    """Samples `indices` of a seed: (B, M, 3) float32 on the model's device, and the NFE.

    size: (height, width) of images, a number of points, or None for the size trained on; part: a box (x0, y0, x1, y1) of
    its pixels, or a run (start, stop) of its points, None for all. A query of sample i depends on (seed, i, size) and its
    place alone. label (B,) int64, tokens (B, T, token_dim). progress(share of an evaluation): called chunk by chunk."""
    cfg, device = model.cfg, model.latents.device
    image = cfg.domain == "image"
    N = cfg.res ** 2 if image else cfg.points
    trained = (cfg.res, cfg.res) if image else cfg.points
    size = trained if size is None else tuple(size) if image else size
    whole = (0, 0, size[1], size[0]) if image else (0, size)
    part = whole if part is None else tuple(part)

    def noise(*key):                                                   # (B, N, 3), or (B, N + M, 3)
        start = [torch.stack([gaussian((0, N), seed, i, "context", *key) for i in indices])]
        if size != trained:
            start.append(torch.stack([gaussian(part, seed, i, size, *key) for i in indices]))
        return torch.cat(start, 1).to(device)

    coords = None
    if image:
        coords = [asft.image_coords(cfg.res)] + [asft.image_coords(*size, box=part)] * (size != trained)
        coords = torch.cat(coords).to(device)
    velocity = Velocity(model, coords, label, tokens, guidance, chunk, N, progress)
    x = SOLVERS[solver](velocity, noise("start"), steps, control=N, noise=lambda i: noise("sde", i), path=path,
                        diffusion=diffusion)
    if size != trained:
        x = x[:, N:]
    elif part != whole and image:
        x = x.unflatten(1, size)[:, part[1]:part[3], part[0]:part[2]].flatten(1, 2)
    elif part != whole:
        x = x[:, slice(*part)]
    return x, velocity.calls


def zoom(part_of, size, at, views=4, finer=4):
    """Pictures (H, W, 3) of one sample around the point `at` (x, y in [0, 1]), each `finer` times finer than the one before,
    with the frame of the next in it. part_of(size, box) draws a box of the sample at a size: uint8."""
    def around(full, height, width):
        """Upper left corner of the box of this size that lies around `at` in the full picture."""
        return [min(max(round(a * big - side / 2), 0), big - side) for a, big, side in zip(at, full[::-1], (width, height))]

    pictures, (H, W) = [], size
    for level in range(views):
        full = H * finer ** level, W * finer ** level
        x0, y0 = around(full, H, W)
        picture = Image.fromarray(part_of(full, (x0, y0, x0 + W, y0 + H)))
        if level + 1 < views:
            h, w = H // finer, W // finer
            x, y = around(full, h, w)
            ImageDraw.Draw(picture).rectangle((x - x0 - 1, y - y0 - 1, x - x0 + w, y - y0 + h), outline="red")
        pictures.append(np.asarray(picture))
    return pictures


# ---------------------------------------------------------------------------------------------------------
# Pictures and files

def draw_points(points, size=256):
    """A shaded picture of a cloud: (P, 3) in [-1, 1], y up -> uint8 (size, size, 3).

    Every point is a small sphere, lit from the upper left, seen from 30 degrees to the side and 20 above, nearer ones
    drawn over farther ones; twice the size inside, then averaged."""
    points, S = np.asarray(points, np.float32), 2 * size
    turn, tilt = math.radians(30), math.radians(20)
    x, y, z = points.T
    x, z = math.cos(turn) * x + math.sin(turn) * z, math.cos(turn) * z - math.sin(turn) * x
    y, z = math.cos(tilt) * y - math.sin(tilt) * z, math.cos(tilt) * z + math.sin(tilt) * y
    radius = max(1.5, 0.55 * S / math.sqrt(len(points) + 100))
    span = np.arange(-math.ceil(radius), math.ceil(radius) + 1)
    dx, dy = (g.ravel() for g in np.meshgrid(span, span))
    inside = dx ** 2 + dy ** 2 <= radius ** 2
    dx, dy = dx[inside], dy[inside]
    dz = np.sqrt(radius ** 2 - dx ** 2 - dy ** 2)                      # height of the sphere over its centre
    light = np.clip((-0.45 * dx - 0.55 * dy + 0.7 * dz) / radius, 0, 1)
    scale = 0.34 * S
    column = np.rint(S / 2 + scale * x)[:, None].astype(np.int64) + dx
    row = np.rint(S / 2 - scale * y)[:, None].astype(np.int64) + dy
    depth = scale * z[:, None] + dz                                    # larger is nearer to the eye
    near = np.clip((z + 1.5) / 3, 0, 1)[:, None]
    tint = np.stack([0.25 + 0.55 * near[:, 0], 0.45 + 0.25 * (y * 0.5 + 0.5).clip(0, 1), 0.85 - 0.35 * near[:, 0]], -1)
    shade = (0.35 + 0.65 * light) * (0.55 + 0.45 * near)
    color = 255 * (tint[:, None] * shade[..., None]).clip(0, 1)        # (P, disc, 3)
    on = (column >= 0) & (column < S) & (row >= 0) & (row < S)
    order = np.argsort(depth[on], kind="stable")
    picture = np.full((S * S, 3), 255, np.uint8)
    picture[(row[on] * S + column[on])[order]] = color[on][order].astype(np.uint8)     # the nearest is written last
    return np.asarray(Image.fromarray(picture.reshape(S, S, 3)).reduce(2))


def grid_picture(pictures, columns=None, most=4096):
    """Equal uint8 pictures (h, w, 3) in rows on white, small ones enlarged, the whole at most about `most` wide."""
    h, w, _ = pictures[0].shape
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    zoom = max(1, min(128 // max(h, w), 1024 // max(w * columns, h * rows)))
    shrink = max(1, math.ceil(max(w * columns, h * rows) / most))
    tile = lambda p: Image.fromarray(p).resize((w * zoom, h * zoom), Image.NEAREST).reduce(shrink)
    tw, th = tile(pictures[0]).size
    sheet = Image.new("RGB", (columns * (tw + 2) - 2, rows * (th + 2) - 2), "white")
    for i, p in enumerate(pictures):
        sheet.paste(tile(p), ((i % columns) * (tw + 2), i // columns * (th + 2)))
    return sheet


def picture(x, size, image):
    """One sample (M, 3) as a uint8 picture: an image of (height, width), or the preview of a cloud."""
    x = x.float().cpu()
    return encode_image(x, *size) if image else draw_points(x.numpy())


def read_record(out):
    """What out/samples.json says of the samples beside it, None where there is none. Raises InputError naming it."""
    path = Path(out) / "samples.json"
    try:
        record = json.loads(path.read_text())
        for sample in record["samples"]:
            if Path(sample["file"]).name != sample["file"]:
                raise ValueError
        return record
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as e:
        raise InputError(f"{path}: not written by sample.py ({type(e).__name__}); give another directory") from e


def remove_sample(out, name):
    """Removes all files of the sample that samples.json calls `name`."""
    stem = (out / name).with_suffix("")
    for suffix in (".png", ".npy", ".ply", "-preview.png"):
        stem.with_name(stem.name + suffix).unlink(missing_ok=True)
    remove_parts(stem)


def parts_directory(stem):
    return stem.with_name(stem.name + ".parts")


def remove_parts(stem):
    for part in parts_directory(stem).glob("*-*.*"):
        part.unlink()
    if parts_directory(stem).is_dir():
        parts_directory(stem).rmdir()


def begin_samples(out, record):
    """Writes out/samples.json before the first sample. Samples of the same setting that are there already are kept, those of
    another, and files of their names that no record tells of, are removed, so that no two settings are mixed."""
    old = read_record(out)
    own = {key: record[key] for key in record if key not in ("n", "nfe", "complete", "samples", *HOW_CUT)}
    if old is None:
        for sample in record["samples"]:
            remove_sample(out, sample["file"])
    elif json.loads(json.dumps(own)) == {key: old.get(key) for key in own}:
        if len(old["samples"]) > len(record["samples"]):
            record["n"], record["samples"] = old["n"], old["samples"]
        record["nfe"] = old.get("nfe")
    else:
        print0(f"replacing {len(old['samples'])} samples in {out}")
        for sample in old["samples"]:
            remove_sample(out, sample["file"])
    write_atomic(out / "samples.json", lambda f: f.write(json.dumps(record, indent=1).encode()))


QUANTISATION = "uint8: 127.5 (x + 1) rounded to the nearest, clamped to 0..255"
HOW_CUT = ("ckpt", "batch", "chunk", "device", "processes")      # settings that change a sample by rounding at most


def write_picture(path, pixels):
    write_atomic(path, lambda f: Image.fromarray(pixels).save(f, format="PNG"))


def write_cloud(stem, points):
    """A cloud (P, 3) float32 as stem.ply, stem.png and stem.npy; the file that the record names comes last, so that where it
    exists the sample is complete."""
    at = lambda suffix: stem.with_name(stem.name + suffix)
    write_ply(at(".ply"), points)
    write_picture(at(".png"), draw_points(points))
    write_atomic(at(".npy"), lambda f: np.save(f, points))


PART = 2 ** 20            # queries; the state of that many and their noise are some 100 MB


def cut(size, crop, share, image):
    """The parts in which a sample is drawn: runs of points, or bands of rows (of whole tiles where they are that high), of at
    most PART queries, and so many that `share` processes find work; [None] where the sample is drawn whole."""
    first, last, width = (crop[1], crop[3], crop[2] - crop[0]) if image else (0, size, 1)
    rows = min(max(1, PART // width), math.ceil((last - first) / share))
    if rows >= last - first:
        return [None]
    if image and rows > TILE:
        rows = rows // TILE * TILE
    cuts = [(i, min(i + rows, last)) for i in range(first, last, rows)]
    return [(crop[0], a, crop[2], b) for a, b in cuts] if image else cuts


def part_file(stem, part, image):
    """Where a finished part of a sample waits for the others; named by its rows or points."""
    first, last = part[1::2] if image else part
    return parts_directory(stem) / f"{first:09d}-{last:09d}{'.png' if image else '.npy'}"


def join_parts(stem, parts, image):
    """Makes a sample of its parts, and of a large picture a preview of at most 1024 pixels; never holds more than a part of a
    picture."""
    files = [part_file(stem, part, image) for part in parts]
    if not image:
        write_cloud(stem, np.concatenate([np.load(f, allow_pickle=False) for f in files]))
    else:
        width, height, previews = parts[0][2] - parts[0][0], parts[-1][3] - parts[0][1], []
        shrink = 2 ** max(0, math.ceil(math.log2(max(width, height) / 1024)))

        def bands():
            for f in files:
                with Image.open(f) as band:
                    previews.append(np.asarray(band.reduce(shrink)))
                    yield np.asarray(band)
        write_atomic(stem.with_name(stem.name + ".png"), lambda f: write_png(f, width, height, bands()))
        if shrink > 1:
            write_picture(stem.with_name(stem.name + "-preview.png"), np.concatenate(previews))
    remove_parts(stem)


def write_png(f, width, height, bands):
    """Streams uint8 bands (rows, width, 3) into one PNG: 8-bit RGB, every row less the row above (filter 2 of ISO 15948)."""
    def chunk(kind, body):
        f.write(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))

    f.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    deflate, above = zlib.compressobj(), np.zeros((1, width, 3), np.uint8)
    for band in bands:
        rows = np.full((len(band), 1 + 3 * width), 2, np.uint8)
        rows[:, 1:] = (band - np.concatenate([above, band[:-1]])).reshape(len(band), -1)
        above = band[-1:]
        if body := deflate.compress(rows):
            chunk(b"IDAT", body)
    chunk(b"IDAT", deflate.flush())
    chunk(b"IEND", b"")


def write_adm_npz(path, pictures, shape, labels):
    """ADM's sample file: arr_0 uint8 (n, H, W, 3), arr_1 int64 labels; pictures are taken one by one, never all in memory."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as f:
            np.lib.format.write_array_header_1_0(f, dict(descr="|u1", fortran_order=False, shape=shape))
            for p in pictures:
                f.write(np.asarray(p).tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as f:
                np.lib.format.write_array(f, np.asarray(labels), allow_pickle=False)


def write_ply(path, points):
    """Binary little-endian PLY of (P, 3) float32 vertices."""
    header = ("ply\nformat binary_little_endian 1.0\n" f"element vertex {len(points)}\n"
              "property float x\nproperty float y\nproperty float z\nend_header\n")
    Path(path).write_bytes(header.encode() + np.ascontiguousarray(points, "<f4").tobytes())


# ---------------------------------------------------------------------------------------------------------
# Command line

def pick_device(name):
    """auto: CUDA if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu" or name == "mps" and torch.backends.mps.is_available():
        return torch.device(name)
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise InputError(f"--device {name}: expected auto, cpu, cuda, cuda:N, or mps on a Mac that has it")
    device, count = torch.device(name), torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise InputError(f"--device {name}: this torch sees {count} CUDA devices; use --device cpu")
    return device


def pick_dtype(name, device, fallback):
    """auto: bfloat16 on CUDA where it has it, else `fallback`. Returns the autocast dtype, or None for float32."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else fallback
    return {"bfloat16": torch.bfloat16, "float32": None}[name]


def autocast(device, dtype):
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def parse_size(text, cfg):
    """--res: a side, HEIGHTxWIDTH, or so many times the one trained on, as in 4x."""
    if cfg.domain != "image":
        raise InputError("--res is for images; this checkpoint draws points: use --points")
    if re.fullmatch(r"[1-9]\d*x", text):
        text = str(int(text[:-1]) * cfg.res)
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match or 0 in (size := (int(match[1]), int(match[2] or match[1]))):
        raise InputError(f"--res {text}: expected a positive size such as 512, HEIGHTxWIDTH such as 192x320, or 4x for "
                         f"four times the resolution trained on")
    return size


def parse_crop(text, size):
    """--crop: a box x0,y0,x1,y1 in pixels of the whole picture."""
    box = tuple(map(int, text.split(","))) if re.fullmatch(r"\d+,\d+,\d+,\d+", text) else ()
    if not box or not (box[0] < box[2] <= size[1] and box[1] < box[3] <= size[0]):
        raise InputError(f"--crop {text}: expected x0,y0,x1,y1 with 0 <= x0 < x1 <= {size[1]} and 0 <= y0 < y1 <= {size[0]}, "
                         f"pixels of the whole picture")
    return box


def parse_zoom(text):
    """--zoom: a place x,y in [0, 1]."""
    try:
        x, y = map(float, text.split(","))
        if 0 <= x <= 1 and 0 <= y <= 1:
            return x, y
    except ValueError:
        pass
    raise InputError(f"--zoom {text}: expected x,y between 0 and 1 from the upper left corner, such as 0.5,0.5")


def parse_classes(names, known):
    """Class names, or else indices, to labels."""
    labels = []
    for name in names:
        if name in known:
            labels.append(known.index(name))
        elif name.isdecimal() and int(name) < len(known):
            labels.append(int(name))
        elif not known:
            raise InputError("--class: this checkpoint is unconditional, it has no classes")
        else:
            raise InputError(f"--class {name}: expected a class name or an index 0..{len(known) - 1}; "
                             f"names are {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}")
    return labels


def read_condition(args, cfg, spec):
    """What clouds are conditioned on: (what samples.json says of it, [(object, function that gives its tokens (T, C)), ...]),
    or (None, None). spec: what the checkpoint says of the tokens it was trained on."""
    flag = "image" if args.image else "tokens" if args.tokens else None
    if flag is None:
        if cfg.token_dim:
            print0("no --image and no --tokens: sampling without a condition")
        return None, None
    if not cfg.token_dim:
        raise InputError(f"--{flag}: this checkpoint was trained without pictures, it takes none")
    if args.image and args.tokens:
        raise InputError("--image and --tokens: expected one of them")
    if args.image:
        if spec is None:
            raise InputError("--image: the checkpoint does not say what its tokens are, as they were not made by data.py tokens; "
                             "use --tokens")
        if len(args.image) > spec["views"]:
            raise InputError(f"--image: {len(args.image)} pictures; expected one, or {spec['views']} of opposite sides")
        extract, digest = data.FEATURES[spec["features"]](args.features_weights, "cpu")
        if digest != spec["weights_sha256"]:
            raise InputError(f"--features-weights: SHA-256 {digest[:16]}... is not that of the weights that the training tokens were "
                             f"made with, {spec['weights_sha256'][:16]}...")
        found = torch.from_numpy(data.picture_tokens(data.read_views(args.image, spec["size"]), extract))
        return [sha256(file) for file in args.image], [(" ".join(args.image), lambda: found)]
    path = Path(args.tokens)
    files = data.find_files(args.tokens, {".npz"}) if path.is_dir() else [args.tokens]
    if not files:
        raise InputError(f"--tokens {args.tokens}: no .npz files in it; expected cond_token (T, {cfg.token_dim}) in each")

    def read(file):
        found = data.read_npz(file, ("cond_token",)).get("cond_token")
        if found is None or found.dtype.kind != "f" or found.ndim != 2 or found.shape[1] != cfg.token_dim:
            what = "no cond_token" if found is None else f"cond_token {found.dtype} {found.shape}"
            raise InputError(f"{file}: found {what}; expected floats (T, {cfg.token_dim})")
        if T not in (None, len(found)):
            raise InputError(f"{file}: found {len(found)} tokens; expected {T} as in {files[0]}")
        return torch.from_numpy(found.astype(np.float32))
    T = None
    T = len(read(files[0]))                                            # what is wrong with all is told before anything is written
    return args.tokens, [(file, lambda file=file: read(file)) for file in files]


def make_directory(path, flag):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{flag} {path}: cannot be made a directory ({e.strerror})") from e


def at_least(low):
    """A parser of whole numbers, for argparse."""
    def number(text):
        if not text.removeprefix("-").isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {low}, not {text!r}")
        return int(text)
    return number


positive, natural = at_least(1), at_least(0)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("what to sample")
    g.add_argument("--ckpt", help="checkpoint file or run directory (default: the newest in runs/)")
    g.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged or last weights (default: ema)")
    # torchrun takes --n in its script's flags for its own --nnodes, hence the second name
    g.add_argument("--n", "--samples", type=positive, default=16, help="number of samples (default: 16)")
    g.add_argument("--class", dest="classes", nargs="+", metavar="CLASS", default=[],
                   help="class names or indices, taken in turn (default: all classes in turn)")
    g.add_argument("--seed", type=natural, default=0)
    g.add_argument("--res", help="images: side, HEIGHTxWIDTH, or 4x for four times the one trained on (default: that one)")
    g.add_argument("--crop", metavar="x0,y0,x1,y1", help="images: only this box of the picture, in its pixels; none other is drawn")
    g.add_argument("--zoom", metavar="x,y", help="images: four views of --res towards this place (0..1), each 4 times finer")
    g.add_argument("--points", type=positive, help="clouds: number of points (default: the one trained on)")
    g.add_argument("--image", nargs="+", metavar="FILE", help="clouds of the object in this picture, or in these two of opposite sides")
    g.add_argument("--tokens", metavar="PATH", help="clouds of prepared objects: an .npz with cond_token, or a directory of them, "
                   "one a sample, taken in turn")
    g.add_argument("--features-weights", metavar="PATH", help="DINOv2 of --image, as for data.py tokens (default: torch.hub's)")
    g = p.add_argument_group("how (defaults: the recipe's, stored in the checkpoint)")
    g.add_argument("--guidance", type=float, help="classifier-free guidance scale; 1 is none")
    g.add_argument("--solver", choices=SOLVERS)
    g.add_argument("--steps", type=positive, help="steps of euler, heun, sde; cap on evaluations of dopri5")
    g.add_argument("--diffusion", choices=DIFFUSIONS, default="sigma", help="w(t) of the sde solver (default: sigma)")
    g = p.add_argument_group("where and with what")
    g.add_argument("--out", help="output directory (default: samples/ in the run, named by the setting)")
    g.add_argument("--npz", action="store_true", help="also samples.npz: arr_0 uint8 (n,H,W,3), arr_1 labels (ADM's format)")
    g.add_argument("--batch", type=positive, help="samples at a time (default: by resolution)")
    g.add_argument("--chunk", type=positive, help="queries decoded at a time (default: 4096 on the CPU, else 65536)")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                   help="auto: bfloat16 on CUDA, float32 on the CPU")
    return p


def main(argv=None):
    """Runs the command line; returns the directory of the samples."""
    args = parser().parse_args(argv)
    path = newest_run() if args.ckpt is None else Path(args.ckpt)
    ckpt = read_checkpoint(path, mmap=True)
    device = start_processes(args.device, "gloo")
    same_everywhere(ckpt)
    file = ckpt["file"]
    config, step = ckpt["config"], ckpt["step"]
    names, sampling, trained = config["class_names"], config["sampling"], config["settings"]
    model = load_model(ckpt, path, args.weights).to(device)
    del ckpt
    cfg = model.cfg
    image = cfg.domain == "image"

    size = parse_size(args.res, cfg) if args.res else (cfg.res, cfg.res) if image else args.points or cfg.points
    if args.points and image:
        raise InputError("--points is for point clouds; this checkpoint draws images: use --res")
    for flag in ("npz", "crop", "zoom"):
        if getattr(args, flag) and not image:
            raise InputError(f"--{flag} is for images; this checkpoint draws points")
    if args.zoom and (args.crop or args.npz):
        raise InputError(f"--zoom chooses its own crops and writes pictures: drop --{'crop' if args.crop else 'npz'}")
    crop = parse_crop(args.crop, size) if args.crop else (0, 0, size[1], size[0]) if image else None
    at = parse_zoom(args.zoom) if args.zoom else None
    count = lambda part: (part[2] - part[0]) * (part[3] - part[1]) if image else part[1] - part[0]     # its queries
    queries = count(crop if image else (0, size))
    if args.npz and queries > 2 ** 26:
        raise InputError(f"--npz: expected pictures of at most {2 ** 26} pixels; larger ones are written as .png alone")
    dtype = pick_dtype(args.dtype, device, "float32")
    setting = dict(ckpt=str(path), ckpt_sha256=None, step=step, dataset=trained.get("dataset"),
                   category=trained.get("category"), model=trained.get("model"), weights=args.weights, size=size,
                   crop=args.crop and crop, zoom=at, seed=args.seed, solver=args.solver or sampling["solver"],
                   steps=args.steps or sampling["steps"],
                   guidance=sampling["guidance"] if args.guidance is None else args.guidance,
                   diffusion=args.diffusion, classes=args.classes, dtype="float32" if dtype is None else "bfloat16")
    setting["tokens"], condition = read_condition(args, cfg, config.get("tokens"))
    if not names and condition is None:
        setting["guidance"] = 1.0
        if args.guidance not in (None, 1.0):
            raise InputError(f"--guidance {args.guidance}: " + ("give --image or --tokens to guide by" if cfg.token_dim else
                                                                "this checkpoint is unconditional, there is nothing to guide by"))
    if not 0 <= setting["guidance"] <= 1e3:
        raise InputError(f"--guidance {setting['guidance']}: expected a number between 0 and 1000")
    if setting["solver"] == "dopri5" and setting["steps"] < 7:
        raise InputError(f"--steps {setting['steps']}: dopri5 needs a cap of at least 7 evaluations")
    classes = parse_classes(args.classes, names) or list(range(len(names)))
    labels = [classes[i % len(classes)] if names else None for i in range(args.n)]

    tag = "x".join(map(str, size)) if image else f"{size}points"
    tag += f"-crop{args.crop}" if args.crop else f"-zoom{args.zoom}" if args.zoom else ""
    tag += f"-{Path((args.image or [args.tokens])[0]).stem}" if condition else ""
    run = path if path.is_dir() else path.parent
    out = Path(args.out) if args.out else run / "samples" / \
        f"{tag}-{setting['solver']}{setting['steps']}-g{setting['guidance']:g}-seed{args.seed}-step{step}"
    # what is not trained on can be shared out among processes, where there are more of them than samples
    whole = at or size == ((cfg.res, cfg.res) if image else cfg.points)
    parts = [None] if whole else cut(size, crop, math.ceil(WORLD / args.n), image)
    batch = 1 if at or len(parts) > 1 else args.batch or max(1, min(64, PART // queries))
    setting.update(batch=batch, chunk=args.chunk, device=str(device), processes=WORLD)
    suffix = ".png" if image else ".npy"
    record = dict(setting, n=args.n, nfe=None, complete=False, normalisation=config.get("normalisation"), quantisation=QUANTISATION
                  if image else None, samples=[dict(file=f"{i:06d}{suffix}", index=i, label=label,
                                                    class_name=None if label is None else names[label],
                                                    object=condition and condition[i % len(condition)][0])
                                               for i, label in enumerate(labels)])
    make_directory(out, "--out")
    if RANK == 0:
        record["ckpt_sha256"] = hashlib.sha256(np.memmap(file, mode="r")).hexdigest()
        begin_samples(out, record)
    wait_for_all()
    # many samples are shared out, the parts of few; what an interrupted run finished is not drawn again
    stem = lambda i: out / f"{i:06d}"
    done = lambda i: (out / f"{i:06d}{suffix}").exists()
    together = len(parts) > 1 and args.n < WORLD
    mine = range(args.n) if together else range(RANK, args.n, WORLD)
    todo = [i for i in mine if not done(i)]
    if len(parts) > 1:
        for i in todo:
            parts_directory(stem(i)).mkdir(exist_ok=True)
        every = [([i], part) for i in todo for part in parts]
        jobs = [job for job in (every[RANK::WORLD] if together else every) if not part_file(stem(job[0][0]), job[1], image).exists()]
        ready = sum(part_file(stem(i), part, image).exists() for (i,), part in every)
        if ready:
            print0(f"{ready} of {len(every)} parts of this setting are in {out} already")
    else:
        jobs = [(todo[first:first + batch], crop if args.crop else None) for first in range(0, len(todo), batch)]

    print0(f"{path}: step {step}, {args.weights} weights, {cfg.domain} model trained at "
           f"{f'{cfg.res}x{cfg.res}' if image else f'{cfg.points} points'}, sampling {args.n} at {tag} on "
           + (f"{WORLD} x " if WORLD > 1 else "") + str(device) + (f", each in {len(parts)} parts" if len(parts) > 1 else ""))
    if len(todo) < len(mine):
        print0(f"{len(mine) - len(todo)} samples of this setting are in {out} already")
    nfe, started = None, time.time()
    evaluations = setting["steps"] * (2 if setting["solver"] == "heun" else 1)       # of dopri5: at most
    unit, total, finished, told = "pixel" if image else "point", sum(len(i) * (count(part) if part else queries) for i, part in jobs), 0, started
    with tqdm(total=total * (4 if at else 1), unit=unit, unit_scale=True, desc="sampling",
              disable=None if RANK == 0 else True) as bar, autocast(device, dtype):

        def draw(indices, size, part):
            """Samples, or a part of them, as (B, M, 3); the bar runs on."""
            nonlocal nfe
            label, start = torch.tensor([labels[i] for i in indices], device=device) if names else None, bar.n
            tokens = condition and torch.stack([condition[i % len(condition)][1]() for i in indices]).to(device)
            work = len(indices) * (count(part) if part else queries)
            advance = lambda share: bar.update(work * share / evaluations)
            x, nfe = generate(model, indices, args.seed, size, label, tokens, setting["guidance"], setting["solver"],
                              setting["steps"], args.chunk, config["path"], args.diffusion, part, advance)
            if not x.isfinite().all():
                raise InputError(f"{path}: its {args.weights} weights give non-finite samples; try another checkpoint")
            bar.update(start + work - bar.n)                           # dopri5 needed fewer evaluations
            return x

        def pixels(x, box):
            return encode_image(x, box[3] - box[1], box[2] - box[0])

        for indices, part in jobs:
            if not sys.stderr.isatty() and finished and time.time() - told > 10:               # no bar there: a line now and then
                told = time.time()
                print0(f"{finished:,} of {total:,} {unit}s, {(told - started) * (total / finished - 1) / 60:.1f} min left")
            finished += len(indices) * (count(part) if part else queries)
            if at:
                view = lambda size, box: pixels(draw(indices, size, box)[0], box)
                write_picture(out / f"{indices[0]:06d}.png", np.asarray(grid_picture(zoom(view, size, at), columns=4)))
                continue
            for i, x in zip(indices, draw(indices, size, part)):
                if image:
                    file, box = (part_file(stem(i), part, image), part) if len(parts) > 1 else (out / f"{i:06d}.png", crop)
                    write_picture(file, pixels(x, box))
                elif len(parts) > 1:
                    write_atomic(part_file(stem(i), part, image), lambda f: np.save(f, x.cpu().numpy()))
                else:
                    write_cloud(stem(i), x.cpu().numpy())
            if len(parts) > 1 and not together and all(part_file(stem(indices[0]), p, image).exists() for p in parts):
                join_parts(stem(indices[0]), parts, image)
    wait_for_all()
    if len(parts) > 1:
        for i in range(RANK, args.n, WORLD):
            if not done(i):
                join_parts(stem(i), parts, image)
    wait_for_all()
    if RANK == 0:
        finish_samples(out, record, args.n, nfe, (crop[3] - crop[1], crop[2] - crop[0]) if image else None, args.npz)
        guided = (names or condition) and setting["guidance"] != 1
        print0(f"{args.n} samples in {time.time() - started:.1f} s, NFE {record['nfe']}"
              f"{' (each guided: two passes)' if guided else ''}, solver {setting['solver']}, "
              f"guidance {setting['guidance']:g}, written to {out}")
    wait_for_all()                                                     # whoever reads the record next finds it finished
    return out


def finish_samples(out, record, n, nfe, size, npz):
    """grid.png of the first 64, samples.npz where asked for, and the finished samples.json. size: (height, width) of pictures."""
    read = lambda i: Image.open(out / f"{i:06d}.png")

    def small(i):
        if (out / f"{i:06d}-preview.png").exists():
            return np.asarray(Image.open(out / f"{i:06d}-preview.png"))
        picture = read(i)
        return np.asarray(picture.reduce(math.ceil(max(picture.size) / 1024)))     # keep the sheet's memory bounded
    if not record.get("zoom"):
        grid_picture([small(i) for i in range(min(n, 64))]).save(out / "grid.png")
    if npz:
        labels = [sample["label"] for sample in record["samples"][:n]]
        write_atomic(out / "samples.npz", lambda f: write_adm_npz(f, map(read, range(n)), (n, *size, 3),
                                                                  None if labels[0] is None else labels))
    record.update(nfe=nfe or record["nfe"], complete=True)             # nothing counted where all was there before
    write_atomic(out / "samples.json", lambda f: f.write(json.dumps(record, indent=1).encode()))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")                  # file names need not be text
    try:
        main()
    except (InputError, OSError) as e:
        fail("sample.py", e)
    except KeyboardInterrupt:
        if RANK == 0:
            print("sample.py: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()
