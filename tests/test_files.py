"""data.py's readers: every kind of image as its owner sees it; broken and hostile files, named in a line."""
import io
import os
import pickle
import struct
import sys
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

import data
from conftest import Bomb, refused
from test_data import RNG, encoded, fill, noise, npz

pytestmark = pytest.mark.usefixtures("nothing_goes_off")

# --- images in files

def png(colour_type, bits, row, clear=(), extra=b""):
    """An 8 x 8 PNG written by hand: every row is `row`, tRNS is `clear`, its profile `extra`."""
    def chunk(kind, content):
        if not content:
            return b""
        size, check = (struct.pack(">I", number) for number in (len(content), zlib.crc32(kind + content)))
        return size + kind + content + check
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, bits, colour_type, 0, 0, 0))
    profile = chunk(b"iCCP", extra and b"x\0\0" + zlib.compress(extra))
    clear, pixels = chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear)), zlib.compress(8 * (b"\0" + row))
    end = b"\0\0\0\0IEND\xaeB`\x82"
    return b"\x89PNG\r\n\x1a\n" + head + profile + clear + chunk(b"IDAT", pixels) + end

def flat(mode, colour, kind="PNG", **options):
    return encoded(Image.new(mode, (8, 8), colour), kind, **options)

PALETTE = Image.new("P", (8, 8), 1)
PALETTE.putpalette([0, 0, 0, 10, 200, 30])
MOVING = dict(save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")])
WHITE, GREY16 = (255, 255, 255), Image.fromarray(np.full((8, 8), 40000, np.uint16))
SEEN = {                               # file -> its bytes, the colour that its owner sees
    "l.png": (flat("L", 77), (77, 77, 77)), "1.png": (flat("1", 1), WHITE),
    "x.BMP": (flat("RGB", (1, 2, 3), "BMP"), (1, 2, 3)), "x.ppm": (flat("RGB", (1, 2, 3), "PPM"), (1, 2, 3)),
    "la.png": (flat("LA", (0, 0)), WHITE), "half.png": (flat("LA", (0, 51)), (204, 204, 204)),
    "rgba.png": (flat("RGBA", (255, 0, 0, 51)), (255, 204, 204)),
    "p.png": (encoded(PALETTE, "PNG"), (10, 200, 30)), "jpeg.png": (flat("L", 9, "JPEG"), (9, 9, 9)),
    "rgba.webp": (flat("RGBA", (255, 0, 0, 0), "WEBP", lossless=True), WHITE),
    "p-clear.png": (encoded(PALETTE, "PNG", transparency=1), WHITE),
    "rgb-clear.png": (flat("RGB", (9, 8, 7), transparency=(9, 8, 7)), WHITE),
    "cmyk.tif": (flat("CMYK", (0, 255, 255, 0), "TIFF"), (255, 0, 0)),
    "cmyk.JPEG": (flat("CMYK", (0, 255, 255, 0), "JPEG"), (255, 0, 0)),
    "16.png": (encoded(GREY16, "PNG"), (156, 156, 156)), "16.tif": (encoded(GREY16, "TIFF"), (156, 156, 156)),
    "32.tif": (encoded(Image.fromarray(np.full((8, 8), 65535, np.int32)), "TIFF"), WHITE),
    "moving.gif": (flat("RGB", "red", "GIF", **MOVING), (255, 0, 0)),
    "moving.png": (flat("RGB", "red", "PNG", **MOVING), (255, 0, 0)),
    "16-clear.png": (png(0, 16, b"\x4e\x20" * 8, [20000]), WHITE),
    "16-kept.png": (png(0, 16, b"\x9c\x40" * 8, [20000]), (156, 156, 156)),
    "rgb16-clear.png": (png(2, 16, b"\x01\x02" * 24, [258, 258, 258]), WHITE),
    "4-clear.png": (png(0, 4, b"\x33" * 4, [3]), WHITE), "2-clear.png": (png(0, 2, b"\x55" * 2, [1]), WHITE),
    "4-kept.png": (png(0, 4, b"\x33" * 4, [5]), (51, 51, 51)), "1-clear.png": (png(0, 1, b"\0", [0]), WHITE),
    "profile.png": (png(2, 8, b"\xc8\x64\x32" * 8, extra=os.urandom(3 * 2 ** 20)), (200, 100, 50)),
}

def test_every_kind_of_image_is_read_as_its_owner_sees_it(tmp_path):
    for name, (content, _) in SEEN.items():
        (tmp_path / name).write_bytes(content)
    ds = data.Folder(tmp_path, res=8)
    assert len(ds) == len(SEEN) and ds.class_names == []
    for i, file in enumerate(ds.files):
        pixels, colour = ds.item(i)[0], SEEN[os.path.basename(file)][1]
        assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
        assert np.abs(pixels.astype(int) - colour).max() <= 2, (file, pixels[0, 0], colour)
    exif, image = Image.Exif(), noise()
    exif[0x0112] = 6                   # stored lying on its left side: turn by 90 degrees clockwise to show
    image.save(tmp_path / "turned.png", exif=exif)
    assert (np.asarray(data.read_image(tmp_path / "turned.png")) == np.rot90(np.asarray(image), -1)).all()

@pytest.mark.parametrize("width,height", [(100, 70), (33, 64), (5, 9), (64, 64), (517, 300)])
def test_resize_is_that_of_adm(width, height):
    """Against the definition written out: halve by boxes while the short side is >= 2 res, bicubic, crop."""
    image = halved = noise(width, height)
    w, h = width, height
    while min(w, h) >= 64:
        w, h = w // 2, h // 2
        halved = halved.resize((w, h), Image.BOX)
    w, h = (32, round(h * 32 / w)) if w <= h else (round(w * 32 / h), 32)
    whole, top, left = np.asarray(halved.resize((w, h), Image.BICUBIC)), (h - 32) // 2, (w - 32) // 2
    assert (data.fit(image, 32) == whole[top:top + 32, left:left + 32]).all()

# --- broken files: each lies among good ones

def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()

def npy_of(shape):
    """A .npy that says it has a shape, and 100 bytes."""
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(100)

JPEG, PNG, CLOUD = encoded(noise(), "JPEG"), encoded(noise(), "PNG"), RNG.normal(size=(100, 3))
BROKEN = {
    "truncated.jpg": JPEG[:len(JPEG) // 2], "truncated.png": PNG[:len(PNG) // 2], "header.png": PNG[:33],
    "empty.png": b"", "page.jpg": b"<!DOCTYPE html>", "damaged.png": PNG[:200] + bytes(40) + PNG[240:],
    "pickle.png": pickle.dumps(Bomb()), "new\nline.png": b"x", "postscript.png": encoded(noise(), "EPS"),
    "float.tif": encoded(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF"),
    "text.png": png(2, 8, bytes(24), extra=bytes(2 * 10 ** 8)),          # a few bytes that unpack to 200 MB
    "nan.npy": npy(CLOUD * np.nan), "inf.npy": npy(np.where(CLOUD > 2, np.inf, CLOUD)), "empty.npy": b"",
    "two.npy": npy(CLOUD[:, :2]), "across.npy": npy(CLOUD.T), "batch.npy": npy(CLOUD[None]),
    "ints.npy": npy(CLOUD.astype(int)), "few.npy": npy(CLOUD[:63]), "equal.npy": npy(CLOUD * 0 + 1),
    "objects.npy": npy(np.array([[Bomb()] * 3] * 100)), "pickle.npy": pickle.dumps(Bomb()),
    "cut.npy": npy(CLOUD)[:500], "memory.npy": npy_of((10 ** 15, 3)), "beyond.npy": npy_of((10 ** 30, 3)),
    "negative.npy": npy_of((-5, 3)), "mkdir.npy": npy_of("__import__('os').mkdir('went_off')"),
}

@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_and_can_be_skipped(tmp_path, name):
    """If a broken file ended in anything but one line with its name, ran, or could not be skipped."""
    folder = fill(tmp_path / "s", "03/train/x") / "03" / "train"
    cloud, shown = name.endswith(".npy"), " ".join(name.split())
    for i in range(3):
        content = npy(CLOUD + i * CLOUD ** 2) if cloud else encoded(noise(), "PNG")
        (folder / f"{i}{name[-4:]}").write_bytes(content)
    (folder / name).write_bytes(BROKEN[name])
    ds = data.load("shapenet", tmp_path / "s", points=64) if cloud else data.Folder(folder, 8)
    k, bad = [os.path.basename(file) for file in ds.files].index(name), {}
    found = "cannot identify" if name == "postscript.png" else ""       # no program is asked to read it
    refused(shown, "expected", found, call=lambda: ds.item(k))
    refused(shown, "expected", call=lambda: next(data.loader(ds, 0, 0, 4, 4)))
    values, _ = next(data.loader(ds, 0, 0, 4, 4, skip_bad=bad))
    assert [*bad] == [k] and shown in bad[k] and np.isfinite(values.numpy()).all() and len(values) == 4

def test_broken_arrays_and_archives(tmp_path):
    good, bomb, path = np.zeros((3, 4, 4, 3), np.uint8), np.array([Bomb()], object), tmp_path / "bad.npz"
    three = dict(images=good, labels=[0, 1, 2])
    for arrays in (dict(other=good), dict(images=good / 2), dict(images=good[0, 0]), dict(images=good[:0]),
                   dict(images=good[..., :2]), dict(images=bomb), dict(three, labels=[0, 1]),
                   dict(three, labels=bomb), dict(three, label_names=["a", "b"])):
        refused(path, "expected", call=lambda: data.Arrays(npz(path, **arrays)))
    whole, pickled = npz(path, images=good).read_bytes(), pickle.dumps(Bomb())
    for content in (npy(good), pickled, b"hello", b"", whole[:150], whole[:40] + bytes(99) + whole[139:]):
        path.write_bytes(content)
        refused(path, "expected", call=lambda: data.Arrays(path))
    for name in ("a.zip", "a.mdb", "a.h5", "a.pt"):
        (tmp_path / name).write_bytes(b"PK nothing")
        kind = data.Folder if name in ("a.zip", "a.mdb") else data.ShapeNet
        refused(name, "expected", call=lambda: kind(tmp_path / name))
    for method in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        path = tmp_path / f"{method}.zip"
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("a/1.png", PNG)
        raw = path.read_bytes()
        path.write_bytes(raw[:60] + bytes(255 - b for b in raw[60:80]) + raw[80:])
        refused("zip/a/1.png", "cannot be read", call=lambda: data.Folder(path, 8).item(0))
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "cut"), map_size=2 ** 24) as base, base.begin(write=True) as txn:
        txn.put(b"x", bytes(50_000))
    (tmp_path / "cut" / "data.mdb").write_bytes((tmp_path / "cut" / "data.mdb").read_bytes()[:-4096])
    refused("cut", "bytes", call=lambda: data.Folder(tmp_path / "cut", 8))      # mapped, it ends the process

@pytest.mark.parametrize("package,name", [("lmdb", "data.mdb"), ("h5py", "a.hdf5"), ("trimesh", "a.ply")])
def test_missing_packages_are_named(tmp_path, monkeypatch, package, name):
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    read = dict(lmdb=data.Folder, h5py=data.ShapeNet, trimesh=data.read_cloud)[package]
    refused(f"{tmp_path / name}: needs {package}: pip install {package}", call=lambda: read(tmp_path / name))
