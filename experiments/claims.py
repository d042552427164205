"""The paper's claims, as far as two CPU cores can try them: python experiments/claims.py NAME [--data ...]

| NAME     | the paper                                       | compared here, equal steps and seeds       |
|----------|-------------------------------------------------|--------------------------------------------|
| latents  | Tab. 8: spatial latents 7.03, PerceiverIO 65.09 | as many parameters, two learning rates     |
| decoded  | Fig. 3b: decoding fewer pairs saves FLOPs       | 1/16 to all pairs; at 1/4's FLOPs          |
| widths   | Fig. 3a: larger models are better               | width 64, 128, 256                         |
| linear   | App. B: ASFT-linear is a cheap variant          | spatial, linear                            |
| plateau  | not in the paper: the decoder starts local      | spatial, 16 heads, linear; uniform start   |
| switches | levels, RoPE, logit-normal t, QK-norm           | one at a time                              |
| ours     | not in the paper                                | heads, windows, latents in the query       |
| defaults | not in the paper: the CPU recipe                | learning rate, schedule, EMA's warm-up     |
| sampling | Sec. 4: guidance, solver, steps                 | one model, quality against evaluations     |
| upscale  | Tab. 9: drawn at 4x 23.09, bicubic 24.34        | trained at 32, against true 64 and 128     |
| clouds   | Tab. 4: 1-NNA, COV, MMD                         | the CPU recipe, training shapes, baselines |
| settings | not in the paper: the CPU recipe of clouds      | learning rate, distribution of t           |
| dense    | Fig. 4b: 50 x denser clouds                     | 100,000 points against 2,048 of the same   |

Images: --data is an .npz with `images` and `labels` (default: 10,000 built-in glyphs); four fifths are
trained on, the rest is held out. Frechet distance, precision and recall, against what was trained on, are of
96 features of a classifier trained here on it; `pixels` and `patches` are Frechet distances of images reduced
to 8 x 8 and of all their patches of 8 x 8; `floor` is the score of n held-out images. Samples are 0 to n-1 of
seed 0, classes in turn, without guidance, Euler 25, averaged weights. Clouds: a tree of ShapeNet; SDE 250.

What is finished is kept in --out and not done again, an interrupted training goes on; what was made of other
data or with other flags is refused. Results are results/NAME-SET-STEPS.json and .png there, and the table
printed, which `claims.py show FILE.json` prints again.
"""
import argparse
import json
import statistics
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])

import data  # noqa: E402
import model as asft  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from glyph_report import ENLARGE, convolutions, enlarged, fit, patches, planes, renders  # noqa: E402
from metrics import clouds  # noqa: E402
from metrics.frechet import frechet_distance  # noqa: E402
from metrics.precision_recall import precision_recall  # noqa: E402
from metrics.weights import sha256  # noqa: E402

# ---- What is tried: arms, flags of train.py and perhaps a change of the code that is no flag of it --------

CHANGES = "uniform start", "no EMA warm-up"                            # ends of arms' names

def changed(arm):
    """A context in which the project's code is without the part that an arm does without."""
    average, start = train.update_ema, asft.ASFT.init_weights

    def uniform_start(self):
        start(self)
        for attention in (block.attention for block in self.decoder):
            nn.init.xavier_uniform_(attention.kv.weight)
            nn.init.ones_(attention.q_norm.weight)

    def at_once(ema, model, step, *rest):
        average(ema, model, 10 ** 9, *rest)
    if arm.endswith("uniform start"):
        return patch.object(asft.ASFT, "init_weights", uniform_start)
    return patch.object(train, "update_ema", at_once) if arm.endswith("no EMA warm-up") else nullcontext()

def arms(task):
    """Flags of train.py by arm. `spatial` is the paper's form, `preset` that of the CPU recipe, which has 16
    heads in the encoder; decoded, widths and switches are changes of it, the others of `spatial`."""
    if isinstance(task, Clouds):
        return {"preset": [], "lr 1e-3": ["--lr", 1e-3], "logit-normal t": ["--times", "logit-normal"]}
    pairs = task.res ** 2

    def preset(*more, share=4, window=4):
        return ["--latents", (task.res // window) ** 2, "--decode", pairs // share, *more]

    def spatial(*more, window=4):                          # as many heads in the encoder as elsewhere
        return preset("--encoder-heads", 0, *more, window=window)

    def at_equal_flops(share):
        steps = round(task.steps * flops(task.res, pairs // 4) / flops(task.res, pairs // share))
        return preset("--steps", steps, share=share)
    perceiver = spatial("--encoder", "perceiver", "--width", perceiver_width(task.res))
    found = {
        "spatial": spatial(), "linear": spatial("--encoder", "linear"),
        "perceiver": perceiver, "perceiver, lr 1e-3": [*perceiver, "--lr", 1e-3],
        "encoder heads 16": preset("--encoder-heads", 16), "encoder heads 64": preset("--encoder-heads", 64),
        **{f"windows {p} x {p}": spatial(window=p) for p in (2, 7, 8)},
        "preset": preset(), "no EMA warm-up": preset(),
        **{f"decoded 1/{share}": preset(share=share) for share in (16, 8, 2, 1)},
        **{f"decoded 1/{share}, FLOPs of 1/4": at_equal_flops(share) for share in (16, 1)},
        "width 64": preset("--width", 64), "width 256": preset("--width", 256),
        "width 256, lr 1e-3": preset("--width", 256, "--lr", 1e-3),
        "2 levels": preset("--levels", 2), "RoPE": preset("--rope"),
        "uniform t": preset("--times", "uniform"), "no QK-norm": preset("--no-qk-norm"),
        "lr 1e-3": preset("--lr", 1e-3), "lr 4e-3": preset("--lr", 4e-3),
        "constant lr": preset("--schedule", "constant"),
    }
    return found | {f"{arm}, uniform start": found[arm] for arm in ("spatial", "encoder heads 16", "linear")}

@cache
def perceiver_width(res):
    """The width at which the PerceiverIO has most nearly as many parameters as the spatial model of 128."""
    def count(**changes):
        with torch.device("meta"):
            model = asft.ASFT(asft.config("tiny", res=res, latents=(res // 4) ** 2, **changes))
        return sum(p.numel() for p in model.parameters())
    goal = count()
    return min(range(96, 161, 4), key=lambda width: abs(count(encoder="perceiver", width=width) - goal))

@cache
def flops(res, decode):
    """Forward FLOPs of a training picture under preset tiny."""
    return asft.forward_flops(asft.config("tiny", res=res, latents=(res // 4) ** 2), decode)[0]

COMPARED = {          # claim -> default of --steps, arms
    "latents": (2000, ("spatial", "perceiver", "perceiver, lr 1e-3")),
    "decoded": (2000, ("encoder heads 16", "decoded 1/16", "decoded 1/8", "decoded 1/2", "decoded 1/1",
                       "decoded 1/16, FLOPs of 1/4", "decoded 1/1, FLOPs of 1/4")),
    "widths": (2000, ("encoder heads 16", "width 64", "width 256", "width 256, lr 1e-3")),
    "linear": (2000, ("spatial", "linear")),
    "plateau": (800, ("spatial", "spatial, uniform start", "encoder heads 16",
                      "encoder heads 16, uniform start", "linear", "linear, uniform start")),
    "switches": (2000, ("encoder heads 16", "2 levels", "RoPE", "uniform t", "no QK-norm")),
    "ours": (2000, ("spatial", "encoder heads 16", "encoder heads 64", "windows 2 x 2", "windows 7 x 7",
                    "windows 8 x 8")),
    "defaults": (1000, ("preset", "lr 1e-3", "lr 4e-3", "constant lr", "no EMA warm-up")),
    "settings": (1500, ("preset", "lr 1e-3", "logit-normal t")),
}

SAMPLING = [*((1.0, "euler", steps) for steps in (5, 10, 25, 50)),
            *((guidance, "euler", 25) for guidance in (1.5, 2.0, 3.0)),
            *((1.0, "heun", steps) for steps in (3, 5, 13)), *((1.0, "dopri5", steps) for steps in (25, 50)),
            *((1.0, "sde", steps) for steps in (25, 100))]            # guidance, solver, steps

# ---- Pictures: the set, split, and the classifier whose features all arms are scored by -------------------

class Pictures:
    solver, steps_drawn = "euler", 25

    def __init__(self, args):
        self.out, self.steps, self.n, self.stem = Path(args.out), args.steps, args.n, Path(args.data).stem
        self.out.mkdir(parents=True, exist_ok=True)
        source = args.data if args.data != "glyphs" else store_glyphs(self.out / "glyphs.npz", 32)
        whole = data.Arrays(source)
        self.res = self.size = whole.res
        self.classes, self.count = len(whole.class_names), len(whole) * 4 // 5
        self.order = np.random.default_rng(0).permutation(len(whole))
        self.train, self.test = self.split(whole)
        seen = len(set(self.train[1].tolist()))
        if len(whole) < 100 or self.res % 4 or self.res < 8 or not 2 <= self.classes == seen:
            raise ValueError(f"{source}: {len(whole)} pictures of {self.res} pixels, `labels` of "
                             f"{self.classes} classes, {seen} in the four fifths trained on; expected 100 or "
                             f"more, a multiple of 4 from 8 on, two classes or more, all of them there")
        keep(self.out / f"{self.stem}-train.json", dict(source=sha256(source)),
             f"made of another {Path(source).name}")
        file = self.out / f"{self.stem}-train.npz"
        if not file.exists():
            sample.write_atomic(file, lambda f: np.savez(f, images=self.train[0], labels=self.train[1]))
        self.flags = ["--dataset", "npz", "--data", file]
        self.judge = Judge(self.out / f"{self.stem}-classifier.pt", self.train, self.test, self.classes)
        self.facts = dict(samples=self.n, classifier_accuracy=self.judge.accuracy)

    def split(self, whole):
        """What is trained on and what is held out, each pictures and labels."""
        return [(np.stack([whole.item(i)[0] for i in part]), whole.labels[part])
                for part in (self.order[:self.count], self.order[self.count:])]

    def label(self, n):
        return np.arange(n) % self.classes

    def score(self, pictures):
        return self.judge.score(pictures, self.label(len(pictures)))

    def floor(self):
        return self.judge.score(*(part[:self.n] for part in self.test))

    def show(self, pictures):
        return pictures[:16]

def keep(path, facts, otherwise):
    """Stores how something was made, as JSON. Raises ValueError where it is there, made in another way."""
    words = json.dumps(facts, default=str)
    if not path.exists():
        sample.write_atomic(path, lambda f: f.write(words.encode()))
    elif path.read_text() != words:
        raise ValueError(f"{path}: {otherwise}; expected another --out")

def store_glyphs(path, res, count=10_000):
    if not path.exists():
        images, labels = renders(res, count, "train"), np.arange(count) % 36
        sample.write_atomic(path, lambda f: np.savez(f, images=images, labels=labels))
    return path

class Judge:
    """A small classifier of real pictures, and sets of pictures scored by its features."""

    def __init__(self, path, known, held_out, classes, epochs=12):
        torch.manual_seed(0)
        self.net = nn.Sequential(*convolutions(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                 nn.Linear(96, classes))
        if path.exists():
            with data.reading(path, "the classifier trained before, of the same classes: delete it"):
                self.net.load_state_dict(torch.load(path, weights_only=True))
        else:
            fit(self.net, planes(known[0]), torch.from_numpy(known[1]), epochs, batch=64, weight_decay=0.05)
            sample.write_atomic(path, lambda f: torch.save(self.net.state_dict(), f))
        self.net.eval()
        self.known = self.features(known[0])
        self.accuracy = float((self.features(held_out[0])[2] == torch.from_numpy(held_out[1])).float().mean())

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
        more = {} if real is None else dict(patches=patch_distance(pictures, real))
        return dict(fd=distance(self.known[0], deep), pixels=distance(self.known[1], pixels),
                    precision=precision, recall=recall,
                    read=100 * float((read == torch.as_tensor(labels)).float().mean()), **more)

def distance(a, b):
    """Frechet distance of two sets of features, float64 (n, D)."""
    return frechet_distance(*(z.numpy() for x in (a, b) for z in (x.mean(0), torch.cov(x.T))))

def patch_distance(a, b):
    """Frechet distance of all patches of 8 x 8 of two sets of pictures."""
    return frechet_distance(*patches(a), *patches(b))

# ---- Clouds: the set, and its held-out shapes ------------------------------------------------------------

class Clouds:
    solver, steps_drawn = "sde", 250

    def __init__(self, args):
        self.out, self.steps, self.stem = Path(args.out), args.steps, args.category if args.data else "solids"
        self.out.mkdir(parents=True, exist_ok=True)
        self.points = self.size = train.SMALL_POINTS["points"]
        kind, splits = dict(name="solids"), ("train", "val")
        self.flags = ["--dataset", "solids"]
        if args.data:
            kind, splits = dict(name="shapenet", path=args.data, category=args.category), (*splits, "test")
            self.flags = ["--dataset", "shapenet", "--data", args.data, "--category", args.category]
        known, *others = (data.load(**kind, split=split, points=self.points) for split in splits)
        self.classes = len(known.class_names)
        shapes = range(len(known) if args.data else 350)               # the solids have no end
        self.known = np.stack([known.item(i)[0] for i in shapes])
        self.again = np.stack([known.item(i, np.random.default_rng((1, i)))[0] for i in shapes])
        self.reference = np.stack([s.item(i)[0] for s in others for i in range(len(s) if args.data else 70)])
        self.n = len(self.reference)
        self.facts = dict(references=self.n, training_shapes=len(self.known), points=self.points)

    def label(self, n):
        return np.arange(n) % self.classes if self.classes else None

    def score(self, found):
        boxed, reference, result = clouds.normalise_box(found), clouds.normalise_box(self.reference), {}
        for name, distance in (("cd", "chamfer"), ("emd", "lion")):
            scores = clouds.scores(reference, boxed, distance, progress=False)
            result |= {f"{key}_{name}": value for key, value in scores.items()}
        return dict(result, to_training=1e3 * float(self.to_known(found).min(0).mean()))

    def to_known(self, found):
        """Squared Chamfer distances of the training shapes to some clouds."""
        boxed = (clouds.normalise_box(c) for c in (self.known, found))
        return clouds.pairwise(*boxed, "chamfer", progress=False)

    def floor(self):
        return dict(to_training=1e3 * float(self.to_known(self.reference).min(0).mean()))

    def show(self, found):
        return [sample.draw_points(cloud, 160) for cloud in found[:8]]

# ---- One arm ----------------------------------------------------------------------------------------------

def trained(task, arm, seed):
    """The run directory of an arm, trained to its end."""
    flags, change = arms(task)[arm], next((text for text in CHANGES if arm.endswith(text)), None)
    name = arm.replace("/", "_").replace(" ", "-")
    out = task.out / "arms" / f"{task.stem}-{task.steps}" / f"{name}-seed{seed}"
    how = [*map(str, flags), change]
    if not (out / "done").exists():
        words = [*task.flags, "--steps", task.steps, *flags, "--seed", seed, "--device", "cpu", "--out", out,
                 "--resume", "auto", "--sample-every", 10 ** 9, "--keep", 0]
        with changed(arm):
            train.main([*map(str, words)])
        steps = json.loads((out / "config.json").read_text())["settings"]["steps"]
        if json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] < steps:
            raise KeyboardInterrupt                        # train.py saves on Ctrl-C, and returns
    keep(out / "done", how, "trained with other flags than this arm has now")
    return out

def drawn(task, arm, seed, n, guidance=1.0, solver=None, steps=None, size=None, first=0):
    """Samples first..first+n-1 of a trained arm, and the network evaluations of one."""
    run, solver, steps = trained(task, arm, seed), solver or task.solver, steps or task.steps_drawn
    size, more = size or task.size, f"-from-{first}" if first else ""
    path = run / f"drawn-{n}-{guidance:g}-{solver}-{steps}-{size}{more}.npz"
    if not path.exists():
        how = {"evaluations" if solver == "dopri5" else "steps": steps}
        with changed(arm):
            found, nfe = generated(sample.load(run)[0], task.label(n), n, size, first, guidance=guidance,
                                   solver=solver, **how)
        sample.write_atomic(path, lambda f: np.savez(f, images=found, nfe=nfe))
    arrays = np.load(path, allow_pickle=False)
    return arrays["images"], int(arrays["nfe"])

def generated(net, label, n, size, first=0, **how):
    """Samples first..first+n-1 of seed 0: uint8 (n, R, R, 3) or float32 (n, P, 3), and the evaluations."""
    image, found, pairs = net.cfg.domain == "image", [], size
    if image:
        size, pairs = (size, size), size ** 2
    for some in tqdm(torch.arange(n).split(max(1, min(100, 100_000 // pairs))), desc="samples"):
        with sample.autocast(net.device, "auto", train.cpu_dtype()):
            x, nfe = sample.generate(net, (first + some).tolist(), 0, size, chunk=16384, **how,
                                     label=None if label is None else torch.from_numpy(label)[some])
        found += [sample.to_pixels(values, *size) if image else values.numpy() for values in x]
    return np.stack(found), nfe

def cost(task, arm):
    """Parameters, forward GFLOP of a training sample, and training TFLOP (backward: twice the forward)."""
    config = sample.read_checkpoint(trained(task, arm, 0))["config"]
    settings = config["settings"]
    with changed(arm):
        forward, parameters = asft.forward_flops(asft.Config(**config["model"]), settings["decode"])
    return dict(parameters=parameters / 1e6, gflop=forward / 1e9,
                training_tflop=3 * forward * settings["batch_size"] * settings["steps"] / 1e12)

def loss(run):
    """Mean training loss of the last tenth of a run."""
    rows = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    return statistics.mean(rows[-max(1, len(rows) // 10):])

# ---- The claims -------------------------------------------------------------------------------------------

def compare(task, report, args):
    """Trains, samples and scores the arms of a claim."""
    fitting = [arm for arm in COMPARED[report.found["claim"]][1]
               if not arm.startswith("windows") or task.res % int(arm[-1]) == 0]
    for seed in range(args.seeds):                 # a seed of every arm first: these can be compared
        for arm in fitting:
            found, _ = drawn(task, arm, seed, task.n)
            report.add(arm, dict(seed=seed, **task.score(found), loss=loss(trained(task, arm, seed))), found,
                       **cost(task, arm))

def sampling(task, report, args):
    """Scores the samples of one model by guidance, solver and number of steps."""
    for guidance, solver, steps in SAMPLING:
        found, nfe = drawn(task, "encoder heads 16", 0, task.n, guidance, solver, steps)
        more = f", guidance {guidance:g}" if guidance != 1 else ""
        report.add(f"{solver} {steps}{more}", dict(seed=0, **task.score(found)), found, nfe=nfe)

def upscale(task, report, args):
    """Tab. 9: drawn finer than trained, against enlargements of what is drawn at the size trained on."""
    report.found["floor"] = {}                             # the true pictures have a row at each size
    paths = args.fine or [store_glyphs(task.out / f"glyphs{res}.npz", res) for res in (64, 128)]
    labels = np.concatenate([task.train[1], task.test[1]])
    for path in paths:
        whole = data.Arrays(path)
        same = len(whole) == len(labels) and (whole.labels[task.order] == labels).all()
        if not same or whole.res <= task.res or whole.res % 8:
            raise ValueError(f"{path}: {len(whole)} pictures of {whole.res} pixels; expected the "
                             f"{len(labels)} of --data with their labels, finer, of a multiple of 8 pixels")
    coarse = drawn(task, "preset", 0, task.n)[0]
    for path in paths:
        stem, whole = Path(path).stem, data.Arrays(path)
        known, held_out = task.split(whole)
        keep(task.out / f"{stem}-classifier.json", dict(source=sha256(path)), f"made of another {stem}.npz")
        judge = Judge(task.out / f"{stem}-classifier.pt", known, held_out, task.classes,
                      max(4, 16_000 // len(known[0])))
        rows = {"drawn": drawn(task, "preset", 0, task.n, size=whole.res)[0],
                **{how: enlarged(coarse, whole.res, how) for how in ENLARGE},
                "true pictures, held out": held_out[0][:task.n]}
        for arm, found in rows.items():
            labels = held_out[1][:task.n] if arm.startswith("true") else task.label(task.n)
            figures = dict(seed=0, **judge.score(found, labels, known[0][:2000]))
            report.add(f"{arm} at {whole.res}", figures, found, classifier_accuracy=100 * judge.accuracy)

def shapes(task, report, args):
    """Tab. 4, beside clouds that nobody had to learn."""
    cov, mean = np.cov(task.known.reshape(-1, 3).T), task.known.reshape(-1, 3).mean(0)
    for seed in range(args.seeds):
        rng = np.random.default_rng(seed)
        found, _ = drawn(task, "preset", 0, task.n, first=seed * task.n)
        chosen = rng.permutation(len(task.known))[:task.n]
        near = task.again[task.to_known(found).argmin(0)] + rng.normal(0, 0.03, found.shape)
        rows = {"ASFT": found, "training shapes, other points": task.again[chosen],
                "the training shape nearest to each sample of ASFT, noise 0.03": near,
                "each point from one Gaussian": rng.multivariate_normal(mean, cov, found.shape[:2])}
        for arm, cloud in rows.items():
            cloud = np.asarray(cloud, np.float32)
            report.add(arm, dict(seed=seed, **task.score(cloud)), cloud)

def dense(task, report, args, many=100_000, few=2048, objects=4, regions=64):
    """Fig. 4b. The surface is what one half of the dense points shows; how far from it lie the others, and
    the sparse sample's? This compares the model with itself: it shows whether asking for more points changes
    them, not how good they are."""
    sparse, full = (drawn(task, "preset", 0, objects, size=size)[0] for size in (few, many))

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
        report.add(f"{many:,} points", dict(seed=i, **gap(rest, surface)), full)
        report.add(f"{few:,} points", dict(seed=i, **gap(torch.from_numpy(sparse[i]), surface),
                                           density=density, chance=chance), sparse)

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
           "fd_ratio": ("time ratio", "{}"), "patches_ratio": ("patches, time ratio", "{}")}

class Report:
    """The result of a claim, written when it is whole."""

    def __init__(self, task, claim):
        self.task, self.sheet = task, {}
        self.stem = task.out / "results" / f"{claim}-{task.stem}-{task.steps}"
        self.found = dict(claim=claim, data=task.stem, steps=task.steps, **task.facts, floor=task.floor(),
                          arms={})

    def add(self, arm, figures, items, **facts):
        """The figures of one seed of an arm, and what they were taken of."""
        self.found["arms"].setdefault(arm, dict(facts, seeds=[]))["seeds"].append(figures)
        self.sheet.setdefault(arm, self.task.show(items))
        print(arm, *(f"{key} {value:.4g}" for key, value in figures.items()), sep="  ", flush=True)

    def write(self):
        self.stem.parent.mkdir(exist_ok=True)
        sample.write_json(f"{self.stem}.json", self.found)
        sheet(self.sheet, f"{self.stem}.png")

def table(found):
    """A result in Markdown: means over the seeds, and half of the range where there are several."""
    floor = {"floor (held out)": dict(seeds=[found["floor"]])} if found["floor"] else {}
    rows, several = found["arms"] | floor, "samples" if found["claim"] == "dense" else "seeds"
    columns = [key for key in COLUMNS
               if any(key in row or key in row["seeds"][0] for row in found["arms"].values())]
    lines = ["| | " + " | ".join(COLUMNS[key][0] for key in columns) + f" | {several} |",
             "|---" * (len(columns) + 2) + "|"]
    for arm, row in rows.items():
        cells = [cell(key, row) for key in columns]
        if arm in found["arms"] or any(text != "-" for text in cells):
            count = len(row["seeds"]) if arm in found["arms"] else "-"
            lines.append(f"| {arm} | " + " | ".join(cells) + f" | {count} |")
    return "\n".join(lines)

def cell(key, row):
    values = [row[key]] if key in row else [seed[key] for seed in row["seeds"] if key in seed]
    if len(values) < 2:
        return COLUMNS[key][1].format(*values) if values else "-"
    text, half = COLUMNS[key][1].format(statistics.mean(values)), (max(values) - min(values)) / 2
    return f"{text} ± {float(f'{half:.2g}'):g}"

def sheet(rows, path, side=56):
    """A row of pictures for each name."""
    side = max(side, min(160, max(len(p) for row in rows.values() for p in row)))
    page = Image.new("RGB", (200 + side * max(map(len, rows.values())), side * len(rows)), "white")
    pen = ImageDraw.Draw(page)
    for y, (name, pictures) in enumerate(rows.items()):
        words = name.split()
        lines = [" ".join(words[i:i + 4]) for i in range(0, len(words), 4)]
        pen.text((6, side * y + side // 2 - 6 * len(lines)), "\n".join(lines), fill="black")
        for x, p in enumerate(pictures):
            page.paste(Image.fromarray(p).resize((side - 2, side - 2), Image.Resampling.NEAREST),
                       (200 + side * x, side * y))
    sample.write_png(path, page)

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["show"] and len(argv) == 2:
        with data.reading(argv[1], "a result of claims.py, .json"):
            return print(table(json.loads(Path(argv[1]).read_text())))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", choices=CLAIMS)
    p.add_argument("--data", help=".npz, or tree of ShapeNet (default: built-in glyphs and solids)")
    p.add_argument("--fine", nargs="+", help="upscale: the same pictures, finer (default: glyphs)")
    p.add_argument("--category", default="airplane", help="of clouds (default: airplane)")
    p.add_argument("--steps", type=sample.positive, help="of every arm (default: 800 to 10,000, by claim)")
    p.add_argument("--n", type=sample.positive, default=300, help="pictures drawn of an arm (default: 300)")
    p.add_argument("--seeds", type=sample.positive, default=3, help="trainings of an arm; of clouds: sets of "
                   "samples (default: 3)")
    p.add_argument("--out", default="runs/claims")
    args = p.parse_args(argv)
    kind, claim, steps = CLAIMS[args.name]
    if kind is Pictures and args.n < 100:
        p.error(f"--n {args.n}: expected at least 100, for a Frechet distance of 96 features")
    if args.name == "upscale" and args.data and not args.fine:
        p.error("upscale of --data needs --fine: the same pictures at higher resolutions")
    if kind is Pictures and not args.data:
        args.data = "glyphs"
    args.steps = args.steps or steps
    task = kind(args)
    report = Report(task, args.name)
    claim(task, report, args)
    report.write()
    print(f"\n{table(report.found)}\n\n{report.stem}.json and .png")

if __name__ == "__main__":
    sample.run_main(main)
