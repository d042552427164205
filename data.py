"""Data: images and point clouds as arrays, and the endless order in which a run reads them.

| --dataset | domain | --data                                             | classes                    |
|-----------|--------|----------------------------------------------------|----------------------------|
| glyphs    | image  | none: letters and digits (toys.py)                 | 36                         |
| solids    | points | none: tables, mugs, lamps, ... (toys.py)           | 7                          |
| folder    | image  | directory, .zip, lmdb, or what tools/pack.py wrote | sub-directories, or none   |
| npz       | image  | .npz of images or arr_0, perhaps labels            | labels, or none            |
| shapenet  | points | tree of .npy, shapenet.hdf5, LION's ref_val_*.pt   | none, or its categories    |
| objaverse | points | .npz per object: xyz and cond_token                | none; has condition tokens |

In order: reading files, the data sets, load, the order of a run. B batch, R image side, P points. An item is
uint8 (R,R,3), or float32 (P,3) in units of the object's own box; the class label; perhaps tokens (T,C). An
item is a function of (i, rng) and batch s one of (dataset, seed, s): neither resuming nor another number of
processes changes what is read.
"""
import atexit
import contextlib
import functools
import inspect
import io
import itertools
import json
import os
import re
import signal
import sys
import warnings
import zipfile
from importlib import import_module

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin

# Directories of splits: Train, train2017, training_set, ILSVRC2012_img_val, testA
SPLIT = re.compile(r"(?:.*[-_])?(train|val|test)(?:ing|id|idation)?[-_]?(?:set|images|lmdb|[ab]|\d+)?", re.I)
# Directories that are not classes: LSUN's b/f/8/bf8b45.webp, hashes (ab/abcd01.png), NVIDIA's
# 00012/img00012345.png, FFHQ's 12000/12345.png
STORED = re.compile(r"/((?:[\da-f]/){3,}[^/]+|(\d{5})/img\2\d{3}\.\w+|(\d\d)000/\3\d{3}\.\w+"
                    r"|([\da-f]{1,2})/(?:[\da-f]{2}/)?\4[\da-f]{14,}\.\w+)$", re.I)
NO_IMAGE = re.compile(r"__.*|labels?\W.*|.*\.(json|txt|cls)|[^\d.]*")       # keys: length, label-01, __keys__
# ShapeNetCore v2: synsets, each with its category in the names of PointFlow's datasets.py
CATEGORIES = dict(re.findall(r"(\d+)\s+(\w+)", """
    02691156 airplane 02747177 can 02773838 bag 02801938 basket 02808440 bathtub 02818832 bed 02828884 bench
    02843684 birdhouse 02871439 bookshelf 02876657 bottle 02880940 bowl 02924116 bus 02933112 cabinet 02942699
    camera 02946921 tin_can 02954340 cap 02958343 car 02992529 cellphone 03001627 chair 03046257 clock
    03085013 keyboard 03207941 dishwasher 03211117 monitor 03261776 earphone 03325088 faucet 03337140 file
    03467517 guitar 03513137 helmet 03593526 jar 03624134 knife 03636649 lamp 03642806 laptop 03691459 speaker
    03710193 mailbox 03759954 microphone 03761084 microwave 03790512 motorcycle 03797390 mug 03928116 piano
    03938244 pillow 03948459 pistol 03991062 pot 04004475 printer 04074963 remote_control 04090263 rifle
    04099429 rocket 04225987 skateboard 04256520 sofa 04330267 stove 04379243 table 04401088 telephone
    04460130 tower 04468005 train 04530566 vessel 04554684 washer"""))
EXTENSIONS = {"." + suffix for suffix in
              "jpg jpeg jpe jfif png apng bmp webp gif tif tiff ppm pgm pbm pnm jp2 avif tga".split()}
# No others, whatever a file is called: Pillow gives EPS to a program.
FORMATS = "JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA"

# ---- Reading files -------------------------------------------------------------------------------------
@contextlib.contextmanager
def reading(path, expected):
    """Whatever a reader raises becomes a ValueError of one line: path, what was found, what was expected."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{path}: needs {error.name}: pip install {error.name}") from None
    except Exception as error:         # damaged files make libraries raise nearly anything
        found = str(error)[:300]
        if not isinstance(error, ValueError):
            found = f"cannot be read ({type(error).__name__}: {found})"
        raise ValueError(" ".join(f"{path}: {found}; expected {expected}".split())) from None

def find_files(path, suffixes):
    """All files of these suffixes below path, sorted; links are followed, but not to a directory above."""
    found, here = [], os.path.join(os.path.realpath(path), "")
    for entry in os.scandir(path):
        if entry.name.startswith((".", "__MACOSX")):
            continue
        if entry.is_file() and os.path.splitext(entry.name)[1].lower() in suffixes:
            found.append(entry.path)
        elif entry.is_dir() and not here.startswith(os.path.join(os.path.realpath(entry.path), "")):
            found += find_files(entry.path, suffixes)
    return sorted(found)

@functools.lru_cache(maxsize=4)
def archive(path):
    """The images in a .zip or lmdb, as path/name, and the function that gives the bytes of one."""
    if hasattr(os, "register_at_fork"):    # two processes must share neither a file position nor an lmdb
        os.register_at_fork(before=archive.cache_clear)
    if path.lower().endswith(".zip"):
        opened = zipfile.ZipFile(path)
        names = [f"{path}/{name}" for name in opened.namelist() if not re.search(r"(^|/)(\.|__MACOSX)", name)]
        names = [name for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS]
        return sorted(names), lambda file: opened.read(file[len(path) + 1:])
    import lmdb
    base = path if os.path.isfile(path) else os.path.join(path, "data.mdb")
    # without its lock file, which a shared file system may refuse
    opened = lmdb.open(base, subdir=False, readonly=True, lock=False, readahead=False, meminit=False)
    wanted = (opened.info()["last_pgno"] + 1) * opened.stat()["psize"]
    if os.path.getsize(base) < wanted:     # it is memory-mapped: to read on would end the process
        raise ValueError(f"found {os.path.getsize(base)} of its {wanted} bytes")
    view = opened.begin()
    names = [key.decode("latin-1") for key in view.cursor().iternext(values=False)]
    names = [f"{path}/{name}" for name in names if not NO_IMAGE.fullmatch(name)]
    return names, lambda file: view.get(file[len(path) + 1:].encode("latin-1"))

def read_file(path):
    with open(path, "rb") as file:
        return file.read()

def find_shapes(path, split):
    """{synset: its clouds of a split, as .npy files or arrays}."""
    (stem, suffix), shapes = os.path.splitext(path), {}
    if suffix.lower() in (".pt", ".pth"):
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():       # torch looks at no checksum
            raise ValueError("found another checksum than it was written with")
        lion = torch.load(path, map_location="cpu", weights_only=True)
        clouds = (lion["ref"] * lion["std"] + lion["mean"]).float().numpy()
        return {stem.rpartition("ref_val_")[2]: clouds if split == "val" else []}
    if suffix.lower() in (".hdf5", ".h5"):
        import h5py
        with h5py.File(path) as file:      # ModelNet's holds arrays, which have no splits
            for name, group in file.items():
                known = isinstance(group, h5py.Group) and split in group
                shapes[name] = group[split][:] if known else []
            return shapes
    for file in find_files(path, {".npy"}):
        name, part = ["", *file.split("/")][-3:-1]
        if split_of(part) == split:
            shapes.setdefault(name, []).append(file)
    return shapes

def read_image(path, read=read_file):
    """An image as its owner sees it, RGB: upright, first frame, transparency on white, 16 bits as 8."""
    with reading(path, f"an image ({', '.join(FORMATS)})"), warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # of damaged EXIF, of large images
        PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 26    # profiles exceed 1 MB
        Image.init()
        content, known = read(path), [name for name in FORMATS if name in Image.OPEN]
        if content[:4] == b"\x89PNG":        # checksums of pixels too, and which text or profile is bad
            PngImagePlugin.PngImageFile(io.BytesIO(content)).verify()
        try:
            image = Image.open(io.BytesIO(content), formats=known)
        except Image.UnidentifiedImageError:
            raise ValueError(f"cannot identify what begins with {content[:8]}") from None
        clear, bits = image.info.get("transparency"), image.tile and image.tile[0][3]
        image.load()
        if clear is not None and bits in ("L;2", "L;4"):    # Pillow scales the pixels to 8 bits, not this
            image.info["transparency"] = clear * {"L;2": 85, "L;4": 17}[bits]
        elif clear is not None and bits == "RGB;16B":
            image.info["transparency"] = tuple(channel >> 8 for channel in clear)
        with contextlib.suppress(SyntaxError):              # a damaged EXIF turns nothing
            image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("found floating-point pixels, which have no known range")
        if image.mode.startswith("I"):                      # convert would clip; 65535 / 257 = 255
            pixels = np.where(np.asarray(image) == clear, 65535, np.asarray(image))
            image = Image.fromarray(np.rint(np.clip(pixels / 257, 0, 255)).astype(np.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")

def fit(image, res):
    """Centre crop and resize as ADM does (guided-diffusion, center_crop_arr): uint8 (res,res,3)."""
    (width, height), half = image.size, 32 * min(image.size)
    if max(width, height) > 2 * half:  # a line of pixels would first grow to res x millions
        x, y = width // 2, height // 2
        image = image.crop((max(0, x - half), max(0, y - half), min(width, x + half), min(height, y + half)))
    while min(image.size) >= 2 * res:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = res / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - res) // 2, (image.height - res) // 2
    return np.array(image.crop((left, top, left + res, top + res)))

def read_cloud(path, dtype=np.float32):
    """The points of a .npy or .ply file: floats (n,3), with dtype=None as they are stored."""
    with reading(path, "a .npy or .ply of floats (n,3)"):
        if os.fspath(path).lower().endswith(".ply"):
            import trimesh
            cloud = np.asarray(getattr(trimesh.load(path, process=False), "vertices", ()))
            head = re.search(rb"element\s+vertex\s+(\d+)", read_file(path))
            count = int(head[1]) if head else 0
            if not 0 < count == len(cloud):            # trimesh reads a text that was cut
                raise ValueError(f"found {len(cloud)} of {count} points")
        else:
            cloud = np.load(path, mmap_mode="r", allow_pickle=False)
        if cloud.dtype.kind != "f" or cloud.shape[1:] != (3,) or not len(cloud):
            raise ValueError(f"found {cloud.dtype} {cloud.shape}")
        return np.asarray(cloud, dtype)

def normalise(points, least=1):
    """(points - centre) / scale, whose box has the longest side [-1,1], float32 (n,3); centre (3,); scale."""
    points = np.asarray(points)
    if points.dtype.kind != "f" or points.shape[1:] != (3,) or len(points) < least:
        raise ValueError(f"found points {points.dtype} {points.shape}")
    points = points.astype(np.float64)
    low, high = points.min(0), points.max(0)
    centre, scale = (low + high) / 2, float((high - low).max() / 2)
    if not 0 < scale < np.inf:         # NaN fails too
        raise ValueError("found points that are not finite, or all the same")
    return ((points - centre) / scale).astype(np.float32), centre, scale

# ---- Data sets -----------------------------------------------------------------------------------------
def split_of(directory):
    match = SPLIT.fullmatch(directory)
    return match and match[1].lower()

def choose_split(ways, wanted):
    """Returns the numbers of the files of a split, the other directories of their paths, and a line that says
    what was taken. `ways` are the directories of each path. Splits are the first that differ (x/train/...),
    or those below (airplane/train/...)."""
    shared = os.path.commonprefix(ways)
    start = next((k for k, name in enumerate(shared) if split_of(name)), len(shared))
    for depth in (start, start + 1):
        names = sorted({"".join(way[depth:depth + 1]) for way in ways})
        splits = [split_of(name) for name in names]
        if None not in splits:
            if splits.count(wanted) != 1:
                among = listed(names) or "no file"
                raise ValueError(f"found {among}, not one of split {wanted}: try a deeper --data")
            mine = names[splits.index(wanted)]
            chosen = [i for i, way in enumerate(ways) if way[depth] == mine]
            left = [ways[i][start:depth] + ways[i][depth + 1:] for i in chosen]
            if depth > start and len({"".join(way[1:2]) for way in left}) > 1:
                raise ValueError(f"found classes above or in {listed(names)}: try a deeper --data")
            return chosen, left, f"split {mine} (of {listed(names)}); "
        found = [name for name in names if split_of(name)]
        deeper = any(way[depth] in found for way in ways if len(way) > depth + 1)
        if deeper or found and "" in names or len({*splits}) > 2:       # else train may be a class
            raise ValueError(f"found {listed(found)} beside others: try a deeper --data")
    return range(len(ways)), ways, ""

def listed(names):
    return ", ".join([*map(str, names[:3]), "..."][:len(names)])

class Folder:
    """Several directories are the classes, sorted by name, so that ImageNet's get ADM's numbers; one is none.
    NVIDIA's dataset.json goes before. Of train, val, ... `split` is read, by default train. With res=None
    images keep their sizes."""
    domain = "image"
    needs = "images, flat or in a directory per class (train/nXXXXXXXX/*.JPEG), perhaps in a .zip or lmdb"

    def __init__(self, path, res=None, flip=False, labels=True, split=None):
        self.path, self.res, self.flip = os.path.join(path, "")[:-1], res, flip
        with reading(path, self.needs):
            self.archived = os.path.isfile(path) or os.path.isfile(os.path.join(path, "data.mdb"))
            files = archive(self.path)[0] if self.archived else find_files(self.path, EXTENSIONS)
            ways = [STORED.sub("/", file[len(self.path):]).split("/")[1:-1] for file in files]
            chosen, left, self.taken = choose_split(ways, split or "train")
            if split and not self.taken:
                raise ValueError(f"found no image of split {split}")
            self.files, ways = [files[i] for i in chosen], [ways[i] for i in chosen]
            marks = self.marks(ways, left) if labels else None
        names, numbers = np.unique(marks or ["" for _ in self.files], return_inverse=True)
        self.class_names = [*map(str, names)] if len(names) > 1 else []
        self.labels = numbers.tolist()

    def marks(self, ways, left):
        """What tells the class of each file: its number in dataset.json, or a directory; None: no classes."""
        folder = "/".join((self.path, *os.path.commonprefix(ways)))
        try:
            table = dict(json.loads(self.content(f"{folder}/dataset.json"))["labels"] or {})
        except (KeyError, FileNotFoundError, TypeError):               # there is none, or it has no labels
            table = None
        except ValueError as error:
            raise ValueError(f"found dataset.json ({error}): try --no-labels") from None
        if table is not None:
            marks = [table.get(file[len(folder) + 1:]) for file in self.files]
            if table and {*map(type, marks)} != {int}:
                raise ValueError("found dataset.json without a whole number for each image: try --no-labels")
            return marks if table else None
        shared = len(os.path.commonprefix(left))
        marks = ["".join(way[shared:shared + 1]) for way in left]
        odd = [mark for mark in marks if mark.lower() in ("", "images", "image", "imgs", "img", "jpegimages")]
        if len({*marks} - {""}) < 2:
            return None
        if odd:
            file = self.files[marks.index(odd[0])]
            raise ValueError(f"found {file} beside class directories: try --no-labels, or a deeper --data")
        for entry in os.scandir(folder) if not self.archived else ():
            if entry.is_dir() and not entry.name.startswith(".") and not os.listdir(entry):
                raise ValueError(f"found {entry.path} empty: remove it, or try --no-labels")
        return marks

    def content(self, file):
        return (archive(self.path)[1] if self.archived else read_file)(file)

    def __len__(self):
        return len(self.files)

    def image(self, i):
        return read_image(self.files[i], self.content)

    def item(self, i, rng=None):
        pixels = fit(self.image(i), self.res) if self.res else np.array(self.image(i))
        if self.flip and rng is not None and rng.random() < 0.5:
            pixels = pixels[:, ::-1].copy()
        return pixels, int(self.labels[i])

class Arrays(Folder):
    """An .npz, in memory, or what tools/pack.py wrote, memory-mapped. Without names the labels are names."""
    needs = ("an .npz of `images` (or arr_0) uint8 (N,H,W) or (N,H,W,3), H = W without --res, perhaps "
             "`labels` (N,) and `label_names` (K,), or a directory that tools/pack.py wrote with this --res")

    def __init__(self, path, res=None, flip=False, labels=True):
        with reading(path, self.needs):
            packed = os.path.isdir(path)
            if packed:
                found = json.loads(read_file(os.path.join(path, "manifest.json")))
                images = np.load(os.path.join(path, "images.npy"), mmap_mode="r", allow_pickle=False)
                found["images"], found["label_names"] = images, found["class_names"]
                if not found["sha256"]:
                    raise ValueError(f"found {found['done']} of {found['count']} images; pack it again")
            else:
                found = dict(np.load(path, allow_pickle=False))
            if not {"images", "arr_0"} & found.keys():
                raise ValueError(f"found {listed([*found]) or 'nothing'}")
            images, numbers = found.get("images", found.get("arr_0")), found.get("labels", found.get("arr_1"))
            names, shape = found.get("label_names"), images.shape
            grey = len(shape) == 3 and shape[2] > 4        # else one image, (H,W,3)
            known = images.dtype == np.uint8 and images.size and (grey or shape[3:] in ((1,), (3,)))
            fits = res in (None, shape[1]) if packed else res or shape[1] == shape[2]
            if not known or not fits:
                raise ValueError(f"found `images` {images.dtype} {shape}, --res {res}")
            if numbers is None or not labels:
                numbers, names = np.zeros(len(images), np.int64), []
            elif names is None:
                names, numbers = np.unique(numbers, return_inverse=True)
            numbers = np.asarray(numbers)
            if numbers.shape != shape[:1] or numbers.min() < 0 or numbers.max() >= max(1, len(names)):
                raise ValueError(f"found {len(images)} images, {numbers.shape} `labels`, {len(names)} names")
        self.images = images[..., 0] if shape[3:] == (1,) else images
        self.res, self.flip, self.labels = res or shape[1], flip, numbers
        self.class_names, self.files = [*map(str, names)], [f"{path}[{i}]" for i in range(len(images))]

    def image(self, i):
        return Image.fromarray(self.images[i]).convert("RGB")

class ShapeNet:
    """rng picks P of an object's points. Without it they are PointFlow's reference points, the first P of
    those it sets aside for tests (datasets.py), or the first P of all where they are too few."""
    domain, spec, set_aside = "points", None, 10_000
    needs = "<synset>/{train,val,test}/*.npy of floats (n,3), shapenet.hdf5, LION's ref_val_*.pt of split val"

    def __init__(self, path, points=2048, split="train", category="all", labels=False):
        self.points, self.taken = points, f"split {split}; "
        with reading(path, self.needs):
            shapes = find_shapes(os.fspath(path), split)
            chosen = [name for name in sorted(shapes) if category in ("all", name, CATEGORIES.get(name))]
            self.clouds = [cloud for name in chosen for cloud in shapes[name]]
            if not self.clouds:
                known = ", ".join(CATEGORIES.get(name, name) for name in sorted(shapes))
                raise ValueError(f"found no cloud of category {category}, split {split} in {known or 'it'}")
        self.class_names = [CATEGORIES.get(name, name) for name in chosen] if labels else []
        self.labels = [label if labels else 0 for label, name in enumerate(chosen) for _ in shapes[name]]
        self.files = [x if isinstance(x, str) else f"{path}[{i}]" for i, x in enumerate(self.clouds)]

    def __len__(self):
        return len(self.files)

    def read(self, i):
        """All points of object i, normalised, float32 (n,3), and what tokens it has."""
        cloud = self.clouds[i]
        cloud = read_cloud(cloud, None) if isinstance(cloud, str) else cloud
        with reading(self.files[i], f"floats (n,3), n >= {self.points}"):
            return [normalise(cloud, self.points)[0]]

    def item(self, i, rng=None):
        cloud, *tokens = self.read(i)
        if rng is None:
            start = self.set_aside if len(cloud) >= self.set_aside + self.points else 0
            return cloud[start:start + self.points].copy(), self.labels[i], *tokens
        if self.spec and self.spec["views"] == 2 and (u := rng.random()) < 0.5:
            tokens = [np.tile(np.split(tokens[0], 2)[int(u >= 0.25)], (2, 1))]
        return cloud[rng.choice(len(cloud), self.points, replace=False)], self.labels[i], *tokens

class Objaverse(ShapeNet):
    """INRFlow's .npz per object, below train/, val/, test/ where there are such. Where tools/tokens.py made
    them, tokens.json describes the tokens (`spec`) and rng picks views: half of the items get both, others
    one view twice, which attention treats as once."""
    needs = "an .npz per object, of `xyz` floats (n,3) and `cond_token` finite floats (T,C)"
    set_aside, shape, class_names = 0, None, []

    def __init__(self, path, points=16384, split="train"):
        self.points, spec = points, os.path.join(path, "tokens.json")
        with reading(path, self.needs):
            files = find_files(path, {".npz"})
            ways = [os.path.relpath(file, path).split("/")[:-1] for file in files]
            chosen, _, self.taken = choose_split(ways, split)
            self.files = [files[i] for i in chosen]
            if os.path.exists(spec):
                self.spec = json.loads(read_file(spec))
        self.labels = [0 for _ in self.files]
        self.shape = self.n_tokens, self.token_dim = self.read(0)[1].shape

    def read(self, i):
        with reading(self.files[i], f"{self.needs}, n >= {self.points}, (T,C) = {self.shape or 'any'}"):
            with np.load(self.files[i], allow_pickle=False) as arrays:
                cloud, tokens = normalise(arrays["xyz"], self.points)[0], arrays["cond_token"]
            known = tokens.dtype.kind == "f" and tokens.ndim == 2 and self.shape in (None, tokens.shape)
            if not known or not tokens.size or not np.isfinite(tokens).all():
                raise ValueError(f"found `cond_token` {tokens.dtype} {tokens.shape}")
            return cloud, tokens.astype(np.float32)

DATASETS = {"glyphs": lambda res=32, split="train": import_module("toys").Glyphs(res, split),
            "solids": lambda points=2048, split="train": import_module("toys").Solids(points, split),
            "folder": Folder, "npz": Arrays, "shapenet": ShapeNet, "objaverse": Objaverse}

def load(name, path=None, **options):
    """DATASETS[name] with those options that it takes; `about` tells in a line its splits and classes."""
    packed = name == "folder" and path and os.path.exists(os.path.join(path, "manifest.json"))
    kind, given = Arrays if packed else DATASETS[name], dict(options, path=path)
    takes = inspect.signature(kind).parameters
    if "path" in takes and not path:
        raise ValueError(f"--dataset {name}: --data is missing; expected {kind.needs}")
    dataset = kind(**{key: given[key] for key in takes if given.get(key) is not None})
    names, split = dataset.class_names, getattr(dataset, "taken", "")
    dataset.about = split + (f"{len(names)} classes: {listed(names)}" if names else "no classes")
    return dataset

# ---- The order of a run --------------------------------------------------------------------------------
@functools.lru_cache(maxsize=2)        # workers read ahead over the end of an epoch
def permutation(n, seed, epoch):
    return np.random.default_rng((103, seed, epoch)).permutation(n).astype(np.int32)    # toys.py has 101, 102

def item_index(n, seed, k):
    """Item at position k of an endless run: each of n once per epoch, in a fresh order every epoch."""
    return int(permutation(n, seed, k // n)[k % n])

class Run(torch.utils.data.Dataset):
    """run[positions] -> the tensors of the items there, {item: what is wrong with it} of those left out."""

    def __init__(self, dataset, seed, tries):
        self.dataset, self.seed, self.tries = dataset, seed, tries

    def __getitem__(self, positions):
        n, samples, bad = len(self.dataset), [], {}
        for k in positions:
            first = item_index(n, self.seed, k)
            for i in range(first, first + self.tries):
                try:
                    samples.append(self.dataset.item(i % n, np.random.default_rng((self.seed, k))))
                    break
                except ValueError as error:
                    bad[i % n] = str(error)
            else:
                row = f"{self.tries} items in a row cannot be read, the first: " if self.tries > 1 else ""
                raise ValueError(row + bad[first])
        columns = [[*map(torch.as_tensor, column)] for column in zip(*samples)]
        return [torch.stack(column) for column in columns], bad

def start_worker(_):
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):     # sent to all processes of a group: the main one saves
        signal.signal(number, signal.SIG_IGN)          # first, then ends its workers
    torch.multiprocessing._prctl_pr_set_pdeathsig(9)   # where it is killed itself, Linux kills them

def loader(dataset, seed, step, batch_size, micro, rank=0, world=1, workers=0, pin=False, skip_bad=None):
    """Endless micro-batches (values, labels[, tokens]) from optimizer step `step` on: uint8 (micro,R,R,3) or
    float32 (micro,P,3), int64 (micro,), float32 (micro,T,C). Step s reads positions s*batch_size ..
    (s+1)*batch_size-1 of the run, rank r the r-th of `world` blocks of it. Where skip_bad is a dict, the next
    item stands in for one that cannot be read, and the dict tells: {item: what is wrong}."""
    if batch_size % (world * micro):
        raise ValueError(f"batch size {batch_size}: expected a multiple of {world} processes x {micro} items")
    part, tries = batch_size // world, 1 if skip_bad is None else min(len(dataset), 100)
    starts = (s * batch_size + rank * part + k for s in itertools.count(step) for k in range(0, part, micro))
    # torch's handler would raise in the midst of the main process where a worker is killed
    torch.utils.data._utils.signal_handling._SIGCHLD_handler_set = True
    source = iter(torch.utils.data.DataLoader(
        Run(dataset, seed, tries), batch_size=None, sampler=(range(k, k + micro) for k in starts),
        num_workers=workers, worker_init_fn=start_worker, prefetch_factor=4 if workers else None,
        pin_memory=pin, multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        generator=torch.Generator()))                  # its own, or it would draw from the global one
    if workers:                                        # they ignore SIGTERM, by which Python would end them
        atexit.register(source._shutdown_workers)
    try:
        for batch, bad in source:
            if bad:
                skip_bad.update(bad)
            yield tuple(batch)
    except ValueError as error:                        # a worker's comes wrapped in its traceback
        raise ValueError(str(error).rpartition("ValueError: ")[2].strip()) from None
    except (RuntimeError, OSError, EOFError) as error:
        if "Caught" in str(error) or not workers:
            raise
        raise ValueError("a data process was killed; fewer --workers need less memory") from None

def decode_values(batch, device):
    """A loader's first tensor as the model's values: uint8 (B,R,R,3) -> float32 (B,R*R,3) in [-1,1]."""
    batch = batch.to(device, non_blocking=True)
    return batch.flatten(1, 2).float() / 127.5 - 1 if batch.dtype == torch.uint8 else batch
