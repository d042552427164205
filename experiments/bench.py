"""Speeds as ratios within one run: python experiments/bench.py [step guided decode large data small metrics]

Each row times two ways of doing the same work in turn and compares their medians. Nothing passes or fails
here: machines differ.
"""
import argparse
import copy
import ctypes
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import scipy.linalg  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from scipy.optimize import linear_sum_assignment  # noqa: E402
from scipy.spatial import cKDTree  # noqa: E402
from scipy.spatial.distance import cdist  # noqa: E402

import data  # noqa: E402
import model as asft  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
import toys  # noqa: E402
from metrics import clouds, frechet  # noqa: E402
from tools import pack  # noqa: E402

def row(name, ours, theirs, goal, rounds=5):
    """Prints the medians of ours() and theirs(), each seconds for the same amount of work, taken in turn, and
    their ratio; returns the first."""
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    a, b = (statistics.median(column) for column in zip(*pairs))
    print(f"{name:<52} {a:>9.4f} s {b:>9.4f} s {b / a:>7.2f} x   {goal:<8}", flush=True)
    return a

def timed(work, *args, **options):
    """A function that runs work(...) and returns the seconds per unit of what it reports having done."""
    def run():
        started = time.perf_counter()
        units = work(*args, **options)
        return (time.perf_counter() - started) / (units or 1)
    return run

class PlainEncoder(asft.SpatialEncoder):
    """Keys and values of every pixel, attention with one query per window, LayerNorm after the stem's
    Linear."""

    def forward(self, coords, values):
        read = self.read
        values = asft.to_windows(coords, values, self.res, self.side).transpose(0, 1)    # (B, L, n, 3)
        x = torch.nn.Sequential(*self.stem)(values) + self.inside                        # (B, L, n, D)

        def split(z):
            return z.unflatten(-1, (read.heads, -1)).transpose(-2, -3).flatten(0, 1)     # (BL, H, n, D/H)
        q = split(read.q(self.latents + self.centres)[None, :, None].expand(len(x), -1, -1, -1))
        x = F.scaled_dot_product_attention(q, split(read.k(x)), split(read.v(x)))        # (BL, H, 1, D/H)
        return read.mlp(read.norm(x.reshape(len(values), len(self.latents), -1))) + self.centres, None

class Plain(asft.ASFT):
    """The same function with nothing saved: a plain encoder, every modulation applied where it stands, both
    halves of guidance from the pixels on."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.encoder.__class__ = PlainEncoder

    def forward(self, coords, values, query_coords, query_values, t, label=None, tokens=None, drop=None):
        c = self.condition(t, label, drop)
        value = torch.nn.Sequential(*self.query_value)(query_values)
        x = value + asft.fourier(query_coords, self.freqs)
        for block, latents in zip(self.decoder, self.encode(coords, values, t, label, tokens, drop)):
            x = block(x, block.modulations(c), block.keys_values(latents))
        shift, scale = self.head_modulation(F.silu(c))[:, None].chunk(2, -1)
        return self.head(asft.modulate(torch.cat([x, value.to(x.dtype)], -1), shift, scale))

def glibc(run):
    """A function that runs another with glibc's own handling of freed memory."""
    def default():
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
            libc.mallopt(-4, 65536)
            libc.mallopt(-1, 128 * 1024)
        seconds = run()
        sample.start_processes("cpu")
        return seconds
    return default

def model_pair(name, **changes):
    """A preset with random weights everywhere (no gate at zero), and its plain form with the same ones."""
    torch.manual_seed(0)
    models = asft.ASFT(asft.config(name, **changes)), Plain(asft.config(name, **changes))
    for p in models[0].parameters():
        if not p.detach().any():
            torch.nn.init.normal_(p, std=0.02)
    models[1].load_state_dict(models[0].state_dict())
    return models

def peak(dtype, n=2048):
    """FLOP/s of this machine's matrix product."""
    a, b = torch.randn(2, n, n, dtype=dtype)
    times = []
    for _ in range(8):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * n ** 3 / min(times)

def step():
    """Training step (forward, backward) of image B at 256 x 256, 8,192 decoded, batch 2; seconds a step."""
    ours, plain = model_pair("B", n_classes=1000)
    N, B, M = 256 ** 2, 2, 8192
    coords, x0 = asft.image_coords(256), torch.rand(B, N, 3) * 2 - 1
    eps, t = torch.randn(B, N, 3), torch.rand(B)
    query = torch.stack([torch.randperm(N)[:M] for _ in range(B)])
    flops = 3 * B * asft.forward_flops(ours.cfg, M)[0]     # backward: two products for each of forward
    for name, goal, least in (("float32", ">= 1.6", 0.65), ("bfloat16", "-", 0.45)):
        peaks, losses = [], {}

        def once(model):
            with sample.autocast(torch.device("cpu"), name, "float32"):
                loss = asft.cicfm_loss(model, coords, x0, eps, t, query, label=torch.tensor([1, 2]))
            loss.backward()
            model.zero_grad()
            losses[model] = loss.item()

        def once_and_peak():
            peaks.append(peak(getattr(torch, name)))
            return timed(once, ours)()
        once(ours)                                                     # memory and kernels warm
        once(plain)
        seconds = row(f"training step, {name} / plain form", once_and_peak, timed(once, plain), goal, 3)
        assert abs(losses[ours] / losses[plain] - 1) < 1e-2, losses
        speed, most = flops / seconds / 1e9, statistics.median(peaks) / 1e9
        print(f"{'':<52} {flops / 1e9:.0f} GFLOP; {speed:.0f} of the matrix product's {most:.0f} GFLOP/s: "
              f"{speed / most:.2f}   goal >= {least}")

def guided():
    """Guided sampling step of image B at 256 x 256, all pixels, float32; seconds per step."""
    ours, plain = model_pair("B", n_classes=1000)
    coords, x = asft.image_coords(256), torch.randn(1, 256 ** 2, 3)
    label, t, got = torch.tensor([5]), torch.tensor([0.6]), {}
    velocity = sample.Velocity(ours, coords, 256 ** 2, label, guidance=1.5)

    @torch.no_grad()
    def shared():
        got["ours"] = velocity(x, 0.6)

    @torch.no_grad()
    def two_passes():
        cond, null = (plain(coords, x, coords, x, t, z) for z in (label, None))
        got["plain"] = null + 1.5 * (cond - null)
    shared()
    row("guided step / two full plain passes", timed(shared), timed(two_passes), ">= 1.25", 3)
    row("... plain passes with glibc's own memory handling", timed(shared), glibc(timed(two_passes)), "-", 3)
    assert (got["ours"] - got["plain"]).abs().max() < 1e-3

def decode():
    """Decoding with image S, float32; seconds per million queries."""
    ours, _ = model_pair("S")
    t, M = torch.tensor([0.6]), 2 ** 20
    coords, x = asft.image_coords(1024), torch.randn(1, M, 3)
    with torch.no_grad():
        memory = ours.prepare(ours.encode(asft.image_coords(256), torch.randn(1, 256 ** 2, 3), t), t)

    @torch.no_grad()
    def decoded(count, chunk):
        for i in range(0, count, chunk):
            ours.decode(memory, coords[i:i + chunk], x[:, i:i + chunk])
        return count / 1e6
    decoded(M // 4, M)
    row("1M queries, 4096 at a time / a quarter in one pass", timed(decoded, M, 4096),
        timed(decoded, M // 4, M), ">= 0.95", 3)

# a program that samples and prints its largest resident size in kB; Linux's ru_maxrss would count the
# parent's, from before exec
OWN_PEAK = """
import re, resource, sys, sample
sample.main(sys.argv[1:])
if sys.platform == "linux":
    print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1))
"""

def large():
    """sample.py --res 2048 and 4096 with image S, one Euler step, float32, as whole processes."""
    with tempfile.TemporaryDirectory() as place:
        model, _ = model_pair("S")
        weights, ckpt, seconds, memory = model.state_dict(), f"{place}/ckpt.pt", {}, {}
        settings = dict(solver="euler", sampling_steps=1, guidance=1.0, path="linear")
        config = dict(model=vars(model.cfg), class_names=[], settings=settings, normalisation=None)
        torch.save(dict(model=weights, ema=weights, optimizer={"copies": [weights, weights]}, step=1,
                        config=config), ckpt)
        for res in (256, 2048, 4096):
            words = f"--ckpt {ckpt} --n 1 --res {res} --device cpu --out {place}/{res}".split()
            text = subprocess.run([sys.executable, "-c", OWN_PEAK, *words], cwd=ROOT, check=True, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
            seconds[res] = float(re.search(r"([\d.]+) s, NFE", text)[1])
            memory[res] = int(text.split()[-1]) / 2 ** 20
            name = f"--res {res}"
            print(f"{name:<52} {seconds[res]:>9.1f} s {memory[res]:>8.2f} GiB peak resident", flush=True)
        print(f"{'memory at 2048':<52} {memory[2048]:.2f} GiB   goal <= 2.5;   4096 / 2048: "
              f"{memory[4096] / memory[2048]:.3f}   goal <= 1.1")
        print(f"{'time(4096) / time(2048)':<52} {seconds[4096] / seconds[2048]:.2f}   goal <= 4.2")

def folder():
    """Training data at 256 from JPEGs of 500 x 375, as a folder and packed, one worker; seconds a picture."""
    with tempfile.TemporaryDirectory() as place:
        glyphs, noise = toys.Glyphs(500), np.random.default_rng(0)
        files = [f"{place}/{i}.jpg" for i in range(192)]
        for i, file in enumerate(files):
            picture = glyphs.item(i)[0][:375] + noise.normal(0, 8, (375, 500, 3))
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file, quality=90)

        def bare():
            for file in files:
                np.asarray(Image.open(file).convert("RGB").resize((341, 256), Image.BICUBIC))
            return len(files)

        def loaded(path, count):
            source = data.loader(data.load("folder", path, res=256, flip=True), 0, 0, 16, 16, workers=1)

            def read(batches):
                for _ in range(batches):
                    next(source)
                return batches * 16

            def run():
                read(8)                                    # what the worker read ahead in the meantime
                return timed(read, count)()
            run()
            return run
        one = row("folder loader, one worker / bare Pillow, one thread", loaded(place, 12), timed(bare),
                  ">= 0.85", 9)
        pack.main([place, f"{place}-packed", "--res", "256"])
        two = row("packed set, one worker / folder, one worker", loaded(f"{place}-packed", 60),
                  loaded(place, 12), "", 9)
        for model in ("B", "XL"):
            rate = 8 * 0.4 * 989e12 / (3 * asft.forward_flops(asft.config(model, n_classes=1000), 8192)[0])
            print(f"  ImageNet-256, {model} on 8 H100 at 40 % of their peak: {rate:,.0f} pictures/s; cores: "
                  f"folder {rate * one:.1f} (of {1 / one:,.0f} pictures/s each), packed {rate * two:.2f} "
                  f"({1 / two:,.0f} each)", flush=True)

def small():
    """Training steps of the quickstart (tiny, batch 16, 256 decoded); seconds per step."""
    device = torch.device("cpu")
    args = train.settings(["--device", "cpu", "--out", os.devnull + "/none"])[0]
    model = asft.ASFT(asft.config("tiny", n_classes=36))
    batch = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8), torch.arange(16)

    def trainer(compiled):
        net = copy.deepcopy(model)
        called, ema = torch.compile(net) if compiled else net, copy.deepcopy(net).requires_grad_(False)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        coords, spent = asft.image_coords(32), [0.0, 0.0]              # seconds of updates, and of all

        def steps(count=20):
            began = time.perf_counter()
            for i in range(count):
                train.micro_loss(called, coords, batch, i, range(16), args, device).backward()
                started = time.perf_counter()
                train.update(net, ema, optimizer, i, args)
                spent[0] += time.perf_counter() - started
            spent[1] += time.perf_counter() - began
            return count
        steps()
        spent[:] = 0.0, 0.0
        return steps, spent

    eager, spent = trainer(False)
    for _ in range(5):
        eager()
    print(f"{'optimizer + EMA + clip, share of a step':<52} {100 * spent[0] / spent[1]:.1f} %   goal <= 10 %")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        print(f"{'torch.compile / eager':<52} not measured: no C++ compiler on this machine")
        return
    row("torch.compile / eager", timed(trainer(True)[0]), timed(eager), ">= 1.15", 7)

def metrics():
    """Square-root trace, Chamfer and Earth Mover's distances; seconds a call or pair of clouds of 2048."""
    threads, values = torch.get_num_threads(), {}
    print(f"{'':<52} {'ours':>11} {'theirs':>11} {'ratio':>9}   goal      ({threads} threads)")
    r = np.random.default_rng(0)
    S1, S2 = (np.cov(r.standard_normal((4096, 2048)) * np.linspace(0.1, 2, 2048), rowvar=False)
              for _ in range(2))

    def sqrtm():
        values["theirs"] = np.trace(scipy.linalg.sqrtm(S1 @ S2)).real

    def trace():
        values["ours"] = frechet.sqrt_trace(S1, S2)
    row("square-root trace, 2048 dimensions / sqrtm", timed(trace), timed(sqrtm), ">= 5", 3)
    print(f"{'':<52} relative difference {abs(values['ours'] / values['theirs'] - 1):.1e}")

    solids = toys.Solids(2048)
    sets = clouds.normalise_box(np.stack([solids.item(i)[0] for i in range(48)]))
    ref, smp = sets[:24], sets[24:]

    def two_trees():
        for x, y in zip(ref, smp):
            a, b = cKDTree(x), cKDTree(y)
            np.square(a.query(y)[0]).mean() + np.square(b.query(x)[0]).mean()
        return len(ref)

    def assignment(workers):
        def one(pair):
            cost = cdist(*pair)
            return cost[linear_sum_assignment(cost)].mean()
        with ThreadPoolExecutor(workers) as pool:
            return len(list(pool.map(one, zip(ref[:4].astype(float), smp[:4].astype(float)))))

    def pairwise(n, distance, **options):
        return clouds.pairwise(ref[:n], smp[:n], distance, progress=False, **options).size
    row("Chamfer / a loop that builds two trees per pair", timed(pairwise, 24, "chamfer"), timed(two_trees),
        ">= 2")
    row("approximate EMD (lion) / exact assignment", timed(pairwise, 4, "lion"), timed(assignment, threads),
        ">= 4", 3)
    row(f"exact EMD, {threads} threads / 1", timed(pairwise, 2, "exact", workers=threads),
        timed(pairwise, 2, "exact", workers=1), "-", 3)

SECTIONS = {"step": step, "guided": guided, "decode": decode, "large": large, "data": folder, "small": small,
            "metrics": metrics}

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("section", nargs="*", choices=[[], *SECTIONS],
                   help=f"of {', '.join(SECTIONS)} (default: all)")
    sample.start_processes("cpu")
    for name in p.parse_args().section or SECTIONS:
        print(f"{name}: {SECTIONS[name].__doc__}", flush=True)
        SECTIONS[name]()
