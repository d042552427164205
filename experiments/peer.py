"""What a user would take instead of ASFT, at equal CPU time: python experiments/peer.py --data FILE.npz

The peer is a pixel-space patch transformer, dit/2 or dit/4 by its patch side: linear patches with a learned
place, DiT blocks (adaLN-Zero), a linear head. Its blocks are ASFT's own, so neither has faster code, and as
many as "spatial", ASFT with that encoder, has attentions in a row. All else is recipe npz for both;
"dit/4@5e-4" is an arm with a rate of its own.

The clock is CPU time in training steps, data included, on one thread. Each of --minutes is a training of its
own, at whose end the learning rate is zero. Its averaged weights are judged: samples 0 to n-1 of seed 0,
classes in turn, guidance 2, Euler 25; ASFT with its recipe's coupled noise, and with white noise. Four fifths
of the set are trained on, scores are against the others; `floor`: training images. `time ratio`: minutes over
those in which the first arm has that Frechet distance.

Writes SET-ARM-seedS-N.json and .png (samples 0 to 31) to --out after each budget, then peer-SET.json and a
table. A training that is finished is not done again, one that was interrupted is.
"""
import argparse
import copy
import json
import statistics
import time

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common import drawn, training_steps
import claims
import data
import model as asft
import sample
import train

class DiT(nn.Module):
    """The peer behind ASFT's interface. p patch side, S patches along a side; `decode` picks velocities."""
    condition, device = asft.ASFT.condition, asft.ASFT.device          # time plus class, (B, D)

    def __init__(self, cfg, p):
        super().__init__()
        self.cfg, self.p, S, D = cfg, p, cfg.res // p, cfg.width
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.classes = nn.Embedding(cfg.n_classes + 1, D)
        self.patches = nn.Linear(3 * p * p, D)
        self.place = nn.Parameter(asft.fourier(asft.image_coords(S), asft.image_freqs(S, D)))    # (SS, D)
        self.blocks = nn.ModuleList(asft.Block(cfg) for _ in range(1 + cfg.depth + cfg.levels))
        self.modulation, self.head = nn.Linear(D, 2 * D), nn.Linear(D, 3 * p * p)
        zero = [self.modulation, self.head, *(block.modulation for block in self.blocks)]
        for layer in (layer for layer in self.modules() if isinstance(layer, nn.Linear)):    # as in DiT
            nn.init.zeros_(layer.bias)
            nn.init.zeros_(layer.weight) if layer in zero else nn.init.xavier_uniform_(layer.weight)
        for table, std in ((self.classes, 0.5), (self.time[0], 0.02), (self.time[2], 0.02)):   # as in ASFT
            nn.init.normal_(table.weight, std=std)

    def encode(self, coords, values, t, label=None, tokens=None, drop=None):
        c, p, S = self.condition(t, label, drop), self.p, self.cfg.res // self.p         # (B, D)
        x = values.view(-1, S, p, S, p, 3).transpose(2, 3).reshape(-1, S * S, p * p * 3)
        x = asft.repeat_to(self.patches(x) + self.place, len(c))                         # (B, SS, D)
        for block in self.blocks:
            x = block(x, block.modulations(c))                                           # (B, SS, D)
        shift, scale = self.modulation(nn.functional.silu(c))[:, None].chunk(2, -1)      # (B, 1, D) each
        x = self.head(asft.modulate(x, shift, scale))                                    # (B, SS, 3pp)
        return x.view(-1, S, S, p, p, 3).transpose(2, 3).reshape(len(c), -1, 3)          # (B, N, 3)

    def prepare(self, v, t, label=None, drop=None):
        return v

    def decode(self, v, coords, values):
        column, row = (coords * self.cfg.res).long().unbind(-1)                          # (M,) or (B, M)
        pick = (row * self.cfg.res + column).expand(len(v), -1)                          # (B, M)
        return v.gather(1, pick[..., None].expand(-1, -1, 3))                            # (B, M, 3)

    def forward(self, coords, values, query_coords, query_values, *condition):
        return self.decode(self.encode(coords, values, *condition), query_coords, query_values)

def training(task, arm, seed, minutes):
    """Trains an arm for each budget; yields its average, train.py's settings and what is known."""
    kind, _, own = arm.partition("@")
    decode = task.res ** 2 if kind.startswith("dit") else train.RECIPES["npz"]["decode"]
    words = [*task.flags, "--decode", decode, "--seed", seed, "--schedule", "constant", "--device", "cpu",
             "--out", task.out / "run", *(["--lr", own] if own else [])]
    words += ["--model", "tiny" if kind == "spatial" else train.RECIPES["npz"]["model"]]
    args, given, _ = train.settings([*map(str, words)])
    (dataset, cfg), highest = train.build(args, given), args.lr
    for budget in sorted(minutes):
        torch.manual_seed(seed)
        net = DiT(cfg, int(kind[4:])) if kind.startswith("dit") else asft.ASFT(cfg)
        steps = training_steps(net, data.loader(dataset, seed, 0, args.batch_size, args.batch_size), args)
        seconds, losses = 0.0, []
        while seconds < 60 * budget:
            began = time.process_time()
            args.lr = highest * train.SCHEDULES["cosine"](seconds / (60 * budget))
            ema, loss = next(steps)
            losses.append(loss.item())
            seconds += time.process_time() - began
        yield ema, args, dict(cost(net, args.decode), minutes=budget, done=len(losses), cpu_seconds=seconds,
                              loss=statistics.mean(losses[-100:]))

def cost(net, decode):
    """Parameters in millions, and forward GFLOP of a training image."""
    far, x = copy.deepcopy(net).to("meta"), torch.empty(1, net.cfg.res ** 2, 3, device="meta")
    with FlopCounterMode(display=False) as counter:
        asft.cicfm_loss(far, x[0, :, :2], x, x, x[:, 0, 0], torch.zeros_like(x[:, :decode, 0]).long())
    return dict(parameters=sum(p.numel() for p in net.parameters()) / 1e6,
                gflop=counter.get_total_flops() / 1e9)

def judged(task, arm, seed, minutes):
    """Rows of results: of every budget and, for ASFT, noise."""
    path = task.out / f"{task.stem}-{arm}-seed{seed}-{task.n}.json".replace("/", "_")
    rows = json.loads(path.read_text()) if path.exists() else []
    if {*minutes} <= {row["minutes"] for row in rows}:
        return [row for row in rows if row["minutes"] in minutes]
    rows, label = [], np.arange(task.n) % task.classes
    for net, args, facts in training(task, arm, seed, minutes):
        setting = sample.WISHES | dict(
            solver="euler", options=dict(steps=args.sampling_steps), guidance=args.guidance,
            classes=[*range(task.classes)], noise_length=args.noise_length, dtype=train.cpu_dtype())
        for noise in ("white",) if isinstance(net, DiT) else ("coupled", "white"):
            images, _ = drawn(net.eval(), setting | dict(noise=noise), range(task.n))
            scores = task.judge.score(images, label, task.test[0])
            rows.append(dict(facts, arm=f"{arm}, {noise} noise", seed=seed, **scores))
            sample.write_png(path.with_suffix(f".{noise}.png"), sample.grid_image([*images[:32]], 8))
            print(rows[-1], flush=True)
        sample.write_json(path, rows)
    return rows

def ratio(minutes, goal, curve):
    """Minutes over those at which a falling curve is at the same score, logarithmic between its points."""
    times, falls = np.log(curve).T
    falls, goal = np.minimum.accumulate(falls), np.log(goal)
    if not falls[-1] <= goal <= falls[0]:
        return "not reached" if goal < falls[-1] else f"at least {minutes / curve[0][0]:.2g}"
    return f"{minutes / np.exp(np.interp(goal, falls[::-1], times[::-1])):.2g}"

def main(argv=None):
    p = sample.flag_parser(__doc__)
    p.add_argument("--data", help=".npz of images and labels (default: built-in glyphs)")
    p.add_argument("--minutes", nargs="+", type=float, default=[2, 5, 15], help="budgets (default: 2 5 15)")
    p.add_argument("--arms", nargs="+", default=["asft", "dit/2", "dit/4"], help="default: asft dit/2 dit/4")
    p.add_argument("--seeds", type=sample.positive, default=1, help="trainings of every arm (default: 1)")
    p.add_argument("--n", type=sample.positive, default=300, help="samples, at least 100 (default: 300)")
    p.add_argument("--out", default="runs/peer", help="directory (default: runs/peer)")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    sample.start_processes("cpu")
    task = claims.Pictures(argparse.Namespace(data=args.data, out=args.out, n=args.n, steps=None))
    task.judge.known = task.judge.features(task.test[0])               # what no arm has seen
    arms = {}
    for seed, arm in ((seed, arm) for seed in range(args.seeds) for arm in args.arms):
        for row in judged(task, arm, seed, args.minutes):
            name, minutes = f"{row['arm']}, {row['minutes']:g} min", row["minutes"]
            arms.setdefault(name, dict(minutes=minutes, seeds=[]))["seeds"].append(row)
    mean = {name: statistics.mean(seed["fd"] for seed in row["seeds"]) for name, row in arms.items()}
    first = next(iter(arms)).rpartition(",")[0]                        # the arm that others are compared with
    curve = sorted((row["minutes"], mean[name]) for name, row in arms.items() if name.startswith(first))
    for name, row in arms.items():
        row["time_ratio"] = ratio(row["minutes"], mean[name], curve)
    floor = task.judge.score(*(part[:args.n] for part in task.train), task.test[0])
    found = dict(claim="peer", data=task.stem, **task.facts, floor=floor, arms=arms)
    sample.write_json(task.out / f"peer-{task.stem}.json", found)
    print(f"\n{claims.table(found)}\n\n{task.out}/peer-{task.stem}.json")

if __name__ == "__main__":
    sample.run_main(main)
