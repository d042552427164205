"""Evaluate samples against real data: python evaluate.py --fake X --real Y [--metrics fid is ...] [--json metrics.json]

X and Y may be
- a directory of pictures, a .zip or lmdb of them, or what data.py pack made of one; or a directory of clouds (.npy or .ply, one a
  file); a directory of sample.py is read as its samples.json says;
- an .npz: ADM's (arr_0 uint8 (N,H,W,3), or the reference statistics mu, sigma, mu_s, sigma_s, or both), `images` uint8
  (N,H,W[,3]), or Point-E's (arr_0 floating (N,P,3));
- clouds in one file: .npy (N,P,3), or a .pt of LION (its reference files with ref, mean, std, or a tensor (N,P,3));
- a data set of train.py by name, NAME or NAME:SPLIT (--data, --category, --split);
and X also a checkpoint or run directory of train.py: its samples are drawn first, and kept.

`python evaluate.py stats --data Y --res R --out ref.npz` writes reference statistics of anyone's own pictures.
`python evaluate.py upscale --fake RUN --real Y --times 4` compares samples drawn finer than the model was trained with enlargements
of the same seeds' samples (Tab. 9). All share the work under torchrun. Alphabet: S items of a set, P points of a cloud, d features of an item.
"""
import argparse
import contextlib
import hashlib
import importlib
import json
import os
import sys
import time
import warnings
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
from tqdm import tqdm

import data
import sample
from data import InputError, message, write_atomic
from metrics import clip, clouds, frechet, inception, pointnet, ulip, weights
from metrics.precision_recall import precision_recall
from sample import RANK, WORLD, natural, positive, print0, read_record, start_processes, wait_for_all
from train import RECIPES

# ---------------------------------------------------------------------------------------------------------
# What the paper reports: (data set, category or resolution) -> row -> metric, in the units of our output

PAPER = {
    ("ffhq256", 256): {"ASFT-B (Tab. 1)": dict(fid_clip=2.46), "ASFT-L (Tab. 1)": dict(fid_clip=2.18)},
    ("ffhq256", 512): {"ASFT (Tab. 9)": dict(fid=23.09), "bilinear (Tab. 9)": dict(fid=35.05),
                       "bicubic (Tab. 9)": dict(fid=24.34)},
    ("church256", 256): {"ASFT-B (Tab. 1)": dict(fid_clip=7.11), "ASFT-L (Tab. 1)": dict(fid_clip=5.51),
                         "ASFT (Tab. 8)": dict(fid=7.03, precision=0.69, recall=0.34),
                         "PerceiverIO (Tab. 8)": dict(fid=65.09, precision=0.38, recall=0.01)},
    ("imagenet128", 128): {"ASFT-XL (Tab. 2)": {"fid": 2.73, "is": 187.6, "precision": 0.80, "recall": 0.58}},
    ("imagenet256", 256): {"ASFT-XL (Tab. 3)": {"fid": 3.74, "is": 228.8, "precision": 0.82, "recall": 0.52}},
    ("objaverse", None): {"ASFT (Tab. 10)": dict(ulip_i=0.2976, p_fid=0.3638)},
}
TABLE4 = ("mmd_cd", "mmd_emd", "cov_cd", "cov_emd", "1nna_cd", "1nna_emd")
for _category, _b, _l in (
        ("airplane", (0.2861, 0.5156, 43.38, 47.54, 75.55, 64.95), (0.2880, 0.5052, 44.44, 47.16, 62.20, 62.96)),
        ("chair", (3.6310, 2.1725, 46.67, 53.31, 55.43, 51.13), (3.5145, 2.1860, 49.39, 49.84, 50.52, 51.66)),
        ("car", (0.9923, 0.7692, 43.46, 47.44, 60.36, 53.27), (0.9660, 0.7846, 44.03, 48.86, 53.83, 54.55)),
        ("all", (3.2586, 2.1328, 49.00, 50.40, 54.65, 55.70), (3.1775, 1.9794, 49.80, 52.39, 51.80, 53.90))):
    PAPER["shapenet", _category] = {"ASFT-B (Tab. 4)": dict(zip(TABLE4, _b)), "ASFT-L (Tab. 4)": dict(zip(TABLE4, _l))}

PAIRS = ("mmd_cd", "cov_cd", "1nna_cd", "mmd_emd", "cov_emd", "1nna_emd")
METRICS = {"image": ("fid", "sfid", "is", "precision", "recall", "fid_clip", "fd"),
           "points": (*PAIRS, "jsd", "p_fid", "ulip_i", "fd", "precision", "recall")}
DEFAULT = {"image": ("fid", "sfid", "is", "precision", "recall"), "points": (*PAIRS, "jsd")}
UNITS = {"mmd_cd": "x 1e3", "mmd_emd": "x 1e2", **dict.fromkeys(("cov_cd", "cov_emd", "1nna_cd", "1nna_emd"), "%")}

# features -> names of their stored mean and covariance: ADM's for the first two
STATISTICS = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s"), "fid_clip": ("mu_clip", "sigma_clip"),
              "fd": ("mu_fd", "sigma_fd")}
NETWORK = {"fid": "inception", "sfid": "inception", "is": "inception", "fid_clip": "clip", "p_fid": "pointnet"}
REAL_FOR_PR = 10_000      # as many as ADM's reference files hold for precision and recall; of more, a random subset

WARNINGS = []


def warn(text):
    """A loud line, which also goes into the JSON."""
    if text not in WARNINGS:
        WARNINGS.append(text)
        if RANK == 0:
            print(f"WARNING: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------
# Sets: what --fake and --real may be

@dataclass
class Set:
    """S items, read one by one: item(i) is uint8 (H,W,3), or float32 (P,3); or stored statistics alone (count 0)."""
    source: str
    domain: str
    count: int = 0
    item: Callable = None
    name: Callable = None                 # i -> what to call item i in a message
    file_type: str = None
    sha256: str = None                    # of the file; of a directory or data set it is taken while its items are read
    normalisation: str = None             # of clouds, where something says it: box, global
    split: str = None
    dataset: tuple = None                 # (data set, category or resolution) for the paper's figures
    record: dict = field(default_factory=dict)         # samples.json
    statistics: dict = field(default_factory=dict)     # arrays of a reference file
    affine: tuple = None                  # (mean, std) of LION's global normalisation


def open_set(source, args, flag):
    """A Set for what follows --fake or --real. Raises InputError in one line."""
    name, _, split = source.partition(":")
    if name in RECIPES and not Path(source).exists():
        return dataset_set(name, split or args.split, args)
    path = Path(source)
    if not path.exists():
        raise InputError(f"{flag} {source}: no such file or directory, nor a data set ({', '.join(RECIPES)})")
    if data.is_packed(path):
        packed = data.Packed(path)
        return Set(str(path), "image", len(packed), lambda i: fitted(enlarged(Image.fromarray(packed.item(i)[0]), args), args.res),
                   lambda i: f"{path} item {i}", file_types(packed.files))
    if path.is_dir() or data.is_archive(str(path)):
        return folder_set(path, args)
    if path.suffix not in FILES:
        raise InputError(f"{flag} {source}: expected a directory, or a file {', '.join(FILES)}, .zip")
    found = FILES[path.suffix](path, args)
    found.sha256 = sample.sha256(path)
    return found


def dataset_set(name, split, args):
    recipe, where = RECIPES[name], args.data
    split = split or "val"
    if recipe["loader"] == "folder" and where:
        inside = Path(where) / split
        split, where = (split, str(inside)) if inside.is_dir() else ("all", where)
    res = args.res or recipe.get("res")
    dataset = data.load(recipe["loader"], where, res=res, points=args.points or recipe.get("points"),
                        category=args.category, split=split)
    count = len(dataset)
    if recipe["loader"] in ("glyphs", "solids"):                       # endless
        count = args.n or 2 ** 10
    files = getattr(dataset, "files", None)
    image = dataset.domain == "image"
    return Set(source=f"{name}:{split}" + (f" {where}" if where else ""), domain=dataset.domain, count=count,
               item=lambda i: dataset.item(i)[0], name=lambda i: files[i] if files else f"{name} item {i}",
               file_type=file_types(files) if files else name, normalisation=None if image else "box", split=split,
               dataset=(name, dataset.res if image else args.category))


def file_types(files):
    short = {"jpg": "jpeg", "jpe": "jpeg", "jfif": "jpeg", "tif": "tiff"}
    types = {Path(f).suffix[1:].lower() for f in files}
    return "+".join(sorted({short.get(t, t) for t in types}))


def folder_set(path, args):
    record = read_record(path)
    if record is not None:
        files = [path / s["file"] for s in record["samples"]]
        missing = sum(not f.exists() for f in files)
        if missing or not record.get("complete", True):
            raise InputError(f"{path}: {missing} of its {len(files)} samples are missing; run the same sample.py again, it goes on")
        domain = "points" if record.get("normalisation") else "image"
    else:
        record = {}
        path = path / args.split if args.split and (path / args.split).is_dir() else path
        found = sorted(p for p in path.rglob("*") if p.suffix in (".npy", ".ply") and not p.name.startswith("."))
        files = list({p.with_suffix(""): p for p in reversed(found)}.values())[::-1]     # .npy before its twin .ply
        names = data.picture_names(str(path))
        pictures = [os.path.join(path, name) for name in names]
        domain = "points" if files else "image"
        if files and pictures:
            print0(f"{path}: {len(files)} clouds; the {len(pictures)} pictures beside them are not read")
        files = files or pictures
        if not files:
            raise InputError(f"{path}: neither pictures nor clouds (.npy, .ply) in it")
    image = domain == "image"
    opened = (lambda i: data.read_image(files[i])) if record else (lambda i: data.open_picture(str(path), names[i]))
    read = (lambda i: fitted(enlarged(opened(i), args), args.res)) if image else (lambda i: read_cloud(files[i]))
    size, named = record.get("size"), record.get("dataset")
    whole = named and not (record.get("crop") or record.get("zoom"))           # the paper has no figure of a crop
    return Set(source=str(path), domain=domain, count=len(files), item=read, name=lambda i: str(files[i]),
               file_type=file_types(files), normalisation=record.get("normalisation"), record=record,
               dataset=(named, (size[0] if size else None) if image else record.get("category")) if whole else None)


ENLARGE = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}


def enlarged(image, args):
    """A picture as it is, or with --enlarge stretched by that filter until its shorter side is --res."""
    if getattr(args, "enlarge", None) is None or min(image.size) >= args.res:
        return image
    return image.resize([round(side * args.res / min(image.size)) for side in image.size], ENLARGE[args.enlarge])


def fitted(image, res):
    """An RGB picture as it is, or as training crops and resizes it where --res asks for another size."""
    return np.asarray(image) if res is None or image.size == (res, res) else data.fit(image, res)


def read_cloud(path):
    """One cloud of a file: .npy floating (P,3) or more columns, of which the first three count; .ply."""
    if path.suffix == ".ply":
        try:
            vertex = data.read_ply(path)["vertex"]
            return checked_clouds(np.stack([np.asarray(vertex[axis], np.float32) for axis in "xyz"], 1), path, 2)
        except (ValueError, KeyError, IndexError) as e:
            raise InputError(f"{path}: not a readable .ply of vertices ({message(e)})") from None
    return checked_clouds(load_npy(path), path, 2)


def load_npy(path):
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except data.BROKEN_ARRAY as e:
        raise InputError(f"{path}: not a plain .npy array ({message(e)})") from None


def checked_clouds(array, path, dims):
    """float32 (S,P,3), or (P,3) where dims is 2, of an array; names what is wrong with it."""
    array = np.asarray(array)
    shape = "(S,P,3)" if dims == 3 else "(P,3)"
    if array.ndim != dims or array.dtype.kind != "f" or array.shape[-1] < 3 or 0 in array.shape:
        raise InputError(f"{path}: found {array.dtype} {array.shape}; expected floats {shape}")
    array = np.ascontiguousarray(array[..., :3], np.float32)
    bad = np.argwhere(~np.isfinite(array).all(-1))
    if len(bad):
        at = f"cloud {bad[0][0]}, point {bad[0][1]}" if dims == 3 else f"point {bad[0][0]}"
        raise InputError(f"{path}: {len(bad)} points are NaN or infinite, the first is {at}")
    return array


def array_set(path, array, args, **more):
    """The Set of an array in one file: uint8 pictures (S,H,W[,3]) or clouds (S,P,3)."""
    name = lambda i: f"{path} item {i}"
    if array.dtype == np.uint8:
        if array.ndim == 3:
            array = array[..., None]
        if array.ndim != 4 or array.shape[3] not in (1, 3) or 0 in array.shape:
            raise InputError(f"{path}: found uint8 {array.shape}; expected pictures uint8 (S,H,W) or (S,H,W,3)")
        pixels = lambda i: np.repeat(array[i], 3 // array.shape[3], 2)
        return Set(str(path), "image", len(array), lambda i: fitted(Image.fromarray(pixels(i)), args.res), name,
                   path.suffix[1:], **more)
    array = checked_clouds(array, path, 3)
    return Set(str(path), "points", len(array), array.__getitem__, name, path.suffix[1:], **more)


def npz_set(path, args):
    known = [k for pair in STATISTICS.values() for k in pair] + ["features", "meta", "n", "arr_0", "images"]
    with data.open_zip(path) as archive:
        names = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
    arrays = {k: map_npz(path, k) for k in known if k in names}
    pictures = next((arrays.pop(k) for k in ("arr_0", "images") if k in arrays), None)
    if pictures is None and not arrays:
        raise InputError(f"{path}: found {', '.join(names[:8]) or 'nothing'}; expected arr_0 or images, or statistics mu, sigma")
    for mu, sigma in STATISTICS.values():
        if (mu in arrays) != (sigma in arrays):
            raise InputError(f"{path}: found one of `{mu}` and `{sigma}`; expected both")
        if mu in arrays and (arrays[mu].ndim != 1 or arrays[sigma].shape != 2 * arrays[mu].shape):
            raise InputError(f"{path}: `{mu}` {arrays[mu].shape} and `{sigma}` {arrays[sigma].shape} are no mean (d,) and "
                             f"covariance (d,d)")
    if "mu" in arrays and len(arrays["mu"]) == 512:                    # clean-fid's files of CLIP features
        arrays["mu_clip"], arrays["sigma_clip"] = arrays.pop("mu"), arrays.pop("sigma")
    try:
        meta = json.loads(str(arrays.pop("meta", "{}")))
    except ValueError:
        raise InputError(f"{path}: `meta` is not JSON; expected a file of evaluate.py stats") from None
    known_by = path.name.removeprefix("VIRTUAL_").split("_")[0]         # ADM's names: VIRTUAL_imagenet256_labeled.npz
    named = known_by in RECIPES and path.name.startswith("VIRTUAL_")
    more = dict(statistics={k: np.asarray(v) for k, v in arrays.items()}, record=meta,
                dataset=(known_by, RECIPES[known_by].get("res")) if named else None)
    if pictures is None:
        return Set(str(path), "image", file_type=meta.get("file_type", "statistics"), **more)
    return array_set(path, pictures, args, **more)


MAPPED = 2 ** 26      # bytes from which an array is mapped instead of read


def map_npz(path, key):
    """One array of an .npz, memory-mapped where it is stored uncompressed: 50,000 pictures need not fit into memory."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(key + ".npy")
    if info.compress_type == zipfile.ZIP_STORED and info.file_size > MAPPED:
        with open(path, "rb") as f, damage_named(f"{path}: `{key}`"):
            f.seek(info.header_offset + 26)
            f.seek(info.header_offset + 30 + int.from_bytes(f.read(2), "little") + int.from_bytes(f.read(2), "little"))
            start = f.tell()
            version = np.lib.format.read_magic(f)
            if version in ((1, 0), (2, 0)):
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(f)
                size = dtype.itemsize * int(np.prod(shape, dtype=object))
                if dtype.hasobject or f.tell() + size != start + info.file_size:
                    raise InputError(f"{path}: `{key}` is {dtype} {shape}, which its {info.file_size} bytes do not hold")
                return np.memmap(path, dtype, "r", f.tell(), shape, "F" if fortran else "C")
    return data.read_npz(path, (key,))[key]


@contextlib.contextmanager
def damage_named(what):
    """What NumPy raises for a damaged header, as an InputError."""
    try:
        yield
    except InputError:
        raise
    except data.BROKEN_ARRAY as e:
        raise InputError(f"{what} cannot be read ({data.one_line(e)})") from None


def npy_set(path, args):
    return array_set(path, load_npy(path), args)


def ply_set(path, args):
    raise InputError(f"{path}: one cloud; expected a directory of .ply files, one a cloud")


def tensor_set(path, args):
    """LION's reference files {ref (S,P,3), mean, std} and its samples, a tensor (S,P,3)."""
    content = load_tensors(path)
    tensors = content if isinstance(content, dict) else {"ref": content}
    if not isinstance(tensors.get("ref"), torch.Tensor):
        raise InputError(f"{path}: found {', '.join(map(str, list(tensors)[:6])) or 'nothing'}; expected a tensor (S,P,3), "
                         f"or LION's dict with `ref`, `mean`, `std`")
    found = array_set(path, tensors["ref"].float().numpy(), args)
    if {"mean", "std"} <= set(tensors):
        try:                                                           # (S,1,3) and (S,1,1), the same for every cloud
            mean, std = (np.broadcast_to(tensors[k].float().numpy(), (found.count, 1, n))
                         for k, n in (("mean", 3), ("std", 1)))
        except (AttributeError, ValueError):
            raise InputError(f"{path}: `mean` and `std` are not tensors (S,1,3) and (S,1,1)") from None
        found.affine, found.normalisation = (mean, std), "global"
    for category in ("airplane", "chair", "car", "all"):                # LION publishes that of all as PF2_val_all.pt
        if path.name in (f"ref_val_{category}.pt", f"PF2_val_{category}.pt"):
            found.dataset = ("shapenet", category)
    return found


def load_tensors(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # a foreign pickle also draws a warning; the one line below says it all
            # mapped: to tell a checkpoint from clouds, its weights need not be read
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:     # a broken or foreign file raises whatever its bytes provoke
        raise InputError(f"{path}: not a file of tensors ({type(e).__name__}); pickles of anything else are not "
                         f"loaded") from None


FILES = {".npz": npz_set, ".npy": npy_set, ".pt": tensor_set, ".pth": tensor_set, ".ply": ply_set}


def is_checkpoint(source):
    """Whether a path is a run directory of train.py, or one of its checkpoints."""
    path = Path(source)
    if path.is_dir():
        return bool(sample.checkpoints(path))
    if path.suffix == ".pt" and path.is_file():
        content = load_tensors(path)
        return isinstance(content, dict) and {"ema", "config"} <= set(content)
    return False


# ---------------------------------------------------------------------------------------------------------
# Features: every item once, shared out over the processes

def batches(items, numbers, size, workers):
    """Yields (numbers, tensor): uint8 (b,H,W,3) or float32 (b,P,3); the next batch is read while one is used."""
    cuts = [numbers[i:i + size] for i in range(0, len(numbers), size)]
    with ThreadPoolExecutor(workers) as pool:                          # Pillow and NumPy read without the interpreter's lock
        ahead = [pool.submit(items.item, i) for i in cuts[0]] if cuts else []
        for cut, following in zip(cuts, cuts[1:] + [[]]):
            arrays, ahead = [future.result() for future in ahead], [pool.submit(items.item, i) for i in following]
            for i, array in zip(cut, arrays):
                if array.shape != arrays[0].shape:
                    remedy = "--res crops and resizes" if items.domain == "image" else "resample them"
                    raise InputError(f"{items.name(i)} is {array.shape}, {items.name(cut[0])} is {arrays[0].shape}; "
                                     f"expected one size: {remedy}")
            yield cut, torch.from_numpy(np.stack(arrays))


@torch.no_grad()
def extract(items, networks, moments, keep, args, device, subset=None):
    """Runs the networks over a Set. networks: name -> function of a batch giving {feature name: (b,d)}.

    Returns on process 0, else None: {name: Moments} for `moments`, {name: (S,d) float32 in item order} for `keep` (of the items
    in `subset`, if given), and the SHA-256 over the items' own."""
    mine, sums, kept, digests, shape = list(range(RANK, items.count, WORLD)), {}, defaultdict(list), [], None
    bar = tqdm(total=len(mine), unit=items.domain, desc=Path(items.source).name, disable=None if RANK == 0 else True)
    for numbers, batch in batches(items, mine, args.batch or (64 if device.type == "cuda" else 8), args.workers):
        if shape not in (None, batch.shape[1:]):
            raise InputError(f"{items.name(numbers[0])} is {tuple(batch.shape[1:])}, those before {tuple(shape)}; "
                             f"expected one size")
        shape = batch.shape[1:]
        digests += [(i, hashlib.sha256(x.numpy().tobytes()).digest()) for i, x in zip(numbers, batch)]
        batch = batch.to(device)
        for run in networks.values():
            for name, features in run(batch).items():
                if name in moments:
                    sums.setdefault(name, frechet.Moments(features.shape[1], device)).update(features)
                if name in keep:
                    kept[name] += [(i, f) for i, f in zip(numbers, features.float().cpu()) if subset is None or i in subset]
        bar.update(len(numbers))
    bar.close()
    parts = [(sums, dict(kept), digests, shape)]
    if WORLD > 1:
        for m in sums.values():
            m.to("cpu")
        parts = [None] * WORLD if RANK == 0 else None
        dist.gather_object((sums, dict(kept), digests, shape), parts)
        if RANK:
            return None
        for other in parts[1:]:
            for name, m in other[0].items():
                sums[name].merge(m)
    pairs = {name: sorted((pair for part in parts for pair in part[1].get(name, [])), key=lambda p: p[0]) for name in keep}
    rows = {name: torch.stack([f for _, f in pairs[name]]) for name in keep}
    ordered = sorted(pair for part in parts for pair in part[2])
    digest = hashlib.sha256(b"".join(d for _, d in ordered)).hexdigest()
    return sums, rows, digest, tuple(shape)


def image_networks(wanted, args, found, device):
    """name -> function of uint8 (b,H,W,3), for the metrics wanted; `found` gets the weight files' hashes."""
    networks = {}
    if "inception" in wanted:
        net, resize = inception.load(found["inception"]).to(device), inception.RESIZES[args.resize]

        def run(batch):
            pool, spatial, logits = net(resize(batch))
            return {"fid": pool, "sfid": spatial, "is": logits.double().softmax(1)}
        networks["inception"] = run
    if "clip" in wanted:
        tower = clip.load(found["clip"]).to(device)
        networks["clip"] = lambda batch: {"fid_clip": tower(clip.preprocess(batch).to(device))}
    return networks


def own_features(text, device):
    """--features module:callable, or a TorchScript file: a function of uint8 (b,3,H,W), or float32 (b,P,3), giving (b,d)."""
    if Path(text).is_file():
        try:
            function = torch.jit.load(text, map_location=device).eval()
        except RuntimeError as e:
            raise InputError(f"--features {text}: not a TorchScript file ({str(e).splitlines()[0][:100]})") from None
    else:
        module, _, name = text.partition(":")
        sys.path.insert(0, os.getcwd())
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as e:
            raise InputError(f"--features {text}: expected module:callable or a TorchScript file ({message(e)})") from None
        if isinstance(function, torch.nn.Module):
            function = function.to(device).eval()

    def run(batch):
        features = function(batch.permute(0, 3, 1, 2) if batch.dtype == torch.uint8 else batch)
        if not isinstance(features, torch.Tensor) or features.dim() != 2 or len(features) != len(batch):
            shape = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise InputError(f"--features {text}: gave {shape} for {len(batch)} items; expected a tensor ({len(batch)}, d)")
        return {"fd": features}
    return run


def find_weights(names, args, download, lenient=False):
    """{network: path}, and what the JSON says of each. Process 0 downloads, if anyone must. lenient: what is missing is left
    out, loudly."""
    given, found, said = {}, {}, {}
    for path in args.weights or []:
        given[weights.identify(path)] = path
    unused = sorted(set(given) - set(names))
    if unused:
        warn(f"--weights {given[unused[0]]}: weights of {unused[0]}, which none of the metrics asked for uses")
    for rank0_first in ((True, False) if WORLD > 1 else (True,)):
        for name in names:
            if rank0_first == (RANK == 0) or WORLD == 1:
                try:
                    path, digest, published = weights.find(name, given.get(name), args.cache, download, log=print0)
                except ValueError as e:
                    if not lenient:
                        raise
                    warn(f"--metrics all leaves out what needs them: {e}")
                    continue
                found[name], said[name] = path, dict(file=str(path), sha256=digest, published=published)
                if published is False:
                    warn(f"{name}: {path} is not the published file: its SHA-256 is {digest}, the published one "
                         f"{weights.RELEASED[name]['sha256']}; the figures are not comparable")
        wait_for_all()
    return found, said


# ---------------------------------------------------------------------------------------------------------
# The metrics of each domain

def image_scores(fake, real, names, args, device, networks, protocol):
    """{metric: value} on process 0, else {}."""
    pr = "fd" if args.features else "fid"
    distances = [n for n in STATISTICS if n in names]
    with_pr = {"precision", "recall"} & set(names)
    stored = {} if real is None else real.statistics
    keep = [pr] * bool(with_pr)
    got = extract(fake, networks, distances, keep + ["is"] * ("is" in names), args, device)
    subset, reference = None, None
    if real is not None and real.count > REAL_FOR_PR:
        subset = set(np.random.default_rng(0).permutation(real.count)[:REAL_FOR_PR].tolist())
    unstored = [n for n in distances if STATISTICS[n][0] not in stored]
    if real is not None and real.count and (unstored or with_pr):
        useful = {NETWORK.get(n, "features") for n in unstored + keep}
        reference = extract(real, {k: v for k, v in networks.items() if k in useful}, unstored, keep, args, device, subset)
    if RANK:
        return {}
    sums, rows, digest, fake_shape = got
    protocol["fake_sha256"] = protocol["fake_sha256"] or fake.sha256 or digest
    protocol["fake_size"] = list(fake_shape[:2]) if fake.domain == "image" else fake_shape[0]
    if reference:
        protocol["real_size"] = list(reference[3][:2]) if real.domain == "image" else reference[3][0]
        protocol["real_sha256"] = protocol["real_sha256"] or reference[2]
        if fake_shape != reference[3]:
            warn(f"sizes differ: fake {fake_shape}, real {reference[3]}; --res brings pictures to one")
    scores = {}
    for name in distances:
        mean, cov = sums[name].mean, sums[name].cov
        if name in unstored:
            other, n_real = (reference[0][name].mean, reference[0][name].cov), real.count
        else:
            other = [torch.from_numpy(np.asarray(stored[k], np.float64)) for k in STATISTICS[name]]
            n_real = real.record.get("n")
            if len(other[0]) != len(mean):
                raise InputError(f"{real.source}: `{STATISTICS[name][0]}` has {len(other[0])} entries; {name} needs {len(mean)}")
        scores[name] = frechet.frechet_distance(mean.cpu(), cov.cpu(), *(x.cpu() for x in other))
        if min(fake.count, n_real or fake.count) <= len(mean):
            warn(f"{name}: {fake.count} samples against {n_real or 'stored statistics of'} real ones, features of {len(mean)} "
                 f"dimensions: covariances of so few are rank-deficient, the distance is biased upwards")
    if "is" in names:
        scores["is"], scores["is_std"] = inception.inception_score(rows["is"].double())
    if with_pr:
        refs = torch.from_numpy(np.asarray(stored["features"])) if not real.count else reference[1][pr]
        protocol["n_real_pr"] = len(refs)
        p, r = precision_recall(refs, rows[pr], k=args.k, device=device)
        scores.update({k: v for k, v in (("precision", p), ("recall", r)) if k in names})
    return scores


def stack_clouds(items):
    """All clouds of a Set: float32 (S,P,3)."""
    rows = [items.item(i) for i in range(items.count)]
    for i, row in enumerate(rows):
        if row.shape != rows[0].shape:
            raise InputError(f"{items.name(i)} has {len(row)} points, {items.name(0)} has {len(rows[0])}; expected one number")
    return np.stack(rows)


def cloud_scores(fake, real, names, args, device, networks, found, protocol):
    """{metric: value} on process 0, else {}."""
    scores, smp, ref = {}, None, None
    if fake is not None:
        smp = stack_clouds(fake)
        protocol["fake_sha256"] = fake.sha256 or hashlib.sha256(smp.tobytes()).hexdigest()
    if real is not None:
        ref = stack_clouds(real)
        protocol["real_sha256"] = real.sha256 or hashlib.sha256(ref.tobytes()).hexdigest()
    if set(names) & {*PAIRS, "jsd"}:
        scores.update(pair_scores(smp, ref, fake, real, names, args, device, protocol))
    if RANK == 0 and "p_fid" in names:
        net, sums = pointnet.load(found["pointnet"]).to(device), []
        for clouds_ in (smp, ref):
            sums.append(frechet.Moments(512))
            sums[-1].update(pointnet.features(net, clouds_, device=device, progress=True).cpu())
        scores["p_fid"] = frechet.frechet_distance(sums[0].mean, sums[0].cov, sums[1].mean, sums[1].cov)
        if min(len(smp), len(ref)) < 10_000:
            warn(f"p_fid of {len(smp)} against {len(ref)} clouds: the paper's is of 10,000 clouds of 4,096 points")
    if RANK == 0 and "ulip_i" in names:
        scores["ulip_i"] = ulip_score(smp, args, device, found, protocol)
    if set(names) & {"fd", "precision", "recall"}:
        own = [n for n in names if n in ("fd", "precision", "recall")]
        scores.update(image_scores(fake, real, own, args, device, networks, protocol))
    return scores if RANK == 0 else {}


def pair_scores(smp, ref, fake, real, names, args, device, protocol):
    if args.normalize == "box":
        smp, ref = clouds.normalise_box(smp), clouds.normalise_box(ref)
        protocol["normalisation"] = "each cloud: centre of its box to 0, longest side to 1 (LION norm_box)"
    else:
        smp, ref = same_scale(smp, ref, fake, real, protocol)
    if len(smp) > len(ref):
        print0(f"the first {len(ref)} of {len(smp)} samples are used, as many as there are references (LION)")
        smp = smp[:len(ref)]
    elif len(smp) < len(ref):
        warn(f"{len(smp)} samples against {len(ref)} references: COV and 1-NNA assume as many of each")
    P = min(smp.shape[1], ref.shape[1])
    if smp.shape[1] != ref.shape[1]:
        pick = np.random.default_rng(0).permutation(max(smp.shape[1], ref.shape[1]))[:P]     # one choice for all clouds (LION)
        smp, ref = (x[:, pick] if x.shape[1] > P else x for x in (smp, ref))
        warn(f"{protocol['fake_points']} points a sample, {protocol['real_points']} a reference: a random {P} of the larger are used")
    protocol.update(n_fake_pairs=len(smp), n_real_pairs=len(ref), points=P)
    chosen = [d for d, suffix in (("chamfer", "_cd"), (args.emd, "_emd")) if any(n.endswith(suffix) for n in names)]
    jobs = [(a, b, d) for d in chosen for a, b in ((ref, smp), (ref, ref), (smp, smp))]
    options = dict(memory=args.memory, cache=args.cache / "pairs", device=device, workers=args.workers)
    scores = {}
    if jobs:
        print0(f"{', '.join(chosen)}: {len(ref)} references, {len(smp)} samples of {P} points, "
               f"about {duration(clouds.estimate(jobs, **options) / WORLD)}")
    if WORLD > 1:
        for a, b, d in jobs:
            clouds.pairwise(a, b, d, share=(RANK, WORLD), progress=RANK == 0, **options)
        wait_for_all()
    if RANK:
        return {}
    for d in chosen:
        part = clouds.scores(ref, smp, d, **options)
        suffix = "cd" if d == "chamfer" else "emd"
        scores.update({f"{k}_{suffix}": v for k, v in part.items() if f"{k}_{suffix}" in names})
    if "jsd" in names:
        scores["jsd"] = clouds.jsd(ref, smp)
    return scores


def same_scale(smp, ref, fake, real, protocol):
    """--normalize none: both sets in the units they come in, which must be the same."""
    known = fake.normalisation, real.normalisation
    if real.affine and fake.normalisation in (None, "global"):
        mean, std = real.affine
        own = fake.affine or (mean[:1], std[:1])
        protocol["normalisation"] = "none: x std + mean of the reference file on both sets (LION's global protocol)"
        return smp * own[1] + own[0], ref * std + mean
    if None not in known and known[0] != known[1]:
        raise InputError(f"--normalize none: the samples are normalised by {known[0]}, the references by {known[1]}; these cannot "
                         f"be compared, use --normalize box")
    if known[0] != known[1]:
        warn(f"--normalize none: normalisation of the samples: {known[0] or 'unknown'}, of the references: "
             f"{known[1] or 'unknown'}; if they differ, the figures mean nothing")
    protocol["normalisation"] = f"none: as stored ({known[0] or 'unknown'}, {known[1] or 'unknown'})"
    return smp, ref


def ulip_score(smp, args, device, found, protocol):
    """Mean cosine of the clouds' ULIP-2 features and their pictures' CLIP features, pair by pair."""
    if args.point_features:
        points = load_npy(Path(args.point_features))
    else:
        points = ulip.features(ulip.load(found["ulip"]).to(device), smp, device=device, progress=True).cpu().numpy()
    if Path(args.images).suffix == ".npy":
        pictures = load_npy(Path(args.images))
    else:
        images = folder_set(Path(args.images), args)
        tower, rows = clip.load(found["bigg"]).to(device), []
        for i in tqdm(range(images.count), unit="image", desc="CLIP", disable=None):
            with torch.no_grad():
                rows.append(tower(clip.preprocess(torch.from_numpy(images.item(i))[None].clone()).to(device)).cpu())
        pictures = torch.cat(rows).numpy()
    if len(points) != len(pictures):
        raise InputError(f"ulip_i: {len(points)} clouds and {len(pictures)} pictures; expected one picture for each cloud, in "
                         f"the same order")
    protocol["n_ulip"] = len(points)
    return ulip.ulip_score(torch.from_numpy(np.array(points)), torch.from_numpy(np.array(pictures)))


def duration(seconds):
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------------------------------------------------
# Command line

def common_flags(p):
    p.add_argument("--features", help="module:callable, or a TorchScript file: pictures uint8 (b,3,H,W), clouds float32 (b,P,3) "
                   "-> (b,d)")
    p.add_argument("--weights", nargs="+", metavar="PATH", help="weight files of the metrics' networks, told apart by their content "
                   "(default: those in the cache; a metric asked for by name downloads what it needs)")
    p.add_argument("--resize", choices=inception.RESIZES, default="tf1", help="of pictures for Inception (default: tf1, ADM's evaluator)")
    p.add_argument("--res", type=positive, help="pictures: crop and resize to this side, as training does")
    p.add_argument("--split", help="split of a data set, or sub-directory of a directory")
    p.add_argument("--n", "--samples", type=positive, help="number of samples to draw, or of items of an endless data set")
    p.add_argument("--batch", type=positive, help="items at a time (default: 64 on CUDA, 8 on the CPU, whose cache holds them)")
    p.add_argument("--workers", type=positive, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2,
                   help="threads (default: one a core)")
    p.add_argument("--cache", type=Path, default=weights.cache_directory(), help="of weights and pairwise distances (default: "
                   "$ASFT_CACHE, else asft in the user's cache directory)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("what")
    g.add_argument("--fake", help="the samples, or a checkpoint to draw them from")
    g.add_argument("--real", help="the reference")
    g.add_argument("--dataset", choices=RECIPES, help="the same as --real NAME; also tells which of the paper's figures to print")
    g.add_argument("--data", help="directory or file of the data set")
    g.add_argument("--category", help="of shapenet")
    g.add_argument("--metrics", nargs="+", metavar="NAME", help="names of the output, or all. Pictures: "
                   f"{' '.join(METRICS['image'])}. Clouds: {' '.join(METRICS['points'])}")
    g.add_argument("--json", default="metrics.json", help="figures and protocol (default: metrics.json)")
    g = p.add_argument_group("how")
    common_flags(g)
    g.add_argument("--k", type=positive, default=3, help="neighbour of precision and recall (default: 3)")
    g.add_argument("--emd", choices=[n for n in clouds.DISTANCES if n != "chamfer"], default="lion", help="which Earth Mover's distance "
                   "(default: lion, the scale of the paper's table)")
    g.add_argument("--normalize", choices=("box", "none"), default="box", help="clouds: longest side to 1 each (LION's protocol for "
                   "normalised shapes), or as they are (default: box)")
    g.add_argument("--memory", type=positive, default=1024, help="MiB for pairwise distances (default: 1024)")
    g.add_argument("--images", help="ulip_i: the conditioning pictures in the order of the clouds, or their features (S,1280) as .npy")
    g.add_argument("--point-features", help="ulip_i: features of the clouds (S,1280) as .npy, in place of --fake")
    g.add_argument("--enlarge", choices=ENLARGE, help="pictures of directories smaller than --res: enlarge by this filter, nothing else")
    g = p.add_argument_group("drawing samples, where --fake is a checkpoint (as in sample.py; defaults: the checkpoint's)")
    g.add_argument("--raw", action="store_true", help="the last weights instead of the averaged ones")
    g.add_argument("--seed", type=natural, default=0)
    g.add_argument("--points", type=positive, help="points of a cloud, drawn or taken from a data set")
    g.add_argument("--tokens", metavar="PATH", help="the objects to condition on, one a sample")
    g.add_argument("--guidance", type=float)
    g.add_argument("--solver", choices=sample.SOLVERS)
    g.add_argument("--steps", type=positive)
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    g.add_argument("--out", help="directory of the samples (default: samples/ in the run)")
    return p


def choose(args, domain, real):
    """The metrics to compute, and whether they were asked for by name."""
    known = METRICS[domain]
    asked = bool(args.metrics)
    names = list(dict.fromkeys("is" if n == "is_std" else n for n in args.metrics or ()))
    everything = "all" in names
    for name in names:
        if name not in known + ("all",):
            foreign = any(name in m for m in METRICS.values())
            other = "; that is a metric of " + {"image": "clouds", "points": "pictures"}[domain] if foreign else ""
            raise InputError(f"--metrics {name}: expected all, or some of {' '.join(known)}{other}")
    if everything:
        names = [n for n in known if n not in (["fd"] * (not args.features) + ["ulip_i"] * (not args.images)
                                               + ["precision", "recall"] * (domain == "points" and not args.features))]
    if not asked:
        names = ["fd", "precision", "recall"] if args.features else list(DEFAULT[domain])
    if {"fd", "precision", "recall"} & set(names) and not args.features and (domain == "points" or "fd" in names):
        raise InputError("--metrics fd (and for clouds precision, recall) needs --features, to say of what features")
    if "ulip_i" in names and not args.images:
        raise InputError("--metrics ulip_i: needs --images, the conditioning pictures in the order of the clouds, or their features")
    if real is None and set(names) - {"is", "ulip_i"}:
        names = [n for n in names if n in ("is", "ulip_i")] if everything or not asked else names
        if not names or set(names) - {"is", "ulip_i"}:
            raise InputError("--real is missing: what to compare with (a directory, a file, or a data set by name)")
    if real is not None and not real.count:
        lacking = [n for n in ("precision", "recall") if n in names and "features" not in real.statistics]
        if lacking and (asked and not everything):
            raise InputError(f"{real.source}: holds statistics alone; precision and recall need its pictures, or a file of "
                             f"evaluate.py stats")
        for n in lacking:
            names.remove(n)
        if lacking:
            print0(f"{real.source} holds statistics alone: precision and recall are left out")
        absent = [n for n in names if n in STATISTICS and STATISTICS[n][0] not in real.statistics]
        if absent and (asked and not everything):
            raise InputError(f"{real.source}: has no statistics {', '.join(STATISTICS[absent[0]])} for {absent[0]}")
        names = [n for n in names if n not in absent]
        if absent:
            print0(f"{real.source} has no statistics for {', '.join(absent)}: left out")
    return names, asked


def draw(args, n):
    """Draws samples from the checkpoint --fake; returns their directory."""
    words = ["--ckpt", args.fake, "--samples", str(n), "--seed", str(args.seed), "--weights", "raw" if args.raw else "ema",
             "--device", args.device, "--dtype", args.dtype]
    for flag in ("res", "points", "tokens", "guidance", "solver", "steps", "out"):
        if getattr(args, flag) is not None:
            words += [f"--{flag}", str(getattr(args, flag))]
    return str(sample.main(words))


def paper_rows(found, names):
    """The paper's rows that share a metric with `names` on the data set of a Set."""
    rows = PAPER.get(found, PAPER.get((found[0], None), {})) if found else {}
    return {row: values for row, values in rows.items() if set(values) & set(names)}


def print_table(scores, rows, ours="ours"):
    head = ["metric", ours, *rows]
    lines = [[f"{n} ({UNITS[n]})" if n in UNITS else n, f"{v:.4f}", *(f"{r[n]:.4f}" if n in r else "-" for r in rows.values())]
             for n, v in scores.items()]
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    for line in [head, *lines]:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip())


def lossy(file_type):
    return any(t in ("jpeg", "webp", "avif", "jp2", "heic") for t in (file_type or "").split("+"))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    WARNINGS.clear()
    if argv[:1] == ["stats"]:
        return stats(argv[1:])
    if argv[:1] == ["upscale"]:
        return upscale(argv[1:])
    args = parser().parse_args(argv)
    if args.enlarge and not args.res:
        raise InputError(f"--enlarge {args.enlarge}: --res is missing, the side to enlarge to")
    started = time.time()
    device = start_processes(args.device, "gloo")
    torch.backends.cudnn.allow_tf32 = False                            # features in full float32: TF32 moves FID
    real_source = args.real or args.dataset
    if args.fake is None and not args.point_features:
        raise InputError("--fake is missing: the samples (a directory or file), or a checkpoint to draw them from")
    real = open_set(real_source, args, "--real") if real_source else None
    out = Path(args.json)
    if not out.parent.is_dir() or out.is_dir():
        raise InputError(f"--json {args.json}: expected a file in a directory that exists")

    # what is drawn is drawn last of all preparations: everything that can be wrong is found out before
    drawn = args.fake is not None and is_checkpoint(args.fake)
    if drawn:
        domain = sample.read_checkpoint(args.fake)["config"]["model"].get("domain", "image")
    else:
        fake = open_set(args.fake, args, "--fake") if args.fake else None
        domain = fake.domain if fake else "points"
        if fake and not fake.count:
            raise InputError(f"--fake {args.fake}: holds statistics alone; expected samples")
    if real is not None and real.domain != domain:
        raise InputError(f"the samples are {NOUN[domain]}, --real {real.source} holds {NOUN[real.domain]}")
    names, asked = choose(args, domain, real)
    needed = {NETWORK[n] for n in names if n in NETWORK}
    if {"precision", "recall"} & set(names) and not args.features:
        needed.add("inception")
    if "ulip_i" in names:
        needed.update(["ulip"] * (not args.point_features) + ["bigg"] * (not args.images.endswith(".npy")))
    found, used = find_weights(sorted(needed), args, download=asked, lenient="all" in (args.metrics or ()))
    lost = needed - set(found)
    pr = {"precision", "recall"} if "inception" in lost and not args.features else set()
    names = [n for n in names if NETWORK.get(n) not in lost and n not in pr
             and not (n == "ulip_i" and lost & {"ulip", "bigg"})]
    needed -= lost
    if not names:
        raise InputError("--metrics all: nothing is left that can be computed without the weights named above")
    networks = image_networks(needed, args, found, device) if domain == "image" else {}
    if args.features and {"fd", "precision", "recall"} & set(names):
        networks["features"] = own_features(args.features, device)
    if drawn:
        n = args.n or (real.count if real is not None and domain == "points" else 50_000)
        fake = open_set(draw(args, n), args, "--fake")
    elif args.n and fake and fake.count > args.n:
        fake.count = args.n
    torch.set_float32_matmul_precision("highest")
    check_pair(fake, real, names)

    record = fake.record if fake else {}
    protocol = dict(
        fake=fake.source if fake else None, real=real.source if real else None, split=real.split if real else args.split,
        n_fake=fake.count if fake else None, n_real=(real.count or real.record.get("n")) if real else None, fake_sha256=None,
        real_sha256=real.sha256 if real else None, file_type_fake=fake.file_type if fake else None,
        file_type_real=real.file_type if real else None, normalisation_fake=fake.normalisation if fake else None,
        normalisation_real=real.normalisation if real else None, networks=used,
        inception_sha256=used.get("inception", {}).get("sha256"), features=args.features, k=args.k,
        quantisation=record.get("quantisation"), ckpt=record.get("ckpt"), ckpt_sha256=record.get("ckpt_sha256"), step=record.get("step"),
        weights=record.get("weights"), solver=record.get("solver"), steps=record.get("steps"), nfe=record.get("nfe"),
        guidance=record.get("guidance"), seed=record.get("seed"), dtype=record.get("dtype"), size=record.get("size"))
    if domain == "image":
        protocol.update(resize=args.resize if "inception" in needed else None, res=args.res, enlarge=args.enlarge,
                        real_protocol=real.record if real and real.statistics else None,
                        inception_splits=10, pr_features="--features" if args.features else "Inception pool3")
        scores = image_scores(fake, real, names, args, device, networks, protocol)
    else:
        if fake is not None:
            protocol.update(fake_points=len(fake.item(0)), real_points=len(real.item(0)) if real else None)
        protocol.update(emd=args.emd, normalize=args.normalize)
        scores = cloud_scores(fake, real, names, args, device, networks, found, protocol)
    if RANK:
        return None
    bad = [n for n, v in scores.items() if not np.isfinite(v)]
    if bad:
        raise InputError(f"{', '.join(bad)}: not a finite number")
    scores = {n: scores[n] for n in (*METRICS[domain], "is_std") if n in scores}
    which = next((s.dataset for s in (real, fake) if s is not None and s.dataset), None)
    if args.dataset:
        which = (args.dataset, args.category or (which or (0, None))[1])
    rows = paper_rows(which, scores)
    print_table(scores, rows)
    reference = f" against {real.count or 'the stored statistics'}{' items' * bool(real.count)} of {real.source}" if real else ""
    print(f"{fake.count} samples of {fake.source}" if fake else f"features {args.point_features}", end="")
    print(f"{reference}, {duration(time.time() - started)}; protocol in {out}")
    if which in TABLE4_REFERENCES:
        check_table4(which, args, protocol)
    protocol.update(torch=str(torch.__version__), device=str(device), processes=WORLD)
    result = dict(metrics=scores, paper=rows, protocol=protocol, warnings=WARNINGS)
    write_atomic(out, lambda f: f.write(json.dumps(result, indent=1).encode()))
    return result


# references of LION's files, which Table 4 rests on
TABLE4_REFERENCES = {("shapenet", "airplane"): 405, ("shapenet", "chair"): 662, ("shapenet", "car"): 352, ("shapenet", "all"): 1000}


def check_table4(which, args, protocol):
    """Loud warnings where clouds are not scored as those of Table 4 were."""
    if protocol.get("n_real_pairs") not in (None, TABLE4_REFERENCES[which]):
        warn(f"{protocol['n_real_pairs']} references: the paper's row of {which[1]} is against {TABLE4_REFERENCES[which]}, with as many samples; "
             f"MMD, COV and 1-NNA depend on the number")
    if args.emd != "lion" or args.normalize != "box":
        warn(f"--emd {args.emd} --normalize {args.normalize}: the paper's table is --emd lion --normalize box")


NOUN = {"image": "pictures", "points": "clouds"}


def check_pair(fake, real, names):
    """Loud warnings where protocol makes the figures incomparable."""
    if fake is not None and "is" in names and fake.count < 50_000:
        warn(f"is of {fake.count} samples: published figures are of 50,000, in splits of 5,000")
    if fake is None or real is None:
        return
    frechets = [n for n in names if n in ("fid", "sfid", "fid_clip")]
    if frechets and fake.count < 50_000:
        warn(f"{', '.join(frechets)} of {fake.count} samples: published figures are of 50,000"
             + ("; below 10,000 the bias alone is larger than the differences between models" if fake.count < 10_000 else ""))
    if frechets and real.count and real.count < 10_000 and not real.statistics:
        warn(f"{', '.join(frechets)} against {real.count} real pictures: published references have 10,000 at least, most the "
             f"whole training set")
    if fake.domain == "image" and real.file_type and lossy(fake.file_type) != lossy(real.file_type):
        warn(f"file types differ: the samples are {fake.file_type}, the reference {real.file_type}; compression alone moves FID")


def upscale_parser():
    p = parser()
    p.add_argument("--times", type=positive, default=4, help="how much finer than the resolution trained on (default: 4)")
    return p


def upscale(argv):
    """python evaluate.py upscale: Tab. 9, samples drawn --times finer than trained against enlargements of the same seeds'."""
    p = upscale_parser()
    args = p.parse_args(argv)
    if not (args.fake and is_checkpoint(args.fake) and args.real):
        raise InputError("upscale: expected --fake with a checkpoint or run directory, and --real with what to compare with")
    if args.res or args.enlarge or args.out or args.dataset:
        raise InputError("upscale chooses --res, --enlarge and --out itself and names the reference by --real; drop those flags")
    model = sample.read_checkpoint(args.fake)["config"]["model"]
    if model.get("domain") != "image":
        raise InputError(f"--fake {args.fake}: draws clouds; upscale is for pictures")
    args.res = args.times * model["res"]
    count = args.n or open_set(args.real, args, "--real").count
    fine = draw(args, count)
    args.res = None
    coarse = draw(args, count)
    res, results, given = args.times * model["res"], {}, vars(p.parse_args([]))
    common = [word for flag, value in vars(args).items() if flag not in ("fake", "json", "times") and value != given[flag]
              for word in (f"--{flag.replace('_', '-')}", *(map(str, value) if isinstance(value, list) else [str(value)] * (value is not True)))]
    for arm, words in {"drawn": ["--fake", fine], **{how: ["--fake", coarse, "--enlarge", how] for how in ENLARGE}}.items():
        print0()
        print0(f"{arm}:")
        out = Path(args.json).with_suffix(f".{arm}.json")
        results[arm] = main([*words, *common, "--res", str(res), "--json", str(out)])
    if RANK:
        return None
    print(f"\n{count} samples of a model trained at {model['res']} pixels, at {res}")
    drawn, *others = ({name: result["metrics"][name] for name in result["metrics"]} for result in results.values())
    paper = {row: values for row, values in PAPER["ffhq256", 512].items()} if "fid" in drawn else {}
    print_table(drawn, {**dict(zip(ENLARGE, others)), **paper}, "drawn")
    write_atomic(Path(args.json), lambda f: f.write(json.dumps(results, indent=1).encode()))
    return results


def stats(argv):
    """python evaluate.py stats: reference statistics of a set of pictures, every one exactly once."""
    p = argparse.ArgumentParser(prog="evaluate.py stats", description=stats.__doc__)
    p.add_argument("--data", required=True, help="directory of pictures, .npz, or a data set of train.py by name")
    p.add_argument("--out", required=True, help="the .npz to write: ADM's keys, the number of pictures, features for precision "
                   "and recall")
    p.add_argument("--metrics", nargs="+", choices=[*STATISTICS], help="for which features (default: fid sfid; with --features: fd)")
    common_flags(p)
    args = p.parse_args(argv)
    args.category, args.points, args.enlarge = None, None, None
    device = start_processes(args.device, "gloo")
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    out = Path(args.out)
    if out.suffix != ".npz" or not out.parent.is_dir() or out.is_dir():
        raise InputError(f"--out {args.out}: expected the name of an .npz file in a directory that exists")
    name, args.data = args.data, None
    real = open_set(name, args, "--data")
    if real.domain != "image" or not real.count:
        held = "statistics alone" if real.domain == "image" else "clouds"
        raise InputError(f"--data {name}: holds {held}; expected pictures")
    real.count = min(real.count, args.n or real.count)
    names = args.metrics or (["fd"] if args.features else ["fid", "sfid"])
    if "fd" in names and not args.features:
        raise InputError("--metrics fd: needs --features, to say of what features")
    found, used = find_weights(sorted({NETWORK[n] for n in names if n in NETWORK}), args, download=True)
    networks = image_networks(set(found), args, found, device)
    if "fd" in names:
        networks["features"] = own_features(args.features, device)
    pr = "fd" if "fd" in names else "fid" if "fid" in names else None
    subset = set(np.random.default_rng(0).permutation(real.count)[:REAL_FOR_PR].tolist())
    got = extract(real, networks, names, [pr] if pr else [], args, device, subset)
    if RANK:
        return
    sums, rows, digest, shape = got
    meta = dict(n=real.count, sha256=real.sha256 or digest, source=real.source, file_type=real.file_type, size=list(shape[:2]),
                res=args.res, resize=args.resize, networks=used, features=args.features, pr_features=pr)
    arrays = {}
    for n in names:
        arrays[STATISTICS[n][0]], arrays[STATISTICS[n][1]] = sums[n].mean.cpu().numpy(), sums[n].cov.cpu().numpy()
    if pr:
        arrays["features"] = rows[pr].numpy()
    write_atomic(out, lambda f: np.savez(f, n=real.count, meta=json.dumps(meta), **arrays))
    print0(f"{real.count} pictures of {real.source}, {shape[0]} x {shape[1]}: {', '.join(names)} statistics in {out}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")                  # file names need not be text
    try:
        main()
    except (ValueError, OSError) as e:                                 # InputError, and the ValueErrors of metrics/
        sample.fail("evaluate.py", e)
    if dist.is_initialized():
        dist.destroy_process_group()
