"""Sample images or point clouds from a checkpoint, at any resolution: python sample.py --res 512

The encoder sees the context at the training resolution: pairs of its own noise, integrated along with the
queries. Queries may be any coordinates and never feed back into the latents: one seed has one content at
every resolution, and cost is linear in the queries. Noise is a function of (seed, sample, place, step) alone.

In this order: solvers; velocity, `generate`; noise; samples as files; checkpoints; processes; command line.
train.py and evaluate.py use its parts. It needs model.py alone, whose alphabet and conventions it keeps."""
import argparse
import ctypes
import hashlib
import inspect
import json
import math
import os
import re
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from model import ASFT, PATHS, Config, image_coords, linear_path

# ---- Solvers: functions of a velocity(x, t) and a start x at t = 1; they return x at t = 0
def euler(velocity, x, steps):
    for i in range(steps):
        x = x - velocity(x, 1 - i / steps) / steps
    return x

def heun(velocity, x, steps):
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

def dopri5(velocity, x, evaluations=100, rtol=1e-3, atol=1e-3, control=None):
    """Adaptive Dormand-Prince 5(4). The error of the first `control` pairs (None: of all) sets the step.
    When the evaluations run out, the remaining time is cut into the steps left, whatever their error."""
    if evaluations < 7:
        raise ValueError(f"--evaluations {evaluations}: expected at least 7, one step of dopri5")
    t, h, left, forced = 1.0, 0.05, (evaluations - 1) // 6, 0           # steps left
    k = [velocity(x, t)]
    while t > 1e-9:
        least = t / left                                               # what each of them must cover
        floor = h <= least
        h = min(max(h, least), t)
        for c, row in zip(DP_C, DP_A):
            y = x - h * sum(a * ki for a, ki in zip(row, k) if a)
            k.append(velocity(y, max(0.0, t - c * h)))
        left -= 1
        error = h * sum(e * ki for e, ki in zip(DP_E, k) if e)
        scale = atol + rtol * torch.maximum(x.abs(), y.abs())
        norm = (error / scale)[:, :control].square().mean().sqrt().item()
        if norm <= 1 or floor or not left:
            forced += norm > 1
            t, x, k = t - h, y, k[-1:]  # last stage = first stage of the next step
        else:
            k = k[:1]
        h *= min(5.0, max(0.2, 0.9 * max(norm, 1e-8) ** -0.2))
    if forced:
        print0(f"dopri5: --evaluations {evaluations} forced {forced} steps above the tolerance", sys.stderr)
    return x

DIFFUSIONS = {"sigma": lambda a, s, da, ds: 2 * s,                                      # w, linear path: 2t
              "sbdm": lambda a, s, da, ds: 2 * (s * ds - s * s * da / a.clamp_min(1e-8))}       # 2t / (1-t)

def sde(velocity, x, steps, noise, path=linear_path, diffusion=DIFFUSIONS["sigma"], last=0.004):
    """Euler-Maruyama on the reverse SDE, z = noise(i + 1): x <- x - h (v - w score / 2) + sqrt(w h) z.
    The last step, of size `last`, takes the mean. w h is kept below s^2, the variance of the noise in x:
    beyond it one step overshoots what it corrects (sbdm is unbounded at t = 1)."""
    if not 0 < last < 1:
        raise ValueError(f"--last {last}: expected a size between 0 and 1")
    times = [1 + (last - 1) * i / max(1, steps - 1) for i in range(steps)] + [0.0]
    for i, (t, end) in enumerate(zip(times, times[1:])):
        h, v = t - end, velocity(x, t)
        schedule = path(torch.tensor(t, dtype=torch.float64))
        a, s, da, ds = (z.item() for z in schedule)
        w = min(diffusion(*schedule).item(), s ** 2 / h)
        score = (da * x - a * v) / (s * (a * ds - da * s))  # -eps / s, with eps solved from x and v
        x = x - h * (v - w / 2 * score)
        if end > 0:
            x = x + math.sqrt(w * h) * noise(i + 1)
    return x

SOLVERS = {"euler": euler, "heun": heun, "dopri5": dopri5, "sde": sde}
NAMED = {"path": PATHS, "diffusion": DIFFUSIONS}           # options of a solver that `generate` takes by name

# ---- From a model to samples
class Velocity:
    """Guided velocity v_null + g (v_cond - v_null) of a state whose first `context` pairs are the context.
    A call is one encoder pass, then the decoder in chunks; progress(share of a call) hears of each chunk.
    Guidance 1, or a time outside of the interval, runs the conditional pass alone. With `grid` (height,
    width, stride) the queries are an image, of which `interpolated` decodes a part."""

    def __init__(self, model, coords, context, label=None, tokens=None, guidance=1.0, interval=(0.0, 1.0),
                 chunk=None, progress=lambda share: None, grid=None, refine=0.0):
        self.model, self.coords, self.context, self.label, self.tokens = model, coords, context, label, tokens
        self.guidance, self.interval, self.grid, self.refine = guidance, interval, grid, refine
        self.progress, self.calls = progress, 0
        # a CPU is fastest while the activations of a chunk stay in its cache, a GPU when it is filled
        self.chunk = chunk or (4096 if model.device.type == "cpu" else 65536)

    def __call__(self, x, t):
        self.calls += 1
        conditional = self.label is not None or self.tokens is not None
        guided = conditional and self.guidance != 1 and self.interval[0] <= t <= self.interval[1]
        (B, M, _), coords, halves = x.shape, self.coords, 1 + guided
        t = x.new_full((B * halves,), t)                                                 # (2B,)
        label = None if self.label is None else self.label.repeat(halves)                # (2B,)
        tokens = None if self.tokens is None else self.tokens.repeat(halves, 1, 1)       # (2B, T, token_dim)
        drop = torch.arange(B * halves, device=x.device) >= B if guided else None        # the second half
        context = None if coords is None else coords[:self.context]                      # (N, 2)
        levels = self.model.encode(context, x[:, :self.context], t, label, tokens, drop)  # K x (2B, L, D)
        prepared = self.model.prepare(levels, t, label, drop)
        out, pairs = torch.empty_like(x), torch.arange(M, device=x.device)

        def decode(pairs):
            for some in pairs.split(max(1, self.chunk // B)):
                place = None if coords is None else coords[some]                         # (m, 2)
                v = self.model.decode(prepared, place, x[:, some]).float()               # (2B, m, 3)
                if guided:
                    cond, null = v.chunk(2)
                    v = null + self.guidance * (cond - null)                             # (B, m, 3)
                out[:, some] = v
                self.progress(len(some) / M)
        decode(pairs[:self.context] if self.grid else pairs)
        if self.grid:
            self.interpolated(pairs[self.context:], out, decode)
        return out

    def interpolated(self, pairs, out, decode):
        """Decodes the corners of cells of stride x stride pixels and one pixel in the middle of each. Where
        that is at most `refine` off the mean of its corners, the velocities between are interpolated; other
        cells are decoded. A cell rests on nothing outside of it."""
        height, width, s = self.grid
        pairs = pairs.view(height, width)
        corners, h, w = pairs[::s, ::s], (height - 1) // s, (width - 1) // s             # (h+1, w+1)
        middles = pairs[s // 2::s, s // 2::s][:h, :w]
        decode(torch.cat([corners.flatten(), middles.flatten()]))
        v = out[:, corners].movedim(3, 1)                                                # (B, 3, h+1, w+1)
        wrong = (F.avg_pool2d(v, 2, 1).movedim(1, 3) - out[:, middles]).abs()            # (B, h, w, 3)
        rough = (wrong > self.refine).any(3).any(0)                                      # (h, w)
        v = F.interpolate(v, (h * s + 1, w * s + 1), mode="bilinear", align_corners=True)
        out[:, pairs[:h * s, :w * s]] = v[:, :, :-1, :-1].movedim(1, 3)
        exact = torch.ones(height, width, dtype=torch.bool, device=v.device)
        exact[:h * s, :w * s] = rough.repeat_interleave(s, 0).repeat_interleave(s, 1)
        self.progress(((~exact).sum().item() - corners.numel() - middles.numel()) / out.shape[1])
        decode(pairs[exact])

@torch.no_grad()
def generate(model, indices, seed=0, size=None, part=None, label=None, tokens=None, guidance=1.0,
             guidance_interval=(0.0, 1.0), chunk=None, progress=lambda share: None, noise="white",
             noise_length=4.0, refine=0.0, solver="euler", **options):
    """Samples `indices` of a seed: (B, M, 3) float32 on the model's device, and the NFE.
    size: see `shape_of`. part: a box (x0, y0, x1, y1) of it; None: all.
    label (B,) int64; tokens (B, T, token_dim). guidance_interval: (low, high), the times with guidance.
    noise: of the queries, one of NOISES; noise_length: of coupled noise, in training pixels. refine: see
    `Velocity.interpolated`, for large images, one sample at a time. options: those of the solver."""
    cfg, image, N = model.cfg, model.cfg.domain == "image", model.cfg.pairs
    height, width = shape_of(cfg, size)
    coupled = image and noise == "coupled"
    apart = coupled or (height, width) != shape_of(cfg)                # there are queries beyond the context
    x0, y0, x1, y1 = part or (0, 0, width, height)                     # what is asked for
    left, top, right, bottom = (x0, y0, x1, y1) if apart else (0, 0, width, height)          # what is drawn
    s = cell_size(cfg, (height, width), noise, refine)
    if s:                                                              # whole cells, with all their corners
        left, top = x0 // s * s, y0 // s * s
        right, bottom = min(width, -(-x1 // s) * s + 1), min(height, -(-y1 // s) * s + 1)
    box, shape = (left, top, right, bottom), (bottom - top, right - left)
    samples = torch.tensor([*indices], device=model.device)

    def noise_of_pairs(step):                                          # (B, N, 3), or (B, N + M, 3)
        parts = [normals(random_words("context", seed, step, samples, N))]
        if coupled:
            cells = max(1, round(cfg.res / noise_length))
            white = normals(random_words("field", seed, step, samples, cells ** 2))
            parts.append(smooth(white.unflatten(1, (cells, cells)), (height, width), box))
        elif apart:
            rows = torch.arange(top, bottom, device=model.device) * width
            items = (rows[:, None] + torch.arange(left, right, device=model.device)).flatten()
            parts.append(normals(random_words("query", seed, step, samples, items=items)))
        return torch.cat(parts, 1)

    coords = None
    if image:                                                          # (N, 2), or (N + M, 2)
        coords = [image_coords(cfg.res), image_coords(height, width, box=box)][:1 + apart]
        coords = torch.cat(coords).to(model.device)
    velocity = Velocity(model, coords, N, label, tokens, guidance, guidance_interval, chunk, progress,
                        (*shape, s) if s else None, refine)
    options |= {"sde": dict(noise=noise_of_pairs), "dopri5": dict(control=N)}.get(solver, {})
    options |= {name: table[options[name]] for name, table in NAMED.items() if name in options}
    x = SOLVERS[solver](velocity, noise_of_pairs(0), **options)
    x = x[:, N if apart else 0:].unflatten(1, shape)
    return x[:, y0 - top:y1 - top, x0 - left:x1 - left].flatten(1, 2), velocity.calls

# ---- Noise
NOISES = "white", "coupled"
PURPOSES = "training", "context", "query", "field"

def random_words(purpose, seed, step, samples, count=None, items=None):
    """Four words of 32 bits for every sample and item, int64 (4, B, n): a function of these numbers alone,
    equal on every device. samples: int64 (B,); items: int64 (n,), by default 0..count-1; each below 2^32."""
    items = torch.arange(count, device=samples.device) if items is None else items
    items, samples = torch.meshgrid(items, samples, indexing="xy")                       # (B, n) each
    code = torch.full_like(items, PURPOSES.index(purpose))
    return philox((items, samples, torch.full_like(items, step), code), (seed, seed >> 32))

def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011), with its constants: a counter of four words, int64 tensors (...),
    -> (4, ...). A product of two words wraps at 2^64; both halves of it are used."""
    low = 2 ** 32 - 1
    (a, b, c, d), (k, m) = counter, (word & low for word in key)
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32 & low) ^ b ^ k, q & low, (p >> 32 & low) ^ d ^ m, p & low
        k, m = k + 0x9E3779B9 & low, m + 0xBB67AE85 & low
    return torch.stack([a, b, c, d])

def normals(words):
    """Three standard normal numbers of four words (Box & Muller 1958): (4, B, n) -> (B, n, 3) float32."""
    u = (words.float() + 0.5) * 2.0 ** -32                                               # above 0, at most 1
    radius, angle = (-2 * u[:2].log()).sqrt(), 2 * math.pi * u[2:]
    return torch.stack([*(radius * angle.cos()), radius[0] * angle[0].sin()], -1)

def shape_of(cfg, size=None):
    """(height, width) of an image; a cloud of so many points is one pixel wide. None: as in training."""
    if cfg.domain == "image":
        return tuple(size or (cfg.res, cfg.res))
    return size or cfg.points, 1

def cell_size(cfg, shape, noise, refine):
    """Pixels along a cell of `Velocity.interpolated`: a power of two, a quarter of a training pixel at most;
    0 where that is less than two pixels, and where nothing is to be interpolated."""
    finer = min(shape) // (4 * cfg.res) if noise == "coupled" and refine else 0
    return 2 ** (finer.bit_length() - 1) if finer > 1 else 0

def smooth(grid, size, box):
    """White noise on a grid (B, cells, cells, 3) over the unit square, interpolated by a Gaussian of half a
    cell at the pixels of a box: (B, M, 3), each standard normal. It is one field at every resolution."""
    cell = torch.arange(grid.shape[1], device=grid.device) + 0.5

    def weights(start, stop, side):
        place = (torch.arange(start, stop, device=grid.device) + 0.5) * (len(cell) / side)       # in cells
        weight = torch.exp(-2 * (place[:, None] - cell) ** 2)                            # (pixels, cells)
        return weight / weight.norm(dim=1, keepdim=True)
    rows = torch.einsum("yi,bijc->byjc", weights(box[1], box[3], size[0]), grid)
    return torch.einsum("xj,byjc->byxc", weights(box[0], box[2], size[1]), rows).flatten(1, 2)

# ---- Samples as files: 000000.png, or .npy, .ply and a preview .png; samples.json tells the setting
DEFAULTS = dict(evaluations=100, rtol=1e-3, atol=1e-3, diffusion="sigma", last=0.004)      # of solvers
WISHES = dict(size=None, crop=None, seed=0, classes=(), tokens=None, guidance=1.0, guidance_interval=(0, 1),
              solver=None, options={}, dtype="auto", noise="white", noise_length=4.0, refine=0.0)
GENERATED = "guidance", "guidance_interval", "noise", "noise_length", "refine"             # of `generate`
AT_ONCE = 2 ** 20         # queries of a batch: their state and noise are some 100 MB

def resolve(cfg, checkpoint, size=None, **wishes):
    """The setting of some samples as JSON values: wishes over the recipe over WISHES; None is no wish."""
    config, names = checkpoint["config"]["settings"], checkpoint["config"]["class_names"]
    recipe = {name: config[name] for name in (*GENERATED, "solver") if name in config}
    given = {name: wish for name, wish in dict(wishes, size=size).items() if wish is not None}
    setting = WISHES | recipe | given
    if not given.keys() <= WISHES.keys():
        raise TypeError(f"{given}: expected {', '.join(WISHES)}")
    idle = {} if setting["noise"] == "coupled" else dict.fromkeys(("noise_length", "refine"), "coupled noise")
    if not names and not setting["tokens"]:
        idle |= dict.fromkeys(("guidance", "guidance_interval"), "classes or --tokens")
        setting["guidance"] = 1.0
    for name in idle.keys() & {name for name in given if given[name] != WISHES[name]}:
        raise ValueError(f"--{name.replace('_', '-')}: does nothing without {idle[name]}")
    known = DEFAULTS | dict(steps=config["sampling_steps"], path=config["path"])
    takes = [name for name in known if name in inspect.signature(SOLVERS[setting["solver"]]).parameters]
    for name in setting["options"].keys() - takes:
        raise ValueError(f"--{name}: not of solver {setting['solver']}, which takes {', '.join(takes)}")
    height, width = shape_of(cfg, setting["size"])
    x0, y0, x1, y1 = setting["crop"] or (0, 0, width, height)
    low, high = setting["guidance_interval"]
    for name, fits, expected in (
            ("crop", 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height, f"a box within {width} x {height}"),
            ("noise", cfg.domain == "image" or setting["noise"] == "white", "white for point clouds"),
            ("noise_length", setting["noise_length"] >= 0.25, "0.25 or more"),
            ("refine", setting["refine"] >= 0, "0 or more"),
            ("guidance", 0 <= setting["guidance"] <= 1000, "0 to 1000"),
            ("guidance_interval", 0 <= low <= high <= 1, "0 <= LOW <= HIGH <= 1")):
        if not fits:
            raise ValueError(f"--{name.replace('_', '-')} {setting[name]}: expected {expected}")
    setting.update(size=(height, width) if cfg.domain == "image" else height, shape=(y1 - y0, x1 - x0),
                   classes=parse_classes(setting["classes"], names),
                   options={name: known[name] for name in takes} | setting["options"])
    about = {name: config.get(name) for name in ("dataset", "category")}
    about.update(ckpt_sha256=checkpoint["sha256"], step=checkpoint["step"], weights=checkpoint["weights"])
    return json.loads(json.dumps(about | setting))

def parse_classes(wanted, names):
    """Labels of class names, or of indices where no name is a number; all classes where none is wanted."""
    labels = {name: i for i, name in enumerate(names)}
    if not any(name.isdecimal() for name in names):
        labels |= {str(i): i for i in range(len(names))}
    for name in set(wanted) - set(labels):
        raise ValueError(f"--class {name}: no such name or index; the {len(names)} classes are {names[:12]}")
    return [labels[name] for name in wanted] or [*range(len(names))]

def sample(model, checkpoint, n=None, out=None, batch=None, chunk=None, npz=False, **wishes):
    """Writes n samples of a loaded checkpoint (see `load`), or this process's share; returns their directory.
    n: default 16, fewer of large ones. wishes: see WISHES and `generate`; classes are names or indices, taken
    in turn, tokens a path. Samples of this setting that exist are skipped."""
    image, setting = model.cfg.domain == "image", resolve(model.cfg, checkpoint, **wishes)
    queries, options, size = math.prod(setting["shape"]), setting["options"], setting["size"]
    if queries > 16 * AT_ONCE:
        raise ValueError(f"{queries:,} queries: at most {16 * AT_ONCE:,}; tools/poster.py draws more")
    tokens = read_tokens(setting["tokens"], model.cfg) if setting["tokens"] else None
    fits = max(1, AT_ONCE // queries)
    if n is None and fits < 16:
        print0(f"{fits} of 16 samples, since each has {queries:,} queries: --n gives more")
    n = n or min(16, fits)
    code = hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:8]
    tag = "x".join(map(str, size)) if image else f"{size}points"
    out = Path(out or checkpoint["home"] / f"{tag}-seed{setting['seed']}-{code}")
    record, todo = begin(out, n, setting, checkpoint, "png" if image else "npy")
    cell = cell_size(model.cfg, size, setting["noise"], setting["refine"])
    batch = 1 if cell else batch or min(64, fits)              # with cells each sample decodes its own pixels
    calls = (options.get("steps") or options["evaluations"]) * (2 if setting["solver"] == "heun" else 1)
    print0(f"{n} samples at {tag}, step {setting['step']} ({setting['weights']}), {model.device}, to {out}")
    if todo and RANK == 0:
        seconds = len(todo) * calls * seconds_of_a_call(model, setting, tokens)
        print0(f"about {seconds:.0f} s: {len(todo)} x {calls} evaluations of {queries:,} queries")
        if cell:                                           # at least a corner and the middle of each
            print0(f"less where it is smooth, down to {2 * seconds / cell ** 2:.0f} s (--refine)")
    started = time.time()
    with progress_bar(len(todo), "sample") as bar:
        for mine in (todo[i:i + batch] for i in range(0, len(todo), batch)):
            x, record["nfe"] = draw(model, setting, mine, tokens, chunk=chunk,
                                    progress=lambda share: bar.update(
                                        min(len(mine) * share / calls, bar.total - bar.n)))
            for i, values in zip(mine, x):
                write_sample(out / record["samples"][i]["file"], values, setting["shape"], image)
    wait_for_all()
    if RANK == 0:
        finish(out, record, npz)
    print0(f"{time.time() - started:.1f} s, NFE {record['nfe']}, {setting['solver']}, guidance "
           f"{setting['guidance']:g}")
    wait_for_all()                                              # whoever reads the record next finds it whole
    return out

def draw(model, setting, indices, tokens=None, **more):
    """`generate` with a setting of `resolve`: (B, M, 3) on the CPU, and the NFE."""
    classes, label = setting["classes"], None
    if classes:
        label = torch.tensor([classes[i % len(classes)] for i in indices], device=model.device)
    if tokens:
        tokens = torch.stack([tokens[i % len(tokens)] for i in indices]).to(model.device)
    with autocast(model.device, setting["dtype"], "float32"):
        x, nfe = generate(model, indices, setting["seed"], setting["size"], setting["crop"], label, tokens,
                          solver=setting["solver"], **setting["options"], **more,
                          **{name: setting[name] for name in GENERATED})
    if not x.isfinite().all():
        raise ValueError(f"the {setting['weights']} weights of step {setting['step']}: non-finite samples")
    return x.float().cpu(), nfe

def seconds_of_a_call(model, setting, tokens):
    """Seconds per velocity evaluation of one sample, timed on a small image or cloud of another size."""
    probe = (64, 63) if model.cfg.domain == "image" else 64 * 63
    once = setting | dict(size=probe, crop=None, solver="euler", options={"steps": 1}, refine=0.0,
                          guidance_interval=(0, 1))
    for _ in range(2):                                                 # the first warms up
        began = time.time()
        draw(model, once, [0], tokens)
    apart = shape_of(model.cfg, setting["size"]) != shape_of(model.cfg) or setting["noise"] == "coupled"
    N, queries = model.cfg.pairs, math.prod(setting["shape"]) * apart
    low, high = setting["guidance_interval"]
    share = (1 + high - low) / 2 if setting["guidance"] != 1 else 1    # outside of the interval: half a call
    return (time.time() - began) * share * (N + queries) / (N + 64 * 63)

def begin(out, n, setting, checkpoint, kind):
    """Makes the directory. Returns the record of its samples, and which of this process's are missing."""
    out.mkdir(parents=True, exist_ok=True)
    names, classes, file = checkpoint["config"]["class_names"], setting["classes"], out / "samples.json"
    rows = [dict(file=f"{i:06d}.{kind}", index=i) for i in range(n)]
    for i, row in enumerate(rows if names else ()):
        row.update(label=classes[i % len(classes)], class_name=names[classes[i % len(classes)]])
    old = json.loads(file.read_text()) if file.exists() else {}
    differ = [name for name in setting if old and old.get(name) != setting[name]]
    if differ:
        raise ValueError(f"{out}: holds samples with another {', '.join(differ)}; give another --out")
    record = dict(setting, ckpt=str(checkpoint["path"]), n=n, nfe=old.get("nfe"), complete=False,
                  samples=rows + [row for row in old.get("samples", [])[n:] if (out / row["file"]).exists()],
                  normalisation=checkpoint["config"]["normalisation"])
    wait_for_all()
    if RANK == 0:
        write_json(file, record)
    return record, [i for i in range(RANK, n, WORLD) if not old or not (out / rows[i]["file"]).exists()]

def finish(out, record, npz):
    """grid.png of the first 64, samples.npz (ADM's) if asked for, and the finished samples.json."""
    rows = record["samples"]
    files = [(out / row["file"]).with_suffix(".png") for row in rows]
    if npz:
        images = [np.asarray(Image.open(file)) for file in files]
        labels = [row.get("label", 0) for row in rows]
        write_atomic(out / "samples.npz", lambda f: np.savez(f, arr_0=np.stack(images), arr_1=labels))
    small = [Image.open(file) for file in files[:64]]
    for image in small:
        image.thumbnail((512, 512))
    write_png(out / "grid.png", grid_image([np.asarray(image) for image in small]))
    write_json(out / "samples.json", record | dict(n=len(rows), complete=True))

def write_sample(path, values, shape, image):
    """values (M, 3) as an image; or as a point cloud: a preview .png, .ply, and last .npy."""
    points = values.numpy().astype("<f4")
    pixels = to_pixels(values, *shape) if image else draw_points(points)
    write_png(path.with_suffix(".png"), Image.fromarray(pixels))
    if not image:
        header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\nproperty float x\n"
        header += "property float y\nproperty float z\nend_header\n"
        write_atomic(path.with_suffix(".ply"), lambda f: f.write(header.encode() + points.tobytes()))
        write_atomic(path, lambda f: np.save(f, points))

def write_png(path, image):
    write_atomic(path, lambda f: image.save(f, format="PNG"))

def to_pixels(values, height, width):
    """One image (height*width, 3) in [-1, 1] as uint8 (height, width, 3)."""
    pixels = ((values + 1) * 127.5).round().clamp(0, 255)
    return pixels.to(torch.uint8).reshape(height, width, 3).numpy()

VIEW = np.array([(0.866, 0, 0.5), (0.171, 0.940, -0.296), (-0.470, 0.342, 0.814)])  # turned 30, tilted 20

def draw_points(points, size=256):
    """A point cloud (P, 3) in [-1, 1], y up, as uint8 (size, size, 3): spheres lit from the upper left."""
    S, radius = 2 * size, max(1.5, 1.1 * size / math.sqrt(len(points) + 100))        # drawn at twice the size
    points = np.asarray(points, np.float64) @ VIEW.T
    x, y, z = points[points[:, 2].argsort(kind="stable")].T[..., None]              # (P, 1), the nearest last
    dy, dx = np.indices((2 * math.ceil(radius) + 1,) * 2).reshape(2, -1) - math.ceil(radius)
    dy, dx = np.stack([dy, dx])[:, dx ** 2 + dy ** 2 <= radius ** 2]                     # (disc,)
    light = (0.7 * np.sqrt(radius ** 2 - dx ** 2 - dy ** 2) - 0.45 * dx - 0.55 * dy).clip(0) / radius
    near = ((z + 1.5) / 3).clip(0, 1)
    shade = (0.35 + 0.65 * light) * (0.55 + 0.45 * near)                                 # (P, disc)
    tint = np.stack([0.25 + 0.55 * near, 0.6 + 0 * near, 0.85 - 0.35 * near], -1)        # (P, 1, 3)
    column = np.rint(S * (0.5 + 0.34 * x)).astype(int) + dx
    row = np.rint(S * (0.5 - 0.34 * y)).astype(int) + dy
    on = (column >= 0) & (column < S) & (row >= 0) & (row < S)
    image = np.full((S, S, 3), 255, np.uint8)
    image[row[on], column[on]] = (255 * tint * shade[..., None])[on]
    return np.asarray(Image.fromarray(image).reduce(2))

def grid_image(images, columns=None):
    """A sheet of equal uint8 images (h, w, 3) in rows on white, small ones enlarged."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    zoom = max(1, 128 // max(images[0].shape))
    h, w = (side * zoom + 2 for side in images[0].shape[:2])
    sheet = Image.new("RGB", (columns * w - 2, math.ceil(len(images) / columns) * h - 2), "white")
    for i, image in enumerate(images):
        tile = Image.fromarray(image).resize((w - 2, h - 2), Image.NEAREST)
        sheet.paste(tile, (i % columns * w, i // columns * h))
    return sheet

# ---- Checkpoints and files
WEIGHTS = Path(__file__).resolve().parent / "weights"                  # shipped models; see README.md there

def checkpoints(run):
    """The checkpoint files of a run directory, newest first: ckpt.pt, then the ckpt-STEP.pt before it."""
    return [*Path(run).glob("ckpt.pt"), *sorted(Path(run).glob("ckpt-*[0-9].pt"), reverse=True)]

def find_checkpoint(path=None, flag="--ckpt"):
    """What --ckpt names: a file, a run directory, or a shipped model; None: the newest run, else glyphs."""
    runs = sorted(Path("runs").glob("*/ckpt.pt"), key=os.path.getmtime)
    shipped = {file.stem: file for file in WEIGHTS.glob("*.pt")}
    if path and (Path(path).is_file() or checkpoints(path)):
        return Path(path)
    found = shipped.get(path) if path else runs[-1].parent if runs else shipped.get("glyphs")
    if not found:
        raise ValueError(f"{flag} {path}: expected a checkpoint or run directory of `python train.py`, or a "
                         f"shipped model ({', '.join(sorted(shipped))})")
    if not path:
        print0(f"model: {found}")
    return found

def read_checkpoint(path, mmap=False):
    """A checkpoint of train.py on the CPU, with its `path`; of a run directory the newest whole one."""
    for file in checkpoints(path) if Path(path).is_dir() else [Path(path)]:
        try:
            written = file.stat().st_mtime_ns
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()                           # torch compares no checksums of its own
            ckpt = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
            if file.stat().st_mtime_ns != written:     # replaced meanwhile; torch opens it twice
                raise FileNotFoundError
            if not damaged and {"ema", "step", "config"} <= {*ckpt}:
                return dict(ckpt, path=file)
        except FileNotFoundError:
            if Path(path).exists():                                    # a save has moved the file meanwhile
                return read_checkpoint(path, mmap)
            raise
        except Exception as e:                                         # broken bytes raise nearly anything
            damaged = type(e).__name__
        print0(f"warning: {file}: not a whole checkpoint of train.py ({damaged or 'no weights'})", sys.stderr)
    raise ValueError(f"{path}: no readable checkpoint; expected a ckpt.pt of train.py, or its run directory")

def load(path=None, weights="ema"):
    """The model of a checkpoint (evaluation mode, CPU), and the checkpoint, with a `home` for its samples."""
    ckpt = read_checkpoint(find_checkpoint(path), mmap=True)
    file, kind = ckpt["path"].resolve(), "ema" if weights == "ema" else "model"
    if kind not in ckpt:
        raise ValueError(f"{ckpt['path']}: holds averaged weights alone, no raw ones")
    home = Path("samples", file.stem) if file.parent == WEIGHTS else ckpt["path"].parent / "samples"
    try:
        model = ASFT(Config(**ckpt["config"]["model"]))
        model.load_state_dict(ckpt[kind])
    except (TypeError, RuntimeError, KeyError) as e:
        raise ValueError(f"{ckpt['path']}: not a model of this model.py: {str(e)[:600]}") from None
    with open(file, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    return model.eval(), dict(ckpt, weights=weights, sha256=digest, home=home)

def read_tokens(path, cfg):
    """Condition tokens (T, token_dim), key `cond_token`, of an .npz, or of every .npz below a directory."""
    try:
        files = sorted(Path(path).rglob("*.npz")) if Path(path).is_dir() else [path]
        tokens = [torch.from_numpy(np.load(f, allow_pickle=False)["cond_token"]).float() for f in files]
        found = sorted({tuple(x.shape) for x in tokens})
        if found == [(len(tokens[0]), cfg.token_dim)]:
            return tokens
    except Exception as e:                                             # broken bytes raise nearly anything
        found = type(e).__name__
    raise ValueError(f"--tokens {path}: found {found}; expected `cond_token` (T, {cfg.token_dim}), one T")

def write_atomic(path, write):
    """write(file) into a temporary file, fsync, rename: a reader finds the old file or the new one, whole."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:
        e.filename = str(path)                                         # a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)

def write_json(path, content):
    write_atomic(path, lambda f: f.write(json.dumps(content, indent=1).encode()))

# ---- Processes and devices: valid with and without torchrun
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def print0(text="", file=None):
    if RANK == 0:
        print(text, file=file, flush=True)

def flag_parser(text):                                                 # --help shows it as it stands
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)

def run_main(main):
    """Runs a command; an error of its input ends in one line and status 2."""
    sys.stdout.reconfigure(errors="backslashreplace")                  # file names need not be text
    try:
        main()
    except (ValueError, OSError) as e:
        time.sleep(5 if RANK else 0)                                   # the first process speaks for all
        text = f"{e.filename}: {e.strerror}" if getattr(e, "filename", None) else " ".join(str(e).split())
        print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()

def start_processes(name="auto", backend=None):
    """The device of this process, picked by LOCAL_RANK; joins the process group of torchrun."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    index = int(number or os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else 0
    if kind not in ("cpu", "mps", "cuda") or kind == "cuda" and index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: expected auto, cpu, mps, cuda or cuda:N; found "
                         f"{torch.cuda.device_count()} CUDA devices")
    if kind == "cpu" and sys.platform == "linux":
        # M_MMAP_MAX, M_TRIM_THRESHOLD keep freed memory: the kernel would zero it anew, 30 % of sampling time
        ctypes.CDLL(None).mallopt(-4, 0)
        ctypes.CDLL(None).mallopt(-1, -1)
    if kind == "cuda":
        torch.cuda.set_device(index)
        torch.set_float32_matmul_precision("high")                  # TF32 for what autocast leaves in float32
    if "RANK" in os.environ and not dist.is_initialized():
        # samplers wait for each other only at the end, perhaps for days
        patience = timedelta(days=7) if backend else None
        dist.init_process_group(backend or ("nccl" if kind == "cuda" else "gloo"), timeout=patience)
    return torch.device(f"cuda:{index}" if kind == "cuda" else kind)

def autocast(device, dtype, auto):
    """The context of a dtype's name; "auto" is bfloat16 where a GPU multiplies in it, else `auto`."""
    if dtype == "auto":
        own = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if own else auto
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")

def wait_for_all():
    if dist.is_initialized():
        dist.barrier()

def progress_bar(total, unit, initial=0):
    """A bar of the first process; into a file it writes every 10 s."""
    return tqdm(total=total, unit=unit, initial=initial, disable=RANK > 0,
                mininterval=0.1 if sys.stderr.isatty() else 10,
                bar_format="{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}{postfix}]")

# ---- Command line
def positive(text, least=1):
    """A whole number of at least `least`; argparse names the flag of a ValueError."""
    if int(text) < least:
        raise ValueError
    return int(text)

def natural(text):
    return positive(text, 0)

def parse_box(text):
    x0, y0, x1, y1 = (natural(number) for number in text.split(","))
    return x0, y0, x1, y1

def parse_size(text, cfg):
    """--res: a side, HEIGHTxWIDTH, or so many times the training resolution, as in 4x."""
    if not re.fullmatch(r"[1-9]\d*(x|x[1-9]\d*)?", text):
        raise ValueError(f"--res {text}: expected a size such as 512, 192x320, or 4x, times that of training")
    height, _, width = text.partition("x")
    return (int(height) * cfg.res,) * 2 if text.endswith("x") else (int(height), int(width or height))

def check_compiler(device):
    """torch.compile would fail in the first step, in many lines, where it finds no compiler."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(64, device=device))
    except Exception as e:                                             # it raises nearly anything
        reason = " ".join(str(e).partition("Set TORCHDYNAMO")[0].split())[:200]
        raise ValueError(f"torch.compile: {reason}; --no-compile does without it") from None

def compile_parts(model):
    """Compiles encoder and decoder; a second size of chunk or batch compiles them for any size."""
    check_compiler(model.device)
    for name in ("encode", "prepare", "decode"):
        setattr(model, name, torch.compile(getattr(model, name)))

def add_flags(flag, n, res):
    """The flags of sample.py that tools/poster.py has too; n, res: what is said of their defaults."""
    flag("--ckpt", help="file, run directory, or shipped model (default: the newest run, else glyphs)")
    flag("--weights", choices=("ema", "raw"), default="ema", help="averaged or last ones (default: ema)")
    # torchrun takes --n in its script's flags for its own --nnodes, hence the second name
    flag("--n", "--samples", type=positive, help=f"number of samples (default: {n})")
    flag("--class", dest="classes", nargs="+", metavar="CLASS", default=[], help="names or indices, in turn")
    flag("--seed", type=natural, default=0)
    flag("--res", help=f"images: side, HEIGHTxWIDTH, or 4x, times the training resolution (default: {res})")
    flag("--guidance", type=float, help="classifier-free guidance scale; 1 is none (default: the recipe's)")
    flag("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guided times: 0 1 is all")
    flag("--noise", choices=NOISES, help="of the queries (default: the recipe's)")
    flag("--noise-length", type=float, help="images: of coupled noise, in training pixels")
    flag("--refine", type=float, help="coupled noise, large images: interpolate velocities where that is off "
         "by no more; 0 decodes every pixel")
    flag("--solver", choices=SOLVERS, help="default: the recipe's")
    flag("--steps", type=positive, help="of euler, heun, sde (default: the recipe's)")
    flag("--evaluations", type=positive, help=f"dopri5: at most so many (default: {DEFAULTS['evaluations']})")
    flag("--rtol", type=float, help=f"dopri5: relative tolerance (default: {DEFAULTS['rtol']})")
    flag("--atol", type=float, help=f"dopri5: absolute tolerance (default: {DEFAULTS['atol']})")
    flag("--diffusion", choices=DIFFUSIONS, help=f"sde: w(t) (default: {DEFAULTS['diffusion']})")
    flag("--last", type=float, help=f"sde: size of the last step (default: {DEFAULTS['last']})")
    flag("--out", help="output directory (default: beside the checkpoint, named by the setting)")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    flag("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on CUDA")

def wishes_of(args):
    """What `resolve` takes besides the size."""
    options = {name: getattr(args, name) for name in ("steps", *DEFAULTS) if getattr(args, name) is not None}
    return {name: getattr(args, name, None) for name in WISHES.keys() - {"size"}} | dict(options=options)

def parser():
    p = flag_parser(__doc__)
    flag = p.add_argument
    add_flags(flag, "16, fewer of large ones", "1x")
    flag("--crop", type=parse_box, metavar="x0,y0,x1,y1", help="images: draw this box of the pixels alone")
    flag("--points", type=positive, help="point clouds: number of points (default: that of training)")
    flag("--tokens", metavar="PATH", help="condition tokens, .npz or a directory of them (tools/tokens.py)")
    flag("--npz", action="store_true", help="also samples.npz, as ADM: arr_0 uint8 (n,H,W,3), arr_1 labels")
    flag("--batch", type=positive, help="samples at a time (default: by resolution; 1 where --refine acts)")
    flag("--chunk", type=positive, help="queries decoded at a time (default: 4096 on the CPU, else 65536)")
    flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile: for many samples on a GPU")
    return p

def main(argv=None):
    args = parser().parse_args(argv)
    model, checkpoint = load(args.ckpt, args.weights)
    image = model.cfg.domain == "image"
    for name in ("points",) if image else ("res", "crop", "npz"):
        if getattr(args, name):
            raise ValueError(f"--{name}: does not apply to a checkpoint of domain {model.cfg.domain}")
    model.to(start_processes(args.device, "gloo"))
    if args.compile:
        compile_parts(model)
    size = parse_size(args.res or "1x", model.cfg) if image else args.points
    return sample(model, checkpoint, args.n, args.out, args.batch, args.chunk, args.npz, size=size,
                  **wishes_of(args))

if __name__ == "__main__":
    run_main(main)
