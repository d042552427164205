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

Images: --data is an .npz with `images` and `labels` (default: 10,000 of the built-in glyphs); four fifths are
trained on, the rest is held out. Frechet distance, precision and recall are of 96 features of a classifier
trained here on the same four fifths; `pixels` is the Frechet distance of images reduced to 8 x 8, `patches`
that of all their patches of 8 x 8. The reference is what was trained on; `floor` is what the first n held-out
images get. Samples are 0 to n-1 of seed 0, classes in turn, without guidance, Euler 25, averaged weights, but
for `sampling`. Clouds: --data is a tree of ShapeNet with --category (default: the built-in solids); SDE 250.

On one machine everything is a function of --data, --steps and the seeds. What is finished is kept in --out
(default: runs/claims) and not done again, and an interrupted training goes on; what was made of other data or
with other flags is refused. Results are results/NAME-SET-STEPS.json and .png there, and the table printed.
`claims.py show FILE.json` prints the table of a result.
"""
import argparse
import json
import pickle
import statistics
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

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
import toys  # noqa: E402
import train  # noqa: E402
from glyph_report import convolutions, fit, patches, planes  # noqa: E402
from metrics import clouds  # noqa: E402
from metrics.frechet import frechet_distance  # noqa: E402
from metrics.precision_recall import precision_recall  # noqa: E402
from metrics.weights import sha256  # noqa: E402

# ---------------------------------------------------------------------------------------------------------
# What is tried. An arm: flags of train.py, and perhaps a change of the code that is no flag of it

@contextmanager
def changed(change):
    """The project's code with a part taken out that no flag takes out."""
    average, start = train.update_ema, asft.ASFT.init_weights

    def uniform_start(self):
        start(self)
        for attention in (block.attention for block in self.decoder):
            nn.init.xavier_uniform_(attention.kv.weight)
            nn.init.ones_(attention.q_norm.weight)
    if change == "uniform start":
        asft.ASFT.init_weights = uniform_start
    if change == "no EMA warm-up":
        train.update_ema = lambda ema, model, step, *rest: average(ema, model, 10 ** 9, *rest)
    try:
        yield
    finally:
        train.update_ema, asft.ASFT.init_weights = average, start

def arms(task):
    """Arms by name: (flags of train.py, change of the code). `spatial` is the paper's form, `preset` that of
    the CPU recipe, which has 16 heads in the encoder; decoded, widths and switches are changes of it, the
    others of `spatial`."""
    if task.domain == "points":
        return {"preset": ([], None), "lr 1e-3": (["--lr", 1e-3], None),
                "logit-normal t": (["--times", "logit-normal"], None)}
    # windows of 4 x 4 pixels, as in preset tiny
    pairs, side = task.res ** 2, task.res // 4
    latents, decode = ["--latents", side ** 2], ["--decode", pairs // 4]
    # the paper has as many heads in the encoder as elsewhere
    preset, plain = latents + decode, ["--encoder-heads", 0]
    base = preset + plain
    perceiver = [*base, "--encoder", "perceiver", "--width", perceiver_width(task.res)]
    at_equal_flops = lambda share: round(task.steps * flops(task.res, pairs // 4)
                                         / flops(task.res, pairs // share))
    windows = lambda p: (["--latents", (task.res // p) ** 2, *decode, *plain], None)
    return {
        "spatial": (base, None), "linear": ([*base, "--encoder", "linear"], None),
        "perceiver": (perceiver, None), "perceiver, lr 1e-3": ([*perceiver, "--lr", 1e-3], None),
        "encoder heads 16": ([*preset, "--encoder-heads", 16], None),
        "encoder heads 64": ([*preset, "--encoder-heads", 64], None),
        "windows 2 x 2": windows(2), "windows 7 x 7": windows(7), "windows 8 x 8": windows(8),
        "preset": (preset, None),
        **{f"decoded 1/{share}": ([*latents, "--decode", pairs // share], None) for share in (16, 8, 2, 1)},
        **{f"decoded 1/{share}, FLOPs of 1/4": ([*latents, "--decode", pairs // share, "--steps",
                                                 at_equal_flops(share)], None) for share in (16, 1)},
        "width 64": ([*preset, "--width", 64], None), "width 256": ([*preset, "--width", 256], None),
        "width 256, lr 1e-3": ([*preset, "--width", 256, "--lr", 1e-3], None),
        "2 levels": ([*preset, "--levels", 2], None), "RoPE": ([*preset, "--rope"], None),
        "uniform t": ([*preset, "--times", "uniform"], None), "no QK-norm": ([*preset, "--no-qk-norm"], None),
        "lr 1e-3": ([*preset, "--lr", 1e-3], None), "lr 4e-3": ([*preset, "--lr", 4e-3], None),
        "constant lr": ([*preset, "--schedule", "constant"], None),
        "no EMA warm-up": (preset, "no EMA warm-up"),
        "spatial, uniform start": (base, "uniform start"),
        "encoder heads 16, uniform start": ([*preset, "--encoder-heads", 16], "uniform start"),
        "linear, uniform start": ([*base, "--encoder", "linear"], "uniform start"),
    }

def tiny(res, **changes):
    return asft.config("tiny", res=res, latents=(res // 4) ** 2, **changes)

@cache
def perceiver_width(res):
    """The width at which the PerceiverIO has most nearly as many parameters as the spatial model of width
    128."""
    def count(**changes):
        with torch.device("meta"):
            model = asft.ASFT(tiny(res, **changes))
        return sum(p.numel() for p in model.parameters())

    goal = count()
    return min(range(96, 161, 4), key=lambda width: abs(count(encoder="perceiver", width=width) - goal))

@cache
def flops(res, decode):
    """Forward FLOPs of a training picture under preset tiny."""
    return asft.forward_flops(tiny(res), decode)[0]

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

# ---------------------------------------------------------------------------------------------------------
# Pictures: the set, split, and the classifier whose features all arms are scored by

class Pictures:
    domain, solver, steps_drawn = "image", "euler", 25

    def __init__(self, args):
        self.out, self.steps, self.n, self.stem = Path(args.out), args.steps, args.n, Path(args.data).stem
        if args.data == "glyphs":
            self.out.mkdir(parents=True, exist_ok=True)
            args.data = self.out / "glyphs.npz"
            store_glyphs(args.data, 32)
        whole = data.Arrays(args.data)
        if not whole.class_names:
            raise ValueError(f"{args.data}: no `labels`; expected classes, for the classifier whose "
                             f"features are compared")
        if len(whole) < 100:
            raise ValueError(f"{args.data}: {len(whole)} pictures; expected at least 100, for a classifier "
                             f"and a Frechet distance")
        self.res, self.classes = whole.res, len(whole.class_names)
        if self.res % 4 or self.res < 8:
            raise ValueError(f"{args.data}: pictures of {self.res} pixels; expected a multiple of 4 from 8 "
                             f"on, for windows of 4 x 4")
        self.order, self.count = np.random.default_rng(0).permutation(len(whole)), len(whole) * 4 // 5
        self.train, self.test = self.split(whole)
        missing = [whole.class_names[k] for k in set(range(self.classes)) - set(self.train[1].tolist())]
        if missing or self.classes < 2:
            raise ValueError(f"{args.data}: {f'no picture of {missing[0]!r}' if missing else 'one class'} "
                             f"in the four fifths trained on; "
                                  f"expected two classes or more, each with pictures there")
        keep(self.out / f"{self.stem}-train.json", dict(source=sha256(args.data)),
             f"made of another {Path(args.data).name}")
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
        return list(pictures[:16])

def keep(path, facts, otherwise):
    """Stores how something was made, as JSON. Raises InputError where it is there already, made in another
    way."""
    words = json.dumps(facts, default=str)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        sample.write_atomic(path, lambda f: f.write(words.encode()))
    elif path.read_text() != words:
        raise ValueError(f"{path}: {otherwise}; expected another --out")

def store_glyphs(path, res, count=10_000):
    if not path.exists():
        glyphs = toys.Glyphs(res, "train")
        images = np.stack([glyphs.item(i)[0] for i in tqdm(range(count), desc=f"glyphs at {res}")])
        sample.write_atomic(path,
                            lambda f: np.savez(f, images=images,
                                               labels=np.arange(count) % len(glyphs.class_names)))

class Judge:
    """A small convolutional network trained to tell the classes of real pictures, and sets of pictures scored
    by its features."""

    def __init__(self, path, known, held_out, classes, epochs=12):
        torch.manual_seed(0)
        self.net = nn.Sequential(*convolutions(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                 nn.Linear(96, classes))
        if path.exists():
            try:
                self.net.load_state_dict(torch.load(path, weights_only=True))
            except (RuntimeError, EOFError, pickle.UnpicklingError):
                raise ValueError(f"{path}: damaged, or of other classes; expected the classifier trained "
                                 f"before: delete it") from None
        else:
            fit(self.net, planes(known[0]), torch.from_numpy(known[1]), epochs, batch=64, weight_decay=0.05)
            sample.write_atomic(path, lambda f: torch.save(self.net.state_dict(), f))
        self.net.eval()
        self.known = self.features(known[0])
        self.accuracy = float((self.features(held_out[0])[2] == torch.from_numpy(held_out[1])).float().mean())

    @torch.no_grad()
    def features(self, pictures):
        """Classifier features (n, 96), plain pixels of the pictures reduced to 8 x 8 (n, 192), classes read
        (n,)."""
        deep = torch.cat([self.net[:-1](planes(pictures[i:i + 128])) for i in range(0, len(pictures), 128)])
        pixels = torch.cat([F.adaptive_avg_pool2d(planes(pictures[i:i + 128]), 8).flatten(1)
                            for i in range(0, len(pictures), 128)])
        return deep.double(), pixels.double(), self.net[-1](deep).argmax(1)

    def score(self, pictures, labels):
        deep, pixels, read = self.features(pictures)
        distance = lambda a, b: frechet_distance(*moments(a), *moments(b))
        precision, recall = precision_recall(self.known[0], deep)
        return dict(fd=distance(self.known[0], deep), pixels=distance(self.known[1], pixels),
                    precision=precision, recall=recall,
                    read=100 * float((read == torch.as_tensor(labels)).float().mean()))

def moments(x):
    return x.mean(0).numpy(), torch.cov(x.T).numpy()

# ---------------------------------------------------------------------------------------------------------
# Clouds: the set, and its held-out shapes

class Clouds:
    domain, solver, steps_drawn = "points", "sde", 250

    def __init__(self, args):
        self.out, self.steps = Path(args.out), args.steps
        self.stem = f"{args.category}" if args.data else "solids"
        if args.data:
            self.flags = ["--dataset", "shapenet", "--data", args.data, "--category", args.category]
            load = lambda split, points: data.load("shapenet", args.data, split=split, points=points,
                                                   category=args.category)
            held_out, count = ("val", "test"), None
        else:
            self.flags, held_out, count = ["--dataset", "solids"], ("val",), 70
            load = lambda split, points: data.load("solids", None, split=split, points=points)
        self.points = train.SMALL_POINTS["points"]
        known = load("train", self.points)
        self.classes = len(known.class_names)
        self.known = np.stack([known.item(i)[0] for i in range(count and 5 * count or len(known))])
        sets = [load(split, self.points) for split in held_out]
        self.reference = np.stack([s.item(i)[0] for s in sets for i in range(count or len(s))])
        # other points
        self.again = np.stack([known.item(i, np.random.default_rng((1, i)))[0]
                               for i in range(len(self.known))])
        self.n = len(self.reference)
        self.facts = dict(references=self.n, training_shapes=len(self.known), points=self.points)

    def label(self, n):
        return np.arange(n) % self.classes if self.classes else None

    def score(self, found):
        found, reference, known = (clouds.normalise_box(c) for c in (found, self.reference, self.known))
        result = {}
        for name, distance in (("cd", "chamfer"), ("emd", "lion")):
            result.update({f"{key}_{name}": value for key,
                           value in clouds.scores(reference, found, distance, progress=False).items()})
        nearest = clouds.pairwise(known, found, "chamfer", progress=False).min(0)
        return dict(result, to_training=1e3 * float(nearest.mean()))

    def floor(self):
        return dict(to_training=1e3 * float(clouds.pairwise(*(clouds.normalise_box(c)
                                                              for c in (self.known, self.reference)),
                                                            "chamfer",
                                                            progress=False).min(0).mean()))

    def show(self, found):
        return [sample.draw_points(cloud, 160) for cloud in found[:8]]

# ---------------------------------------------------------------------------------------------------------
# One arm

def trained(task, arm, seed):
    """The run directory of an arm, trained to its end."""
    flags, change = arms(task)[arm]
    name = arm.replace("/", "_").replace(" ", "-")
    out = task.out / "arms" / f"{task.stem}-{task.steps}" / f"{name}-seed{seed}"
    how = [str(word) for word in flags] + [change]
    if (out / "done").exists():
        keep(out / "done", how, "trained with other flags than this arm has now")
        return out
    with changed(change):
        train.main([str(word) for word in (*task.flags, "--steps", task.steps, *flags, "--seed", seed,
                                           "--device", "cpu", "--out", out,
                                           "--resume", "auto", "--sample-every", 10 ** 9, "--keep", 0)])
    steps = json.loads((out / "config.json").read_text())["settings"]["steps"]
    # train.py saves on Ctrl-C, and returns
    if json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] < steps:
        raise KeyboardInterrupt
    keep(out / "done", how, "")
    return out

def drawn(task, arm, seed, n, guidance=1.0, solver=None, steps=None, size=None, first=0):
    """Samples first..first+n-1 of seed 0, classes in turn: uint8 (n, R, R, 3) or float32 (n, P, 3), and the
    network evaluations of one."""
    run, change = trained(task, arm, seed), arms(task)[arm][1]
    size, solver, steps = size or (task.res if task.domain == "image"
                                   else task.points), solver or task.solver, steps or task.steps_drawn
    path = run / f"drawn-{n}-{guidance:g}-{solver}-{steps}-{size}{f'-from-{first}' if first else ''}.npz"
    if not path.exists():
        label, found = task.label(n), []
        batch = (100 if size <= 32 else 16) if task.domain == "image" else 100 if size <= 10_000 else 1
        with changed(change):
            net, _ = sample.load(run)
            for start in tqdm(range(0, n, batch), desc=f"{arm}, seed {seed}: drawn"):
                places = slice(start, min(n, start + batch))
                with sample.autocast(torch.device("cpu"), "auto", train.cpu_dtype()):
                    x, nfe = sample.generate(net, range(first + places.start, first + places.stop), 0,
                                             (size, size) if task.domain == "image" else size,
                                             label=None if label is None else torch.from_numpy(label[places]),
                                             guidance=guidance, solver=solver, chunk=16384,
                                             **{"evaluations" if solver == "dopri5" else "steps": steps})
                found += [sample.to_pixels(p, size, size) if task.domain == "image" else p.numpy() for p in x]
        sample.write_atomic(path, lambda f: np.savez(f, images=np.stack(found), nfe=nfe))
    arrays = np.load(path, allow_pickle=False)
    return arrays["images"], int(arrays["nfe"])

def cost(task, arm):
    """Parameters, forward GFLOP of a training sample, and training TFLOP of an arm (backward: twice the
    forward)."""
    run = trained(task, arm, 0)
    config = sample.read_checkpoint(run)["config"]
    settings = config["settings"]
    with changed(arms(task)[arm][1]):
        forward, parameters = asft.forward_flops(asft.Config(**config["model"]), settings["decode"])
    return dict(parameters=parameters / 1e6, gflop=forward / 1e9,
                training_tflop=3 * forward * settings["batch_size"] * settings["steps"] / 1e12)

def loss(run):
    """Mean training loss of the last tenth of a run."""
    rows = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    return statistics.mean(rows[-max(1, len(rows) // 10):])

# ---------------------------------------------------------------------------------------------------------
# The claims

def compare(task, report, args):
    """Trains, samples and scores the arms of a claim."""
    fitting = [arm for arm in COMPARED[report.found["claim"]][1] if not arm.startswith("windows")
               or task.res % int(arm[-1]) == 0]
    # a seed of every arm first: what is there can be compared at any time
    for seed in range(args.seeds):
        for arm in fitting:
            found, _ = drawn(task, arm, seed, task.n)
            report.add(arm, dict(seed=seed, **task.score(found), loss=loss(trained(task, arm, seed))), found,
                       **cost(task, arm))

def sampling(task, report, args):
    """Scores the samples of one model by guidance, solver and number of steps."""
    for guidance, solver, steps in SAMPLING:
        found, nfe = drawn(task, "encoder heads 16", 0, task.n, guidance, solver, steps)
        report.add(f"{solver} {steps}" + (f", guidance {guidance:g}" if guidance != 1 else ""),
                   dict(seed=0, **task.score(found)), found, nfe=nfe)

def upscale(task, report, args):
    """Tab. 9: drawn finer than trained, against enlargements of what is drawn at the size trained on."""
    # that of the coarse pictures; here the true ones have a row at each size
    report.found["floor"] = {}
    paths = args.fine or [task.out / f"glyphs{res}.npz" for res in (64, 128)]
    for path in paths:
        if not args.fine:
            store_glyphs(path, int(path.stem[6:]))
        whole = data.Arrays(path)
        labels = np.concatenate([task.train[1], task.test[1]])
        if len(whole) != len(labels) or (whole.labels[task.order] != labels).any():
            raise ValueError(f"{path}: other pictures or labels than --data has; expected the same "
                             f"{len(task.order)}, finer")
        if whole.res <= task.res or whole.res % 8:
            raise ValueError(f"{path}: pictures of {whole.res} pixels; expected a multiple of 8, more than "
                             f"the {task.res} of --data")
    coarse = drawn(task, "preset", 0, task.n)[0]
    for path in paths:
        whole = data.Arrays(path)
        known, held_out = task.split(whole)
        keep(task.out / f"{Path(path).stem}-classifier.json", dict(source=sha256(path)),
             f"made of another {Path(path).name}")
        judge = Judge(task.out / f"{Path(path).stem}-classifier.pt", known, held_out, task.classes,
                      max(4, 16_000 // len(known[0])))
        enlarged = lambda how: np.stack([np.asarray(Image.fromarray(p).resize((whole.res, whole.res),
                                                                              how)) for p in coarse])
        rows = {"drawn": drawn(task, "preset", 0, task.n, size=whole.res)[0],
                "bilinear": enlarged(Image.Resampling.BILINEAR),
                "bicubic": enlarged(Image.Resampling.BICUBIC),
                "true pictures, held out": held_out[0][:task.n]}
        for arm, found in rows.items():
            labels = held_out[1][:task.n] if arm.startswith("true") else task.label(task.n)
            figures = judge.score(found, labels)
            figures["patches"] = frechet_distance(*patches(found), *patches(known[0][:2000]))
            report.add(f"{arm} at {whole.res}", dict(seed=0, **figures), found,
                       classifier_accuracy=100 * judge.accuracy)

def shapes(task, report, args):
    """Tab. 4, beside clouds that nobody had to learn."""
    cov = np.cov(task.known.reshape(-1, 3).T)
    mean = task.known.reshape(-1, 3).mean(0)
    for seed in range(args.seeds):
        rng = np.random.default_rng(seed)
        found, nfe = drawn(task, "preset", 0, task.n, first=seed * task.n)
        chosen = rng.permutation(len(task.known))[:task.n]
        distance = clouds.pairwise(*(clouds.normalise_box(c) for c in (task.known, found)), "chamfer",
                                   progress=False)
        near = task.again[distance.argmin(0)] + rng.normal(0, 0.03, found.shape)
        for arm, cloud in {"ASFT": found, "training shapes, other points": task.again[chosen],
                           "the training shape nearest to each sample of ASFT, noise 0.03": near,
                           "each point from one Gaussian": rng.multivariate_normal(mean, cov,
                                                                                   found.shape[:2])}.items():
            cloud = np.asarray(cloud, np.float32)
            report.add(arm, dict(seed=seed, **task.score(cloud)), cloud)

def dense(task, report, args, many=100_000, few=2048, objects=4, regions=64):
    """Fig. 4b. The surface is what one half of the dense points shows; how far from it lie the others, and
    the sparse sample's?

    This compares the model with itself: it shows whether asking for more points changes them, not how good
    they are."""
    sparse = drawn(task, "preset", 0, objects, size=few)[0]
    full = drawn(task, "preset", 0, objects, size=many)[0]
    for i in range(objects):
        surface, rest = (torch.from_numpy(part.copy()) for part in (full[i][::2], full[i][1::2]))
        rng = np.random.default_rng(i)
        centres = full[i][rng.permutation(many)[:regions]]
        share = lambda points: np.bincount(np.linalg.norm(points[:, None] - centres, axis=-1).argmin(1),
                                           minlength=regions) / len(points)
        whole = share(full[i])
        apart = lambda p: 100 * 0.5 * float(np.abs(p - whole).sum())
        gap = lambda points: dict(median=1e3 * float((d := nearest(points, surface)).median()),
                                  p99=1e3 * float(d.quantile(0.99)))
        report.add(f"{many:,} points", dict(seed=i, **gap(rest)), full)
        report.add(f"{few:,} points",
                   dict(seed=i, **gap(torch.from_numpy(sparse[i])), density=apart(share(sparse[i])),
                                           chance=apart(rng.multinomial(few, whole) / few)), sparse)

def nearest(points, surface):
    """Distance of each point to the nearest one of a surface's."""
    return torch.cat([torch.cdist(part, surface).amin(1) for part in points.split(500)])

CLAIMS = {**{name: (Clouds if name == "settings" else Pictures, compare, steps)
             for name, (steps, _) in COMPARED.items()},
          "sampling": (Pictures, sampling, 2000), "upscale": (Pictures, upscale, 10_000),
          "clouds": (Clouds, shapes, 6000),
          "dense": (Clouds, dense, 6000)}                                # what of, how, default of --steps

# ---------------------------------------------------------------------------------------------------------
# Results

COLUMNS = {"parameters": ("parameters", "{:.2f}M"), "gflop": ("forward GFLOP", "{:.3f}"),
           "training_tflop": ("training TFLOP", "{:.1f}"), "nfe": ("NFE", "{}"),
           "fd": ("Frechet distance", "{:.3g}"), "pixels": ("pixels", "{:.3g}"),
           "patches": ("patches", "{:.3g}"), "precision": ("precision", "{:.2f}"),
           "recall": ("recall", "{:.2f}"), "read": ("read as its class, %", "{:.0f}"),
           "loss": ("loss", "{:.3f}"),
           "1nna_cd": ("1-NNA CD", "{:.1f}"), "1nna_emd": ("1-NNA EMD", "{:.1f}"),
           "cov_cd": ("COV CD", "{:.1f}"),
           "cov_emd": ("COV EMD", "{:.1f}"), "mmd_cd": ("MMD CD", "{:.2f}"), "mmd_emd": ("MMD EMD", "{:.2f}"),
           "to_training": ("CD to the nearest training shape", "{:.2f}"),
           "median": ("median distance to the surface", "{:.1f}"),
           "p99": ("99th percentile", "{:.1f}"), "density": ("points in another region, %", "{:.1f}"),
           "chance": ("... by chance", "{:.1f}")}

class Report:
    """The result of a claim, written when it is whole."""

    def __init__(self, task, claim):
        self.task, self.sheet = task, {}
        self.stem = task.out / "results" / f"{claim}-{task.stem}-{task.steps}"
        self.found = dict(claim=claim, data=task.stem, steps=task.steps, **task.facts, floor=task.floor(),
                          arms={})

    def add(self, arm, figures, items, **facts):
        """The figures of one seed of an arm, and what they were taken of."""
        row = self.found["arms"].setdefault(arm, dict(facts, seeds=[]))
        row["seeds"].append(figures)
        if arm not in self.sheet:
            self.sheet[arm] = self.task.show(items)
        print(f"{arm}, seed {figures['seed']}: "
              + "  ".join(f"{k} {v:.4g}" for k, v in figures.items() if k != "seed"), flush=True)

    def write(self):
        self.stem.parent.mkdir(exist_ok=True)
        sample.write_atomic(f"{self.stem}.json", lambda f: f.write(json.dumps(self.found, indent=1).encode()))
        sheet(self.sheet, f"{self.stem}.png")

def table(found):
    """A result as a table in Markdown: means over the seeds, and half of the range where there are
    several."""
    rows = found["arms"].values()
    columns = [key for key in COLUMNS if any(key in row or key in row["seeds"][0] for row in rows)]
    several = "samples" if found["claim"] == "dense" else "seeds"
    lines = ["| | " + " | ".join(COLUMNS[key][0] for key in columns) + f" | {several} |",
             "|---" * (len(columns) + 2) + "|"]
    floor = {"floor (held out)": dict(seeds=[found["floor"]])} if set(found["floor"]) & set(columns) else {}
    for arm, row in {**found["arms"], **floor}.items():
        cells = []
        for key in columns:
            values = [row[key]] if key in row else [seed[key] for seed in row["seeds"] if key in seed]
            cell = COLUMNS[key][1].format(statistics.mean(values)) if values else "-"
            cells.append(cell + (f" ± {float(f'{(max(values) - min(values)) / 2:.2g}'):g}"
                                 if len(values) > 1 else ""))
        lines.append(f"| {arm} | " + " | ".join(cells)
                     + f" | {len(row['seeds']) if arm in found['arms'] else '-'} |")
    return "\n".join(lines)

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

def result(path):
    """The result in a JSON file that this script wrote."""
    try:
        found = json.loads(Path(path).read_text())
        table(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a result of claims.py, .json ({type(error).__name__}: "
                         f"{error})") from None
    return found

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["show"]:
        if len(argv) != 2:
            raise ValueError(f"show {' '.join(argv[1:])}: expected one FILE.json")
        return print(table(result(argv[1])))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                epilog="claims.py show FILE.json prints the table of a result")
    p.add_argument("name", choices=CLAIMS)
    p.add_argument("--data",
                   help="pictures: .npz with images and labels (default: built-in glyphs); clouds: tree of "
                        "ShapeNet's (default: built-in solids)")
    p.add_argument("--fine", nargs="+",
                   help="upscale: the same pictures, finer, .npz (default: built-in glyphs at 64 and 128)")
    p.add_argument("--category", default="airplane", help="of clouds (default: airplane)")
    p.add_argument("--steps", type=sample.positive,
                   help="of every arm (default: pictures 1,000 or 2,000, upscale 10,000, clouds 6,000, "
                        "settings 1,500)")
    p.add_argument("--n", type=sample.positive, default=300,
                   help="pictures drawn of every arm (default: 300)")
    p.add_argument("--seeds", type=sample.positive, default=3,
                   help="trainings of every arm; of clouds: sets of samples (default: 3)")
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
