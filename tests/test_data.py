"""data.py: what each dataset yields, what it refuses and in which words, and the order of a run."""
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import data  # noqa: E402


def refused(*words, call):
    """The one-line text of the InputError that `call` raises; it must contain every word."""
    with pytest.raises(data.InputError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, (word, text)
    return text


# --- glyphs

def test_glyphs_are_functions_of_the_index():
    ds = data.Glyphs(res=32)
    assert ds.domain == "image" and len(ds) == 2 ** 20 and len(ds.class_names) == 36
    for i in (0, 35, 36, 2 ** 20 - 1):
        pixels, label = ds.item(i, np.random.default_rng(i))
        assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8 and label == i % 36
        assert (pixels == data.Glyphs(res=32).item(i, None)[0]).all()
    assert (ds.render(5) != ds.render(5 + 36)).any()
    assert (ds.render(5) != data.Glyphs(res=32, split="test").render(5)).any()


def test_glyphs_at_another_resolution_are_the_same_picture():
    ds = data.Glyphs(res=32)
    for res, factor in ((256, 8), (64, 2)):
        for i in range(0, 36, 5):
            fine = ds.render(i, res).astype(float).reshape(32, factor, 32, factor, 3).mean((1, 3))
            difference = np.abs(fine - ds.render(i))
            assert difference.mean() < 1 and difference.max() < 20
    assert ds.render(3, 28).shape == (28, 28, 3)


def ink(pixels):
    """How far each pixel is from the corner's colour, 0..1."""
    distance = np.abs(pixels.astype(float) - pixels[0, 0]).sum(2)
    return distance / distance.max()


def test_glyphs_are_whole_and_stand_out():
    ds = data.Glyphs(res=32)
    weights = (0.299, 0.587, 0.114)
    for i in range(360):
        pixels = ds.render(i)
        mask = ink(pixels)
        assert mask[[0, -1]].max() == 0 and mask[:, [0, -1]].max() == 0, f"item {i} touches the border"
        inked = pixels[mask > 0.9].mean(0) @ weights
        assert pixels[0, 0] @ weights - inked > 90
        rows = np.flatnonzero((mask > 0.5).any(1))
        assert 0.4 < (rows[-1] - rows[0] + 1) / 32 < 0.93


def test_glyph_classes_differ():
    """Nearest class mean, after centring, names most unseen glyphs."""
    ds = data.Glyphs(res=32)

    def centred(i):
        mask = ink(ds.render(i))
        rows, columns = np.flatnonzero((mask > 0.5).any(1)), np.flatnonzero((mask > 0.5).any(0))
        cut = Image.fromarray((255 * mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]).astype(np.uint8))
        scale = 20 / max(cut.size)
        cut = cut.resize((max(1, round(cut.width * scale)), max(1, round(cut.height * scale))))
        out = np.zeros((20, 20))
        top, left = (20 - cut.height) // 2, (20 - cut.width) // 2
        out[top:top + cut.height, left:left + cut.width] = np.asarray(cut)
        return out.ravel()

    means = np.stack([np.mean([centred(c + 36 * j) for j in range(12)], 0) for c in range(36)])
    unseen = range(36 * 50, 36 * 54)
    guesses = [int(np.square(means - centred(i)).sum(1).argmin()) for i in unseen]
    assert np.mean([guess == i % 36 for guess, i in zip(guesses, unseen)]) > 0.85


def test_glyphs_without_freetype(monkeypatch):
    def missing(size=None):
        raise ImportError("The _imagingft C module is not installed")
    monkeypatch.setattr(data.ImageFont, "load_default", missing)
    refused("FreeType", call=data.Glyphs)


# --- solids

def test_solids_are_normalised_and_functions_of_the_index():
    ds = data.Solids(points=500)
    assert ds.domain == "points" and ds.points == 500
    for i in range(3 * len(ds.class_names)):
        surface = ds.surface(i).reshape(-1, 3)
        low, high = surface.min(0), surface.max(0)
        assert np.abs(low + high).max() < 1e-6 and (high - low).max() == pytest.approx(2, abs=1e-6)
        points, label = ds.item(i, None)
        assert points.shape == (500, 3) and points.dtype == np.float32 and label == i % len(ds.class_names)
        assert np.abs(points).max() <= 1 and (points >= low - 1e-6).all() and (points <= high + 1e-6).all()
        assert (points == ds.item(i, None)[0]).all()
        assert (points == data.Solids(points=900).item(i, None)[0][:500]).all()
        drawn = ds.item(i, np.random.default_rng(1))[0]
        assert (drawn != points).any() and (drawn == ds.item(i, np.random.default_rng(1))[0]).all()


def test_points_are_uniform_by_area():
    """A flat box: its two large faces hold their share of the area, evenly, within 4 standard errors."""
    size = np.array((2.0, 0.1, 1.0))
    points = data.on_surface(data.box((0, 0, 0), size), np.random.default_rng(0).random((40000, 3)))
    sides = [size[1] * size[2], size[0] * size[2], size[0] * size[1]]
    share = sides[1] / sum(sides)
    flat = np.abs(np.abs(points[:, 1]) - 0.05) < 1e-6
    assert abs(flat.mean() - share) < 4 * np.sqrt(share * (1 - share) / 40000)
    counts = np.histogram2d(points[flat, 0], points[flat, 2], bins=4, range=((-1, 1), (-0.5, 0.5)))[0]
    assert np.abs(counts / counts.mean() - 1).max() < 4 / np.sqrt(counts.mean())


def test_surfaces_have_the_area_of_the_formula():
    def area(triangles):
        a, b, c = np.moveaxis(triangles, 1, 0)
        return np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2
    assert area(data.box((1, 2, 3), (1, 2, 3))) == pytest.approx(22)
    assert area(data.lathe([(0, 0), (1, 0)], sides=400)) == pytest.approx(np.pi, rel=1e-3)               # disc
    assert area(data.lathe([(1, 0), (0, 1)], sides=400)) == pytest.approx(np.pi * 2 ** 0.5, rel=1e-3)    # cone
    assert area(data.torus((0, 0, 0), 1, 0.2, 0, 2 * np.pi)) == pytest.approx(0.8 * np.pi ** 2, rel=0.03)


def test_normalise_round_trip():
    points = np.random.default_rng(0).normal(size=(1000, 3)) * (3, 1, 2) + (5, -7, 1)
    unit, centre, scale = data.normalise(points)
    assert unit.dtype == np.float32 and np.abs(unit).max() == 1
    assert np.abs(unit * np.float64(scale) + centre - points).max() < 1e-6
    refused("not finite", call=lambda: data.normalise(np.ones((5, 3))))
    refused("not finite", call=lambda: data.normalise(np.array([[0, 0, 0], [1, np.nan, 1]])))


# --- folder

def picture(width=20, height=12, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def flat(path, colour, **options):
    """Writes a 6 x 6 picture of one colour in the mode that `options` says; returns its path."""
    mode = options.pop("mode")
    Image.new(mode, (6, 6), colour).save(path, **options)
    return path


def test_every_mode_reads_as_its_owner_sees_it(tmp_path):
    palette = Image.new("P", (6, 6), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.save(tmp_path / "p.png")
    palette.save(tmp_path / "p_clear.png", transparency=1)
    Image.fromarray(np.full((6, 6), 40000, np.uint16)).save(tmp_path / "i16.png")
    Image.fromarray(np.full((6, 6), 40000, np.uint16)).save(tmp_path / "i16.tif")
    Image.fromarray(np.full((6, 6), 65535, np.int32)).save(tmp_path / "i32.tif")
    Image.new("RGB", (6, 6), "red").save(tmp_path / "moving.gif", save_all=True,
                                         append_images=[Image.new("RGB", (6, 6), "blue")])
    expected = {
        flat(tmp_path / "l.png", 77, mode="L"): (77, 77, 77),
        flat(tmp_path / "one.png", 1, mode="1"): (255, 255, 255),
        flat(tmp_path / "la.png", (0, 0), mode="LA"): (255, 255, 255),
        flat(tmp_path / "la_half.png", (0, 51), mode="LA"): (204, 204, 204),
        flat(tmp_path / "rgba.png", (255, 0, 0, 51), mode="RGBA"): (255, 204, 204),
        flat(tmp_path / "rgba.webp", (255, 0, 0, 0), mode="RGBA", lossless=True): (255, 255, 255),
        flat(tmp_path / "rgb_clear.png", (9, 8, 7), mode="RGB", transparency=(9, 8, 7)): (255, 255, 255),
        flat(tmp_path / "cmyk.tif", (0, 255, 255, 0), mode="CMYK"): (255, 0, 0),
        flat(tmp_path / "cmyk.JPEG", (0, 255, 255, 0), mode="CMYK", format="JPEG"): (255, 0, 0),
        flat(tmp_path / "rgb.BMP", (1, 2, 3), mode="RGB", format="BMP"): (1, 2, 3),
        flat(tmp_path / "rgb.ppm", (1, 2, 3), mode="RGB"): (1, 2, 3),
        tmp_path / "p.png": (10, 200, 30), tmp_path / "p_clear.png": (255, 255, 255),
        tmp_path / "i16.png": (156, 156, 156), tmp_path / "i16.tif": (156, 156, 156), tmp_path / "i32.tif": (255,) * 3,
        tmp_path / "moving.gif": (255, 0, 0),
    }
    Image.new("RGB", (1, 1), (4, 5, 6)).save(tmp_path / "dot.png")
    expected[tmp_path / "dot.png"] = (4, 5, 6)
    ds = data.Folder(tmp_path, res=8)
    assert len(ds) == len(expected) and ds.class_names == [] and ds.domain == "image"
    for i in range(len(ds)):
        pixels, label = ds.item(i, None)
        assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8 and label == 0
        wanted = expected[pathlib.Path(ds.files[i])]
        assert np.abs(pixels.astype(int) - wanted).max() <= 2, (ds.files[i], pixels[0, 0], wanted)


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6        # stored lying on its left side: turn by 90 degrees clockwise to show
    picture().save(tmp_path / "a.png", exif=exif)
    shown = data.read_image(tmp_path / "a.png")
    assert shown.size == (12, 20)
    assert (np.asarray(shown) == np.rot90(np.asarray(picture()), -1)).all()


@pytest.mark.parametrize("width,height", [(100, 70), (33, 64), (32, 32), (5, 9), (517, 300)])
def test_resize_is_that_of_adm(width, height):
    """Against the definition written out: halve by 2 x 2 boxes while the short side is >= 2 res, bicubic, crop."""
    res, image = 32, picture(width, height)
    w, h, halved = width, height, image
    while min(w, h) >= 64:
        w, h = w // 2, h // 2
        halved = halved.resize((w, h), Image.BOX)
    w, h = (32, round(h * 32 / w)) if w <= h else (round(w * 32 / h), 32)
    whole = np.asarray(halved.resize((w, h), Image.BICUBIC))
    top, left = (h - 32) // 2, (w - 32) // 2
    assert (data.fit(image, res) == whole[top:top + 32, left:left + 32]).all()


def test_flip_comes_from_rng(tmp_path):
    picture().save(tmp_path / "a.png")
    still, flipping = data.Folder(tmp_path, 8), data.Folder(tmp_path, 8, flip=True)
    straight = still.item(0, None)[0]
    assert (flipping.item(0, None)[0] == straight).all()
    assert (still.item(0, np.random.default_rng(0))[0] == straight).all()
    seen = [flipping.item(0, np.random.default_rng(seed))[0] for seed in range(64)]
    mirror = [bool((pixels == straight[:, ::-1]).all()) for pixels in seen]
    assert 16 < sum(mirror) < 48
    assert all(m or (pixels == straight).all() for m, pixels in zip(mirror, seen))


def fill(root, *files):
    for number, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        picture(seed=number).save(root / file, format="PNG")


def test_folder_classes(tmp_path):
    fill(tmp_path / "three", "b/1.JPEG", "a/deep/er/2.png", "c/3.PNG", "c/.hidden.png", ".git/x.png")
    (tmp_path / "three" / "notes").mkdir()
    (tmp_path / "three" / "notes" / "readme.txt").write_text("a directory without pictures is no class")
    ds = data.Folder(tmp_path / "three", 8)
    assert ds.class_names == ["a", "b", "c"] and ds.labels == [0, 1, 2]
    fill(tmp_path / "flat", "1.png", "2.png")
    fill(tmp_path / "single", "all/1.png", "all/2.png")
    for name in ("flat", "single"):
        ds = data.Folder(str(tmp_path / name) + os.sep, 8)
        assert ds.class_names == [] and ds.labels == [0, 0]


def test_folder_reads_one_split(tmp_path):
    fill(tmp_path / "imagenet", "train/n02/1.JPEG", "train/n01/2.JPEG", "val/n01/3.JPEG", "val/n02/4.JPEG")
    ds = data.Folder(tmp_path / "imagenet", 8)
    assert ds.class_names == ["n01", "n02"] and len(ds) == 2
    assert len(data.Folder(tmp_path / "imagenet" / "val", 8)) == 2
    fill(tmp_path / "unlabelled", "train/1.png", "test/2.png")
    assert data.Folder(tmp_path / "unlabelled", 8).class_names == []
    fill(tmp_path / "vehicles", "train/1.png", "bus/2.png")       # here train is a class
    assert data.Folder(tmp_path / "vehicles", 8).class_names == ["bus", "train"]


def test_folder_follows_links_once(tmp_path):
    fill(tmp_path / "real", "1.png", "2.png")
    fill(tmp_path / "set", "a/1.png")
    try:
        (tmp_path / "set" / "b").symlink_to(tmp_path / "real", target_is_directory=True)
        (tmp_path / "set" / "a" / "loop").symlink_to(tmp_path / "set", target_is_directory=True)
        (tmp_path / "real" / "gone.png").symlink_to(tmp_path / "nowhere")
    except OSError:
        pytest.skip("this system does not let us make links")
    ds = data.Folder(tmp_path / "set", 8)
    assert ds.class_names == ["a", "b"] and ds.labels == [0, 1, 1]


def test_folder_refusals(tmp_path):
    refused(tmp_path / "none", "no such directory", call=lambda: data.Folder(tmp_path / "none", 8))
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "pictures", ".png", call=lambda: data.Folder(tmp_path / "empty", 8))
    fill(tmp_path / "mixed", "a/1.png", "b/2.png", "3.png")
    refused("3.png", "beside class folders", call=lambda: data.Folder(tmp_path / "mixed", 8))
    fill(tmp_path / "broken", "1.png")
    whole = (tmp_path / "broken" / "1.png").read_bytes()
    jpeg = tmp_path / "broken" / "2.jpg"
    picture(200, 200).save(jpeg)
    for path, content in ((tmp_path / "broken" / "1.png", whole[:len(whole) // 2]),
                          (jpeg, jpeg.read_bytes()[:-400]), (tmp_path / "broken" / "3.gif", b"not a picture")):
        path.write_bytes(content)
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "broken" / "4.tif")
    ds = data.Folder(tmp_path / "broken", 8)
    for i in range(4):
        refused(ds.files[i], "cannot be read", call=lambda: ds.item(i, None))
    refused("res 0", call=lambda: data.Folder(tmp_path / "mixed", 0))


# --- npz

def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_npz(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    ds = data.Npz(npz(tmp_path / "a.npz", images=noise, labels=np.array([7, -2, 7, 30, -2])))
    assert ds.class_names == ["-2", "7", "30"] and ds.res == 6 and len(ds) == 5
    assert [ds.item(i, None)[1] for i in range(5)] == [1, 0, 1, 2, 0]
    assert all((ds.item(i, None)[0] == noise[i]).all() for i in range(5))
    ds = data.Npz(npz(tmp_path / "b.npz", images=noise, labels=np.zeros(5, np.uint8), label_names=["x", "y"]), res=4)
    assert ds.class_names == ["x", "y"] and (ds.item(1)[0] == data.fit(Image.fromarray(noise[1]), 4)).all()
    for shape in ((5, 6, 6), (5, 6, 6, 1)):
        ds = data.Npz(npz(tmp_path / "grey.npz", images=noise[..., 0].reshape(shape)), flip=True)
        assert ds.class_names == [] and ds.item(2)[1] == 0
        assert (ds.item(2)[0] == noise[2, :, :, :1]).all() and ds.item(2)[0].shape == (6, 6, 3)
    wide = npz(tmp_path / "wide.npz", images=noise[:, :, :4])
    refused(wide, "6 x 4", "--res", call=lambda: data.Npz(wide))
    assert data.Npz(wide, res=4).item(0)[0].shape == (4, 4, 3)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb_went_off",)


def test_npz_refusals(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = np.zeros((3, 4, 4, 3), np.uint8)
    bad = {
        "`images`": [dict(pictures=good), dict(images=good.astype(np.float32)), dict(images=good[0, 0]),
                     dict(images=good[..., :2]), dict(images=good[:0]), dict(images=np.array([Bomb()], object))],
        "`labels`": [dict(images=good, labels=np.zeros(3)), dict(images=good, labels=np.zeros(2, int)),
                     dict(images=good, labels=np.arange(3), label_names=["a", "b"]),
                     dict(images=good, labels=np.array([Bomb()], object))],
        "`label_names`": [dict(images=good, labels=np.arange(3), label_names=np.arange(3)),
                          dict(images=good, labels=np.arange(3), label_names=np.array(["a", Bomb(), "c"], object))],
    }
    for key, cases in bad.items():
        for arrays in cases:
            path = npz(tmp_path / "bad.npz", **arrays)
            refused(path, key, "expected", call=lambda: data.Npz(path))
    np.save(tmp_path / "single.npy", good)
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez_compressed(tmp_path / "whole.npz", images=np.random.default_rng(0).integers(0, 255, (9, 9, 9), np.uint8))
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:300])
    (tmp_path / "flipped.npz").write_bytes(whole[:200] + bytes(255 - b for b in whole[200:260]) + whole[260:])
    for name in ("single.npy", "pickle.npz", "text.npz", "empty.npz", "cut.npz", "flipped.npz", "missing.npz", "."):
        refused(tmp_path / name, "expected", call=lambda: data.Npz(tmp_path / name))
    refused("a single .npy array", call=lambda: data.Npz(tmp_path / "single.npy"))
    assert not (tmp_path / "bomb_went_off").exists()


# --- shapenet

@pytest.fixture
def tree(tmp_path):
    """Three categories, two shapes in train, one in test; (path, the clouds by file name)."""
    rng, root = np.random.default_rng(0), tmp_path / "parent" / "ShapeNetCore.v2.PC15k"
    for synset in ("03001627", "02691156", "04379243"):
        for split, count in (("train", 2), ("test", 1)):
            (root / synset / split).mkdir(parents=True)
            for number in range(count):
                cloud = (rng.normal(size=(15000, 3)) * (3, 1, 1) + 4).astype(np.float32)
                np.save(root / synset / split / f"{number}.npy", cloud)
    return root


def test_shapenet(tree):
    ds = data.ShapeNet(tree.parent, points=64)
    assert len(ds) == 6 and ds.class_names == [] and ds.labels == [0] * 6 and ds.domain == "points"
    stored = np.load(ds.files[2])
    unit, centre, scale = data.normalise(stored)
    fixed, label = ds.item(2, None)
    assert fixed.shape == (64, 3) and fixed.dtype == np.float32 and label == 0
    assert (fixed == unit[10000:10064]).all() and (fixed == ds.item(2, None)[0]).all()
    assert np.abs(fixed * scale + centre - stored[10000:10064]).max() < 1e-5      # float32 at 4 + 3 * 4
    assert (data.ShapeNet(tree, points=6000).item(2, None)[0] == unit[:6000]).all()
    one, two = (ds.item(2, np.random.default_rng(seed))[0] for seed in (1, 2))
    assert (one != two).any() and (one == ds.item(2, np.random.default_rng(1))[0]).all()
    rows = {row.tobytes() for row in unit}
    assert all(row.tobytes() in rows for row in one) and len({row.tobytes() for row in one}) == 64
    whole = data.ShapeNet(tree, points=15000).item(2, np.random.default_rng(0))[0]
    assert (whole.max(0) - whole.min(0)).max() == pytest.approx(2, abs=1e-6)


def test_shapenet_categories(tree):
    assert len(data.CATEGORIES) == 55 == len(set(data.CATEGORIES.values()))
    for category in ("chair", "03001627"):
        ds = data.ShapeNet(tree, points=8, category=category)
        assert len(ds) == 2 and all("03001627" in file for file in ds.files)
    ds = data.ShapeNet(tree, points=8, split="test", labels=True)
    assert ds.class_names == ["airplane", "chair", "table"] and ds.labels == [0, 1, 2]
    refused("category car", "02958343", "airplane, chair, table", call=lambda: data.ShapeNet(tree, category="car"))
    refused("split val", "no cloud", call=lambda: data.ShapeNet(tree, split="val"))
    refused("split 'dev'", call=lambda: data.ShapeNet(tree, split="dev"))
    refused("nowhere", "ShapeNetCore.v2.PC15k", call=lambda: data.ShapeNet(tree / "nowhere"))
    refused("no cloud", call=lambda: data.ShapeNet(tree / "03001627"))


def test_shapenet_refusals(tree):
    ds = data.ShapeNet(tree, points=64)
    path = pathlib.Path(ds.files[0])
    good = np.load(path)
    for bad, word in ((good.astype(int), "int64"), (good[:, :2], "(15000, 2)"), (good[0], "(3,)"),
                      (good[:63], "63 points"), (good * np.nan, "not finite"), (good * 0, "all the same"),
                      (np.array([Bomb()], object), "cannot be read")):
        np.save(path, bad)
        refused(path, word, "expected", call=lambda: ds.item(0, None))
    for content in (b"", b"\x93NUMPY", path.read_bytes()[:60], pickle.dumps([1])):
        path.write_bytes(content)
        refused(path, "cannot be read", call=lambda: ds.item(0, None))


# --- order of a run

class Numbers:
    """Item i is a picture that says i, and what its generator drew."""
    domain, class_names, res = "image", [], 2

    def __init__(self, n, bad=None):
        self.n, self.bad = n, bad

    def __len__(self):
        return self.n

    def item(self, i, rng):
        if i == self.bad:
            raise data.InputError(f"/some/where/{i}.png: cannot be read")
        pixels = np.zeros((2, 2, 3), np.uint8)
        pixels[0, 0, 0], pixels[1, 1, 1] = i, rng.integers(256)
        return pixels, i


def stream(count, **options):
    """The first `count` micro-batches as lists of (label, bytes)."""
    batches = data.loader(options.pop("dataset", Numbers(24)), **{"seed": 3, "step": 0, **options})
    out = []
    for _ in range(count):
        values, labels = next(batches)
        assert labels.dtype == torch.int64 and len(values) == len(labels) == options["micro"]
        out.append([(int(label), value.numpy().tobytes()) for value, label in zip(values, labels)])
    batches.close()
    return out


def joined(batches):
    return [item for batch in batches for item in batch]


def test_item_index_is_a_permutation_each_epoch():
    first, second = ([data.item_index(10, 1, k) for k in range(e * 10, e * 10 + 10)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert first != [data.item_index(10, 2, k) for k in range(10)]


def test_two_ranks_with_two_workers_read_every_item_once_an_epoch():
    ranks = [joined(stream(3, batch_size=8, micro=4, rank=r, world=2, workers=2)) for r in (0, 1)]
    assert sorted(label for rank in ranks for label, _ in rank) == list(range(24))


def test_stream_does_not_depend_on_workers_ranks_or_micro_batches():
    whole = joined(stream(6, batch_size=8, micro=8))
    assert joined(stream(6, batch_size=8, micro=8, workers=2)) == whole
    assert joined(stream(24, batch_size=8, micro=2)) == whole
    ranks = [stream(12, batch_size=8, micro=2, rank=r, world=2, workers=r) for r in (0, 1)]
    assert joined(batch for s in range(0, 12, 2) for rank in ranks for batch in rank[s:s + 2]) == whole


def test_stream_resumes_at_any_step():
    whole = stream(10, batch_size=8, micro=4)
    for step in (1, 4):
        assert stream(2, batch_size=8, micro=4, step=step, workers=step // 4) == whole[2 * step:2 * step + 2]


def test_loader_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    stream(2, batch_size=4, micro=4)
    assert (torch.get_rng_state() == before).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_error_is_one_line(workers):
    with pytest.raises(data.InputError) as caught:
        stream(6, dataset=Numbers(24, bad=5), batch_size=8, micro=4, workers=workers)
    assert str(caught.value) == "/some/where/5.png: cannot be read"


@pytest.mark.skipif(os.name == "nt", reason="process groups and SIGINT are of POSIX")
def test_interrupt_is_heard_by_the_main_process_only(tmp_path):
    code = """
import data
if __name__ == "__main__":
    try:
        for n, _ in enumerate(data.loader(data.Glyphs(), 0, 0, 8, 8, workers=2)):
            if n == 20:     # by now both workers are at work
                print("ready", flush=True)
    except KeyboardInterrupt:
        print("stopped")
"""
    (tmp_path / "run.py").write_text(code)
    process = subprocess.Popen([sys.executable, "run.py"], cwd=tmp_path, stdout=-1, stderr=-1, text=True,
                               start_new_session=True,
                               env={**os.environ, "PYTHONPATH": os.path.dirname(data.__file__)})
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    # torch may still warn about few cores, or lose a tensor on its way when the receiver stops: neither is the signal
    assert out == "stopped\n" and "KeyboardInterrupt" not in err, err


def test_loader_refusals():
    for options in (dict(batch_size=8, micro=3), dict(batch_size=8, micro=8, world=2), dict(batch_size=0, micro=1),
                    dict(batch_size=8, micro=0)):
        refused("expected", call=lambda: data.loader(Numbers(8), 0, 0, **options))
    refused("seed -1", call=lambda: data.loader(Numbers(8), -1, 0, 8, 8))


def test_values_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(2, 16, 16, 3)
    values = data.decode_values(pixels, "cpu")
    assert values.shape == (2, 256, 3) and values.dtype == torch.float32
    assert values.min() == -1 and values.max() == 1
    assert (data.encode_image(values[0], 16, 16) == pixels[0].numpy()).all()
    assert data.encode_image(torch.tensor([[-9.0, 0.0, 9.0], [1, 1, 1]]), 1, 2).tolist() == [[[0, 128, 255], [255] * 3]]
    points = torch.rand(2, 5, 3)
    assert (data.decode_values(points, "cpu") == points).all()


# --- by name, and alone

def test_load(tmp_path, tree):
    assert data.load("glyphs", res=16).res == 16 and data.load("glyphs").res == 32
    assert data.load("solids", points=9, res=5, split="test").points == 9
    fill(tmp_path / "pictures", "1.png")
    assert data.load("folder", tmp_path / "pictures", res=8, flip=True).flip
    assert len(data.load("shapenet", tree, points=8, category="chair", split="test")) == 1
    refused(*data.DATASETS, call=lambda: data.load("cifar"))
    for name in ("folder", "npz", "shapenet"):
        refused("--data is missing", data.DATASETS[name].needs, call=lambda: data.load(name, res=8))
    refused("--res", call=lambda: data.load("folder", tmp_path))


def test_file_works_alone_and_does_nothing_when_imported(tmp_path):
    shutil.copy(data.__file__, tmp_path / "data.py")
    code = "import data, pickle; d = pickle.loads(pickle.dumps(data.load('glyphs'))); assert d.item(0, None)[1] == 0"
    for line in ("import data", code):
        done = subprocess.run([sys.executable, "-c", line], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""})
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
