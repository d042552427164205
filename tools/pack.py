"""Packs a set of images once, cropped and resized, into one array: training then decodes nothing.

    python tools/pack.py SRC DST --res 256 [--no-labels] [--workers N]

SRC is what --dataset folder reads. Writes DST/images.npy, uint8 (S,R,R,3), and DST/manifest.json, which
counts those that are done: an interrupted command goes on there. `in_parallel` serves the other tools too.
"""
import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Folder, reading, start_worker
from metrics.weights import sha256
from sample import flag_parser, natural, positive, run_main, write_json

SAVE_EVERY = 4096               # images: 0.8 GB at 256 x 256
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
TYPES = {"jpg": "jpeg", "jpe": "jpeg", "jfif": "jpeg", "tif": "tiff"}

def attempt(function, item):
    """function(item), or what is wrong with the item: raised in a worker, it would come as a traceback."""
    try:
        return function(item)
    except (ValueError, OSError) as error:
        return ValueError(str(error))

def in_parallel(function, items, workers, unit):
    """Yields attempt(function, item) of every item, in order, with a progress bar."""
    results = DataLoader(items, batch_size=None, collate_fn=partial(attempt, function), num_workers=workers,
                         worker_init_fn=start_worker)
    try:
        yield from tqdm(results, total=len(items), unit=unit)
    except RuntimeError as error:
        raise OSError(f"{error}; fewer --workers need less memory") from None

def pack(src, dst, res, labels=True, workers=0):
    """Writes dst, or what is missing of it; returns its manifest."""
    source, dst = Folder(src, res, labels=labels), Path(dst)
    types = {Path(file).suffix[1:].lower() for file in source.files}
    listing = dict(format="ASFT packed images 2", res=res, count=len(source), class_names=source.class_names,
                   labels=[int(label) for label in source.labels],
                   file_type="+".join(sorted({TYPES.get(kind, kind) for kind in types})),
                   names_sha256=hashlib.sha256(os.fsencode("\n".join(source.files))).hexdigest())
    manifest = listing | dict(done=0, sha256=None)
    with reading(dst, f"a new directory outside {src}, or one of the same set to go on with"):
        if dst.resolve().is_relative_to(Path(src).resolve()):
            raise ValueError("found it in the source")
        if (dst / "manifest.json").exists():
            manifest = json.loads((dst / "manifest.json").read_text())
            differ = [key for key in listing if manifest[key] != listing[key]]
            if differ:
                raise ValueError(f"found a packed set of another {', '.join(differ)}")
        elif dst.exists() and any(dst.iterdir()):
            raise ValueError("found other files")
    if manifest["sha256"] is None:
        dst.mkdir(parents=True, exist_ok=True)
        write_json(dst / "manifest.json", manifest)
        fill(source, dst / "images.npy", manifest, workers)
    return manifest

def fill(source, path, manifest, workers):
    """Writes the images from number `done` on."""
    done, shape = manifest["done"], (len(source), source.res, source.res, 3)
    with reading(path, f"uint8 {shape}"):
        images = np.lib.format.open_memmap(path, "r+" if done else "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):                     # a map that fills the disk would kill this process
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    items = in_parallel(partial(Folder.item, source), range(done, len(source)), workers, "image")
    for i, item in enumerate(items, done):
        if isinstance(item, ValueError):
            raise ValueError(f"{item}; tools/check.py lists all such files")
        images[i] = item[0]
        if (i + 1) % SAVE_EVERY == 0 or i + 1 == len(source):
            images.flush()
            manifest["done"] = i + 1
            write_json(path.with_name("manifest.json"), manifest)
    manifest["sha256"] = sha256(path)
    write_json(path.with_name("manifest.json"), manifest)

def main(argv=None):
    p = flag_parser(__doc__)
    p.add_argument("src", help="directory of images, .zip or lmdb")
    p.add_argument("dst", help="directory to write")
    p.add_argument("--res", type=positive, required=True, help="side of the packed images")
    p.add_argument("--no-labels", action="store_true", help="sub-directories are no classes (those of FFHQ)")
    p.add_argument("--workers", type=natural, default=CORES, help=f"processes (default: one a core, {CORES})")
    args = p.parse_args(argv)
    found = pack(args.src, args.dst, args.res, not args.no_labels, args.workers)
    print(f"{found['count']} images, {len(found['class_names'])} classes: --data {args.dst} --res {args.res}")

if __name__ == "__main__":
    run_main(main)
