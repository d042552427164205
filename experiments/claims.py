"""The paper's claims, as far as two CPU cores can try them: python experiments/claims.py NAME [--data ...]

NAME is one of COMPARED, which trains and compares those arms with equal steps and seeds, or
sampling (Sec. 4): guidance, solver and steps of one model, quality against evaluations
upscale (Tab. 9): drawn finer than trained, against enlargements and true pictures
clouds (Tab. 4): 1-NNA, COV and MMD, beside training shapes and clouds that nobody had to learn
dense (Fig. 4b): 100,000 points against 2,048 of the same

Images: --data is an .npz with `images` and `labels` (default: 10,000 built-in glyphs); four fifths are
trained on, the rest is held out. Frechet distance, precision and recall, against what was trained on, are of
96 features of a classifier trained here on it; `pixels` and `patches` are Frechet distances of images reduced
to 8 x 8 and of all their patches of 8 x 8; `floor` is the score of n held-out images. Samples are 0 to n-1 of
seed 0, classes in turn, without guidance, Euler 25, averaged weights. Clouds: a tree of ShapeNet; SDE 250.

What is finished is kept in --out and not done again, an interrupted training goes on. Results are the table
printed, results/NAME-SET-STEPS.json there, and .png: the first samples, a row for each row of the table.
"""
import json
import math
import statistics
from functools import reduce
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import ENLARGE, drawn, enlarged, renders
import data
import model as asft
import sample
import train
from metrics import clouds
from metrics.frechet import Moments, frechet_distance
from metrics.precision_recall import precision_recall
from metrics.weights import sha256

# ---- What is tried: arms, flags of train.py and perhaps a change of the code that is no flag of it --------
def changed(arm):
    """A context in which the project's code is as an arm has it."""
    average, start = train.update_ema, asft.ASFT.init_weights

    def uniform_start(self):
        start(self)
        for attention in (block.attention for block in self.decoder):
            nn.init.xavier_uniform_(attention.kv.weight)
            nn.init.ones_(attention.q_norm.weight)

    def heads_apart(self):
        start(self)
        read, (n, D), H = self.encoder.read, self.encoder.inside.shape, self.encoder.read.heads
        side, rows = math.isqrt(n), max(k for k in range(1, H + 1) if H % k == 0 and k * k <= H)
        parts = F.adaptive_avg_pool2d(self.encoder.inside.T.view(D, side, side), (rows, H // rows))
        nn.init.zeros_(read.q.weight)
        read.q.bias.data.view(H, -1)[:, 0] = 10 * (D // H) ** 0.5
        read.k.weight.data.view(H, -1, D)[:, 0] = parts.flatten(1).T * (2 / D)

    def small_classes(self):
        start(self)
        nn.init.normal_(self.classes.weight, std=0.02)

    def at_once(ema, model, step, *rest):
        average(ema, model, 10 ** 9, *rest)
    if arm == "no EMA warm-up":
        return patch.object(train, "update_ema", at_once)
    starts = {"uniform start": uniform_start, "small classes": small_classes, "heads apart": heads_apart}
    start_of_arm = starts.get(arm.rpartition(", ")[2], start)
    return patch.object(asft.ASFT, "init_weights", start_of_arm)

def arms(task):
    """Flags of train.py by arm. `spatial` is the paper's form, `preset` that of recipe glyphs, which has 16
    heads in the encoder; decoded, widths and switches are changes of it, the others of `spatial`."""
    if isinstance(task, Clouds):
        return {"preset": [], "lr 1e-3": ["--lr", 1e-3], "logit-normal t": ["--times", "logit-normal"]}
    spatial = ["--encoder-heads", 0]                       # as many heads in the encoder as elsewhere
    perceiver = [*spatial, "--encoder", "perceiver", "--width", 120]               # nearest in parameters
    pairs, half = task.res ** 2, ["--lr", 1e-3]
    found = {
        "spatial": spatial, "linear": [*spatial, "--encoder", "linear"],
        "perceiver": perceiver, "perceiver, lr 1e-3": [*perceiver, *half],
        "encoder heads 16": ["--encoder-heads", 16], "encoder heads 64": ["--encoder-heads", 64],
        **{f"windows {p} x {p}": [*spatial, "--latents", (task.res // p) ** 2] for p in (2, 7)},
        "preset": [], "preset, small classes": [], "preset, heads apart": [], "no EMA warm-up": [],
        **{f"decoded 1/{share}": ["--decode", pairs // share] for share in (16, 8, 2, 1)},
        "width 64": ["--width", 64], "width 256": ["--width", 256],
        "width 256, lr 1e-3": ["--width", 256, *half],
        "2 levels": ["--levels", 2], "RoPE": ["--rope"],
        "uniform t": ["--times", "uniform"], "no QK-norm": ["--no-qk-norm"],
        "S": ["--model", "S", "--lr", 1e-4, "--schedule", "constant", "--batch-size", 8],
        "lr 1e-3": half, "lr 4e-3": ["--lr", 4e-3], "constant lr": ["--schedule", "constant"],
    }
    for share in (16, 1):
        steps = round(task.steps * flops(task.res, pairs // 4) / flops(task.res, pairs // share))
        found[f"decoded 1/{share}, FLOPs of 1/4"] = [*found[f"decoded 1/{share}"], "--steps", steps]
    local = "spatial", "encoder heads 16", "linear", "S"
    return found | {f"{arm}, uniform start": found[arm] for arm in local}

def flops(res, decode):
    """Forward FLOPs of a training picture under preset tiny."""
    return asft.forward_flops(asft.config("tiny", res=res, latents=(res // 4) ** 2), decode)[0]

COMPARED = {          # claim -> default of --steps, arms
    "latents": (2000, ("spatial", "perceiver", "perceiver, lr 1e-3")),                   # Tab. 8
    "decoded": (2000, ("encoder heads 16", "decoded 1/16", "decoded 1/8", "decoded 1/2", "decoded 1/1",
                       "decoded 1/16, FLOPs of 1/4", "decoded 1/1, FLOPs of 1/4")),      # Fig. 3b
    "widths": (2000, ("encoder heads 16", "width 64", "width 256", "width 256, lr 1e-3")),       # Fig. 3a
    "linear": (2000, ("spatial", "linear")),                                             # App. B
    "plateau": (800, ("spatial", "spatial, uniform start", "encoder heads 16",
                      "encoder heads 16, uniform start", "linear", "linear, uniform start")),
    "S": (200, ("S", "S, uniform start")),                 # the paper's preset and rate, for 64 pixels
    "classes": (2000, ("preset", "preset, small classes")),
    "heads": (1000, ("preset", "preset, heads apart", "linear")),
    "switches": (2000, ("encoder heads 16", "2 levels", "RoPE", "uniform t", "no QK-norm")),
    "ours": (2000, ("spatial", "encoder heads 16", "encoder heads 64", "windows 2 x 2", "windows 7 x 7")),
    "defaults": (1000, ("preset", "lr 1e-3", "lr 4e-3", "constant lr", "no EMA warm-up")),       # on CPUs
    "settings": (1500, ("preset", "lr 1e-3", "logit-normal t")),                         # of clouds on CPUs
}

SAMPLING = [*((1.0, "euler", steps) for steps in (5, 10, 25, 50)),
            *((guidance, "euler", 25) for guidance in (1.5, 2.0, 3.0)),
            *((1.0, "heun", steps) for steps in (3, 5, 13)), *((1.0, "dopri5", steps) for steps in (25, 50)),
            *((1.0, "sde", steps) for steps in (25, 100))]            # guidance, solver, steps

# ---- Pictures: the set, split, and the classifier whose features all arms are scored by -------------------
class Pictures:
    solver, steps_drawn = "euler", 25

    def __init__(self, args):
        self.out, self.steps, self.n = Path(args.out), args.steps, args.n
        self.out.mkdir(parents=True, exist_ok=True)
        source = args.data or store_glyphs(self.out / "glyphs.npz", 32)
        self.stem = Path(source).stem
        whole = data.Arrays(source)
        self.res = self.size = whole.res
        self.classes, self.count = len(whole.class_names), len(whole) * 4 // 5
        self.order = np.random.default_rng(0).permutation(len(whole))
        self.train, self.test = self.split(whole)
        self.made = self.out / f"{self.stem}-{sha256(source)[:8]}"     # of these very pictures
        file = f"{self.made}-train.npz"
        sample.write_atomic(file, lambda f: np.savez(f, images=self.train[0], labels=self.train[1]))
        self.flags = ["--dataset", "npz", "--data", file, "--model", "tiny",
                      "--latents", (self.res // 4) ** 2, "--decode", self.res ** 2 // 4]
        self.judge = Judge(f"{self.made}-classifier.pt", self.train, self.test, self.classes)
        self.facts = dict(samples=self.n, classifier_accuracy=self.judge.accuracy)
        self.floor = self.judge.score(*(part[:self.n] for part in self.test))

    def split(self, whole):
        """What is trained on and what is held out, each pictures and labels."""
        return [(np.stack([whole.item(i)[0] for i in part]), whole.labels[part])
                for part in (self.order[:self.count], self.order[self.count:])]

    def score(self, pictures):
        return self.judge.score(pictures, np.arange(len(pictures)) % self.classes)

    def show(self, pictures):
        return [*pictures[:16]]

def store_glyphs(path, res, count=10_000):
    if not path.exists():
        images, labels = renders(res, count, "train")
        sample.write_atomic(path, lambda f: np.savez(f, images=images, labels=labels))
    return path

class Judge:
    """A small classifier of real pictures, and sets of pictures scored by its features."""

    def __init__(self, path, known, held_out, classes, epochs=12):
        torch.manual_seed(0)
        layers = []
        for a, b in ((3, 24), (24, 48), (48, 96)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, classes))
        if Path(path).exists():
            self.net.load_state_dict(torch.load(path, weights_only=True))
        else:
            self.fit(planes(known[0]), torch.from_numpy(known[1]), epochs)
            sample.write_atomic(path, lambda f: torch.save(self.net.state_dict(), f))
        self.net.eval()
        self.known = self.features(known[0])
        self.accuracy = float((self.features(held_out[0])[2] == torch.from_numpy(held_out[1])).float().mean())

    def fit(self, x, y, epochs, batch=64):
        """Trains on pictures x (n, 3, R, R) of classes y (n,)."""
        steps = epochs * (len(x) // batch)
        optimizer = torch.optim.AdamW(self.net.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        for step in tqdm(range(steps), desc="classifier"):
            pick = [data.item_index(len(x), 1, step * batch + j) for j in range(batch)]
            F.cross_entropy(self.net(x[pick]), y[pick]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    @torch.no_grad()
    def features(self, pictures):
        """Classifier features (n, 96), pixels of pictures reduced to 8 x 8 (n, 192), classes read (n,)."""
        parts = [planes(pictures[i:i + 128]) for i in range(0, len(pictures), 128)]
        deep = torch.cat([self.net[:-1](x) for x in parts])
        pixels = torch.cat([F.adaptive_avg_pool2d(x, 8).flatten(1) for x in parts])
        return deep.double(), pixels.double(), self.net[-1](deep).argmax(1)

    def score(self, pictures, labels, real=None):
        """Against what was trained on; `patches` against real pictures, where some are given."""
        deep, pixels, read = self.features(pictures)
        precision, recall = precision_recall(self.known[0], deep)
        more = {} if real is None else dict(patches=distance(patches(pictures), patches(real)))
        return dict(fd=distance([self.known[0]], [deep]), pixels=distance([self.known[1]], [pixels]),
                    precision=precision, recall=recall,
                    read=100 * float((read == torch.as_tensor(labels)).float().mean()), **more)

def planes(pictures):
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1

def distance(a, b):
    """Frechet distance of two sets of features, each some tensors (n, D)."""
    return frechet_distance(*moments(a), *moments(b))

def moments(parts):
    found = reduce(Moments.merge, (Moments(x.shape[1]).update(x) for x in parts))
    return found.mean, found.cov

def patches(pictures, side=8):
    """The pixels of all patches of side x side of pictures. Gaussians of whole pictures need more than a few
    hundred: of 36 with 49,152 numbers, blurred samples beat true renders."""
    for i in range(0, len(pictures), 100):
        x = F.unfold(planes(pictures[i:i + 100]).double(), side, stride=side - 1)        # at every phase
        yield x.transpose(1, 2).flatten(0, 1)

# ---- Clouds: the set, and its held-out shapes ------------------------------------------------------------
class Clouds:
    solver, steps_drawn = "sde", 250

    def __init__(self, args):
        self.out, self.steps, self.stem = Path(args.out), args.steps, args.category if args.data else "solids"
        self.made = self.out / self.stem
        self.points = self.size = train.SMALL_POINTS["points"]
        kind, splits, self.flags = dict(name="solids"), ("train", "val"), ["--dataset", "solids"]
        if args.data:
            kind, splits = dict(name="shapenet", path=args.data, category=args.category), (*splits, "test")
            self.flags = ["--dataset", "shapenet", "--data", args.data, "--category", args.category]
        known, *others = (data.load(**kind, split=split, points=self.points) for split in splits)
        shapes = range(len(known) if args.data else 350)               # the solids have no end
        self.known = np.stack([known.item(i)[0] for i in shapes])
        self.again = np.stack([known.item(i, np.random.default_rng((1, i)))[0] for i in shapes])
        self.reference = np.stack([s.item(i)[0] for s in others for i in range(len(s) if args.data else 70)])
        self.n = len(self.reference)
        self.facts = dict(references=self.n, training_shapes=len(self.known), points=self.points)
        self.floor = self.to_training(self.reference)

    def score(self, found):
        boxed, reference, result = clouds.normalise_box(found), clouds.normalise_box(self.reference), {}
        for name, kind in (("cd", "chamfer"), ("emd", "lion")):
            scores = clouds.scores(reference, boxed, kind, progress=False)
            result |= {f"{key}_{name}": value for key, value in scores.items()}
        return result | self.to_training(found)

    def to_known(self, found):
        """Squared Chamfer distances of the training shapes to some clouds."""
        boxed = (clouds.normalise_box(c) for c in (self.known, found))
        return clouds.pairwise(*boxed, "chamfer", progress=False)

    def to_training(self, found):
        return dict(to_training=1e3 * float(self.to_known(found).min(0).mean()))

    def show(self, found):
        return [sample.draw_points(cloud, 160) for cloud in found[:8]]

# ---- One arm ----------------------------------------------------------------------------------------------
def trained(task, arm, seed):
    """The run directory of an arm, trained to its end."""
    name = arm.replace("/", "_").replace(" ", "-")
    out = task.out / "arms" / f"{task.made.name}-{task.steps}" / f"{name}-seed{seed}"
    if not (out / "done").exists():
        words = [*task.flags, "--steps", task.steps, *arms(task)[arm], "--seed", seed, "--device", "cpu",
                 "--out", out, "--resume", "auto", "--sample-every", 10 ** 9, "--keep", 0]
        with changed(arm):
            train.main([*map(str, words)])
        checkpoint = sample.read_checkpoint(out, mmap=True)
        if checkpoint["step"] < checkpoint["config"]["settings"]["steps"]:
            raise KeyboardInterrupt                        # train.py saves on Ctrl-C, and returns
        (out / "done").touch()
    return out

def samples(task, arm, seed, guidance=1.0, solver=None, steps=None, size=None, first=0, n=None):
    """Samples first..first+n-1 of seed 0 of a trained arm, and the network evaluations of one."""
    run, solver, steps = trained(task, arm, seed), solver or task.solver, steps or task.steps_drawn
    n, size = n or task.n, size or task.size
    path = run / f"drawn-{first}-{n}-{guidance:g}-{solver}-{steps}-{size}.npz"
    if not path.exists():
        model, checkpoint = sample.load(run)
        shape = (size, size) if model.cfg.domain == "image" else size
        options = {"evaluations" if solver == "dopri5" else "steps": steps}
        setting = sample.resolve(model.cfg, checkpoint, shape, guidance=guidance, solver=solver,
                                 options=options, noise="white", dtype=train.cpu_dtype())
        found, nfe = drawn(model, setting, range(first, first + n))
        sample.write_atomic(path, lambda f: np.savez(f, images=found, nfe=nfe))
    arrays = np.load(path, allow_pickle=False)
    return arrays["images"], int(arrays["nfe"])

def cost(task, arm):
    """Parameters, forward GFLOP of a training sample, and training TFLOP (backward: twice the forward)."""
    config = sample.read_checkpoint(trained(task, arm, 0))["config"]
    settings = config["settings"]
    forward, parameters = asft.forward_flops(asft.Config(**config["model"]), settings["decode"])
    return dict(parameters=parameters / 1e6, gflop=forward / 1e9,
                training_tflop=3 * forward * settings["batch_size"] * settings["steps"] / 1e12)

def loss(run):
    """Mean training loss of the last tenth of a run."""
    rows = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    return statistics.mean(rows[-max(1, len(rows) // 10):])

# ---- The claims: each yields an arm, the figures of one seed, what they were taken of, and facts ----------
def compare(task, args):
    """Trains, samples and scores the arms of a claim."""
    fitting = [arm for arm in COMPARED[args.name][1]
               if not arm.startswith("windows") or task.res % int(arm[-1]) == 0]
    for seed in range(args.seeds):                 # a seed of every arm first: these can be compared
        for arm in fitting:
            found, _ = samples(task, arm, seed)
            figures = dict(seed=seed, **task.score(found), loss=loss(trained(task, arm, seed)))
            yield arm, figures, found, cost(task, arm)

def sampling(task, args):
    """Scores the samples of one model by guidance, solver and number of steps."""
    for guidance, solver, steps in SAMPLING:
        found, nfe = samples(task, "encoder heads 16", 0, guidance, solver, steps)
        more = f", guidance {guidance:g}" if guidance != 1 else ""
        yield f"{solver} {steps}{more}", dict(seed=0, **task.score(found)), found, dict(nfe=nfe)

def upscale(task, args):
    """Tab. 9: drawn finer than trained, against enlargements of what is drawn at the size trained on."""
    coarse, in_turn = samples(task, "preset", 0)[0], np.arange(task.n) % task.classes
    for path in args.fine or [store_glyphs(task.out / f"glyphs{res}.npz", res) for res in (64, 128)]:
        whole = data.Arrays(path)
        known, held_out = task.split(whole)
        if not (np.array_equal(known[1], task.train[1]) and np.array_equal(held_out[1], task.test[1])):
            raise ValueError(f"{path}: expected the pictures of --data, finer, with their labels")
        judge = Judge(f"{task.made}-{sha256(path)[:8]}-classifier.pt", known, held_out, task.classes,
                      max(4, 16_000 // len(known[0])))
        rows = {"drawn": (samples(task, "preset", 0, size=whole.res)[0], in_turn),
                **{how: (enlarged(coarse, whole.res, how), in_turn) for how in ENLARGE},
                "true pictures, held out": [part[:task.n] for part in held_out]}
        for arm, (found, labels) in rows.items():
            figures = dict(seed=0, **judge.score(found, labels, known[0][:2000]))
            yield f"{arm} at {whole.res}", figures, found, dict(classifier_accuracy=100 * judge.accuracy)

def shapes(task, args):
    """Tab. 4, beside clouds that nobody had to learn."""
    cov, mean = np.cov(task.known.reshape(-1, 3).T), task.known.reshape(-1, 3).mean(0)
    for seed in range(args.seeds):
        rng = np.random.default_rng(seed)
        found, _ = samples(task, "preset", 0, first=seed * task.n)
        chosen = rng.permutation(len(task.known))[:task.n]
        near = task.again[task.to_known(found).argmin(0)] + rng.normal(0, 0.03, found.shape)
        rows = {"ASFT": found, "training shapes, other points": task.again[chosen],
                "the training shape nearest to each sample of ASFT, noise 0.03": near,
                "each point from one Gaussian": rng.multivariate_normal(mean, cov, found.shape[:2])}
        for arm, cloud in rows.items():
            cloud = np.asarray(cloud, np.float32)
            yield arm, dict(seed=seed, **task.score(cloud)), cloud, {}

def dense(task, args, many=100_000, few=2048, objects=4, regions=64):
    """Fig. 4b. The surface is what one half of the dense points shows; how far from it lie the others, and
    the sparse sample's? It shows whether asking for more points changes them, not how good they are."""
    sparse, full = (samples(task, "preset", 0, size=size, n=objects)[0] for size in (few, many))

    def gap(points, surface):
        distance = torch.cat([torch.cdist(part, surface).amin(1) for part in points.split(500)])
        return dict(median=1e3 * float(distance.median()), p99=1e3 * float(distance.quantile(0.99)))

    def share(points, centres):
        """Of points in the region of each centre."""
        nearest = np.linalg.norm(points[:, None] - centres, axis=-1).argmin(1)
        return np.bincount(nearest, minlength=regions) / len(points)
    for i in range(objects):
        surface, rest = (torch.from_numpy(part.copy()) for part in (full[i][::2], full[i][1::2]))
        rng = np.random.default_rng(i)
        centres = full[i][rng.permutation(many)[:regions]]
        whole = share(full[i], centres)
        density, chance = (50 * float(np.abs(p - whole).sum())
                           for p in (share(sparse[i], centres), rng.multinomial(few, whole) / few))
        yield f"{many:,} points", dict(seed=i, **gap(rest, surface)), full, {}
        found = gap(torch.from_numpy(sparse[i]), surface)
        yield f"{few:,} points", dict(seed=i, **found, density=density, chance=chance), sparse, {}

CLAIMS = {**{name: (Pictures, compare, steps) for name, (steps, _) in COMPARED.items()},
          "settings": (Clouds, compare, COMPARED["settings"][0]), "sampling": (Pictures, sampling, 2000),
          "upscale": (Pictures, upscale, 10_000), "clouds": (Clouds, shapes, 6000),
          "dense": (Clouds, dense, 6000)}                                # what of, how, default of --steps

# ---- Results ----------------------------------------------------------------------------------------------
COLUMNS = {"parameters": ("parameters", "{:.2f}M"), "gflop": ("forward GFLOP", "{:.3f}"),
           "training_tflop": ("training TFLOP", "{:.1f}"), "nfe": ("NFE", "{}"), "done": ("steps", "{:.0f}"),
           "fd": ("Frechet distance", "{:.3g}"), "pixels": ("pixels", "{:.3g}"),
           "patches": ("patches", "{:.3g}"), "precision": ("precision", "{:.2f}"),
           "recall": ("recall", "{:.2f}"), "read": ("read as its class, %", "{:.0f}"),
           "loss": ("loss", "{:.3f}"), "1nna_cd": ("1-NNA CD", "{:.1f}"),
           "1nna_emd": ("1-NNA EMD", "{:.1f}"), "cov_cd": ("COV CD", "{:.1f}"),
           "cov_emd": ("COV EMD", "{:.1f}"), "mmd_cd": ("MMD CD", "{:.2f}"), "mmd_emd": ("MMD EMD", "{:.2f}"),
           "to_training": ("CD to the nearest training shape", "{:.2f}"),
           "median": ("median distance to the surface", "{:.1f}"), "p99": ("99th percentile", "{:.1f}"),
           "density": ("points in another region, %", "{:.1f}"), "chance": ("... by chance", "{:.1f}"),
           "gradient": ("gradient", "{:.4f}"), "time_ratio": ("time ratio", "{}")}

def table(found):
    """A result in Markdown: means over the seeds, and half of the range where there are several."""
    columns = [key for key in COLUMNS
               if any(key in row or key in row["seeds"][0] for row in found["arms"].values())]
    heads = [COLUMNS[key][0] for key in columns] + ["samples" if found["claim"] == "dense" else "seeds"]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for arm, row in found["arms"].items():
        cells = [cell(key, row) for key in columns]
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {len(row['seeds'])} |")
    if found["floor"].keys() & {*columns}:
        cells = [cell(key, found["floor"]) for key in columns]
        lines.append("| floor (held out) | " + " | ".join(cells) + " | - |")
    return "\n".join(lines)

def cell(key, row):
    values = [row[key]] if key in row else [seed[key] for seed in row.get("seeds", ()) if key in seed]
    if len(values) < 2:
        return COLUMNS[key][1].format(*values) if values else "-"
    text, half = COLUMNS[key][1].format(statistics.mean(values)), (max(values) - min(values)) / 2
    return f"{text} ± {float(f'{half:.2g}'):g}"

def main(argv=None):
    p = sample.flag_parser(__doc__)
    p.add_argument("name", choices=CLAIMS)
    p.add_argument("--data", help=".npz, or tree of ShapeNet (default: built-in glyphs and solids)")
    p.add_argument("--fine", nargs="+", help="upscale: the same pictures, finer (default: glyphs)")
    p.add_argument("--category", default="airplane", help="of clouds (default: airplane)")
    p.add_argument("--steps", type=sample.positive, help="of every arm (default: 200 to 10,000, by claim)")
    p.add_argument("--n", type=sample.positive, default=300, help="pictures of an arm (default: 300)")
    p.add_argument("--seeds", type=sample.positive, default=3, help="trainings, or sets of clouds (3)")
    p.add_argument("--out", default="runs/claims")
    args = p.parse_args(argv)
    kind, claim, steps = CLAIMS[args.name]
    args.steps = args.steps or steps
    task, rows = kind(args), {}
    floor = {} if args.name == "upscale" else task.floor               # which has its own, for each size
    result = dict(claim=args.name, data=task.stem, steps=task.steps, **task.facts, floor=floor, arms={})
    for arm, figures, found, facts in claim(task, args):
        result["arms"].setdefault(arm, dict(facts, seeds=[]))["seeds"].append(figures)
        rows.setdefault(arm, task.show(found))
        print(arm, *(f"{key} {value:.4g}" for key, value in figures.items()), sep="  ", flush=True)
    path = task.out / "results" / f"{args.name}-{task.stem}-{task.steps}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    sample.write_json(path, result)
    tiles = [tile for row in rows.values() for tile in row]
    sample.write_png(path.with_suffix(".png"), sample.grid_image(tiles, len(tiles) // len(rows)))
    print(f"\n{table(result)}\n\n{path} and .png")

if __name__ == "__main__":
    sample.run_main(main)
