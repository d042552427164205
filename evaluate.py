"""Evaluate samples against real data: python evaluate.py --fake X --real Y [--metrics fid is ...]

X, Y: a directory, .zip or lmdb of images, packed or not; a directory of point clouds (.npy, .ply) or of
sample.py; an .npz (arr_0 or images uint8 (S,H,W,3); statistics mu, sigma; arr_0 floating (S,P,3)); a .npy or
LION's .pt of point clouds (S,P,3); a data set, NAME or NAME:SPLIT. X may be a checkpoint or shipped model.

    python evaluate.py stats --data Y --res R --out ref.npz      reference statistics of images

To add a metric: a function in metrics/, a score function here that gives {name: value} for all its names,
and a row of METRICS. S items, P points, d features, b in a batch.
"""
import hashlib
import json
import os
import pkgutil
import sys
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

import data
import sample
from metrics import clip, clouds, dinov2, frechet, inception, nearest, pointnet, references, ulip, weights
from metrics.precision_recall import density_coverage, precision_recall
from sample import RANK, WORLD, flag_parser, natural, positive, print0, wait_for_all, write_atomic, write_json

# ---- Scores ---------------------------------------------------------------------------------------------
class Task:
    """What scores see: two sets, with `statistics` of their features. The protocol goes into the JSON."""

    def __init__(self, args, real):
        self.args, self.real, self.fake = args, real, Set()
        self.protocol, self.warnings = dict(networks={}), []

    def warn(self, text):
        self.warnings.append(text)
        print0(f"WARNING: {text}", sys.stderr)

def frechet_scores(task, names):
    found, fake, real = {}, task.fake, task.real
    for name in names:
        sides = [items.statistics[key] for items in (fake, real) for key in METRICS[name].statistics]
        found[name], d = frechet.frechet_distance(*sides), len(sides[0])
        if min(fake.count, real.record.get("n") or real.count or fake.count) <= d:
            task.warn(f"{name}: fewer items than the {d} dimensions of the features: covariances are "
                      f"rank-deficient, the distance is biased upwards")
    return found

def inception_scores(task, names):
    return dict(zip(("is", "is_std"), inception.inception_score(task.fake.statistics["classes"])))

def row_scores(score, keys, task, names):
    """Both figures, called `keys`, that `score` gives of the rows of the two sets."""
    args, real, fake = task.args, task.real.statistics["features"], task.fake.statistics["features"]
    task.protocol["n_real_pr"] = len(real)
    # density and coverage keep the k = 5 of their authors, whatever --k is
    more = {"k": args.k} if score is precision_recall else {}
    try:
        return dict(zip(keys, score(real, fake, device=args.device, **more)))
    except ValueError as e:                                            # fewer than k items
        if {*keys} & {*(args.metrics or ())}:
            raise
        task.warn(f"{keys[0]}, {keys[1]} are left out: {e}")
        return {}

def pair_scores(task, names):
    """MMD, COV, 1-NNA of Chamfer distances or EMD, and JSD. All processes fill one cache of pairs."""
    args, fake, real = task.args, task.fake, task.real
    smp, ref, scale = clouds.comparable(
        stack(fake), stack(real), args.normalize == "box", (fake.normalisation, real.normalisation),
        (fake.affine or real.affine, real.affine), task.warn)
    expected = references.paper(real.dataset).get("references")
    if expected and (expected, "lion", "box") != (len(ref), args.emd, args.normalize):
        task.warn(f"{len(ref)} references: the paper's row is against {expected}, with lion and box")
    task.protocol.update(normalisation=scale, n_pairs=[len(smp), len(ref)], points=ref.shape[1])
    options = dict(memory=args.memory, cache=f"{args.cache}/pairs", device=args.device, workers=args.workers)
    kinds = {name: args.emd if name.endswith("emd") else "chamfer" for name in names if name != "jsd"}
    jobs = [(a, b, kind) for kind in sorted({*kinds.values()})
            for a, b in ((ref, smp), (ref, ref), (smp, smp))]
    print0(f"{len(ref)} references, {len(smp)} samples, ~ {clouds.estimate(jobs, **options) / WORLD:.0f} s")
    for a, b, kind in jobs:
        clouds.pairwise(a, b, kind, share=(RANK, WORLD), progress=RANK == 0, **options)
    wait_for_all()
    parts = {kind: clouds.scores(ref, smp, kind, **options) for kind in {*kinds.values()}}
    found = {name: parts[kind][name.split("_")[0]] for name, kind in kinds.items()}
    return found | ({"jsd": clouds.jsd(ref, smp)} if "jsd" in names else {})

def p_fid_score(task, names):
    net = pointnet.load(task.protocol["networks"]["pointnet"]["file"]).to(task.args.device)
    found = [pointnet.features(net, stack(items)) for items in (task.fake, task.real)]
    one, other = (frechet.Moments(x.shape[1]).update(x) for x in found)
    return {"p_fid": frechet.frechet_distance(one.mean, one.cov, other.mean, other.cov)}

@torch.no_grad()
def ulip_score(task, names):
    """Mean cosine of ULIP-2's features of point clouds and CLIP's of their images, pair by pair."""
    args, device, networks = task.args, task.args.device, task.protocol["networks"]
    points = args.point_features and np.load(args.point_features, allow_pickle=False)
    if not args.point_features:
        points = ulip.features(ulip.load(networks["ulip"]["file"]).to(device), stack(task.fake))
    if args.images.endswith(".npy"):
        return {"ulip_i": ulip.ulip_score(points, np.load(args.images, allow_pickle=False))}
    tower, items = clip.load(networks["bigg"]["file"]).to(device), open_set(args.images, args, "--images")
    images = [clip.features(tower, items.item(i)[None])["clip"] for i in range(items.count)]
    return {"ulip_i": ulip.ulip_score(points, torch.cat(images))}

@dataclass
class Metric:
    domains: tuple            # image, points
    score: Callable
    networks: tuple = ()      # whose weights it needs (metrics/weights.py)
    feature: str = None       # of STREAMS
    statistics: tuple = ()    # of the feature, as stored: the names of mean and covariance, or of all rows
    published: int = 0        # samples behind published figures
    unit: str = ""
    asked: bool = False       # computed only if asked for by name, as all are outside of their first domain
    own: bool = False         # of the features of --features, where that is given
    needs: tuple = ("fake", "real")

PRECISION = partial(row_scores, precision_recall, ("precision", "recall"))
DENSITY = partial(row_scores, density_coverage, ("density", "coverage"))
KID = partial(row_scores, frechet.kid, ("kid", "kid_std"))

IMAGE, POINTS, BOTH, ROWS = ("image",), ("points",), ("image", "points"), ("features",)
METRICS = {
    "fid": Metric(IMAGE, frechet_scores, ("inception",), "pool", ("mu", "sigma"), 50_000),
    "sfid": Metric(IMAGE, frechet_scores, ("inception",), "spatial", ("mu_s", "sigma_s"), 50_000),
    "is": Metric(IMAGE, inception_scores, ("inception",), "classes", ("classes",), 50_000, needs=("fake",)),
    **dict.fromkeys(("precision", "recall"), Metric(BOTH, PRECISION, ("inception",), "pool", ROWS, own=True)),
    **dict.fromkeys(("density", "coverage"), Metric(BOTH, DENSITY, ("inception",), "pool", ROWS, own=True)),
    "kid": Metric(BOTH, KID, ("inception",), "pool", ROWS, unit="x 1e3", own=True),
    "fid_clip": Metric(IMAGE, frechet_scores, ("clip",), "clip", ("mu_clip", "sigma_clip"), 50_000, "", True),
    "fdd": Metric(IMAGE, frechet_scores, ("dinov2",), "dinov2", ("mu_fdd", "sigma_fdd"), 50_000, "", True),
    "mmd_cd": Metric(POINTS, pair_scores, unit="x 1e3"),
    "mmd_emd": Metric(POINTS, pair_scores, unit="x 1e2"),
    **dict.fromkeys(("cov_cd", "cov_emd", "1nna_cd", "1nna_emd"), Metric(POINTS, pair_scores, unit="%")),
    "jsd": Metric(POINTS, pair_scores),
    "p_fid": Metric(POINTS, p_fid_score, ("pointnet",), published=10_000, asked=True),
    "ulip_i": Metric(POINTS, ulip_score, ("ulip", "bigg"), asked=True, needs=("images",)),
    "fd": Metric(BOTH, frechet_scores, (), "own", ("mu_fd", "sigma_fd"), asked=True, own=True),
}

# ---- Sets: what --fake and --real may be ---------------------------------------------------------------
FOLDERS = {"ffhq256": 256, "church256": 256, "imagenet128": 128, "imagenet256": 256}     # name: resolution

@dataclass
class Set(references.Reference):
    """S items: item(i) is uint8 (H,W,3), or float32 (P,3); or stored statistics alone (count 0). The record
    is samples.json, or what `stats` wrote."""
    source: str = None
    domain: str = None
    count: int = 0
    item: Callable = None
    file_type: str = None
    normalisation: str = None                          # of point clouds, where something says it: box, global
    dataset: tuple = None                              # name, and category or resolution
    sha256: str = None                                 # of the file; else taken while the items are read

def types_of(files):
    return "+".join(sorted({Path(file).suffix[1:].lower().partition("[")[0] for file in files})) or None

def open_set(source, args, flag):
    """The Set of what follows --fake or --real. With --res images are cropped and resized as in training."""
    if not source:
        return Set()
    path, name, known = Path(source), source.partition(":")[0], {**data.DATASETS, **FOLDERS}
    if path.is_file() and path.suffix.lower() in FILES:
        found = FILES[path.suffix.lower()](path)
    elif path.is_dir():
        found = directory_set(path, args.split)
    elif name in known and not path.exists():
        found = named_set(source, args)
    else:
        raise ValueError(f"{flag} {source}: no such directory, file of {', '.join(FILES)}, or data set "
                         f"({', '.join(known)})")
    if args.res and found.domain == "image":
        return replace(found, item=lambda i: data.fit(Image.fromarray(found.item(i)), args.res))
    return found

def directory_set(path, split):
    """What sample.py wrote, point clouds, or images; of a sub-directory of the split, where there is one."""
    if (path / "samples.json").exists():
        return sampled_set(path)
    path = path / split if split and (path / split).is_dir() else path
    files = [] if (path / "manifest.json").exists() else data.find_files(path, (".npy", ".ply"))
    files.sort(key=lambda file: file.lower().endswith(".npy"))         # of twins the last is read: the .npy
    files = sorted({os.path.splitext(file)[0]: file for file in files}.values())
    return file_set(path, files, data.read_cloud) if files else image_set(path)

def file_set(path, files, read, **more):
    """One item a file."""
    domain = "image" if read is data.read_image else "points"
    return Set(source=str(path), domain=domain, count=len(files), file_type=types_of(files),
               item=lambda i: np.asarray(read(files[i])), **more)

def image_set(path):
    """A directory, .zip or lmdb of images, or a packed directory."""
    return of_dataset(data.load("folder", str(path), labels=False), path)

def of_dataset(found, path, **more):
    """A data set of data.py; the manifest of a packed one tells what was packed."""
    file_type = types_of(getattr(found, "files", ()))
    if isinstance(found, data.Arrays) and os.path.isdir(path):
        file_type = json.loads(Path(path, "manifest.json").read_text())["file_type"]
    more = {"source": str(path), "count": len(found)} | more
    return Set(domain=found.domain, item=lambda i: found.item(i)[0], file_type=file_type, **more)

def named_set(source, args):
    """NAME or NAME:SPLIT of data.py; of a directory the sub-directory of the split, where there is one."""
    name, _, split = source.partition(":")
    kind, split = "folder" if name in FOLDERS else name, split or args.split
    split = split or (None if kind == "folder" and not os.path.isdir(f"{args.data}/val") else "val")
    found = data.load(kind, args.data, res=args.res or FOLDERS.get(name), points=args.points,
                      category=args.category, split=split)
    count = (args.n or 1024) if name in ("glyphs", "solids") else len(found)          # those two are endless
    key, scale = (found.res, None) if found.domain == "image" else (args.category or "all", "box")
    return of_dataset(found, args.data, source=f"{name}:{split or 'all'}", count=count, normalisation=scale,
                      dataset=(name, key), record={"split": split or "all"})

def sampled_set(path):
    """A directory of sample.py."""
    with data.reading(path / "samples.json", "a complete record of sample.py"):
        record = json.loads((path / "samples.json").read_text())
        files, scale = [str(path / row["file"]) for row in record["samples"]], record["normalisation"]
        key = record["dataset"], (record["category"] or "all") if scale else record["size"][0]
        if not record["complete"]:
            raise ValueError("found an unfinished one; the same sample.py goes on")
    return file_set(path, files, data.read_cloud if scale else data.read_image, normalisation=scale,
                    dataset=None if record["crop"] else key, record=record)

def array_set(path):
    """A file of arrays, or of statistics alone."""
    known = [key for row in METRICS.values() if "real" in row.needs for key in row.statistics]
    with data.reading(path, references.EXPECTED):
        found = references.read(path, known)
    array, about = found.array, dict(vars(found), source=str(path), sha256=weights.sha256(path))
    if array is None:
        return Set(**about, domain="image")
    kind, domain = (np.uint8, "image") if array.dtype == np.uint8 else (np.float32, "points")
    return Set(**about, domain=domain, count=len(array), item=lambda i: array[i].astype(kind),
               file_type=types_of([path]), normalisation="global" if found.affine else None,
               dataset=("shapenet", found.category))

FILES = {**dict.fromkeys((".npz", ".npy", ".pt", ".pth"), array_set), ".zip": image_set}

def stack(items):
    """All point clouds of a Set: float32 (S,P,3)."""
    rows = [items.item(i) for i in range(items.count)]
    for i, row in enumerate(rows):
        if row.shape != rows[0].shape or not np.isfinite(row).all():
            raise ValueError(f"{items.source}: item {i} has {np.isfinite(row).all(1).sum()} finite points of "
                             f"{len(row)}; expected {len(rows[0])}, as item 0")
    return np.stack(rows)

# ---- Features: every item once, shared out over the processes ------------------------------------------
STREAMS = {"inception": inception, "clip": clip, "dinov2": dinov2}

def stream(network, args, path):
    """A function of a batch, uint8 (b,H,W,3) or float32 (b,P,3), that gives {feature: (b,d)}."""
    if network != "own":
        module, more = STREAMS[network], {"resize": args.resize} if network == "inception" else {}
        net = module.load(path).to(args.device)
        size = (net.norm.weight.numel(), len(net.blocks), net.registers) if network == "dinov2" else None
        if size not in (None, (1024, 24, 0)):
            raise ValueError(f"{path}: width, depth, registers are {size}; expected ViT-L/14, (1024, 24, 0)")
        return lambda batch: module.features(net, batch, **more)
    with data.reading(f"--features {args.features}", "module:callable or a TorchScript file"):
        if Path(args.features).is_file():
            function = torch.jit.load(args.features, map_location=args.device).eval()
        else:
            sys.path.insert(0, os.getcwd())
            function = pkgutil.resolve_name(args.features)
    return lambda batch: {"own": function(batch.permute(0, 3, 1, 2) if batch.dtype == torch.uint8 else batch)}

def feature_of(name, args):
    return "own" if METRICS[name].own and args.features else METRICS[name].feature

@torch.no_grad()
def extract(task, side, names, runs):
    """Streams a set through `runs`: fills its statistics, on process 0, and the protocol."""
    args, items, moments, rows = task.args, getattr(task, side), {}, defaultdict(dict)
    wanted = {METRICS[name].statistics: feature_of(name, args) for name in names}
    most = 10_000 if side == "real" else items.count                   # as ADM's reference files
    chosen = {*np.random.default_rng(0).permutation(items.count)[:most].tolist()}
    mine, size = range(RANK, items.count, WORLD), args.batch or (64 if args.device.type == "cuda" else 8)
    shape = items.item(0).shape
    with ThreadPoolExecutor(args.workers) as pool, sample.progress_bar(len(mine), items.domain) as bar:
        ahead = [pool.submit(items.item, i) for i in mine[:size]]
        for start in range(0, len(mine), size):
            numbers, arrays = mine[start:start + size], [future.result() for future in ahead]
            ahead = [pool.submit(items.item, i) for i in mine[start + size:start + 2 * size]]
            for i, array in zip(numbers, arrays):
                if array.shape != shape:
                    raise ValueError(f"{items.source}: item {i} is {array.shape}, item 0 {shape}; see --res")
                rows["sha256"][i] = hashlib.sha256(array.tobytes()).digest()
            batch = torch.from_numpy(np.stack(arrays)).to(args.device)
            found = {feature: x for run in runs for feature, x in run(batch).items()}
            for keys, feature in wanted.items():
                x = found[feature]
                if len(keys) == 2:                                     # mean and covariance
                    moments.setdefault(keys, frechet.Moments(x.shape[1], args.device)).update(x)
                else:
                    rows[keys[0]].update(pair for pair in zip(numbers, x.float().cpu()) if pair[0] in chosen)
            bar.update(len(numbers))
    moments = {keys: one.to("cpu") for keys, one in moments.items()}
    parts = [(moments, rows)] * WORLD
    if WORLD > 1:
        dist.gather_object(parts[0], parts if RANK == 0 else None)
    for more_moments, more_rows in parts[1:] if RANK == 0 else ():
        for keys, one in more_moments.items():
            moments[keys].merge(one)
        for key, one in more_rows.items():
            rows[key].update(one)
    rows = {key: [one[i] for i in sorted(one)] for key, one in rows.items()}
    digest = hashlib.sha256(b"".join(rows.pop("sha256"))).hexdigest()
    if RANK == 0:
        items.statistics |= {key: torch.stack(one) for key, one in rows.items()}
        for keys, one in moments.items():
            items.statistics |= zip(keys, (one.mean, one.cov))
    task.protocol |= {f"{side}_sha256": items.sha256 or digest, f"{side}_size": shape}

# ---- Commands ------------------------------------------------------------------------------------------
def choose(task, domain):
    """The metrics to compute, and the streams of their features. Of `all` and of the default what cannot be
    computed is left out; asked for by name it is an error."""
    args, names, left_out = task.args, [], defaultdict(list)
    asked, networks = args.metrics or [], task.protocol["networks"]
    known = [name for name, row in METRICS.items() if domain in row.domains]
    if not {*asked} <= {*known, "all"}:
        raise ValueError(f"--metrics {' '.join(asked)}: of these sets there are all, {', '.join(known)}")
    wanted = [name for name in known if METRICS[name].domains[0] == domain and not METRICS[name].asked]
    if asked:
        wanted = [name for name in known if {name, "all"} & {*asked}]
    elif args.features:
        wanted = [name for name in known if METRICS[name].own]
    given = {weights.identify(path): path for path in args.weight_files or ()}
    if RANK:
        wait_for_all()                                                 # process 0 alone downloads
    for name in wanted:
        try:
            require(task, name, domain, given)
            names.append(name)
        except ValueError as e:
            left_out[str(e)].append(name)
    for reason, some in left_out.items():
        if not names or asked and "all" not in asked:
            raise ValueError(f"{', '.join(some)}: {reason}")
        task.warn(f"left out: {', '.join(some)}: {reason}")
    if RANK == 0:
        wait_for_all()
    files = {network: found["file"] for network, found in networks.items() if network in STREAMS}
    files |= {"own": None} if "own" in {feature_of(name, args) for name in names} else {}
    return names, [stream(network, args, file) for network, file in files.items()]

def require(task, name, domain, given):
    """ValueError where a metric cannot be computed; finds the weights that it needs, for the protocol."""
    args, real, networks, row = task.args, task.real, task.protocol["networks"], METRICS[name]
    own = feature_of(name, args) == "own"
    spared = {"ulip": args.point_features, "bigg": str(args.images).endswith(".npy"), "inception": own}
    lacking = [flag for flag in row.needs if not getattr(args, flag)]
    if lacking or row.own and not args.features and (own or domain == "points"):
        raise ValueError(f"--{[*lacking, 'features'][0]} is missing")
    if "real" in row.needs and not real.count and not {*row.statistics} <= {*real.statistics}:
        raise ValueError(f"{real.source} holds statistics alone, not {', '.join(row.statistics)}; "
                         "expected images")
    for network in row.networks:
        if network not in networks and not spared.get(network):
            file, digest, published = weights.find(network, given.get(network), args.cache,
                                                   bool(args.metrics), print0)
            networks[network] = dict(file=str(file), sha256=digest, published=published)
            if published is False:
                task.warn(f"{network}: {file}, SHA-256 {digest}, is not the published file; not comparable")

def is_checkpoint(source):
    """A shipped model, a run directory, or a file with averaged weights: other .pt files hold clouds."""
    path, shipped = Path(source), sample.WEIGHTS / f"{source}.pt"
    if path.suffix.lower() != ".pt" or not zipfile.is_zipfile(path):
        return bool(sample.checkpoints(path)) if path.exists() else shipped.exists()
    with data.reading(path, "a file of tensors"):
        return {"ema", "config"} <= {*torch.load(path, map_location="cpu", weights_only=True, mmap=True)}

def evaluate(args):
    """Draws what is to be drawn, computes, prints, writes args.json; returns its content on process 0."""
    model, task = None, Task(args, open_set(args.real, args, "--real"))
    real, held = task.real, open_set(args.held_out, args, "--held-out")
    if args.nearest and not (args.fake and real.count) or args.held_out and not (args.nearest and held.count):
        raise ValueError("--nearest N needs --fake, and as --real the training items; --held-out SET needs "
                         "--nearest N and a set of items")
    if args.fake and is_checkpoint(args.fake):
        model, checkpoint = sample.load(args.fake, "raw" if args.raw else "ema")
    else:
        task.fake = open_set(args.fake, args, "--fake")
        task.fake.count = min(task.fake.count, args.n or task.fake.count)
    domain = model.cfg.domain if model else task.fake.domain or "points"
    if {real.domain, held.domain} - {domain, None} or task.fake.source and not task.fake.count:
        raise ValueError(f"--fake {args.fake}, --real {args.real}: expected items, of one domain")
    names, runs = choose(task, domain) if args.metrics or not args.nearest else ([], [])
    if model:
        count = args.n or (not names and args.nearest) or (domain == "points" and real.count) or 50_000
        size = args.points if domain == "points" else args.res and (args.res, args.res)
        out = sample.sample(model.to(args.device), checkpoint, count, args.out, size=size, seed=args.seed,
                            tokens=args.tokens, guidance=args.guidance, solver=args.solver, dtype=args.dtype,
                            options={"steps": args.steps} if args.steps else {})
        task.fake = open_set(str(out), args, "--fake")
    task.protocol = protocol(task) | task.protocol
    scores = compute(task, names, runs)
    if RANK:
        return None
    if names and not scores or not np.isfinite([*scores.values()]).all():
        raise ValueError(f"found {scores or 'no figure'}; expected finite numbers")
    rows = references.paper(real.dataset) or references.paper(task.fake.dataset)
    paper = {row: rows[row] for row in rows if row != "references" and {*rows[row]} & {*scores}}
    if scores:
        print_table({"ours": scores, **paper})
    print(f"{task.protocol['n_fake']} samples, {task.protocol['n_real']} references; protocol in {args.json}")
    result = dict(metrics=scores, paper=paper, protocol=task.protocol, warnings=task.warnings,
                  nearest=memorised(task, held) if args.nearest else None)
    write_json(args.json, result)
    return result

def compute(task, names, runs):
    """Features of the sets, where metrics need them, then {name: figure}, on process 0."""
    for side, items in (("fake", task.fake), ("real", task.real)):
        stored = items.statistics.keys() - ROWS if side == "real" else set()     # moments stand for the items
        streamed = [name for name in names if METRICS[name].feature and side in METRICS[name].needs
                    and stored.isdisjoint(METRICS[name].statistics)]
        if streamed and items.count:
            extract(task, side, streamed, runs)
    check_pair(task, names)
    scores = {}
    for score, mine in groupby(names, lambda name: METRICS[name].score):
        if RANK == 0 or score is pair_scores:
            scores.update(score(task, [*mine]))
    return scores

def memorised(task, held):
    """--nearest N: the three training items nearest to each of N samples, on a sheet and in numbers."""
    args, real, image = task.args, task.real, task.fake.domain == "image"

    def read(items, i):
        return items.item(i) if image else clouds.normalise_box(items.item(i)[None])[0]

    def near(items):
        with sample.progress_bar(items.count, "item") as bar:
            return nearest.nearest(samples, lambda i: read(items, i), items.count, args.workers, bar.update)
    samples = [read(task.fake, i) for i in range(min(args.nearest, task.fake.count))]
    order, found = near(real)                                          # (N,3)
    tiles = [x for one, row in zip(samples, order.tolist()) for x in (one, *(read(real, j) for j in row))]
    tiles = tiles if image else [sample.draw_points(2 * tile) for tile in tiles]
    sheet = Path(args.json).with_suffix(".nearest.png")
    write_atomic(sheet, lambda file: sample.grid_image(tiles, 1 + order.shape[1]).save(file, "PNG"))
    result = dict(sheet=str(sheet), train=found[:, 0].mean(), n_train=real.count)
    if held.count:
        result.update(held_out=near(held)[1][:, 0].mean(), n_held_out=held.count)
        result["ratio"] = result["train"] / result["held_out"] if result["held_out"] else None
    print("nearest:", *(f"{key} {value}" for key, value in result.items()))
    return result | dict(items=order.tolist(), distances=found.tolist())

def protocol(task):
    """How the figures come about: all flags, what sample.py wrote beside the samples, both sets."""
    args, fake, real = task.args, task.fake, task.real
    empty = dict.fromkeys(("ckpt_sha256", "weights", "nfe"))
    content = vars(args) | empty | fake.record | dict(samples=None, device=str(args.device))
    for side, items in (("fake", fake), ("real", real)):
        n = items.count or items.record.get("n")
        content |= {side: items.source, f"n_{side}": n, f"{side}_sha256": items.sha256,
                    f"file_type_{side}": items.file_type, f"normalisation_{side}": items.normalisation}
    return content | dict(torch=str(torch.__version__), processes=WORLD, real_protocol=real.record,
                          split=real.record.get("split", args.split))

def check_pair(task, names):
    """Warns of what makes figures incomparable."""
    types, sizes, hashes, paths = (
        [task.protocol.get(key.format(side)) for side in ("fake", "real")]
        for key in ("file_type_{}", "{}_size", "{}_sha256", "{}"))
    few = [name for name in names if task.fake.count < METRICS[name].published]
    if few:
        task.warn(f"{', '.join(few)} of {task.fake.count} samples, {task.real.count} real items read: "
                  f"published figures are of {METRICS[few[0]].published:,} samples; the bias of fewer "
                  "exceeds what models differ by")
    known = {"jpg", "jpeg", "jpe", "jfif", "webp", "avif", "jp2"}
    lossy = {bool(known & {*kind.split("+")}) for kind in types if kind}
    if len(lossy) == 2:
        task.warn(f"file types differ: {types[0]} samples, {types[1]} references; "
                  "compression alone moves FID")
    resize = task.real.record.get("resize", task.args.resize)
    if resize != task.args.resize and "inception" in task.protocol["networks"]:
        task.warn(f"--resize {task.args.resize}, but the reference was made with {resize}: not comparable")
    if None not in sizes and sizes[0] != sizes[1]:
        task.warn(f"sizes differ: samples {sizes[0]}, references {sizes[1]}; --res brings images to one")
    same = None not in hashes and hashes[0] == hashes[1]
    if same or None not in paths and Path(paths[0]).resolve() == Path(paths[1]).resolve():
        task.warn(f"{paths[0]} and {paths[1]} are the same set: the figures say nothing of a model")

def print_table(columns):
    """{heading: {metric: figure}}; the first column says which metrics."""
    print(" " * 14, *(f"{heading:>18}" for heading in columns))
    for name in next(iter(columns.values())):
        figures = (f"{column[name]:18.4f}" if name in column else f"{'-':>18}" for column in columns.values())
        print(f"{name} {METRICS[name.removesuffix('_std')].unit}".ljust(14), *figures)

def stats(args):
    """Reference statistics of a set of images, every one exactly once."""
    args.fake = args.real = args.data
    task = Task(args, open_set(args.data, args, "--data"))
    real = task.real
    if real.domain != "image" or not real.count or not args.out.endswith(".npz"):
        raise ValueError(f"--data {args.data} --out {args.out}: expected images, a name that ends in .npz")
    real.count = min(real.count, args.n or real.count)
    names, runs = choose(task, "image")
    names = [name for name in names if "real" in METRICS[name].needs]
    task.protocol = protocol(task) | task.protocol
    real.statistics.clear()                                            # of another tool
    extract(task, "real", names, runs)
    if RANK == 0:
        meta = json.dumps(dict(task.protocol, n=real.count))
        write_atomic(args.out, lambda file: np.savez(file, n=real.count, meta=meta, **real.statistics))
    print0(f"{args.out}: {', '.join(names)} of {real.count} images {task.protocol['real_size']}")

# ---- Flags ---------------------------------------------------------------------------------------------
def parser():
    p = flag_parser(__doc__)
    flag = p.add_argument
    flag("command", nargs="?", choices=("stats",))
    flag("--fake", help="the samples, or a checkpoint or shipped model to draw them from")
    flag("--real", help="the reference")
    flag("--dataset", choices=[*data.DATASETS, *FOLDERS], help="the same as --real NAME")
    flag("--data", help="directory or file of the data set; for stats: any set that --real takes")
    flag("--category", help="of shapenet")
    flag("--split", help="of a data set, or sub-directory of a directory")
    flag("--metrics", nargs="+", metavar="NAME", help=f"all, or of {' '.join(METRICS)}")
    flag("--json", default="metrics.json", help="figures and protocol (default: metrics.json)")
    flag("--features", help="module:callable or TorchScript: uint8 (b,3,H,W) or float32 (b,P,3) -> (b,d)")
    flag("--weights", nargs="+", metavar="PATH", dest="weight_files", help="networks (default: the cache's)")
    flag("--cache", default=str(weights.cache_directory()), help="of weights and pairs of clouds")
    flag("--resize", choices=inception.RESIZES, default="tf1", help="for Inception (default: tf1, ADM's)")
    flag("--res", type=positive, help="crop and resize images to this side, as training does")
    flag("--n", "--samples", type=positive, help="samples to draw or read; items of an endless data set")
    flag("--k", type=positive, default=3, help="neighbour of precision and recall (default: 3)")
    flag("--nearest", type=positive, metavar="N", help="a sheet: N samples, nearest training items (--real)")
    flag("--held-out", help="for --nearest: items of no training, a set as --real")
    emds = [name for name in clouds.DISTANCES if name != "chamfer"]
    flag("--emd", choices=emds, default="lion", help="default: lion, the paper's scale")
    flag("--normalize", choices=("box", "none"), default="box", help="clouds: longest side 1, or as stored")
    flag("--images", help="ulip_i: the conditioning images, in order, or their features as .npy")
    flag("--point-features", help="ulip_i: features of the clouds as .npy, in place of --fake")
    flag("--memory", type=positive, default=1024, help="MiB for pairs of clouds (default: 1024)")
    flag("--batch", type=positive, help="items at a time (default: 64 on CUDA, 8 on the CPU)")
    flag("--workers", type=positive, default=torch.get_num_threads(), help="threads (default: one a core)")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    flag("--raw", action="store_true", help="draw from the last weights, not the averaged ones")
    flag("--seed", type=natural, default=0, help="of the samples drawn (default: 0)")
    flag("--solver", choices=sample.SOLVERS)
    flag("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    for name, kind in dict(points=positive, guidance=float, steps=positive, tokens=str, out=str).items():
        flag(f"--{name}", type=kind)
    return p

def main(argv=None):
    args = parser().parse_args(argv)
    args.real, out = args.real or args.dataset, Path(args.out or "." if args.command else args.json)
    if not args.command and not args.fake and not args.point_features:
        raise ValueError("--fake is missing: samples (a directory or file), or a checkpoint to draw from")
    if not out.parent.is_dir() or out.is_dir():
        raise ValueError(f"{out}: expected the name of a file, in a directory that exists")
    args.device = sample.start_processes(args.device, "gloo")
    torch.set_float32_matmul_precision("highest")                      # TF32 moves FID
    torch.backends.cudnn.allow_tf32 = False
    return stats(args) if args.command else evaluate(args)

if __name__ == "__main__":
    sample.run_main(main)
