"""Speeds as ratios within one run: python experiments/bench.py [step guided decode data small metrics]

Each row times two ways of doing the same work in turn and compares their medians. Nothing passes or fails
here: machines differ.
"""
import itertools
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from PIL import Image

from common import alive, training_steps
import data
import model as asft
import sample
import toys
import train
from metrics import clouds, frechet
from tools import pack, plan

def row(name, ours, theirs, rounds=5):
    """Prints the medians of ours() and theirs(), each seconds for the same amount of work, taken in turn, and
    their ratio; returns the first."""
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    a, b = (statistics.median(column) for column in zip(*pairs))
    print(f"{name:<52} {a:>9.4f} s {b:>9.4f} s {b / a:>7.2f} x", flush=True)
    return a

def timed(work, *args, units=1, **options):
    """A function that runs work(...) and returns the seconds for each of so many units of it."""
    def run():
        started = time.perf_counter()
        work(*args, **options)
        return (time.perf_counter() - started) / units
    return run

class PlainEncoder(asft.SpatialEncoder):
    """Keys and values of every pixel, one query per window, LayerNorm after the stem's Linear."""

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

    def __init__(self, model):
        super().__init__(model.cfg)
        self.encoder.__class__ = PlainEncoder
        self.load_state_dict(model.state_dict())

    def forward(self, coords, values, query_coords, query_values, t, label=None, tokens=None, drop=None):
        c = self.condition(t, label, drop)
        value = torch.nn.Sequential(*self.query_value)(query_values)
        x = value + asft.fourier(query_coords, self.freqs)
        for block, latents in zip(self.decoder, self.encode(coords, values, t, label, tokens, drop)):
            x = block(x, block.modulations(c), block.keys_values(latents))
        shift, scale = self.head_modulation(F.silu(c))[:, None].chunk(2, -1)
        return self.head(asft.modulate(torch.cat([x, value.to(x.dtype)], -1), shift, scale))

def step():
    """Training step (forward, backward) of image B at 256 x 256, 8,192 decoded, batch 2; seconds a step."""
    ours = alive(asft.config("B", n_classes=1000))
    plain, N, B, M = Plain(ours), 256 ** 2, 2, 8192
    coords, x0 = asft.image_coords(256), torch.rand(B, N, 3) * 2 - 1
    eps, t = torch.randn(B, N, 3), torch.rand(B)
    query = torch.stack([torch.randperm(N)[:M] for _ in range(B)])
    flops = 3 * B * asft.forward_flops(ours.cfg, M)[0]     # backward: two products for each of forward
    for name in ("float32", "bfloat16"):
        a, b = torch.randn(2, 2048, 2048, dtype=getattr(torch, name))
        products, losses = [], {}

        def once(model):
            with sample.autocast(torch.device("cpu"), name, "float32"):
                loss = asft.cicfm_loss(model, coords, x0, eps, t, query, label=torch.tensor([1, 2]))
            loss.backward()
            model.zero_grad()
            losses[model] = loss.item()

        def once_beside_products():                        # the machine's speed changes with its load
            products.append(min(timed(torch.mm, a, b)() for _ in range(8)))
            return timed(once, ours)()
        once(ours)                                                     # memory and kernels warm
        once(plain)
        seconds = row(f"training step, {name} / plain form", once_beside_products, timed(once, plain), 3)
        assert abs(losses[ours] / losses[plain] - 1) < 1e-2, losses
        speed, most = flops / seconds / 1e9, 2 * 2048 ** 3 / statistics.median(products) / 1e9
        print(f"{'':<52} {flops / 1e9:.0f} GFLOP; {speed:.0f} of the matrix product's {most:.0f} GFLOP/s: "
              f"{speed / most:.2f}")

@torch.no_grad()
def guided():
    """Guided sampling step of image B at 256 x 256, all pixels, float32; seconds per step."""
    ours = alive(asft.config("B", n_classes=1000))
    plain, coords, x = Plain(ours), asft.image_coords(256), torch.randn(1, 256 ** 2, 3)
    label, t = torch.tensor([5]), torch.tensor([0.6])
    velocity = sample.Velocity(ours, coords, 256 ** 2, label, guidance=1.5)

    def two_passes():
        cond, null = (plain(coords, x, coords, x, t, z) for z in (label, None))
        return null + 1.5 * (cond - null)
    assert (velocity(x, 0.6) - two_passes()).abs().max() < 1e-3
    row("guided step / two full plain passes", timed(velocity, x, 0.6), timed(two_passes), 3)

@torch.no_grad()
def decode():
    """Decoding with image S, float32; seconds per million queries."""
    model, t, M = alive(asft.config("S")), torch.tensor([0.6]), 2 ** 20
    coords, x = asft.image_coords(1024), torch.randn(1, M, 3)
    memory = model.prepare(model.encode(asft.image_coords(256), torch.randn(1, 256 ** 2, 3), t), t)

    def decoded(count, chunk):
        for i in range(0, count, chunk):
            model.decode(memory, coords[i:i + chunk], x[:, i:i + chunk])
    decoded(M // 4, M)
    row("1M queries, 4096 at a time / a quarter in one pass", timed(decoded, M, 4096, units=M / 1e6),
        timed(decoded, M // 4, M, units=M / 4e6), 3)

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

        def loaded(path, batches):
            source = data.loader(data.load("folder", path, res=256, flip=True), 0, 0, 16, 16, workers=1)

            def run():
                list(itertools.islice(source, 8))          # what the worker read ahead in the meantime
                return timed(list, itertools.islice(source, batches), units=16 * batches)()
            run()
            return run
        one = row("folder loader, one worker / bare Pillow, one thread", loaded(place, 12),
                  timed(bare, units=len(files)), 9)
        pack.main([place, f"{place}-packed", "--res", "256"])
        two = row("packed set, one worker / folder, one worker", loaded(f"{place}-packed", 60),
                  loaded(place, 12), 9)
        for model in ("B", "XL"):
            flops = 3 * asft.forward_flops(asft.config(model, n_classes=1000), 8192)[0]
            rate = 8 * 0.4 * plan.H100_FLOPS / flops
            print(f"  ImageNet-256, {model} on 8 H100 at 40 % of their peak: {rate:,.0f} pictures/s; cores: "
                  f"folder {rate * one:.1f} (of {1 / one:,.0f} pictures/s each), packed {rate * two:.2f} "
                  f"({1 / two:,.0f} each)", flush=True)

def small():
    """Training steps of the quickstart (tiny, batch 16, 256 decoded); seconds per step."""
    args = train.settings(["--device", "cpu", "--out", os.devnull + "/none"])[0]
    batch = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8), torch.arange(16)
    update, updates = train.update, []

    def timed_update(*task):
        updates.append(timed(update, *task)())

    def trainer(compiled):
        """A function that trains for 20 steps and returns the seconds for each; it has done so once."""
        net = asft.ASFT(asft.config("tiny", n_classes=36))
        called = torch.compile(net) if compiled else net
        steps = training_steps(net, itertools.repeat(batch), args, called)
        run = timed(lambda: [next(steps) for _ in range(20)], units=20)
        run()
        return run
    eager = trainer(False)
    with patch.object(train, "update", timed_update):
        seconds = 20 * sum(eager() for _ in range(5))
    print(f"{'optimizer + EMA + clip, share of a step':<52} {100 * sum(updates) / seconds:.1f} %")
    row("torch.compile / eager", trainer(True), eager, 7)

def metrics():
    """Square-root trace, Chamfer and Earth Mover's distances; seconds a call or pair of clouds of 2048."""
    threads, r = torch.get_num_threads(), np.random.default_rng(0)
    S1, S2 = (np.cov(r.standard_normal((4096, 2048)) * np.linspace(0.1, 2, 2048), rowvar=False)
              for _ in range(2))
    row("square-root trace, 2048 dimensions / sqrtm", timed(frechet.sqrt_trace, S1, S2),
        timed(lambda: np.trace(scipy.linalg.sqrtm(S1 @ S2)).real), 3)

    solids = toys.Solids(2048)
    sets = clouds.normalise_box(np.stack([solids.item(i)[0] for i in range(48)]))
    ref, smp = sets[:24], sets[24:]

    def two_trees():
        for x, y in zip(ref, smp):
            a, b = scipy.spatial.cKDTree(x), scipy.spatial.cKDTree(y)
            np.square(a.query(y)[0]).mean() + np.square(b.query(x)[0]).mean()

    def one_assignment(pair):
        cost = scipy.spatial.distance.cdist(*pair)
        return cost[scipy.optimize.linear_sum_assignment(cost)].mean()

    def assignment():
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one_assignment, zip(ref[:4].astype(float), smp[:4].astype(float))))

    def pairwise(n, distance, **options):
        return timed(clouds.pairwise, ref[:n], smp[:n], distance, progress=False, units=n * n, **options)
    row("Chamfer / a loop that builds two trees per pair", pairwise(24, "chamfer"),
        timed(two_trees, units=len(ref)))
    row("approximate EMD (lion) / exact assignment", pairwise(4, "lion"), timed(assignment, units=4), 3)
    row(f"exact EMD, {threads} threads / 1", pairwise(2, "exact", workers=threads),
        pairwise(2, "exact", workers=1), 3)

SECTIONS = {"step": step, "guided": guided, "decode": decode, "data": folder, "metrics": metrics,
            "small": small}                                            # which needs a compiler

if __name__ == "__main__":
    p = sample.flag_parser(__doc__)
    p.add_argument("section", nargs="*", choices=[[], *SECTIONS], help=f"default: all, {', '.join(SECTIONS)}")
    sample.start_processes("cpu")
    for name in p.parse_args().section or SECTIONS:
        print(f"{name}: {SECTIONS[name].__doc__}", flush=True)
        SECTIONS[name]()
