"""What the quickstart's model has learnt, in numbers: python experiments/glyph_report.py [--ckpt runs/glyphs]

1. legible: share of guided samples that a classifier trained on real glyph renders calls by their class
2. sharp: edge sharpness of samples at 4 x the training resolution beside that of true renders
3. no grid: energy of the 4 x samples' spectrum at the window frequency and its harmonics, against neighbours

Samples are indices 0..n-1 of the seed, classes in turn; the true renders are of the test split. Prints JSON.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample  # noqa: E402
from data import item_index  # noqa: E402
from toys import Glyphs  # noqa: E402

ENLARGE = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}

def renders(res, count, split):
    glyphs = Glyphs(res, split)                                        # class of item i is i % 36
    return np.stack([glyphs.item(i)[0] for i in tqdm(range(count), desc=f"glyphs at {res}")])

def drawn(model, checkpoint, n, res, **wishes):
    """Samples 0 to n-1 of a checkpoint with wishes of `sample.resolve`, classes in turn: (n, res, res, 3)."""
    setting = sample.resolve(model.cfg, checkpoint, (res, res), **wishes)
    batch, found = max(1, 2 ** 16 // res ** 2), []
    for start in range(0, n, batch):
        x, _ = sample.draw(model, setting, range(start, min(n, start + batch)))
        found += [sample.to_pixels(values, res, res) for values in x]
    return np.stack(found)

def enlarged(pictures, res, how):
    return np.stack([np.asarray(Image.fromarray(p).resize((res, res), ENLARGE[how])) for p in pictures])

def planes(pictures):
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1

def convolutions():
    """Layers that turn pictures (B, 3, R, R) into 96 maps of an eighth of the side."""
    widths, layers = (3, 24, 48, 96), []
    for a, b in zip(widths, widths[1:]):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    return layers

def fit(net, x, y, epochs, batch, weight_decay):
    """Trains a classifier on pictures x (n, 3, R, R) and classes y (n,)."""
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="classifier"):
        pick = [item_index(len(x), 1, step * batch + j) for j in range(batch)]
        F.cross_entropy(net(x[pick]), y[pick]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

def train_classifier(per_class=700, epochs=3):
    """A network fitted to real renders of the training split, and its accuracy on the test split."""
    torch.manual_seed(1)
    net = nn.Sequential(*convolutions(), nn.Flatten(), nn.Linear(96 * 16, 36))
    x, y = planes(renders(32, 36 * per_class, "train")), torch.arange(36 * per_class) % 36
    fit(net, x, y, epochs, batch=128, weight_decay=0.01)
    net.eval()
    with torch.no_grad():
        right = net(planes(renders(32, 36 * 20, "test"))).argmax(1) == torch.arange(36 * 20) % 36
    return net, right.float().mean().item()

def patches(pictures, side=8):
    """Mean and covariance of the pixels of side x side patches of pictures (n, H, W, 3). Gaussians of whole
    pictures need more than a few hundred: of 36 with 49,152 numbers, blurred samples beat true renders."""
    total, square, count = 0, 0, 0
    for i in range(0, len(pictures), 100):
        x = F.unfold(planes(pictures[i:i + 100]).double(), side, stride=side - 1)        # at every phase
        x = x.transpose(1, 2).flatten(0, 1)
        total, square, count = total + x.sum(0), square + x.T @ x, count + len(x)
    mean = total / count
    return mean.numpy(), ((square - count * torch.outer(mean, mean)) / (count - 1)).numpy()

def textures(pictures):
    """Few features for evaluate.py --features: uint8 (B,3,H,W) -> (B,30), per channel mean, spread, and mean
    size of differences 1, 2, 4 and 8 pixels apart, across and down."""
    x = pictures.float() / 127.5 - 1
    steps = [(x[..., d:] - x[..., :-d]).abs().mean((2, 3)) for d in (1, 2, 4, 8)]
    steps += [(x[:, :, d:] - x[:, :, :-d]).abs().mean((2, 3)) for d in (1, 2, 4, 8)]
    return torch.cat([x.mean((2, 3)), x.std((2, 3)), *steps], 1)

def sharpness(pictures):
    """Mean over pictures of the steepest 2 % of gradients, in contrasts per pixel."""
    out = []
    for p in np.asarray(pictures, np.float64).mean(-1):
        dy, dx = np.gradient(p)
        slope = np.sort(np.hypot(dx, dy).ravel())
        out.append(slope[-len(slope) // 50:].mean() / (np.percentile(p, 98) - np.percentile(p, 2) + 1e-9))
    return float(np.mean(out))

def grid_energy(pictures, period):
    """Largest ratio of the spectrum at the window frequency and its harmonics to its neighbours' median."""
    p = np.asarray(pictures, np.float64).mean(-1)
    worst = 0.0
    for axis in (1, 2):
        power = (np.abs(np.fft.rfft(p - p.mean((1, 2), keepdims=True), axis=axis)) ** 2).mean((0, 3 - axis))
        base = p.shape[1] // period
        for f in range(base, len(power) - 3, base):
            around = np.r_[power[f - 3:f - 1], power[f + 2:f + 4]]
            worst = max(worst, power[f] / np.median(around))
    return float(worst)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="runs/glyphs")
    p.add_argument("--n", type=int, default=180, help="samples at 32 pixels")
    p.add_argument("--fine", type=int, default=36, help="samples at 128 pixels (0: none)")
    p.add_argument("--guidance", type=float, help="default: the recipe's")
    p.add_argument("--steps", type=int, help="default: the recipe's")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    model, checkpoint = sample.load(args.ckpt)
    recipe, names = checkpoint["config"]["settings"], checkpoint["config"]["class_names"]
    guidance, steps = args.guidance or recipe["guidance"], args.steps or recipe["sampling_steps"]
    how = dict(noise="white", seed=args.seed, guidance=guidance, solver="euler", options=dict(steps=steps))
    classifier, accuracy = train_classifier()
    report = dict(step=checkpoint["step"], seed=args.seed, n=args.n, guidance=guidance, steps=steps,
                  classifier_on_real_renders=accuracy)
    coarse = drawn(model, checkpoint, args.n, 32, **how)
    with torch.no_grad():
        right = classifier(planes(coarse)).argmax(1) == torch.arange(args.n) % 36
    report["legible"] = right.float().mean().item()
    report["misread"] = "".join(sorted({names[i % 36] for i in np.flatnonzero(~right.numpy())}))
    if args.fine:
        arms = {"drawn at 128": drawn(model, checkpoint, args.fine, 128, **how, refine=0),
                "true renders": list(renders(128, 36 * 40, "train")[-args.fine:])}
        report["sharpness_128"] = {k: sharpness(v) for k, v in arms.items()}
        report["grid_energy_128"] = {k: grid_energy(v, 128 // 8) for k, v in arms.items()}
    print(json.dumps(report, indent=1))

if __name__ == "__main__":
    main()
