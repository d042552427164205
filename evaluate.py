"""Evaluate samples against real data: python evaluate.py --fake X --real Y [--metrics fid is ...]

X, Y: a directory, .zip or lmdb of images, packed or not; a directory of point clouds (.npy, .ply) or of
sample.py; an .npz, read into memory (arr_0 or images uint8 (S,H,W,3); statistics mu, sigma; arr_0 floating
(S,P,3)); a .npy or LION's .pt of point clouds (S,P,3); a data set, NAME or NAME:SPLIT. X may be a checkpoint.

    python evaluate.py stats --data Y --res R --out ref.npz      reference statistics of images

In order: scores and METRICS; sets; features; commands; flags. A new metric is a function in metrics/ and here
its score function and a row of METRICS. S items, P points, d features, b in a batch.
"""
import argparse
import hashlib
import importlib
import json
import os
import sys
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
from sample import RANK, WORLD, natural, positive, print0, wait_for_all, write_atomic, write_json

# ---- Scores ---------------------------------------------------------------------------------------------
# score(task, names) -> {name: value}, called once for all names that share it. A task has args, the
# Sets fake and real (empty where not given), protocol (goes into the JSON), warn(text), and of features
# moments {(side, feature): frechet.Moments} and rows {(side, feature): (S,d)}; side is "fake" or "real".

def frechet_scores(task, names):
    found = {}
    for name in names:
        row = METRICS[name]
        one, other = task.moments["fake", row.feature], task.moments.get(("real", row.feature))
        real = (other.mean, other.cov) if other else [task.real.statistics[key] for key in row.statistics]
        found[name] = frechet.frechet_distance(one.mean, one.cov, *real)
        if min(one.n, other.n if other else task.real.record.get("n", one.n)) <= len(one.mean):
            task.warn(f"{name}: fewer items than the {len(one.mean)} dimensions of the features: covariances "
                      f"are rank-deficient, the distance is biased upwards")
    return found

def inception_scores(task, names):
    return dict(zip(("is", "is_std"), inception.inception_score(task.rows["fake", "classes"].double())))

# Density and coverage keep the k = 5 of their authors, whatever --k is
ROW_SCORES = {("precision", "recall"): precision_recall, ("density", "coverage"): density_coverage,
              ("kid", "kid_std"): frechet.kid}

def row_scores(task, names):
    args, feature, found = task.args, feature_of(names[0], task.args), {}
    real = task.rows["real", feature] if task.real.count else task.real.statistics["features"]
    task.protocol["n_real_pr"] = len(real)
    for keys, score in ROW_SCORES.items():
        if {*keys} & {*names}:
            more = {"k": args.k} if score is precision_recall else {}
            try:
                found.update(zip(keys, score(real, task.rows["fake", feature], device=args.device, **more)))
            except ValueError as e:                                    # fewer than k items
                if {*keys} & {*(args.metrics or ())}:
                    raise
                task.warn(f"{keys[0]}, {keys[1]} are left out: {e}")
    return found

def pair_scores(task, names):
    """MMD, COV, 1-NNA of Chamfer distances or EMD, and JSD. All processes fill one cache of pairs."""
    args, (smp, ref) = task.args, comparable_clouds(task)
    options = dict(memory=args.memory, cache=f"{args.cache}/pairs", device=args.device, workers=args.workers)
    kinds = {name: args.emd if name.endswith("emd") else "chamfer" for name in names if name != "jsd"}
    sides = (ref, smp), (ref, ref), (smp, smp)
    jobs = [(a, b, kind) for kind in sorted({*kinds.values()}) for a, b in sides]
    print0(f"{len(ref)} references, {len(smp)} samples, ~ {clouds.estimate(jobs, **options) / WORLD:.0f} s")
    for a, b, kind in jobs:
        clouds.pairwise(a, b, kind, share=(RANK, WORLD), progress=RANK == 0, **options)
    wait_for_all()
    parts = {kind: clouds.scores(ref, smp, kind, **options) for kind in {*kinds.values()}}
    found = {name: parts[kind][name.split("_")[0]] for name, kind in kinds.items()}
    return found | ({"jsd": clouds.jsd(ref, smp)} if "jsd" in names else {})

def comparable_clouds(task):
    """Samples and references in one scale, of one P, no more samples than references, as in LION's code."""
    args, fake, real = task.args, task.fake, task.real
    smp, ref, scales = stack(fake), stack(real), [fake.normalisation, real.normalisation]
    if args.normalize == "box":
        scale = "box: longest side to 1 (LION)"
        smp, ref = clouds.normalise_box(smp), clouds.normalise_box(ref)
    elif real.affine and fake.normalisation in (None, "global"):
        scale = "x std + mean of the reference file (LION's global protocol)"
        mean, std = fake.affine or real.affine
        smp, ref = smp * std[:1] + mean[:1], ref * real.affine[1] + real.affine[0]
    else:
        scale = f"samples normalised by {scales[0] or 'unknown'}, references by {scales[1] or 'unknown'}"
        if None not in scales and scales[0] != scales[1]:
            raise ValueError(f"--normalize none: {scale}; expected one rule, or --normalize box")
        if scales[0] != scales[1]:
            task.warn(f"--normalize none: {scale}; if they differ, the figures mean nothing")
    most, least = max(smp.shape[1], ref.shape[1]), min(smp.shape[1], ref.shape[1])
    if most > least:
        task.warn(f"{smp.shape[1]} points a sample, {ref.shape[1]} a reference: a random {least} are used")
        pick = np.random.default_rng(0).permutation(most)[:least]      # one choice for all (LION)
        smp, ref = (x[:, pick] if x.shape[1] > least else x for x in (smp, ref))
    if len(smp) < len(ref):
        task.warn(f"{len(smp)} samples against {len(ref)} references: COV and 1-NNA assume as many of each")
    expected = references.paper(real.dataset).get("references")
    if expected and (expected, "lion", "box") != (len(ref), args.emd, args.normalize):
        task.warn(f"{len(ref)} references: the paper's row is against {expected}, with lion and box")
    task.protocol.update(normalisation=scale, n_pairs=[min(len(smp), len(ref)), len(ref)], points=least)
    return smp[:len(ref)], ref

def p_fid_score(task, names):
    net = pointnet.load(task.protocol["networks"]["pointnet"]["file"]).to(task.args.device)
    found = [pointnet.features(net, stack(items), progress=True) for items in (task.fake, task.real)]
    one, other = (frechet.Moments(x.shape[1]).update(x) for x in found)
    return {"p_fid": frechet.frechet_distance(one.mean, one.cov, other.mean, other.cov)}

@torch.no_grad()
def ulip_score(task, names):
    """Mean cosine of ULIP-2's features of point clouds and CLIP's of their images, pair by pair."""
    args, device, networks = task.args, task.args.device, task.protocol["networks"]
    points = args.point_features and np.load(args.point_features, allow_pickle=False)
    if not args.point_features:
        points = ulip.features(ulip.load(networks["ulip"]["file"]).to(device), stack(task.fake), device, True)
    if args.images.endswith(".npy"):
        images = np.load(args.images, allow_pickle=False)
        return {"ulip_i": ulip.ulip_score(points, images)}
    tower, items = clip.load(networks["bigg"]["file"]).to(device), open_set(args.images, args, "--images")
    images = (clip.preprocess(torch.from_numpy(items.item(i))[None]) for i in range(items.count))
    return {"ulip_i": ulip.ulip_score(points, torch.cat([tower(image.to(device)) for image in images]))}

@dataclass
class Metric:
    domains: str              # image, points, or both
    score: Callable
    networks: tuple = ()      # whose weights it needs (metrics/weights.py)
    feature: str = None       # of STREAMS: as moments where there are `statistics`, else as rows
    statistics: tuple = ()    # names of stored mean and covariance
    default: str = ""         # the domain in which it is computed without being asked for
    published: int = 0        # samples behind published figures
    unit: str = ""
    own: bool = False         # of the features of --features, where that is given
    needs: tuple = ("fake", "real")

METRICS = {
    "fid": Metric("image", frechet_scores, ("inception",), "pool", ("mu", "sigma"), "image", 50_000),
    "sfid": Metric("image", frechet_scores, ("inception",), "spatial", ("mu_s", "sigma_s"), "image", 50_000),
    "is": Metric("image", inception_scores, ("inception",), "classes", (), "image", 50_000, needs=("fake",)),
    "kid": Metric("image points", row_scores, ("inception",), "pool", (), "image", unit="x 1e3", own=True),
    **dict.fromkeys(("precision", "recall", "density", "coverage"),
                    Metric("image points", row_scores, ("inception",), "pool", default="image", own=True)),
    "fid_clip": Metric("image", frechet_scores, ("clip",), "clip", ("mu_clip", "sigma_clip"), "", 50_000),
    "fdd": Metric("image", frechet_scores, ("dinov2",), "dinov2", ("mu_fdd", "sigma_fdd"), "", 50_000),
    "mmd_cd": Metric("points", pair_scores, unit="x 1e3", default="points"),
    "mmd_emd": Metric("points", pair_scores, unit="x 1e2", default="points"),
    **dict.fromkeys(("cov_cd", "cov_emd", "1nna_cd", "1nna_emd"),
                    Metric("points", pair_scores, unit="%", default="points")),
    "jsd": Metric("points", pair_scores, default="points"),
    "p_fid": Metric("points", p_fid_score, ("pointnet",), published=10_000),
    "ulip_i": Metric("points", ulip_score, ("ulip", "bigg"), needs=("images",)),
    "fd": Metric("image points", frechet_scores, (), "own", ("mu_fd", "sigma_fd"), own=True),
}

# ---- Sets: what --fake and --real may be ---------------------------------------------------------------

FOLDERS = {"ffhq256": 256, "church256": 256, "imagenet128": 128, "imagenet256": 256}     # name: resolution

@dataclass
class Set:
    """S items: item(i) is uint8 (H,W,3), or float32 (P,3); or stored statistics alone (count 0)."""
    source: str = None
    domain: str = None
    count: int = 0
    item: Callable = None
    files: list = ()
    normalisation: str = None                          # of point clouds, where something says it: box, global
    dataset: tuple = None                              # name, and category or resolution
    record: dict = field(default_factory=dict)         # samples.json, or what `stats` wrote
    statistics: dict = field(default_factory=dict)
    affine: tuple = ()                                 # mean, std of LION's global normalisation
    sha256: str = None                                 # of the file; else taken while the items are read

    @property
    def file_type(self):
        return "+".join(sorted({Path(file).suffix[1:].lower() for file in self.files})) or None

def open_set(source, args, flag):
    """The Set of what follows --fake or --real."""
    path, (name, _, split), known = Path(source), source.partition(":"), {**data.DATASETS, **FOLDERS}
    read = FILES.get(path.suffix.lower())
    if not path.exists() and name in known:
        return named_set(name, split or args.split, args)
    if not path.is_dir() and not (path.exists() and read):
        raise ValueError(f"{flag} {source}: no such directory, file of {', '.join(FILES)}, or data set "
                         f"({', '.join(known)})")
    if path.is_file():
        return read(path, args)
    if (path / "samples.json").exists():
        return sampled_set(path, args)
    path = path / args.split if args.split and (path / args.split).is_dir() else path
    files = [] if (path / "manifest.json").exists() else data.find_files(path, (".npy", ".ply"))
    files.sort(key=lambda file: file.lower().endswith(".npy"))         # which is read, not its twin .ply
    files = sorted({os.path.splitext(file)[0]: file for file in files}.values())
    return file_set(path, files, data.read_cloud, args) if files else image_set(path, args)

def file_set(path, files, read, args, **more):
    """One item a file."""
    domain = "image" if read is data.read_image else "points"
    return Set(str(path), domain, len(files), lambda i: sized(read(files[i]), args), files, **more)

def image_set(path, args):
    """A directory, .zip or lmdb of images, or a packed directory."""
    found = data.load("folder", str(path), labels=False)
    files = found.files
    if isinstance(found, data.Arrays):                                 # the manifest tells what was packed
        manifest = json.loads((path / "manifest.json").read_text())
        files = [f"image.{kind}" for kind in manifest["file_type"].split("+")]
    return Set(str(path), "image", len(found), lambda i: sized(found.item(i)[0], args), files)

def named_set(name, split, args):
    """A data set of data.py; of a directory the sub-directory of the split, where there is one."""
    kind = "folder" if name in FOLDERS else name
    split = split or (None if kind == "folder" and not os.path.isdir(f"{args.data}/val") else "val")
    found = data.load(kind, args.data, res=args.res or FOLDERS.get(name), points=args.points,
                      category=args.category, split=split)
    count = args.n or 2 ** 10 if name in ("glyphs", "solids") else len(found)         # those two are endless
    key, scale = (found.res, None) if found.domain == "image" else (args.category or "all", "box")
    return Set(f"{name}:{split or 'all'}", found.domain, count, lambda i: found.item(i)[0],
               getattr(found, "files", ()), scale, (name, key), {"split": split or "all"})

def sampled_set(path, args):
    """A directory of sample.py."""
    with data.reading(path / "samples.json", "a complete record of sample.py"):
        record = json.loads((path / "samples.json").read_text())
        files, scale = [str(path / row["file"]) for row in record["samples"]], record["normalisation"]
        key = record["dataset"], (record["category"] or "all") if scale else record["size"][0]
        if not record["complete"]:
            raise ValueError("found an unfinished one; the same sample.py goes on")
    return file_set(path, files, data.read_cloud if scale else data.read_image, args, normalisation=scale,
                    dataset=None if record["crop"] else key, record=record)

def sized(item, args):
    """A point cloud or image; with --res an image is cropped and resized as in training."""
    item = np.asarray(item)
    return data.fit(Image.fromarray(item), args.res) if args.res and item.dtype == np.uint8 else item

def array_set(path, args):
    """A file of arrays, or of statistics alone."""
    known = [key for row in METRICS.values() for key in row.statistics] + ["features"]
    with data.reading(path, references.EXPECTED):
        found = references.read(path, known)
    array, more = found.array, dict(record=found.record, statistics=found.statistics, affine=found.affine,
                                    sha256=weights.sha256(path))
    if array is None:
        return Set(str(path), "image", **more)
    kind, domain = (np.uint8, "image") if array.dtype == np.uint8 else (np.float32, "points")
    return Set(str(path), domain, len(array), lambda i: sized(array[i].astype(kind), args), [path],
               normalisation="global" if found.affine else None, dataset=("shapenet", found.category), **more)

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

def inception_features(args, path):
    net, resize = inception.load(path).to(args.device), inception.RESIZES[args.resize]

    def run(batch):
        pool, spatial, logits = net(resize(batch))
        return {"pool": pool, "spatial": spatial, "classes": logits.double().softmax(1)}
    return run

def clip_features(args, path):
    tower = clip.load(path).to(args.device)
    return lambda batch: {"clip": tower(clip.preprocess(batch).to(args.device))}

def dinov2_features(args, path):
    net = dinov2.load(path).to(args.device)
    found = net.norm.weight.numel(), len(net.blocks), net.registers
    if found != (1024, 24, 0):
        raise ValueError(f"{path}: width, depth, registers are {found}; expected ViT-L/14, (1024, 24, 0)")
    return lambda batch: {"dinov2": net(dinov2.preprocess(batch), "class")}

def own_features(args, path):
    """--features: a function of uint8 (b,3,H,W), or float32 (b,P,3), giving (b,d)."""
    module, _, name = args.features.partition(":")
    with data.reading(f"--features {args.features}", "module:callable or a TorchScript file"):
        if Path(args.features).is_file():
            function = torch.jit.load(args.features, map_location=args.device).eval()
        else:
            sys.path.insert(0, os.getcwd())
            function = getattr(importlib.import_module(module), name)
    return lambda batch: {"own": function(batch.permute(0, 3, 1, 2) if batch.dtype == torch.uint8 else batch)}

# network -> load(args, path of weights), a function of a batch (b,H,W,3) or (b,P,3) giving {feature: (b,d)}
STREAMS = {"inception": inception_features, "clip": clip_features, "dinov2": dinov2_features,
           "own": own_features}

def feature_of(name, args):
    return "own" if METRICS[name].own and args.features else METRICS[name].feature

@torch.no_grad()
def extract(task, side, names, runs):
    """Streams a set through `runs`: fills the task's moments and rows, on process 0, and its protocol."""
    args, items, moments, rows = task.args, getattr(task, side), {}, defaultdict(dict)
    wanted = {(feature_of(name, args), bool(METRICS[name].statistics)) for name in names}
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
            for feature, found in (pair for run in runs for pair in run(batch).items()):
                if (feature, True) in wanted:
                    moments.setdefault(feature, frechet.Moments(found.shape[1], args.device)).update(found)
                if (feature, False) in wanted:
                    rows[feature].update((i, x) for i, x in zip(numbers, found.float().cpu()) if i in chosen)
            bar.update(len(numbers))
    parts = [({feature: one.to("cpu") for feature, one in moments.items()}, rows)] * WORLD
    if WORLD > 1:
        dist.gather_object(parts[0], parts if RANK == 0 else None)
    for more_moments, more_rows in parts[1:] if RANK == 0 else ():
        for feature, one in more_moments.items():
            moments[feature].merge(one)
        for feature, one in more_rows.items():
            rows[feature].update(one)
    task.moments.update({(side, feature): one for feature, one in moments.items()})
    rows = {feature: [one[i] for i in sorted(one)] for feature, one in rows.items()}
    digest = hashlib.sha256(b"".join(rows.pop("sha256"))).hexdigest()
    task.rows.update({(side, feature): torch.stack(one) for feature, one in rows.items()})
    task.protocol.update({f"{side}_sha256": items.sha256 or digest, f"{side}_size": shape})

# ---- Commands ------------------------------------------------------------------------------------------

def choose(args, domain, real, warn):
    """The metrics to compute, {network: (path, SHA-256, published)}, and the streams of features. Of `all`
    and of the default what cannot be computed is left out; asked for by name it is an error."""
    known = [name for name, row in METRICS.items() if domain in row.domains]
    default = [n for n in known if (METRICS[n].own if args.features else METRICS[n].default == domain)]
    asked, names, found, left_out = args.metrics or [], [], {}, {}
    if not {*asked} <= {*known, "all"}:
        raise ValueError(f"--metrics {' '.join(asked)}: of these sets there are all, {', '.join(known)}")
    wanted = known if "all" in asked else [name for name in known if name in (asked or default)]
    given = {weights.identify(path): path for path in args.weight_files or ()}
    if RANK:
        wait_for_all()                                                 # process 0 alone downloads
    for name in wanted:
        try:
            require(name, args, domain, real, found, given)
            names.append(name)
        except ValueError as e:
            if asked and "all" not in asked:
                raise ValueError(f"{name}: {e}") from None
            left_out.setdefault(str(e), []).append(name)
    for reason, some in left_out.items():
        if not names:
            raise ValueError(f"{', '.join(some)}: {reason}")
        warn(f"left out: {', '.join(some)}: {reason}")
    if RANK == 0:
        wait_for_all()
    for network, (path, digest, published) in found.items():
        if published is False:
            warn(f"{network}: {path}, SHA-256 {digest}, is not the published file; not comparable")
    own = {"own": [None]} if "own" in {feature_of(name, args) for name in names} else {}
    return names, found, [STREAMS[n](args, path) for n, (path, *_) in (found | own).items() if n in STREAMS]

def require(name, args, domain, real, found, given):
    """Raises ValueError where a metric cannot be computed; adds the weights it needs to `found`."""
    row, own = METRICS[name], feature_of(name, args) == "own"
    spared = {"ulip": args.point_features, "bigg": str(args.images).endswith(".npy"), "inception": own}
    lacking = [flag for flag in row.needs if not getattr(args, flag)]
    if lacking or row.own and not args.features and (own or domain == "points"):
        raise ValueError(f"--{[*lacking, 'features'][0]} is missing")
    stored = {*(row.statistics or ("features",))}
    if "real" in row.needs and not real.count and not stored <= {*real.statistics}:
        raise ValueError(f"{real.source} holds statistics alone, not {', '.join(stored)}; expected images")
    for network in row.networks:
        if network not in found and not spared.get(network):
            found[network] = weights.find(network, given.get(network), args.cache, bool(args.metrics), print0)

def is_checkpoint(source):
    path = Path(source or "")
    if path.suffix.lower() != ".pt" or not path.is_file():
        return path.is_dir() and bool(sample.checkpoints(path))
    with data.reading(path, "a file of tensors"):
        mmap = zipfile.is_zipfile(path)                                # its weights are not read here
        return {"ema", "config"} <= {*torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)}

def evaluate(args):
    """Draws what is to be drawn, computes, prints, writes args.json; returns its content on process 0."""
    warnings, fake, model, scores = [], Set(), None, {}

    def warn(text):
        warnings.append(text)
        print0(f"WARNING: {text}", sys.stderr)
    real, held = (open_set(source, args, flag) if source else Set()
                  for source, flag in ((args.real, "--real"), (args.held_out, "--held-out")))
    if args.nearest and not (args.fake and real.count) or args.held_out and not (args.nearest and held.count):
        raise ValueError("--nearest N needs --fake, and as --real the training items; --held-out needs both")
    if is_checkpoint(args.fake):
        model, checkpoint = sample.load(args.fake, "raw" if args.raw else "ema")
    elif args.fake:
        fake = open_set(args.fake, args, "--fake")
        fake.count = min(fake.count, args.n or fake.count)
    domain = model.cfg.domain if model else fake.domain or "points"
    if {real.domain, held.domain} - {domain, None} or fake.source and not fake.count:
        raise ValueError(f"--fake {args.fake}, --real {args.real}: expected items, of one domain")
    names, nets, runs = choose(args, domain, real, warn) if args.metrics or not args.nearest else ([], {}, [])
    if model:
        count = args.n or (domain == "points" and real.count) or 50_000
        size = args.points if domain == "points" else args.res and (args.res, args.res)
        out = sample.sample(model.to(args.device), checkpoint, count, args.out, size=size, seed=args.seed,
                            tokens=args.tokens, guidance=args.guidance, solver=args.solver, dtype=args.dtype,
                            options={"steps": args.steps} if args.steps else {})
        fake = open_set(str(out), args, "--fake")
    task = argparse.Namespace(args=args, fake=fake, real=real, warn=warn, moments={}, rows={},
                              protocol=protocol(args, fake, real, nets))
    check_pair(fake, real, names, warn)
    compute(task, names, runs, scores)
    if RANK:
        return None
    if not np.isfinite([*scores.values()]).all():
        raise ValueError(f"found {scores}; expected finite numbers")
    rows = references.paper(real.dataset) or references.paper(fake.dataset)
    paper = {row: rows[row] for row in rows if row != "references" and {*rows[row]} & {*scores}}
    if scores:
        print_table({"ours": scores, **paper})
    print(f"{task.protocol['n_fake']} samples, {task.protocol['n_real']} references; protocol in {args.json}")
    result = dict(metrics=scores, paper=paper, protocol=task.protocol, warnings=warnings,
                  nearest=memorised(task, held) if args.nearest else None)
    write_json(args.json, result)
    return result

def compute(task, names, runs, scores):
    torch.set_float32_matmul_precision("highest")
    for side, items in (("fake", task.fake), ("real", task.real)):
        streamed = [name for name in names if METRICS[name].feature and side in METRICS[name].needs
                    and not {*METRICS[name].statistics} & {*items.statistics}]
        if streamed and items.count:
            extract(task, side, streamed, runs)
    sizes, hashes, paths = ([task.protocol.get(f"{side}{key}") for side in ("fake", "real")]
                            for key in ("_size", "_sha256", ""))
    if None not in sizes and sizes[0] != sizes[1]:
        task.warn(f"sizes differ: samples {sizes[0]}, references {sizes[1]}; --res brings images to one")
    same = None not in hashes and hashes[0] == hashes[1]
    if same or None not in paths and Path(paths[0]).resolve() == Path(paths[1]).resolve():
        task.warn(f"{paths[0]} and {paths[1]} are the same set: the figures say nothing of a model")
    for score in dict.fromkeys(METRICS[name].score for name in names):
        mine = [name for name in names if METRICS[name].score is score]
        if RANK == 0 or score is pair_scores:
            scores.update(score(task, mine))

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

def protocol(args, fake, real, found):
    """How the figures come about: all flags, what sample.py wrote beside the samples, both sets."""
    empty = dict.fromkeys(("ckpt_sha256", "weights", "nfe"))
    content = vars(args) | empty | fake.record | dict(samples=None, device=str(args.device))
    for side, items in (("fake", fake), ("real", real)):
        n = items.count or items.record.get("n")
        content.update({side: items.source, f"n_{side}": n, f"{side}_sha256": items.sha256,
                        f"file_type_{side}": items.file_type, f"normalisation_{side}": items.normalisation})
    keys = "file", "sha256", "published"
    content["networks"] = {name: dict(zip(keys, (str(path), *rest))) for name, (path, *rest) in found.items()}
    return content | dict(torch=str(torch.__version__), processes=WORLD, real_protocol=real.record,
                          split=real.record.get("split", args.split))

def check_pair(fake, real, names, warn):
    """Warns where the protocol makes figures incomparable."""
    few = [name for name in names if fake.count < METRICS[name].published]
    if few:
        warn(f"{', '.join(few)} of {fake.count} samples, {real.count} real items read: published figures are "
             f"of {METRICS[few[0]].published:,} and 10,000; the bias of fewer exceeds what models differ by")
    types = [items.file_type for items in (fake, real)]
    lossy = {bool({"jpg", "jpeg", "webp", "avif", "jp2"} & {*kind.split("+")}) for kind in types if kind}
    if len(lossy) == 2:
        warn(f"file types differ: {types[0]} samples, {types[1]} references; compression alone moves FID")

def print_table(columns):
    """{heading: {metric: figure}}; the first column says which metrics."""
    print(" " * 14, *(f"{heading:>18}" for heading in columns))
    for name in next(iter(columns.values())):
        figures = (f"{column[name]:18.4f}" if name in column else f"{'-':>18}" for column in columns.values())
        print(f"{name} {METRICS[name.removesuffix('_std')].unit}".ljust(14), *figures)

def stats(args):
    """Reference statistics of a set of images, every one exactly once."""
    args.fake = args.real = args.data
    real = open_set(args.data or "", args, "--data")
    if real.domain != "image" or not real.count or not args.out.endswith(".npz"):
        raise ValueError(f"--data {args.data} --out {args.out}: expected images, a name that ends in .npz")
    real.count = min(real.count, args.n or real.count)
    names, found, runs = choose(args, "image", real, lambda text: print0(f"WARNING: {text}", sys.stderr))
    names = [name for name in names if "real" in METRICS[name].needs]
    task = argparse.Namespace(args=args, real=real, moments={}, rows={},
                              protocol=protocol(args, Set(), real, found))
    extract(task, "real", names, runs)
    arrays = {"features": rows.numpy() for rows in task.rows.values()}
    for name in names:
        if METRICS[name].statistics:
            one = task.moments["real", feature_of(name, args)]
            arrays.update(zip(METRICS[name].statistics, (one.mean.numpy(), one.cov.numpy())))
    if RANK == 0:
        meta = json.dumps(dict(task.protocol, n=real.count))
        write_atomic(args.out, lambda file: np.savez(file, n=real.count, meta=meta, **arrays))
    print0(f"{args.out}: {', '.join(names)} of {real.count} images {task.protocol['real_size']}")

# ---- Flags ---------------------------------------------------------------------------------------------

def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = p.add_argument
    flag("command", nargs="?", choices=("stats",))
    flag("--fake", help="the samples, or a checkpoint to draw them from")
    flag("--real", help="the reference")
    flag("--dataset", choices=[*data.DATASETS, *FOLDERS], help="the same as --real NAME")
    flag("--data", help="directory or file of the data set; of stats, as --real")
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
    flag("--emd", choices=[*clouds.DISTANCES][1:], default="lion", help="default: lion, the paper's scale")
    flag("--normalize", choices=("box", "none"), default="box", help="clouds: longest side 1, or as stored")
    flag("--images", help="ulip_i: the conditioning images, in order, or their features as .npy")
    flag("--point-features", help="ulip_i: features of the clouds as .npy, in place of --fake")
    flag("--memory", type=positive, default=1024, help="MiB for pairs of clouds (default: 1024)")
    flag("--batch", type=positive, help="items at a time (default: 64 on CUDA, 8 on the CPU)")
    flag("--workers", type=positive, default=torch.get_num_threads(), help="threads (default: one a core)")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    flag("--raw", action="store_true", help="draw from the last weights, not the averaged ones")
    flag("--seed", type=natural, default=0, help="this and the next: as in sample.py")
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
    torch.backends.cudnn.allow_tf32 = False                            # TF32 moves FID
    return stats(args) if args.command else evaluate(args)

if __name__ == "__main__":
    sample.run_main(main)
