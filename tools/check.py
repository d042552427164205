"""Lists what is wrong with a set that train.py reads, and counts its classes; status 1 where anything is.

    python tools/check.py PATH [--least N] [--workers N]

Wrong is what cannot be read, what holds the same as another item, and another size (pixels of an image,
points of a cloud) than 90 % have, or with --least one below N; of a packed set also bytes of another SHA-256.
"""
import collections
import hashlib
import json
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Arrays, Folder, Objaverse, ShapeNet, find_files, split_of
from metrics.weights import sha256
from sample import flag_parser, natural, positive, run_main
from tools.pack import CORES, in_parallel

def datasets(path):
    """What is in a path: [(split, dataset), ...]."""
    suffix = path.suffix.lower()
    if suffix == ".npz" or (path / "manifest.json").exists():
        return [("", Arrays(path))]
    files = find_files(path, {".npz", ".npy"}) if path.is_dir() else []
    found = {split_of(part) for file in files for part in Path(file).relative_to(path).parts[:-1]}
    splits = [split for split in ("train", "val", "test") if split in found]
    if any(file.lower().endswith(".npz") for file in files):
        return [(split, Objaverse(path, 1, split)) for split in splits or ["train"]]
    if suffix in (".hdf5", ".h5", ".pt", ".pth"):
        splits = ["val"] if suffix.startswith(".p") else ["train", "val", "test"]
    if splits:
        return [(split, ShapeNet(path, 1, split, labels=True)) for split in splits]
    folder = Folder(path)
    return [(folder.taken.partition(" (")[0].removeprefix("split "), folder)]

def look(items, k):
    """SHA-256 and size of an item."""
    dataset, i = items[k]
    array = dataset.read(i)[0] if dataset.domain == "points" else dataset.item(i)[0]
    return hashlib.sha256(array.tobytes()).digest(), array.shape[-2::-1]

def check(path, least=None, workers=0):
    """Prints what is wrong, and the classes; returns how many items are wrong."""
    path, wrong, first, sizes = Path(path), collections.Counter(), {}, {}

    def say(what, text):
        wrong[what] += 1
        tqdm.write(f"{what}: {text}")
    if (path / "manifest.json").exists():
        if json.loads((path / "manifest.json").read_text())["sha256"] != sha256(path / "images.npy"):
            say("damaged", f"{path / 'images.npy'}: its SHA-256 is not that of manifest.json; pack it again")
    found = datasets(path)
    items = [(dataset, i) for _, dataset in found for i in range(len(dataset))]
    names = [name for _, dataset in found for name in dataset.files]
    for name, result in zip(names, in_parallel(partial(look, items), range(len(items)), workers, "item")):
        if isinstance(result, ValueError):
            say("unreadable", result)
            continue
        digest, sizes[name] = result
        if first.setdefault(digest, name) != name:
            say("duplicate", f"{name} holds the same as {first[digest]}")
    (common, count), = collections.Counter(sizes.values()).most_common(1) or [(None, 0)]
    for name, size in sizes.items():
        small = min(size) < least if least else size != common and count >= 0.9 * len(sizes)
        if small:
            expected = f"at least {least}" if least else " x ".join(map(str, common))
            say("wrong size", f"{name}: {' x '.join(map(str, size))}; expected {expected}")
    for split, dataset in found:
        for k, count in sorted(collections.Counter(map(int, dataset.labels)).items()):
            name = dataset.class_names[k] if dataset.class_names else "no class"
            print(f"{name} {split}".strip() + f": {count}")
    summary = ", ".join(f"{n} {what}" for what, n in wrong.items()) or "nothing wrong"
    print(f"{path}: {len(items)} items; {summary}")
    return wrong.total()

def main(argv=None):
    p = flag_parser(__doc__)
    p.add_argument("path", help="what train.py takes as --data: images, clouds, or a packed set")
    p.add_argument("--least", type=positive, metavar="N", help="smallest side, or number of points")
    p.add_argument("--workers", type=natural, default=CORES, help=f"processes (default: one a core, {CORES})")
    args = p.parse_args(argv)
    sys.exit(1 if check(args.path, args.least, args.workers) else 0)

if __name__ == "__main__":
    run_main(main)
