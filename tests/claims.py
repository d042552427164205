"""The paper's claims, as far as two CPU cores can try them: python tests/claims.py NAME --data pictures.npz

| NAME     | the paper                                                        | arms, each with the same steps, batch and seeds           |
|----------|------------------------------------------------------------------|-----------------------------------------------------------|
| latents  | Tab. 8: spatial-aware latents 7.03, vanilla PerceiverIO 65.09    | spatial, perceiver (as many parameters)                   |
| decoded  | Fig. 3b: decoding fewer pairs costs little and saves FLOPs       | 1/16, 1/8, 1/4, 1/2 and all pairs of a training picture   |
| widths   | Fig. 3a: larger models are better                                | width 64, 128, 256                                        |
| linear   | App. B: ASFT-linear is a cheap variant                           | spatial, linear                                           |
| switches | multi-level decoding, RoPE, logit-normal t, QK-norm              | one at a time                                             |
| ours     | not in the paper                                                 | encoder heads, latents added to the query, window size    |
| sampling | Sec. 4: guidance, solver, steps                                  | the first arm, quality against network evaluations        |

--data is an .npz with `images` and `labels`: four fifths are trained on, the rest is held out. Frechet distance, precision and recall
are of the 96 features of a classifier trained here on the same four fifths, and Frechet also of pictures reduced to 8 x 8 pixels; the
references are the pictures trained on, `floor` is what the held-out ones get. Everything is a function of --data, --steps and the seeds;
what is finished is kept in --out (default: runs/claims) and not done again. Writes results/NAME-*.json and .png there. Samples 0 to n-1 of
seed 0, classes in turn, without guidance, Euler 25, averaged weights, but for `sampling`.
"""
import argparse
import json
import math
import statistics
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import model as asft  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from metrics.frechet import frechet_distance  # noqa: E402
from metrics.precision_recall import precision_recall  # noqa: E402


# ---------------------------------------------------------------------------------------------------------
# What is tried. An arm: flags of train.py, and perhaps a change of model.py that is no option of it

@contextmanager
def changed(change):
    """train.py and sample.py with a changed model.py."""
    kept = asft.Attention.__init__, asft.WindowEncoder.__init__, asft.ASFT.decode, asft.ASFT.memory
    if change == "no QK-norm":
        def init(self, width, heads):
            kept[0](self, width, heads)
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        asft.Attention.__init__ = init
    if change and change.startswith("encoder heads"):
        asft.WindowEncoder.__init__ = lambda self, width, heads: kept[1](self, width, int(change.split()[-1]))
    if change == "interpolated":
        def memory(self, levels, *rest):
            blocks, head = kept[3](self, levels, *rest)
            return blocks, (*head, levels[-1])

        def decode(self, parts, coords, values):
            blocks, (weight, bias, latents) = parts
            stem = self.query_stem(values)
            x = stem + asft.fourier(coords, self.freqs)
            x, stem = asft.repeat_to(x, len(bias)), asft.repeat_to(stem, len(bias))
            x = x + interpolated(latents, coords).to(x.dtype)
            for block, (modulations, kv) in zip(self.decoder, blocks):
                x = block(x, modulations, kv)
            x = torch.cat([x, stem.to(x.dtype)], -1)
            return torch.baddbmm(bias, F.layer_norm(x, x.shape[-1:], eps=1e-6), weight)
        asft.ASFT.memory, asft.ASFT.decode = memory, decode
    try:
        yield
    finally:
        asft.Attention.__init__, asft.WindowEncoder.__init__, asft.ASFT.decode, asft.ASFT.memory = kept


def interpolated(latents, coords):
    """Bilinear interpolation of latents (B, L, D) on their grid at coords (M, 2) or (B, M, 2): (B, M, D)."""
    B, L, D = latents.shape
    side = math.isqrt(L)
    grid = latents.float().transpose(1, 2).view(B, D, side, side)
    at = (2 * coords - 1).expand(B, -1, -1)[:, :, None]                # (B, M, 1, 2)
    return F.grid_sample(grid, at, padding_mode="border", align_corners=False)[..., 0].transpose(1, 2)


def arms(task):
    """Arms by name: (flags of train.py, change of model.py). The first is what all others are compared with."""
    pairs, side = task.res ** 2, task.res // 4                        # windows of 4 x 4 pixels, as in preset tiny
    base = ["--latents", side ** 2, "--decode", pairs // 4]
    with_decode = lambda share: ["--latents", side ** 2, "--decode", pairs // share]
    known = {
        "spatial": (base, None),
        "perceiver": ([*base, "--encoder", "perceiver", "--width", perceiver_width(task)], None),
        "linear": ([*base, "--encoder", "linear"], None),
        **{f"decoded 1/{share}": (with_decode(share), None) for share in (16, 8, 2, 1)},
        "width 64": ([*base, "--width", 64], None), "width 256": ([*base, "--width", 256], None),
        "2 levels": ([*base, "--levels", 2], None), "RoPE": ([*base, "--rope"], None), "uniform t": ([*base, "--times", "uniform"], None),
        "no QK-norm": (base, "no QK-norm"), "encoder heads 16": (base, "encoder heads 16"), "encoder heads 64": (base, "encoder heads 64"),
        "interpolated": (base, "interpolated"),
        "windows 2 x 2": (["--latents", (2 * side) ** 2, "--decode", pairs // 4], None),
    }
    if task.res % 8 == 0 or task.res % 7 == 0:
        p = 8 if task.res % 8 == 0 else 7
        known[f"windows {p} x {p}"] = (["--latents", (task.res // p) ** 2, "--decode", pairs // 4], None)
    return known


def perceiver_width(task):
    """The width at which the PerceiverIO has most nearly as many parameters as the spatial model of width 128."""
    count = lambda **changes: asft.forward_flops(asft.config("tiny", res=task.res, latents=(task.res // 4) ** 2, **changes), 16)[1]
    goal = count()
    return min(range(96, 161, 4), key=lambda width: abs(count(encoder="perceiver", width=width) - goal))


SAMPLING = [*((guidance, "euler", 50) for guidance in (1.0, 1.5, 2.0, 3.0)), *((1.0, "euler", steps) for steps in (5, 10, 25, 100)),
            *((1.0, "heun", steps) for steps in (5, 10, 25)), *((1.0, "dopri5", steps) for steps in (25, 50, 100)),
            *((1.0, "sde", steps) for steps in (25, 100, 250))]      # guidance, solver, steps

CLAIMS = {
    "latents": (("spatial", "perceiver"), 3),
    "decoded": (("spatial", "decoded 1/16", "decoded 1/8", "decoded 1/2", "decoded 1/1"), 3),
    "widths": (("width 64", "spatial", "width 256"), 3),
    "linear": (("spatial", "linear"), 3),
    "switches": (("spatial", "2 levels", "RoPE", "uniform t", "no QK-norm"), 3),
    "ours": (("spatial", "encoder heads 16", "encoder heads 64", "interpolated", "windows"), 3),
    "sampling": (("spatial",), 1),
}


# ---------------------------------------------------------------------------------------------------------
# Data, and the classifier whose features all arms are scored by

class Task:
    """The set, split; its classifier; the directory of all that is made."""

    def __init__(self, args):
        self.out, self.steps, self.n = Path(args.out), args.steps, args.n
        whole = data.Npz(args.data)
        if not whole.class_names:
            raise data.InputError(f"{args.data}: no `labels`; expected classes, for the classifier whose features are compared")
        self.res, self.classes, self.source = whole.res, len(whole.class_names), args.data
        order = np.random.default_rng(0).permutation(len(whole))
        self.parts, count = {}, len(whole) * 4 // 5
        for name, chosen in (("train", order[:count]), ("test", order[count:])):
            self.parts[name] = np.stack([whole.item(i)[0] for i in chosen]), whole.labels[chosen]
        self.out.mkdir(parents=True, exist_ok=True)
        self.file = self.out / f"{Path(args.data).stem}-train.npz"
        if not self.file.exists():
            images, labels = self.parts["train"]
            data.write_atomic(self.file, lambda f: np.savez(f, images=images, labels=labels))
        self.net, self.accuracy = self.classifier()
        self.reference = self.features(self.parts["train"][0])

    def classifier(self, epochs=12):
        """A small convolutional network, and its accuracy on the held-out pictures."""
        torch.manual_seed(0)
        widths, layers = (3, 24, 48, 96), []
        for a, b in zip(widths, widths[1:]):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, self.classes))
        path = self.out / f"{Path(self.source).stem}-classifier.pt"
        if path.exists():
            net.load_state_dict(torch.load(path, weights_only=True))
        else:
            x, y = planes(self.parts["train"][0]), torch.from_numpy(self.parts["train"][1])
            steps = epochs * (len(x) // 64)
            optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
            for step in tqdm(range(steps), desc="classifier"):
                pick = [data.item_index(len(x), 1, step * 64 + j) for j in range(64)]
                F.cross_entropy(net(x[pick]), y[pick]).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            data.write_atomic(path, lambda f: torch.save(net.state_dict(), f))
        net.eval()
        labels = self.parts["test"][1]
        return net, float((self.run(net, self.parts["test"][0]).argmax(1) == torch.from_numpy(labels)).float().mean())

    @staticmethod
    @torch.no_grad()
    def run(net, pictures):
        return torch.cat([net(planes(pictures[i:i + 256])) for i in range(0, len(pictures), 256)])

    def features(self, pictures):
        """Classifier features (n, 96), plain pixels of the pictures reduced to 8 x 8 (n, 192), classes read (n,)."""
        deep = self.run(self.net[:-1], pictures)
        pixels = F.adaptive_avg_pool2d(planes(pictures), 8).flatten(1)
        return deep.double(), pixels.double(), self.net[-1](deep).argmax(1)

    def score(self, pictures, labels=None):
        """Figures of a set of pictures against those trained on."""
        deep, pixels, read = self.features(pictures)
        distance = lambda a, b: frechet_distance(*moments(a), *moments(b))
        precision, recall = precision_recall(self.reference[0][:len(self.parts["train"][0])], deep)
        found = dict(fd=distance(self.reference[0], deep), fd_pixels=distance(self.reference[1], pixels), precision=precision, recall=recall)
        if labels is not None:
            found["legible"] = float((read == torch.as_tensor(labels)).float().mean())
        return found


def planes(pictures):
    return torch.from_numpy(np.asarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def moments(x):
    return x.mean(0).numpy(), torch.cov(x.T).numpy()


# ---------------------------------------------------------------------------------------------------------
# One arm

def trained(task, arm, seed):
    """The run directory of an arm, trained to its end."""
    flags, change = arms(task)[arm]
    out = task.out / "arms" / f"{Path(task.source).stem}-{task.steps}" / f"{arm.replace('/', '_').replace(' ', '-')}-seed{seed}"
    with changed(change):
        if not (out / "done").exists():
            train.main([str(word) for word in ("--dataset", "npz", "--data", task.file, *flags, "--steps", task.steps, "--seed", seed, "--device", "cpu",
                                               "--out", out, "--resume", "auto", "--sample-every", 10 ** 9, "--keep", 0)])
            (out / "done").touch()
    return out


def drawn(task, arm, seed, n, guidance=1.0, solver="euler", steps=25, size=None, batch=100):
    """Samples 0..n-1 of seed 0, classes in turn: uint8 (n, R, R, 3), their labels, network evaluations of one."""
    run, change = trained(task, arm, seed), arms(task)[arm][1]
    size = size or task.res
    path = run / f"drawn-{n}-{guidance:g}-{solver}-{steps}-{size}.npz"
    labels = np.arange(n) % task.classes
    if not path.exists():
        with changed(change):
            ckpt = sample.read_checkpoint(run)
            net, pictures = sample.load_model(ckpt, run), []
            for first in tqdm(range(0, n, batch), desc=f"{arm}, seed {seed}"):
                indices = range(first, min(n, first + batch))
                with sample.autocast(torch.device("cpu"), torch.bfloat16 if train.bfloat16_cpu() else None):
                    x, nfe = sample.generate(net, indices, 0, (size, size), torch.from_numpy(labels[indices.start:indices.stop]),
                                             guidance=guidance, solver=solver, steps=steps)
                pictures += [data.encode_image(p, size, size) for p in x]
        data.write_atomic(path, lambda f: np.savez(f, images=np.stack(pictures), nfe=nfe))
    arrays = data.read_npz(path, ("images", "nfe"))
    return arrays["images"], labels, int(arrays["nfe"])


def cost(task, arm):
    """Parameters, forward GFLOP of a training sample, and training PFLOP of an arm (backward: twice the forward)."""
    run = trained(task, arm, 0)
    config = sample.read_checkpoint(run)["config"]
    with changed(arms(task)[arm][1]):
        flops, parameters = asft.forward_flops(asft.Config(**config["model"]), config["settings"]["decode"])
    return dict(parameters=parameters, forward_gflop=flops / 1e9, training_pflop=3 * flops * 16 * task.steps / 1e15)


def loss(run):
    """Mean training loss of the last tenth of a run."""
    rows = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    return statistics.mean(rows[-max(1, len(rows) // 10):])


def compare(task, name, seeds):
    """Trains, samples and scores the arms of a claim."""
    wanted, affordable = CLAIMS[name]
    names = [arm for arm in arms(task) if arm in wanted or any(arm.startswith(w) and w == "windows" for w in wanted)]
    result = {}
    for seed in range(seeds or affordable):             # a seed of every arm first: what is there can be compared at any time
        for arm in names:
            pictures, labels, nfe = drawn(task, arm, seed, task.n)
            row = result.setdefault(arm, dict(cost(task, arm), seeds=[]))
            row["seeds"].append(dict(seed=seed, loss=loss(trained(task, arm, seed)), **task.score(pictures, labels)))
            write(task, name, result)
    return result


def sample_each_way(task):
    """Scores the samples of one model by guidance, solver and number of steps."""
    rows, pictures = [], {}
    for guidance, solver, steps in SAMPLING:
        found, labels, nfe = drawn(task, "spatial", 0, task.n, guidance, solver, steps)
        rows.append(dict(guidance=guidance, solver=solver, steps=steps, nfe=nfe, **task.score(found, labels)))
        pictures[f"{solver} {steps}, guidance {guidance:g}"] = found[:16]
        print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()), flush=True)
        stem = results(task, "sampling")
        data.write_atomic(f"{stem}.json", lambda f: f.write(json.dumps(dict(claim="sampling", data=Path(task.source).name, rows=rows,
                                                                            floor=task.score(*task.parts["test"])), indent=1).encode()))
        sheet(pictures, f"{stem}.png")


def results(task, name):
    (task.out / "results").mkdir(exist_ok=True)
    return task.out / "results" / f"{name}-{Path(task.source).stem}-{task.steps}"


def write(task, name, result):
    for row in result.values():
        for key in row["seeds"][0]:
            if key != "seed":
                values = [s[key] for s in row["seeds"]]
                row[key] = dict(mean=statistics.mean(values), spread=max(values) - min(values))
    report = dict(claim=name, data=Path(task.source).name, steps=task.steps, samples=task.n, classifier_accuracy=task.accuracy,
                  floor=task.score(*task.parts["test"]), arms=result)
    stem = results(task, name)
    data.write_atomic(f"{stem}.json", lambda f: f.write(json.dumps(report, indent=1).encode()))
    rows = {arm: drawn(task, arm, 0, task.n)[0][:16] for arm in result}
    sheet(rows, f"{stem}.png")
    print(f"{name}, {Path(task.source).name}, {task.steps} steps, floor fd {report['floor']['fd']:.3f}, classifier {task.accuracy:.3f}")
    for arm, row in result.items():
        figure = lambda key: f"{row[key]['mean']:8.4f} +-{row[key]['spread'] / 2:.4f}"
        print(f"  {arm:18} {row['parameters'] / 1e6:5.2f}M {row['forward_gflop']:6.3f} GFLOP  loss {figure('loss')}  fd {figure('fd')}  pixels "
              f"{figure('fd_pixels')}  P {figure('precision')}  R {figure('recall')}  legible {figure('legible')}", flush=True)


def sheet(rows, path, side=56):
    """A row of pictures for each name."""
    page = Image.new("RGB", (160 + side * max(map(len, rows.values())), side * len(rows)), "white")
    pen = ImageDraw.Draw(page)
    for y, (name, pictures) in enumerate(rows.items()):
        pen.text((6, side * y + side // 2 - 6), name, fill="black")
        for x, p in enumerate(pictures):
            page.paste(Image.fromarray(p).resize((side - 2, side - 2), Image.Resampling.NEAREST), (160 + side * x, side * y))
    data.write_atomic(path, lambda f: page.save(f, format="PNG"))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", choices=CLAIMS)
    p.add_argument("--data", required=True, help=".npz with images and labels")
    p.add_argument("--steps", type=int, default=3000, help="of every arm (default: 3000)")
    p.add_argument("--n", type=int, default=1000, help="samples of every arm (default: 1000)")
    p.add_argument("--seeds", type=int, help="default: 3")
    p.add_argument("--out", default="runs/claims")
    args = p.parse_args(argv)
    for flag in ("steps", "n"):
        if getattr(args, flag) < 100:
            p.error(f"--{flag} {getattr(args, flag)}: expected at least 100")
    task = Task(args)
    sample_each_way(task) if args.name == "sampling" else compare(task, args.name, args.seeds)


if __name__ == "__main__":
    try:
        main()
    except data.InputError as e:
        print(f"claims.py: {e}", file=sys.stderr)
        sys.exit(2)
