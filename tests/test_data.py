"""data.py and toys.py: what each data set yields, what it refuses and in which words, the order of a run."""
import io
import json
import multiprocessing
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
import toys
from conftest import ROOT, Bomb, python, refused

pytestmark = pytest.mark.usefixtures("nothing_goes_off")
RNG = np.random.default_rng(0)

def noise(width=20, height=12):
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))

def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()

def fill(root, *names):
    """Writes an image for each name; returns the root."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise().save(root / name, format="PNG")
    return root

def items(dataset, seed=None):
    """(class label, bytes) of every item."""
    rngs = [None if seed is None else np.random.default_rng((seed, i)) for i in range(len(dataset))]
    return [(item[1], item[0].tobytes()) for item in map(dataset.item, range(len(dataset)), rngs)]

# --- toys

def test_glyphs():
    """If an item depended on more than (i, split), touched the border, or was hard to tell from its paper."""
    ds, weights = data.load("glyphs"), (0.299, 0.587, 0.114)
    assert (ds.domain, ds.res, len(ds), len(ds.class_names)) == ("image", 32, 2 ** 20, 36)
    assert ds.about == "36 classes: A, B, C, ..."
    for i in (*range(72), 2 ** 20 - 1):
        pixels, label = ds.item(i, np.random.default_rng(i))
        ink = np.abs(pixels.astype(float) - pixels[0, 0]).sum(2)
        assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8 and label == i % 36
        assert ink[[0, -1]].max() == ink[:, [0, -1]].max() == 0
        assert pixels[0, 0] @ weights - pixels[ink > 0.9 * ink.max()].mean(0) @ weights > 90
        assert (pixels == toys.Glyphs(32).item(i)[0]).all() and (pixels != ds.render(i + 36)).any()
        assert (pixels != data.load("glyphs", split="test").render(i)).any()
    for i in range(0, 36, 5):                              # the same image, finer
        fine = ds.render(i, 256).astype(float).reshape(32, 8, 32, 8, 3).mean((1, 3))
        assert np.abs(fine - ds.render(i)).mean() < 1 and np.abs(fine - ds.render(i)).max() < 20
    refused("split 'dev'", "train, val, test", call=lambda: data.load("glyphs", split="dev"))

def test_solids():
    """If an item depended on more than (i, split, rng), or its surface did not fill its box."""
    ds = data.load("solids", points=500)
    for i in range(14):
        surface = ds.surface(i).reshape(-1, 3)
        low, high = surface.min(0), surface.max(0)
        assert np.abs(low + high).max() < 1e-6 and (high - low).max() == pytest.approx(2, abs=1e-6)
        points, label = ds.item(i)
        assert points.shape == (500, 3) and points.dtype == np.float32 and label == i % len(ds.class_names)
        assert (points >= low - 1e-6).all() and (points <= high + 1e-6).all()
        assert (points == toys.Solids(900).item(i)[0][:500]).all()
        one, two = (ds.item(i, np.random.default_rng(seed))[0] for seed in (1, 1))
        assert (one != points).any() and (one == two).all()

def test_points_are_uniform_by_area():
    """A flat box: its two large faces hold their share of the area, evenly, within 4 standard errors."""
    points = toys.on_surface(toys.box((0, 0, 0), (2, 0.1, 1)), np.random.default_rng(0).random((40000, 3)))
    share, wide = 2 / 2.3, np.abs(np.abs(points[:, 1]) - 0.05) < 1e-6
    assert abs(wide.mean() - share) < 4 * np.sqrt(share * (1 - share) / 40000)
    counts = np.histogram2d(points[wide, 0], points[wide, 2], bins=4, range=((-1, 1), (-0.5, 0.5)))[0]
    assert np.abs(counts / counts.mean() - 1).max() < 4 / np.sqrt(counts.mean())

# --- layouts of image sets

def test_flip_comes_from_rng(tmp_path):
    """If mirroring were not a coin of the generator, or done without one."""
    still, flipping = data.Folder(fill(tmp_path, "a.png"), 8), data.Folder(tmp_path, 8, flip=True)
    straight = still.item(0, np.random.default_rng(0))[0]
    assert (flipping.item(0)[0] == straight).all() and not (straight == straight[:, ::-1]).all()
    seen = [flipping.item(0, np.random.default_rng(seed))[0] for seed in range(64)]
    mirror = [bool((pixels == straight[:, ::-1]).all()) for pixels in seen]
    assert 16 < sum(mirror) < 48 and all(m or (pixels == straight).all() for m, pixels in zip(mirror, seen))

LAYOUTS = {                            # files, then the classes and class labels that follow from them
    "classes": (["b/1.JPEG", "a/deep/er/2.png", "c/3.PNG", "c/.hidden.png", ".git/x.png"], "abc", [0, 1, 2]),
    "flat": (["1.png", "2.png"], "", [0, 0]), "one": (["all/1.png", "all/2.png", "3.png"], "", [0, 0, 0]),
    "split": (["train/b/1.JPEG", "train/a/2.JPEG", "val/a/3.JPEG"], "ab", [0, 1]),
    "split without classes": (["train/1.png", "test/2.png"], "", [0]),
    "train is a class": (["train/1.png", "bus/2.png"], ["bus", "train"], [0, 1]),
    "Kaggle": (["x/y/train/b/1.png", "x/y/train/a/2.png", "x/y/val/3.png", "x/y/test/4.png"], "ab", [0, 1]),
    "spellings": (["Training_set/b/1.png", "Training_set/a/2.png", "x_TEST1/c/3.png"], "ab", [0, 1]),
    "wrapped": (["train/all/b/1.png", "train/all/a/2.png", "validation/all/c/3.png"], "ab", [0, 1]),
    "split below": (["a/train/1.png", "a/val/2.png", "b/train/3.png"], "ab", [0, 1]),
    "LSUN": (["b/f/8/bf83.png", "c/1/1/c112.png"], "", [0, 0]),
    "digits": (["0/1.png", "1/0.png"], "01", [0, 1]),
    "LSUN's": (["x/b/f/8/bf83.png", "y/c/1/1/c112.png"], "xy", [0, 1]),
    "hashes": (["ab/abcdef0123456789.png", "bc/bcdef0123456789a.png"], "", [0, 0]),
    "NVIDIA": (["00000/img00000999.png", "00001/img00001000.png"], "", [0, 0]),
    "FFHQ": (["x/00000/00999.png", "x/01000/01000.png"], "", [0, 0]),
}

@pytest.mark.parametrize("what", LAYOUTS)
def test_layouts(tmp_path, what):
    """If classes came in the order of the disk, or a directory, .zip and lmdb of the same images differed."""
    lmdb, (names, classes, labels) = pytest.importorskip("lmdb"), LAYOUTS[what]
    folder = data.load("folder", f"{fill(tmp_path / 'set', *names)}/", res=8)
    assert (folder.class_names, folder.labels) == ([*classes], labels)
    assert data.load("folder", tmp_path / "set", res=8, labels=False).class_names == []
    with zipfile.ZipFile(tmp_path / "set.ZIP", "w") as archive:
        for name in reversed(sorted(names)):
            archive.write(tmp_path / "set" / name, name)
        archive.writestr("__MACOSX/train/a/._2.png", b"no image")
    zipped = data.load("folder", tmp_path / "set.ZIP", res=8)
    assert items(zipped) == items(folder) and zipped.class_names == folder.class_names
    for subdir in (True, False):
        path = tmp_path / f"{subdir}.lmdb"
        with lmdb.open(str(path), subdir=subdir, map_size=2 ** 22) as base, base.begin(write=True) as txn:
            for file in folder.files:
                txn.put(os.path.relpath(file, tmp_path / "set").encode(), pathlib.Path(file).read_bytes())
            txn.put(b"length", b"3")
            for key in (b"__keys__", b"num-samples", b"label-000000001", b"0.json"):
                txn.put(key, pickle.dumps(names))
        inside = data.load("folder", path, res=8)
        assert sorted(items(inside)) == sorted(items(folder))
    for ds in (zipped, inside) if what == "classes" else ():       # forked processes read them anew
        batches = [next(data.loader(ds, 0, 0, 4, 4, workers=workers)) for workers in (0, 2)]
        assert all(map(torch.equal, *batches)) and data.archive.cache_info().currsize == 0

def test_splits_links_and_refusals_of_folders(tmp_path):
    """If another split were read than asked for and said, or a link, pipe or loop were followed."""
    root = fill(tmp_path / "s", "train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png", "val/b/5.png")
    assert len(data.load("folder", root, res=8, split="val")) == len(data.Folder(root / "val", 8)) == 3
    assert data.load("folder", root).about == "split train (of train, val); 2 classes: a, b"
    assert data.Folder(root).item(0)[0].shape == (12, 20, 3)
    refused(root, "split test", "train", call=lambda: data.Folder(root, 8, split="test"))
    for path in (tmp_path / "none", root / "train"):
        refused(path, "expected images", call=lambda: data.Folder(path, 8, split="val"))
    fill(tmp_path / "x", "a/1.png", "b/2.png", "3.png")
    refused("3.png", "beside class", "--no-labels", call=lambda: data.Folder(tmp_path / "x", 8))
    os.remove(tmp_path / "x" / "3.png")
    os.mkfifo(tmp_path / "x" / "pipe.png")
    (tmp_path / "x" / "a" / "loop").symlink_to(tmp_path / "x", target_is_directory=True)
    (tmp_path / "x" / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "x" / "c").symlink_to(root / "val", target_is_directory=True)
    assert data.Folder(tmp_path / "x", 8).labels == [0, 1, 2, 2, 2]

@pytest.mark.parametrize("names,words", [
    ("train/a/1 train/b/2 3", "train beside others"), ("val/a/1", "found val, not one of split train"),
    ("train/1 test/2 extra/3", "test, train beside"), ("1 test/2", "test beside"),
    ("train/a/1 extra/2", "train beside"), ("images/1 masks/1", "--no-labels"), ("trainA/1 trainB/1", "B"),
    ("a/train/x/1 a/train/y/2 b/val/x/1", "classes above"), ("a/train/1 a/val/2 b/3", "train, val beside")])
def test_ambiguous_directories_are_refused(tmp_path, names, words):
    """If held-out images were trained on, or directories of another meaning became classes."""
    root = fill(tmp_path / "s", *(f"{name}.png" for name in names.split()))
    refused(words, "--data", call=lambda: data.load("folder", root))

def test_numbers_of_nvidia(tmp_path):
    """If dataset.json did not go before directories, or were read where it is not one of labels."""
    names, root = [f"00000/img{i:08d}.png" for i in range(3)], tmp_path / "s"
    fill(root, *names)
    for labels, classes, numbers in ((zip(names, [12, 12, 3]), ["3", "12"], [1, 1, 0]), ((), [], [0, 0, 0])):
        (root / "dataset.json").write_text(json.dumps(dict(labels=[*labels] or None)))
        for path in (root, shutil.make_archive(tmp_path / f"{len(classes)}", "zip", root), tmp_path):
            ds = data.load("folder", path, res=8)
            assert (ds.class_names, ds.labels) == (classes, numbers)
    assert ds.about == "no classes"
    for text in ('{"labels": [["x.png", 1]]}', json.dumps(dict(labels={names[0]: 0.5})), "{oops"):
        (root / "dataset.json").write_text(text)
        refused("dataset.json", "--no-labels", call=lambda: data.Folder(root))
        assert data.Folder(root, labels=False).class_names == []
    fill(root, "a/1.png", "b/2.png")
    (root / "dataset.json").write_text('{"name": "x"}')
    shutil.rmtree(root / "00000")
    assert data.Folder(root).class_names == ["a", "b"]
    (root / "c").mkdir()
    refused("s/c empty", "--no-labels", call=lambda: data.Folder(root))

def test_damaged_chunks_of_a_png_are_named(tmp_path):
    """If a damaged text, profile or row of pixels were read as if it were whole, or called no image."""
    good = encoded(Image.new("RGB", (8, 8)), "PNG")
    for kind, content in ((b"iCCP", b"x\0\5bad"), (b"zTXt", b"x\0\3bad"), (b"tEXt", b"a\0b")):
        check = zlib.crc32(kind + content) ^ (kind == b"tEXt")
        chunk = len(content).to_bytes(4, "big") + kind + content + check.to_bytes(4, "big")
        bad = good[:33] + chunk + good[33:]
        refused(kind.decode(), call=lambda: data.read_image("x.png", lambda path: bad))
    wrong = good[:50] + bytes([good[50] ^ 1]) + good[51:]
    refused("IDAT", call=lambda: data.read_image("x.png", lambda path: wrong))

# --- arrays

def npz(path, **arrays):
    np.savez(path, **arrays)
    return path

def test_npz(tmp_path):
    pixels = RNG.integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    ds = data.load("npz", npz(tmp_path / "a.npz", images=pixels, labels=np.array([7, -2, 7, 30, -2])))
    assert ds.class_names == ["-2", "7", "30"] and ds.res == 6 and len(ds) == 5
    assert items(ds) == [(label, image.tobytes()) for label, image in zip([1, 0, 1, 2, 0], pixels)]
    assert data.Arrays(tmp_path / "a.npz", labels=False).class_names == []
    named = npz(tmp_path / "b.npz", arr_0=pixels, arr_1=np.zeros(5, np.uint8), label_names=["x", "y"])
    assert data.Arrays(named, 4).class_names == ["x", "y"]
    assert (data.Arrays(named, 4).item(1)[0] == data.fit(Image.fromarray(pixels[1]), 4)).all()
    for shape in ((5, 6, 6), (5, 6, 6, 1)):
        grey = data.Arrays(npz(tmp_path / "grey.npz", images=pixels[..., 0].reshape(shape)), flip=True)
        assert grey.class_names == [] and (grey.item(2)[0] == pixels[2, :, :, :1]).all()
    wide = npz(tmp_path / "wide.npz", images=pixels[:, :, :4])
    refused(wide, "6, 4", "--res", call=lambda: data.Arrays(wide))
    refused("(6, 6, 3)", call=lambda: data.Arrays(npz(tmp_path / "one.npz", images=pixels[0]), 6))

# --- point clouds

@pytest.fixture
def tree(tmp_path):
    """Three categories, two shapes in train, one in test."""
    root = tmp_path / "parent" / "ShapeNetCore.v2.PC15k"
    for synset in ("03001627", "02691156", "04379243"):
        for name in ("train/0.npy", "train/1.NPY", "test/0.npy"):
            (root / synset / name).parent.mkdir(parents=True, exist_ok=True)
            with open(root / synset / name, "wb") as file:
                np.save(file, (RNG.normal(size=(11000, 3)) * (3, 1, 1) + 4).astype(np.float32))
    return root

def test_shapenet(tree):
    ds = data.load("shapenet", tree.parent, points=64)
    assert len(ds) == 6 and ds.class_names == [] and ds.labels == [0] * 6 and ds.domain == "points"
    stored = np.load(ds.files[2])
    unit, centre, scale = data.normalise(stored)
    assert np.abs(unit).max() == 1 and np.abs(unit * np.float64(scale) + centre - stored).max() < 1e-5
    fixed, label = ds.item(2)
    assert fixed.dtype == np.float32 and label == 0
    assert (fixed == unit[10000:10064]).all()                             # PointFlow's reference points
    assert (data.ShapeNet(tree, points=6000).item(2)[0] == unit[:6000]).all()
    one, two = (ds.item(2, np.random.default_rng(seed))[0] for seed in (1, 2))
    assert (one != two).any() and (one == ds.item(2, np.random.default_rng(1))[0]).all()
    assert len({*map(bytes, one)}) == 64 and {*map(bytes, one)} <= {*map(bytes, unit)}
    assert len(data.CATEGORIES) == 55 == len(set(data.CATEGORIES.values()))
    for category in ("chair", "03001627"):
        assert all("/03001627/" in file for file in data.ShapeNet(tree, 8, category=category).files)
    ds = data.load("shapenet", tree, points=8, split="test", labels=True)
    assert ds.about == "split test; 3 classes: airplane, chair, table"
    assert ds.class_names == ["airplane", "chair", "table"] and ds.labels == [0, 1, 2]
    refused("category car", "airplane, chair, table", call=lambda: data.ShapeNet(tree, category="car"))
    refused("split dev", "{train,val,test}", call=lambda: data.ShapeNet(tree, split="dev"))
    refused("nowhere", "<synset>", call=lambda: data.ShapeNet(tree / "nowhere"))

def test_shapenet_in_one_file(tree, tmp_path):
    """If the hdf5 form, or LION's reference file, gave other clouds than the tree."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "s.HDF5", "w") as file:
        for part in tree.glob("*/*"):
            clouds = [np.load(path) for path in data.find_files(part, {".npy"})]
            file.create_dataset(f"{part.parent.name}/{part.name}", data=np.stack(clouds))
    for options in (dict(), dict(split="test"), dict(category="chair"), dict(labels=True)):
        a, b = (data.load("shapenet", path, points=16, **options) for path in (tree, tmp_path / "s.HDF5"))
        assert items(a) == items(b) and items(a, 7) == items(b, 7) and a.class_names == b.class_names
    with h5py.File(tmp_path / "modelnet.h5", "w") as file:
        file["data"], file["label"] = np.zeros((2, 9, 3)), [0, 1]
    refused("data, label", "expected <synset>", call=lambda: data.ShapeNet(tmp_path / "modelnet.h5"))
    x, path = torch.rand(2, 30, 3), tmp_path / "ref_val_chair.pt"
    torch.save(dict(ref=(x - 0.5) / 3, mean=torch.full((2, 1, 3), 0.5), std=torch.full((2, 1, 1), 3.0)), path)
    lion = data.load("shapenet", path, points=16, split="val", category="chair")
    assert all(np.allclose(lion.item(i)[0], data.normalise(x[i].numpy())[0][:16], atol=1e-5) for i in (0, 1))
    refused("split train", call=lambda: data.load("shapenet", path))
    refused("category car", "chair", call=lambda: data.load("shapenet", path, split="val", category="car"))
    raw = path.read_bytes()
    path.write_bytes(raw[:len(raw) // 2] + bytes(8) + raw[len(raw) // 2 + 8:])
    refused("checksum", call=lambda: data.ShapeNet(path, 9, "val"))
    torch.save(Bomb(), path)
    refused(path, "LION", call=lambda: data.ShapeNet(path, 9, "val"))

def test_objaverse(tmp_path):
    """If points were not drawn at random, views chosen otherwise than said, or another split read."""
    tokens, root = RNG.normal(size=(8, 5)).astype(np.float16), tmp_path / "set"
    for name in ("train/0", "train/1", "val/0"):
        npz(fill(root, f"{name}.png") / f"{name}.npz", xyz=RNG.normal(size=(90, 3)), cond_token=tokens)
    plain = data.load("objaverse", root, points=64)
    assert (len(plain), plain.n_tokens, plain.token_dim, plain.spec, plain.class_names) == (2, 8, 5, None, [])
    assert len(data.load("objaverse", root, points=64, split="val")) == 1
    assert (plain.item(0, np.random.default_rng(1))[2] == tokens).all()
    assert plain.item(0)[2].dtype == np.float32
    (root / "val").rename(root / "Val")
    (root / "train").rename(root / "Train")
    assert len(data.load("objaverse", root.parent, points=64)) == 2
    (root / "Train").rename(root / "train")
    (root / "tokens.json").write_text(json.dumps(dict(views=2)))
    ds, kinds = data.load("objaverse", root, points=64), []
    for k in range(200):
        cloud, label, got = ds.item(0, np.random.default_rng(k))
        halves = [(got == np.concatenate([half, half])).all() for half in (tokens[:4], tokens[4:])]
        kinds.append("both" if (got == tokens).all() else ("first", "second")[halves.index(True)])
    assert 75 < kinds.count("both") < 125 and 30 < kinds.count("first") < 70
    assert label == 0 and {*map(bytes, cloud)} <= {*map(bytes, ds.read(0)[0])}
    xyz = RNG.normal(size=(90, 3))
    for bad in (dict(xyz=xyz), dict(xyz=xyz[:9], cond_token=tokens), dict(xyz=xyz[:, :2], cond_token=tokens),
                dict(xyz=xyz, cond_token=tokens[:4]), dict(xyz=xyz, cond_token=tokens * np.nan)):
        npz(root / "train" / "1.npz", **bad)
        refused("1.npz", "`cond_token`", call=lambda: ds.item(1))

def test_ply(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    points = RNG.normal(size=(9, 3)).astype(np.float32)[[0, 1, 2, 2, 3]]              # one of them twice
    (tmp_path / "a.PLY").write_bytes(trimesh.PointCloud(points).export(file_type="ply"))
    assert (data.read_cloud(tmp_path / "a.PLY") == points).all()
    head = "property float x\nproperty float y\nproperty float z\nend_header\n"
    for count, rows, found in ((3, "1 2 3\n4 5 6\n", "2 of 3"), (0, "", "found 0 of 0 points")):
        (tmp_path / "b.ply").write_text(f"ply\nformat ascii 1.0\nelement vertex {count}\n{head}{rows}")
        refused("b.ply", found, call=lambda: data.read_cloud(tmp_path / "b.ply"))

# --- order of a run

class Numbers:
    """Item i is an image that says i, and what its generator drew."""
    domain, class_names, res = "image", [], 2

    def __init__(self, n=24, bad=()):
        self.n, self.bad = n, bad

    def __len__(self):
        return self.n

    def item(self, i, rng):
        if i in self.bad:
            raise ValueError(f"/some/where/{i}.png: cannot be read")
        return np.array([[[i, rng.integers(256), 0]]], np.uint8), i

def stream(count, dataset=Numbers(), **options):
    """(label, bytes) of the items of the first `count` micro-batches."""
    batches, out = data.loader(dataset, **{"seed": 3, "step": 0, **options}), []
    for _ in range(count):
        values, labels = next(batches)
        assert labels.dtype == torch.int64 and len(values) == len(labels) == options["micro"]
        out += [(int(label), value.numpy().tobytes()) for value, label in zip(values, labels)]
    batches.close()
    return out

def test_order_of_a_run():
    """If an item came twice in an epoch, or the stream depended on workers, ranks, micro-batches, steps."""
    assert [data.item_index(10, 1, k) for k in range(10)] == [6, 3, 4, 0, 8, 2, 7, 9, 1, 5]
    whole = stream(6, batch_size=8, micro=8)
    labels = [label for label, _ in whole]
    assert labels == [data.item_index(24, 3, k) for k in range(48)] and labels[:24] != labels[24:]
    assert sorted(labels[:24]) == sorted(labels[24:]) == [*range(24)]
    assert len({pixels[1] for _, pixels in whole}) > 30    # every position has a generator of its own
    assert stream(6, batch_size=8, micro=8, workers=2) == stream(24, batch_size=8, micro=2) == whole
    ranks = [stream(12, batch_size=8, micro=2, rank=r, world=2, workers=2 * r) for r in (0, 1)]
    assert [item for s in range(0, 24, 4) for rank in ranks for item in rank[s:s + 4]] == whole
    for step in (1, 4):
        assert stream(4, batch_size=8, micro=4, step=step, workers=step // 4) == whole[8 * step:8 * step + 16]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    stream(2, batch_size=4, micro=4)
    assert (torch.get_rng_state() == before).all()
    for options in (dict(batch_size=8, micro=3), dict(batch_size=8, micro=8, world=2)):
        refused("expected a multiple", call=lambda: stream(1, **options))

@pytest.mark.parametrize("workers", [0, 2])
def test_bad_items_are_replaced_by_the_next(workers):
    """If what stands in for a bad item depended on processes or what was read, or was sought for ever."""
    options, bad, dataset = dict(batch_size=8, micro=4, workers=workers), {}, Numbers(bad=[5, 6, 23])
    with pytest.raises(ValueError, match="^/some/where/5.png: cannot be read$"):
        stream(6, Numbers(bad=[5]), **options)
    whole = stream(6, dataset, skip_bad=bad, **options)
    replaced = [{5: 7, 6: 7, 23: 0}.get(label, label) for label, _ in stream(6, batch_size=8, micro=4)]
    assert [label for label, _ in whole] == replaced
    assert bad == {i: f"/some/where/{i}.png: cannot be read" for i in (5, 6, 23)}
    assert stream(2, dataset, batch_size=8, micro=8, step=1, skip_bad={}) == whole[8:24]
    with pytest.raises(ValueError, match="^24 items in a row cannot be read, the first: /some/where/[^/]*$"):
        stream(1, Numbers(bad=range(24)), skip_bad={}, **options)

RUN = """
import multiprocessing, data
if __name__ == "__main__":
    try:
        for i, _ in enumerate(data.loader(data.load("glyphs"), 0, 0, 8, 8, workers=2)):
            if i == 20:                # both workers are at work
                print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    except KeyboardInterrupt:
        print("stopped")
"""

@pytest.mark.parametrize("send,said", [(signal.SIGINT, "stopped\n"), (signal.SIGKILL, "")])
def test_workers_end_with_their_parent(tmp_path, send, said):
    process = subprocess.Popen([sys.executable, "-c", RUN], cwd=ROOT, stdout=-1, stderr=-1, text=True,
                               start_new_session=True)
    workers = [int(word) for word in process.stdout.readline().split()]
    (os.killpg if said else os.kill)(process.pid, send)
    out, err = process.communicate(timeout=60)
    assert len(workers) == 2 and out == said and "KeyboardInterrupt" not in err, err
    ends = time.time() + 3             # torch's own watch looks every 5 seconds
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.time() < ends
        time.sleep(0.05)

def test_signals_to_workers():
    """If Ctrl-C ended one, or a killed one were a traceback, or heard in the midst of something else."""
    others = {*multiprocessing.active_children()}
    batches = data.loader(data.load("glyphs"), 0, 0, 8, 8, workers=2)
    next(batches)
    workers = {process.pid for process in {*multiprocessing.active_children()} - others}
    for number in (signal.SIGINT, signal.SIGTERM):         # as batch systems send them, to all processes
        for pid in workers:
            os.kill(pid, number)
        assert len([next(batches) for _ in range(20)]) == 20
    os.kill(min(workers), signal.SIGKILL)
    time.sleep(0.3)
    refused("a data process was killed", "--workers", call=lambda: [None for _ in batches])

# --- by name, and alone

def test_load_and_decode(tmp_path, tree):
    assert data.load("solids", points=9, res=5, flip=True, split="test").points == 9
    assert data.load("folder", fill(tmp_path / "images", "1.png"), res=8, flip=True, points=None).flip
    assert len(data.load("shapenet", tree, points=8, category="chair", split="test", res=None)) == 1
    for name in ("folder", "npz", "shapenet", "objaverse"):
        refused("--data is missing", data.DATASETS[name].needs, call=lambda: data.load(name, res=8))
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(2, 16, 16, 3)
    values, points = data.decode_values(pixels, "cpu"), torch.rand(2, 5, 3)
    assert values.shape == (2, 256, 3) and values.dtype == torch.float32
    assert ((values + 1) * 127.5 - pixels.flatten(1, 2)).abs().max() < 1e-4
    assert (data.decode_values(points, "cpu") == points).all()

def test_the_file_works_alone_and_does_nothing_when_imported(tmp_path):
    shutil.copy(ROOT / "data.py", fill(tmp_path / "set", "1.png").parent)
    code = "import data, pickle; d = pickle.loads(pickle.dumps(data.load('folder', 'set', res=8))); d.item(0)"
    assert python("-c", code, cwd=tmp_path) == ("", "")
