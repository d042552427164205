"""python data.py: miniature trees of every layout, packed sets, meshes, views and tokens, and clouds drawn from pictures."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import sample
import train
from conftest import ROOT
from test_data import refused


def draw(path, i, size=(40, 30), kind=None):
    """A picture file whose colours tell item i from all others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(i).integers(0, 256, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.BICUBIC).save(path, format=kind, **dict(quality=95) if kind == "JPEG" else {})


def command(*words):
    """data.py in a process of its own: (exit status, standard output, standard error without its bars)."""
    done = subprocess.run([sys.executable, str(ROOT / "data.py"), *map(str, words)], capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr.split("\r")[-1]


def run(*words):
    """data.py in this process, without workers."""
    return data.main([*map(str, words), *(["--workers", "0"] if words[0] != "stats" else [])])


def items(ds, seed=None):
    rngs = [None if seed is None else np.random.default_rng((seed, i)) for i in range(len(ds))]
    return [(label, pixels.tobytes()) for pixels, label in (ds.item(i, rng) for i, rng in enumerate(rngs))]


# --- picture sets

@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """ImageNet in small: synsets whose folders were not made in order, .JPEG in capitals, a CMYK file and a PNG by name JPEG."""
    root = tmp_path_factory.mktemp("imagenet")
    for i, synset in enumerate(("n02105855", "n01440764", "n01739381", "n15075141")):
        for k in range(5):
            draw(root / "train" / synset / f"{synset}_{k}.JPEG", 10 * i + k, kind="JPEG")
    draw(root / "train" / "n02105855" / "n02105855_2933.JPEG", 90, kind="PNG")
    Image.new("CMYK", (50, 36), (0, 255, 255, 0)).save(root / "train" / "n01739381" / "n01739381_1309.JPEG", format="JPEG", quality=95)
    draw(root / "val" / "n01440764" / "ILSVRC2012_val_00000001.JPEG", 99, kind="JPEG")
    return root


def test_imagenet_has_the_label_numbers_of_adm(imagenet):
    """If classes came in the order of the directory, or depended on the level at which the tree is given."""
    ds = data.load("folder", imagenet, res=16)
    assert ds.class_names == ["n01440764", "n01739381", "n02105855", "n15075141"] and len(ds) == 22        # sorted; val is not read
    for file, label in zip(ds.files, ds.labels):
        assert ds.class_names[label] == file.split(os.sep)[-2]
    assert items(data.load("folder", imagenet / "train", res=16)) == items(ds)
    by_name = {os.path.basename(file): ds.item(i)[0] for i, file in enumerate(ds.files)}
    assert abs(by_name["n01739381_1309.JPEG"].astype(int) - (255, 0, 0)).max() < 12                        # ink of magenta and yellow
    assert by_name["n02105855_2933.JPEG"].std() > 20


def test_ffhq_and_church_have_no_classes(tmp_path):
    """If the 70 folders of FFHQ, or the nested ones of an exported LSUN, became classes."""
    for i in range(6):
        draw(tmp_path / "ffhq" / f"{i // 2 * 1000:05d}" / f"{i:05d}.png", i)
        draw(tmp_path / "church" / "ab" / "cd"[i % 2] / f"{i:05d}.webp", i)
    assert len(data.load("folder", tmp_path / "ffhq", res=16).class_names) == 3
    for name in ("ffhq256", "church256"):
        args, given, *_ = train.settings(["--dataset", name, "--data", str(tmp_path / name[:-3]), "--device", "cpu"])
        ds, cfg = train.build(args, given)
        assert ds.class_names == [] and cfg.n_classes == 0 and len(ds) == 6 and {label for label, _ in items(ds)} == {0}
    run("pack", tmp_path / "ffhq", tmp_path / "packed", "--res", 16, "--no-labels")
    assert data.load("folder", tmp_path / "packed").class_names == []


def test_zip_is_read_as_the_folder_it_holds(imagenet, tmp_path):
    """If an archive had another order, other classes, or broke when two processes read it."""
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in reversed(sorted(imagenet.rglob("*.JPEG"))):
            archive.write(file, file.relative_to(imagenet))
        archive.writestr("__MACOSX/train/n01440764/._n01440764_0.JPEG", b"no picture")
        archive.writestr("train/readme.txt", b"no picture")
    ds, folder = data.load("folder", tmp_path / "set.zip", res=16), data.load("folder", imagenet, res=16)
    assert items(ds) == items(folder) and ds.class_names == folder.class_names and ds.labels == folder.labels
    streams = [[x.numpy().tobytes() for _, (x, _) in zip(range(6), data.loader(d, 0, 0, 4, 4, workers=w))] for d, w in ((ds, 2), (folder, 0))]
    assert streams[0] == streams[1]
    (tmp_path / "bad.zip").write_bytes(b"PK nothing")
    refused(tmp_path / "bad.zip", ".zip", call=lambda: data.load("folder", tmp_path / "bad.zip", res=16))
    with zipfile.ZipFile(tmp_path / "torn.zip", "w") as archive:
        archive.writestr("a.png", b"no picture")
    refused("a.png", call=lambda: data.load("folder", tmp_path / "torn.zip", res=16).item(0))


def test_lsun_lmdb(tmp_path, monkeypatch):
    """If LSUN's database gave other pictures than its files, or failed in forked processes."""
    lmdb = pytest.importorskip("lmdb")
    for i in range(8):
        draw(tmp_path / "files" / f"{i:08x}.webp", i)
    with lmdb.open(str(tmp_path / "church_outdoor_train_lmdb"), map_size=2 ** 24) as base, base.begin(write=True) as txn:
        for file in (tmp_path / "files").iterdir():
            txn.put(file.stem.encode(), file.read_bytes())
    ds, folder = (data.load("folder", tmp_path / name, res=16, labels=False) for name in ("church_outdoor_train_lmdb", "files"))
    assert items(ds) == items(folder) and len(ds) == 8
    streams = [[x.numpy().tobytes() for _, (x, _) in zip(range(4), data.loader(d, 0, 0, 4, 4, workers=w))] for d, w in ((ds, 2), (folder, 0))]
    assert streams[0] == streams[1]


@pytest.mark.parametrize("package,make", [("lmdb", lambda d: (d / "data.mdb").write_bytes(b"")), ("h5py", lambda d: (d / "shapenet.hdf5").write_bytes(b"")),
                                          ("trimesh", lambda d: (d / "a.glb").write_bytes(b""))])
def test_missing_packages_are_named(tmp_path, monkeypatch, package, make):
    """If a format that needs a package ended in a traceback where it is not installed."""
    make(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    read = dict(lmdb=lambda: data.load("folder", tmp_path, res=8), h5py=lambda: data.load("shapenet", tmp_path / "shapenet.hdf5"),
                trimesh=lambda: data.read_mesh(str(tmp_path / "a.glb")))[package]
    refused(tmp_path, f"pip install {package}", call=read)


# --- packed sets

def test_packed_is_the_folder_pixel_for_pixel(imagenet, tmp_path, monkeypatch):
    """If packing changed a pixel, a label, the order or the mirroring, or the loader read an item twice or never."""
    monkeypatch.setattr(data, "SHARD", 5 * 3 * 16 ** 2)
    run("pack", imagenet, tmp_path / "set", "--res", 16)
    assert len(list((tmp_path / "set").glob("pictures-*.npy"))) == 5                                       # 22 pictures, 5 a file
    folder, packed = (data.load("folder", path, res=16, flip=True) for path in (imagenet, tmp_path / "set"))
    assert isinstance(packed, data.Packed) and packed.class_names == folder.class_names
    assert items(packed) == items(folder) and items(packed, seed=3) == items(folder, seed=3) != items(folder)
    assert packed.files == folder.names and data.load("folder", tmp_path / "set", labels=False).class_names == []
    plain = np.concatenate([np.load(file) for file in sorted((tmp_path / "set").glob("pictures-*.npy"))])  # readable without us
    assert (plain[7] == folder.item(7)[0]).all() and len(np.load(tmp_path / "set" / "labels.npy")) == 22
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert (manifest["count"], manifest["res"], manifest["class_names"]) == (22, 16, folder.class_names)
    assert "ADM" in manifest["crop"] and len(manifest["source_sha256"]) == 64


EPOCH = """
import sys, torch, data, sample
packed = data.load("folder", sys.argv[1], res=16)
sample.start_processes("cpu")
for step, (values, labels) in zip(range(11), data.loader(packed, 5, 0, 2, 1, sample.RANK, sample.WORLD, workers=2)):
    open(f"{sys.argv[2]}/seen-{sample.RANK}", "a").write(f"{int(labels)} {values.numpy().tobytes().hex()}\\n")
sample.wait_for_all()
torch.distributed.destroy_process_group()
"""


def test_two_processes_of_two_workers_see_every_item_once(imagenet, tmp_path):
    """If a process or a worker read an item twice, or never, within an epoch."""
    run("pack", imagenet, tmp_path / "set", "--res", 16)
    (tmp_path / "epoch.py").write_text(EPOCH)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
                           str(tmp_path / "epoch.py"), str(tmp_path / "set"), str(tmp_path)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    seen = [(int(k), bytes.fromhex(pixels)) for r in (0, 1) for k, pixels in (line.split() for line in open(tmp_path / f"seen-{r}"))]
    assert len(seen) == 22 and sorted(seen) == sorted(items(data.load("folder", imagenet, res=16)))


KILLED = """
import sys, time, data
data.SHARD = 4 * 3 * 32 ** 2
write = data.write_json
data.write_json = lambda *args: (write(*args), time.sleep(float(sys.argv[1])))      # time to be killed in, after every file
data.main(["pack", *sys.argv[2:], "--res", "32"])
"""


def test_pack_killed_half_way_and_run_again_gives_the_same_bytes(tmp_path):
    """If an interrupted pack lost, doubled or reordered pictures, or its bytes depended on the number of processes."""
    for i in range(40):
        draw(tmp_path / "in" / "ab"[i % 2] / f"{i}.png", i)
    def pack(pause, name, workers):
        return [sys.executable, "-c", KILLED, pause, str(tmp_path / "in"), str(tmp_path / name), "--workers", workers]
    subprocess.run(pack("0", "straight", "0"), cwd=ROOT, check=True, capture_output=True)
    broken = subprocess.Popen(pack("0.3", "killed", "2"), cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 60
    while len(list((tmp_path / "killed").glob("pictures-*.npy"))) < 3 and time.time() < deadline:
        time.sleep(0.005)
    broken.send_signal(signal.SIGKILL)
    broken.wait()
    with pytest.raises(ProcessLookupError):                                # no worker is left
        while time.time() < deadline + 20:
            os.killpg(broken.pid, 0)
            time.sleep(0.05)
    begun = json.loads((tmp_path / "killed" / "manifest.json").read_text())
    assert not begun["complete"] and 2 <= len(begun["shards"]) < 10
    refused("in part", "again", call=lambda: data.load("folder", tmp_path / "killed", res=32))
    again = subprocess.run(pack("0", "killed", "2"), cwd=ROOT, check=True, capture_output=True, text=True)
    assert f"{4 * len(begun['shards'])} of 40 pictures" in again.stdout
    names = sorted(os.listdir(tmp_path / "straight"))
    assert sorted(os.listdir(tmp_path / "killed")) == names and len(names) == 13
    assert all((tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes() for name in names)


def test_pack_refusals(imagenet, tmp_path):
    """If a wrong input ended otherwise than in one line, or left a file half written."""
    run("pack", imagenet, tmp_path / "set", "--res", 16)
    refused("--res 16", call=lambda: data.load("folder", tmp_path / "set", res=32))
    refused("another res", call=lambda: run("pack", imagenet, tmp_path / "set", "--res", 32))
    refused("another count", call=lambda: run("pack", imagenet / "val", tmp_path / "set", "--res", 16))
    refused("packed already", call=lambda: run("pack", tmp_path / "set", tmp_path / "other", "--res", 16))
    refused("not empty", call=lambda: run("pack", imagenet, tmp_path, "--res", 16))
    (tmp_path / "bad").mkdir()
    draw(tmp_path / "bad" / "a.png", 1)
    (tmp_path / "bad" / "b.png").write_bytes(b"no picture")
    code, out, error = command("pack", tmp_path / "bad", tmp_path / "new", "--res", 8, "--workers", 1)
    assert code == 2 and "b.png" in error and not list((tmp_path / "new").glob("*.tmp")) and not list((tmp_path / "new").glob("p*"))
    manifest = tmp_path / "set" / "manifest.json"
    good = manifest.read_text()
    for broken in ("{", "[]", good.replace('"count": 22', '"count": "22"'), good.replace("pictures-00000.npy", "../x.npy"),
                   good.replace("pictures 1", "pictures 9"), good.replace('"count": 22', '"count": 21', 1)):
        manifest.write_text(broken)
        refused(tmp_path / "set", call=lambda: data.load("folder", tmp_path / "set", res=16))
    manifest.write_text(good)
    shard = tmp_path / "set" / "pictures-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(shard, call=lambda: data.load("folder", tmp_path / "set", res=16))


def test_packed_sets_train_and_are_evaluated(imagenet, tmp_path, capsys):
    """If a packed set were not accepted where a folder is."""
    run("pack", imagenet, tmp_path / "set", "--res", 16)
    flags = ["--dataset", "folder", "--res", "16", "--model", "tiny", "--width", "16", "--depth", "1", "--latents", "16", "--decode", "8",
             "--batch-size", "4", "--steps", "2", "--device", "cpu", "--dtype", "float32", "--log-every", "1", "--workers", "0"]
    for name, path in (("folder", imagenet), ("packed", tmp_path / "set")):
        train.main([*flags, "--data", str(path), "--out", str(tmp_path / name)])
    one, two = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("folder", "packed"))
    assert one["config"]["class_names"] == two["config"]["class_names"]
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
    args = evaluate.parser().parse_args(["--res", "16"])
    sets = [evaluate.open_set(str(path), args, "--real") for path in (imagenet / "train", tmp_path / "set")]
    assert [s.count for s in sets] == [22, 22] and {s.file_type for s in sets} == {"jpeg"}
    assert all((sets[0].item(i) == sets[1].item(i)).all() for i in range(22))


# --- check and stats

def test_check_lists_what_is_wrong(tmp_path):
    """If an unreadable, doubled or small file went unnoticed, or a clean set were called wrong."""
    for i in range(30):
        draw(tmp_path / "set" / f"class {i % 2}" / f"{i}.png", i)
    assert command("check", tmp_path / "set", "--workers", 1)[:2] == (0, f"class 0: 15\nclass 1: 15\n{tmp_path / 'set'}: 30 items; nothing wrong\n")
    (tmp_path / "set" / "class 0" / "torn.png").write_bytes((tmp_path / "set" / "class 0" / "2.png").read_bytes()[:60])
    (tmp_path / "set" / "class 1" / "twin.png").write_bytes((tmp_path / "set" / "class 0" / "2.png").read_bytes())
    draw(tmp_path / "set" / "class 1" / "small.png", 77, size=(10, 10))
    (tmp_path / "set" / "notes.txt").write_text("not a picture")
    code, out, _ = command("check", tmp_path / "set", "--workers", 1)
    lines = out.splitlines()
    assert code == 1 and len(lines) == 6 and "class 1: 17" in lines
    assert any(line.startswith("unreadable: ") and "torn.png" in line for line in lines)
    assert any(line.startswith("duplicate: ") and "twin.png" in line and "2.png" in line for line in lines)
    assert any(line.startswith("wrong size: ") and "small.png: 10 x 10" in line for line in lines)
    assert command("check", tmp_path / "set", "--least", 40, "--workers", 1)[1].count("wrong size: ") == 32        # 31 of 40 x 30
    assert command("check", tmp_path / "nothing")[0] == 2
    for i in range(2):
        os.makedirs(tmp_path / "odd" / f"a b\n{i}")
        shutil.copy(tmp_path / "set" / "class 0" / "2.png", os.fsencode(tmp_path / "odd" / f"a b\n{i}") + b"/\xfe.png")
    code, out, _ = command("check", tmp_path / "odd", "--workers", 0)                                      # names that are not text
    assert code == 1 and "duplicate: " in out and "\\udcfe.png" in out
    assert command("pack", tmp_path / "odd", tmp_path / "packed", "--res", 8, "--workers", 0)[0] == 0
    assert data.load("folder", tmp_path / "packed").files == data.load("folder", tmp_path / "odd", res=8).names


def test_check_of_packed_sets_and_clouds(imagenet, tmp_path, capsys):
    """If a damaged packed file, or a bad cloud, were not found."""
    run("pack", imagenet, tmp_path / "set", "--res", 16)
    assert not run("check", tmp_path / "set")
    shard = tmp_path / "set" / "pictures-00000.npy"
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 1
    shard.write_bytes(raw)
    assert run("check", tmp_path / "set") == 1 and "damaged: pictures-00000.npy" in capsys.readouterr().out
    rng = np.random.default_rng(0)
    for split, n in (("train", 3), ("val", 2)):
        for i in range(n):
            path = tmp_path / "clouds" / "03001627" / split / f"{i}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, rng.random((20, 3)))
    assert not run("check", tmp_path / "clouds")
    assert "chair train: 3\nchair val: 2\n" in capsys.readouterr().out
    np.save(path, np.full((20, 3), np.nan))
    assert run("check", tmp_path / "clouds", "--least", 30) == 1
    out = capsys.readouterr().out
    assert "unreadable: " in out and str(path) in out and out.count("wrong size: ") == 4


def test_stats_hands_over(imagenet, tmp_path, monkeypatch, capsys):
    """If data.py stats were a second implementation, or lost a flag."""
    (tmp_path / "mine.py").write_text("def pixels(x):\n    return x.float().mean((2, 3))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    data.main(["stats", str(imagenet / "train"), "--res", "8", "--out", "ref.npz", "--features", "mine:pixels", "--device", "cpu"])
    found = np.load("ref.npz")
    pixels = np.stack([data.load("folder", imagenet, res=8).item(i)[0].mean((0, 1)) for i in range(22)])
    assert found["n"] == 22 and np.allclose(found["mu_fd" if "mu_fd" in found else "mu"], pixels.mean(0), atol=1e-3)


# --- point sets

def test_shapenet_hdf5_and_reference_files(tmp_path):
    """If the hdf5 form, or LION's reference file, gave other clouds than the tree."""
    h5py, rng = pytest.importorskip("h5py"), np.random.default_rng(1)
    clouds = {name: {split: rng.random((n, 40, 3)).astype(np.float32) for split, n in (("train", 4), ("val", 2), ("test", 1))}
              for name in ("03001627", "02691156")}
    with h5py.File(tmp_path / "shapenet.hdf5", "w") as file:
        for name, parts in clouds.items():
            for split, array in parts.items():
                file.create_dataset(f"{name}/{split}", data=array)
                for i, cloud in enumerate(array):
                    path = tmp_path / "tree" / name / split / f"{i}.npy"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    np.save(path, cloud)
    for options in (dict(), dict(split="val"), dict(category="chair"), dict(labels=True)):
        a, b = (data.load("shapenet", tmp_path / name, points=16, **options) for name in ("tree", "shapenet.hdf5"))
        assert items(a) == items(b) and items(a, 7) == items(b, 7) and a.class_names == b.class_names
    refused("category car", "airplane, chair", call=lambda: data.load("shapenet", tmp_path / "shapenet.hdf5", category="car"))
    (tmp_path / "no.hdf5").write_bytes(b"no")
    refused(tmp_path / "no.hdf5", call=lambda: data.load("shapenet", tmp_path / "no.hdf5"))
    x = torch.from_numpy(clouds["03001627"]["val"])
    mean, std = x.mean((0, 1), keepdim=True).expand(2, 1, 3), x.std().expand(2, 1, 1)
    torch.save(dict(ref=(x - mean) / std, mean=mean, std=std), tmp_path / "ref_val_chair.pt")
    a, b = (data.load("shapenet", tmp_path / name, points=16, split="val", category="chair") for name in ("tree", "ref_val_chair.pt"))
    assert all(np.allclose(a.item(i)[0], b.item(i)[0], atol=1e-5) for i in range(2)) and len(b) == 2
    refused("split val", call=lambda: data.load("shapenet", tmp_path / "ref_val_chair.pt"))
    refused("category car", call=lambda: data.load("shapenet", tmp_path / "ref_val_chair.pt", split="val", category="car"))
    torch.save([1], tmp_path / "no.pt")
    refused("ref, mean, std", call=lambda: data.load("shapenet", tmp_path / "no.pt", split="val"))


# --- meshes

CUBE = np.array([(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)], float) * (3, 2, 1)
QUADS = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
TRIANGLES = [t for a, b, c, d in QUADS for t in ((a, b, c), (a, c, d))]


def write_meshes(root):
    """The same box in every format, by other means than ours: area 22."""
    root.mkdir(parents=True, exist_ok=True)
    numbers = lambda rows: "\n".join(" ".join(map(str, row)) for row in rows)
    (root / "box.mtl").write_text("newmtl red\nKd 1 0 0\nnewmtl half grey\nKd 0.5 0.5 0.5\n")
    (root / "quads.obj").write_text("mtllib box.mtl\n# a box\n" + "\n".join(f"v {x} {y} {z} # point" for x, y, z in CUBE) + "\nusemtl red\n"
                                    + "\n".join("f " + " ".join(f"{i + 1}/{i + 1}/1" for i in q) for q in QUADS[:3]) + "\nusemtl half grey\n"
                                    + "\n".join("f " + " ".join(str(i - 8) for i in q) for q in QUADS[3:]) + "\n")
    (root / "quads.off").write_text(f"OFF\n# comment\n8 6 12\n{numbers(CUBE)}\n" + numbers([(4, *q) for q in QUADS]) + "\n")
    (root / "joined.off").write_text(f"OFF8 12 0\n{numbers(CUBE)}\n" + numbers([(3, *t, 255, 0, 0) for t in TRIANGLES]) + "\n")
    head = "ply\nformat {} 1.0\ncomment a box\nelement vertex 8\nproperty float x\nproperty float y\nproperty float z\n" \
           "property uchar red\nproperty uchar green\nproperty uchar blue\nelement face {}\n" \
           "property list uchar int vertex_indices\nend_header\n"
    (root / "ascii.ply").write_text(head.format("ascii", 6) + numbers([(*p, 10, 20, 30) for p in CUBE]) + "\n" + numbers([(4, *q) for q in QUADS]))
    for order, name in (("<", "little"), (">", "big")):
        vertices = np.array([(*p, 10, 20, 30) for p in CUBE], [(c, order + "f4") for c in "xyz"] + [(c, "u1") for c in "rgb"])
        faces = b"".join(np.uint8(len(f)).tobytes() + np.array(f, order + "i4").tobytes() for f in QUADS[:2] + TRIANGLES[4:])
        (root / f"{name}.ply").write_bytes(head.format(f"binary_{name}_endian", 10).encode() + vertices.tobytes() + faces)
    facets = np.zeros(12, [("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("spare", "<u2")])
    facets["corners"] = CUBE[np.array(TRIANGLES)]
    (root / "binary.stl").write_bytes(b"solid in name only".ljust(80) + np.uint32(12).tobytes() + facets.tobytes())
    (root / "ascii.stl").write_text("solid box\n" + "\n".join(
        "facet normal 0 0 0\nouter loop\n" + "\n".join("vertex " + " ".join(map(str, CUBE[i])) for i in t) + "\nendloop\nendfacet"
        for t in TRIANGLES) + "\nendsolid box\n")


def test_every_mesh_format_gives_the_same_surface(tmp_path):
    """If a reader lost a face, an index or a byte order."""
    write_meshes(tmp_path)
    files = sorted(f for f in tmp_path.iterdir() if f.suffix in data.MESHES)
    assert len(files) == 8
    for file in files:
        triangles, colours = data.read_mesh(str(file))
        assert triangles.shape == (12, 3, 3) and math.isclose(data.areas(triangles).sum(), 22), file
        assert {tuple(p) for p in triangles.reshape(-1, 3)} == {tuple(p) for p in CUBE}, file
        assert math.isclose(abs(np.einsum("ti,ti->t", triangles[:, 0], np.cross(triangles[:, 1], triangles[:, 2])).sum() / 6), 6), file
        if file.suffix == ".ply":
            assert (colours == (10, 20, 30)).all()
        if file.suffix == ".obj":
            assert (colours[:6] == (255, 0, 0)).all() and (colours[6:] == 128).all()


def test_glb(tmp_path):
    """If nodes' transforms, or colours, of a glTF scene were lost."""
    trimesh = pytest.importorskip("trimesh")
    mesh = trimesh.Trimesh(CUBE, TRIANGLES, process=False)
    mesh.visual.face_colors = (200, 100, 50, 255)
    scene = trimesh.Scene()
    scene.add_geometry(mesh, transform=trimesh.transformations.translation_matrix((10, 0, 0)))
    scene.export(str(tmp_path / "a.glb"))
    triangles, colours = data.read_mesh(str(tmp_path / "a.glb"))
    assert math.isclose(data.areas(triangles).sum(), 22, rel_tol=1e-6) and np.allclose(triangles.reshape(-1, 3).min(0), (10, 0, 0))
    assert abs(colours.astype(int) - (200, 100, 50)).max() <= 1


@pytest.mark.parametrize("name,text", [
    ("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n"), ("a.obj", "v 0 0 0\n"), ("a.obj", "v 0 zero 0\nf 1 1 1\n"), ("a.off", "OOF\n3 1 0\n"),
    ("a.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n"), ("a.off", ""), ("a.ply", "ply\nformat ascii 1.0\nelement vertex 1\n"), ("a.ply", "no"),
    ("a.ply", "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\nend_header\n0 0 0\n"),
    ("a.stl", "solid nothing\nendsolid\n"), ("a.stl", "x"), ("a.obj", "v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n"), ("a.obj", "v 0 0 0\nv nan 0 0\nv 0 1 0\nf 1 2 3\n")])
def test_broken_meshes_are_named(tmp_path, name, text):
    """If a broken file ended in a traceback, or gave a surface."""
    (tmp_path / name).write_text(text)
    refused(tmp_path / name, call=lambda: data.read_mesh(str(tmp_path / name)))


def test_sample_meshes(tmp_path, capsys):
    """If points were not uniform by area, depended on the order of the files, or fell into the wrong class or split."""
    write_meshes(tmp_path / "src" / "03001627" / "train")
    write_meshes(tmp_path / "src" / "box" / "val")
    (tmp_path / "src" / "04256520" / "abc" / "models").mkdir(parents=True)
    (tmp_path / "src" / "04256520" / "abc" / "models" / "model_normalized.obj").write_text(
        "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nv 3 0 1\nv 0 1 1\nf 1 2 3\nf 4 5 6\n")                        # areas 1 : 3
    code, _, _ = command("sample-meshes", tmp_path / "src", tmp_path / "bad", "--points", 50, "--workers", 1)
    assert code == 0 and len(list((tmp_path / "bad").rglob("*.npy"))) == 17                                # quads.obj and quads.off
    assert (tmp_path / "bad" / "box" / "val" / "quads-off.npy").exists() and (tmp_path / "bad" / "box" / "val" / "quads.npy").exists()
    for folder in ("03001627/train", "box/val"):
        for name in ("quads.off", "joined.off", "ascii.stl", "binary.stl", "big.ply", "little.ply"):
            (tmp_path / "src" / folder / name).unlink()
    (tmp_path / "src" / "x-y" / "train").mkdir(parents=True)
    (tmp_path / "src" / "x-y" / "a").mkdir(parents=True)
    for path in ("x-y/train/a-b.off", "x-y/a-b.off", "x-y/a/b.off"):
        (tmp_path / "src" / path).write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    refused("a-b.off", "names that differ", call=lambda: run("sample-meshes", tmp_path / "src", tmp_path / "bad2"))
    shutil.rmtree(tmp_path / "src" / "x-y")
    (tmp_path / "all.csv").write_text("id,synsetId,subSynsetId,modelId,split\n1,04256520,04256520,abc,test\n")
    flags = ["sample-meshes", tmp_path / "src", tmp_path / "dst", "--points", 4000, "--splits", tmp_path / "all.csv"]
    run(*flags)
    written = sorted(str(f.relative_to(tmp_path / "dst")) for f in (tmp_path / "dst").rglob("*.npy"))
    assert written == ["03001627/train/ascii.npy", "03001627/train/quads.npy", "04256520/test/abc.npy", "box/val/ascii.npy", "box/val/quads.npy"]
    assert "sofa" in capsys.readouterr().out
    cloud = np.load(tmp_path / "dst" / "04256520" / "test" / "abc.npy")
    assert cloud.shape == (4000, 3) and cloud.dtype == np.float32
    assert abs((cloud[:, 2] > 0.5).mean() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 4000)                      # four standard errors
    box = np.load(tmp_path / "dst" / "box" / "val" / "quads.npy")
    assert abs((box[:, 0] < 1e-6).mean() - 2 / 22) < 4 * math.sqrt(2 / 22 * 20 / 22 / 4000)                # one side of area 2
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "dst").rglob("*.npy")}
    (tmp_path / "dst" / "box" / "val" / "quads.npy").unlink()
    run(*flags)                                                                                            # goes on, with the same points
    assert (np.load(tmp_path / "dst" / "box" / "val" / "quads.npy") == box).all()
    assert all(f.stat().st_mtime_ns == t for f, t in before.items() if f.name != "quads.npy" or "box" not in str(f))
    assert len(data.load("shapenet", tmp_path / "dst", points=512, category="chair")) == 2
    (tmp_path / "src" / "box" / "val" / "torn.obj").write_text("f 1 2 3")
    refused("torn.obj", "--skip-bad", call=lambda: run(*flags))
    run(*flags, "--skip-bad")
    assert "left out" in (out := capsys.readouterr().out) and "5 of 6 meshes" in out
    refused("no meshes", call=lambda: run("sample-meshes", tmp_path / "dst", tmp_path / "x"))
    refused("all.csv", call=lambda: run(*flags[:-1], tmp_path / "src" / "all.csv"))
    (tmp_path / "none.csv").write_text("modelId,split\nxyz,test\n")
    refused("none.csv: none of its modelIds", call=lambda: run(*flags[:-1], tmp_path / "none.csv"))
    refused("--val 2.0", call=lambda: run(*flags, "--val", 2))
    run("sample-meshes", "solids:val", tmp_path / "named", "--n", 14, "--points", 8)
    assert len(data.load("shapenet", tmp_path / "named", points=8, split="val", category="chair")) == 2          # by the folder's name


def test_val_share(tmp_path, capsys):
    """If the share set aside were not about as asked, or changed with the other files."""
    for i in range(60):
        (tmp_path / "src" / f"{i}").mkdir(parents=True)
        (tmp_path / "src" / f"{i}" / "a.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    run("sample-meshes", tmp_path / "src", tmp_path / "dst", "--points", 4, "--val", 0.3)
    chosen = {f.parts[-3] for f in (tmp_path / "dst").rglob("val/*.npy")}
    assert 8 <= len(chosen) <= 30
    for i in range(0, 60, 2):
        os.remove(tmp_path / "src" / f"{i}" / "a.off")
    run("sample-meshes", tmp_path / "src", tmp_path / "half", "--points", 4, "--val", 0.3)
    assert {f.parts[-3] for f in (tmp_path / "half").rglob("val/*.npy")} == {name for name in chosen if int(name) % 2}


# --- views

def test_rasterise_against_a_loop_over_pixels():
    """If a triangle of any size missed a pixel, or a farther one were seen through a nearer."""
    rng, side = np.random.default_rng(0), 37
    for scale in (3, 15, 80):
        centre = rng.uniform(0, side, (40, 1, 2))
        x, y = np.moveaxis(centre + rng.normal(0, scale, (40, 3, 2)), 2, 0)
        near = rng.uniform(0.2, 0.5, (40, 3))
        expected, depth = np.full((side, side), -1), np.zeros((side, side))
        for t in range(40):
            (ax, bx, cx), (ay, by, cy) = x[t], y[t]
            for i in range(side):
                for j in range(side):
                    u, v, w = np.linalg.solve([[ax, bx, cx], [ay, by, cy], [1, 1, 1]], [j + 0.5, i + 0.5, 1])
                    if min(u, v, w) >= 0 and (z := u * near[t, 0] + v * near[t, 1] + w * near[t, 2]) > depth[i, j]:
                        expected[i, j], depth[i, j] = t, z
        assert (data.rasterise(x, y, near, side) == expected).all()
    assert (data.rasterise(*np.zeros((3, 0, 3)), 5) == -1).all()
    assert (data.rasterise(np.array([[9.0, 10, 11]]), np.array([[1.0, 2, 1]]), np.ones((1, 3)), 5) == -1).all()      # beside the picture


def test_views_are_those_of_the_paper():
    """If field of view, distance, sides or handedness of the cameras were off."""
    ball = data.lathe([(math.cos(a), math.sin(a)) for a in np.linspace(-math.pi / 2, math.pi / 2, 65)])
    views = data.render(ball)
    assert views.shape == (2, 448, 448, 3) and views.dtype == np.uint8
    seen = (views < 250).any(3)
    radius = 224 * math.tan(math.asin(1 / 3.5)) / math.tan(math.radians(20))           # of a unit ball 3.5 units away
    assert abs(np.sqrt(seen.sum((1, 2)) / math.pi) - radius).max() < 1
    assert abs(np.argwhere(seen[0]).mean(0) - 223.5).max() < 0.5
    # a block at the far end of x and one on top: right and left, and up, in views from opposite sides
    blocks = np.concatenate([data.box((0.8, 0, 0), (0.1, 0.1, 0.1)), data.box((0, 0.8, 0), (0.1, 0.1, 0.1))])
    red = np.repeat([[255, 0, 0], [0, 0, 255]], 12, 0)
    for view, side in zip(data.render(blocks, red).astype(int), (1, -1)):
        block, top = (np.argwhere(view[..., c] - view[..., 2 - c] > 50).mean(0) - 223.5 for c in (0, 2))
        assert side * block[1] > 60 and abs(block[0]) < 3 and top[0] < -100 and abs(top[1]) < 3
    # a nearer plate hides a farther one
    colours = np.repeat([[255, 0, 0], [0, 0, 255]], 12, 0)
    front, back = data.render(np.concatenate([data.box((0, 0, z), (0.5, 0.5, 0.01)) for z in (0.1, -0.1)]), colours)[:, 224, 224]
    assert front[0] > 80 > front[2] and back[2] > 80 > back[0]


def test_rays_meet_what_is_seen():
    """If a patch's Plucker ray did not pass through the points that the patch shows."""
    rays = data.rays(2, 448)
    d, m = rays[..., :3].astype(float), rays[..., 3:].astype(float)
    assert rays.shape == (2, 1024, 6) and np.allclose(np.linalg.norm(d, axis=2), 1, atol=1e-6) and abs((d * m).sum(2)).max() < 1e-6
    rng = np.random.default_rng(0)
    for point in rng.uniform(-0.5, 0.5, (6, 3)):
        views = data.render(data.box(point, (0.004,) * 3))
        for v in range(2):
            i, j = np.argwhere((views[v] < 250).any(2)).mean(0)
            k = int(i // 14) * 32 + int(j // 14)
            distances = np.linalg.norm(np.cross(point, d[v]) - m[v], axis=1)               # of the point from every ray
            assert distances[k] < 0.06 and distances[k] == distances.min() or distances[k] - distances.min() < 0.02


def test_raw_patches():
    """If patches were cut in another order than rays are."""
    picture = np.zeros((1, 42, 42, 3), np.uint8)
    picture[0, 14:28, 28:42] = 255
    patches = data.raw_patches(picture)
    assert patches.shape == (1, 9, 588) and (patches[0, 5] == 1).all() and (np.delete(patches[0], 5, 0) == -1).all()
    tokens = data.picture_tokens(picture, data.raw_patches)
    assert tokens.shape == (9, 594) and (tokens[:, 588:] == data.rays(1, 42)[0]).all()


# --- objects with pictures

@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Rendered solids with raw patches as tokens: views/ and set/, 14 of train and 7 of val."""
    root = tmp_path_factory.mktemp("objects")
    for split, n in (("train", 14), ("val", 7)):
        run("render", f"solids:{split}", root / "views", "--n", n, "--size", 56, "--points", 600)
    run("tokens", root / "views", root / "set", "--features", "patches", "--size", 28)
    return root


def test_render_and_tokens(objects, tmp_path, capsys):
    """If a view, a cloud or a token were another's."""
    stem = objects / "views" / "train" / "chair" / "000001"
    assert Image.open(f"{stem}-0.png").size == Image.open(f"{stem}-1.png").size == (56, 56)
    found = np.load(objects / "set" / "train" / "chair" / "000001.npz", allow_pickle=False)
    assert found["xyz"].shape == (600, 3) and found["cond_token"].shape == (8, 594) and found["cond_token"].dtype == np.float16
    views = data.read_views([f"{stem}-0.png", f"{stem}-1.png"], 28)
    assert np.allclose(found["cond_token"], data.picture_tokens(views, data.raw_patches), atol=2e-3)
    surface = data.Solids(1, "train").surface(1)
    low, high = surface.reshape(-1, 3).min(0) - 1e-3, surface.reshape(-1, 3).max(0) + 1e-3
    assert ((found["xyz"] > low) & (found["xyz"] < high)).all()
    refused("another setting", call=lambda: run("tokens", objects / "views", objects / "set", "--features", "patches", "--size", 56))
    refused("multiple of the patch", call=lambda: run("tokens", objects / "views", tmp_path, "--features", "patches", "--size", 50))
    refused("no views", call=lambda: run("tokens", tmp_path, tmp_path / "x", "--features", "patches"))
    refused("DINOv2", "--features patches", call=lambda: run("tokens", objects / "views", tmp_path / "y", "--weights", tmp_path))


def test_objaverse_items(objects, tmp_path):
    """If points were not drawn at random, or views chosen otherwise than said, or workers changed either."""
    ds = data.load("objaverse", objects / "set", points=512)
    assert (len(ds), ds.n_tokens, ds.token_dim, ds.spec["views"]) == (14, 8, 594, 2)
    assert len(data.load("objaverse", objects / "set", points=512, split="val")) == 7
    cloud, label, tokens = ds.item(3)
    assert cloud.shape == (512, 3) and label == 0 and tokens.dtype == np.float32 and math.isclose(abs(ds.whole(3)).max(), 1)
    kinds = []
    for k in range(200):
        _, _, got = ds.item(3, np.random.default_rng(k))
        first, second = (np.array_equal(got, np.concatenate([half, half])) for half in (tokens[:4], tokens[4:]))
        kinds.append("both" if np.array_equal(got, tokens) else "first" if first else "second" if second else "?")
    assert {kind: kinds.count(kind) for kind in set(kinds)}.keys() == {"both", "first", "second"} and 75 < kinds.count("both") < 125
    streams = [[[z.numpy().tobytes() for z in batch] for _, batch in zip(range(4), data.loader(ds, 1, 0, 4, 2, workers=w))] for w in (0, 2)]
    assert streams[0] == streams[1] and len(streams[0][0]) == 3
    # INRFlow's own files: no tokens.json, flat
    np.savez(tmp_path / "a.npz", xyz=np.random.default_rng(0).random((20, 3)), cond_token=np.ones((5, 7), np.float32))
    foreign = data.load("objaverse", tmp_path, points=16)
    assert foreign.spec is None and (foreign.item(0, np.random.default_rng(0))[2] == 1).all()
    refused(tmp_path / "a.npz", "20 points", call=lambda: data.load("objaverse", tmp_path, points=32))
    for keys in (dict(xyz=np.ones((20, 3))), dict(xyz=np.ones((20, 2)), cond_token=np.ones((5, 7))), dict(cond_token=np.ones((5, 7))),
                 dict(xyz=np.ones((20, 3)), cond_token=np.ones((5, 7))), dict(xyz=np.eye(3), cond_token=np.full((5, 7), np.nan))):
        np.savez(tmp_path / "a.npz", **keys)
        refused(tmp_path / "a.npz", call=lambda: data.load("objaverse", tmp_path, points=3))
    np.savez(tmp_path / "a.npz", xyz=np.eye(3), cond_token=np.ones((5, 7)))
    np.savez(tmp_path / "b.npz", xyz=np.eye(3), cond_token=np.ones((5, 8)))
    refused(tmp_path / "b.npz", "(5, 7)", call=lambda: data.load("objaverse", tmp_path, points=3).item(1))
    refused("no .npz", call=lambda: data.load("objaverse", objects / "views"))
    (tmp_path / "tokens.json").write_text("{}")
    refused("tokens.json", call=lambda: data.load("objaverse", tmp_path, points=3))


@pytest.fixture(scope="module")
def conditioned(objects):
    train.main(["--dataset", "objaverse", "--data", str(objects / "set"), "--points", "64", "--decode", "32", "--width", "16", "--depth", "1",
                "--latents", "8", "--batch-size", "4", "--steps", "8", "--warmup", "0", "--log-every", "1", "--device", "cpu", "--dtype", "float32",
                "--out", str(objects / "run"), "--drop", "0.5", "--workers", "0"])
    # a few steps leave the gates near zero, and the condition unseen: open them
    ckpt = torch.load(objects / "run" / "ckpt.pt", weights_only=True)
    g = torch.Generator().manual_seed(0)
    for name, weight in ckpt["ema"].items():
        if "modulation" in name or name.startswith("head"):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=g))
    torch.save(ckpt, objects / "run" / "ckpt.pt")
    return objects / "run"


def test_training_with_pictures(conditioned):
    """If tokens did not reach the model, or the checkpoint did not say what they are."""
    ckpt = torch.load(conditioned / "ckpt.pt", weights_only=True)
    assert ckpt["config"]["tokens"] == dict(features="patches", size=28, views=2, weights_sha256=None)
    assert ckpt["config"]["model"]["token_dim"] == 594
    adam = dict(zip(ckpt["model"], ckpt["optimizer"]["state"].values()))
    assert adam["tokens.weight"]["exp_avg_sq"].abs().sum() > 0 and (conditioned / "samples-0000008.png").exists()
    args = train.settings(["--dataset", "objaverse", "--data", "x", "--model", "point-objaverse", "--device", "cpu"])[0]
    assert (args.points, args.decode, args.batch_size, args.steps, args.solver, args.sampling_steps, args.guidance, args.drop) == \
        (16384, 16384, 384, 500_000, "sde", 500, 5.0, 0.1)


def clouds(out):
    return np.stack([np.load(out / f"{i:06d}.npy") for i in range(len(list(out.glob("*.npy"))))])


def test_sampling_from_pictures(conditioned, objects, tmp_path):
    """If pictures, tokens and objects did not lead to the same clouds, or one view given twice were another condition."""
    flags = ["--ckpt", str(conditioned), "--steps", "4", "--device", "cpu", "--n", "3", "--solver", "euler", "--guidance", "3", "--out"]
    views = [str(objects / "views" / "val" / "mug" / f"000003-{i}.png") for i in (0, 1)]
    draw = lambda name, *more, flags=flags: clouds(sample.main([*flags, str(tmp_path / name), *more]))
    both = draw("both", "--image", *views)
    tokens = data.picture_tokens(data.read_views(views, 28), data.raw_patches)
    np.savez(tmp_path / "both.npz", cond_token=tokens)
    np.savez(tmp_path / "twice.npz", cond_token=np.concatenate(2 * [tokens[:4]]))
    assert np.abs(draw("tokens", "--tokens", str(tmp_path / "both.npz")) - both).max() < 1e-5
    once = [draw(name, "--steps", "1", *more) for name, *more in (
        ("one", "--image", views[0]), ("twice", "--tokens", str(tmp_path / "twice.npz")), ("two", "--image", *views))]
    assert np.abs(once[0] - once[1]).max() < 2e-5 < 1e-3 < np.abs(once[0] - once[2]).max()      # one step: nothing amplifies rounding
    none = draw("none", flags=[*flags[:-3], flags[-1]])
    assert np.abs(none - both).max() > 1e-3
    record = json.loads((tmp_path / "both" / "samples.json").read_text())
    assert record["guidance"] == 3 and record["nfe"] == 4 and record["samples"][0]["object"] == " ".join(views)
    # a directory: object i for sample i, whatever the batch
    several = draw("several", "--tokens", str(objects / "set" / "val"), "--steps", "1")
    assert np.abs(draw("singly", "--tokens", str(objects / "set" / "val"), "--batch", "1", "--steps", "1") - several).max() < 2e-5
    assert np.abs(several[1] - draw("other", "--tokens", str(objects / "set" / "val" / "bookshelf"), "--steps", "1")[1]).max() < 2e-5
    assert [s["object"].split("/")[-2] for s in json.loads((tmp_path / "several" / "samples.json").read_text())["samples"]] == \
        ["airplane", "bookshelf", "bottle"]
    dense = draw("dense", "--image", *views, "--points", "150")
    assert dense.shape == (3, 150, 3)


def test_sampling_refusals(conditioned, objects, solids_run, tmp_path):
    """If a condition that cannot be had were ignored."""
    flags = ["--ckpt", str(conditioned), "--steps", "2", "--device", "cpu", "--n", "1", "--out", str(tmp_path / "out")]
    view = str(objects / "views" / "val" / "mug" / "000003-0.png")
    for words, more in ((("takes none",), ["--ckpt", str(solids_run), "--image", view]), (("one of them",), ["--image", view, "--tokens", "x"]),
                        (("3 pictures",), ["--image", view, view, view]), (("no.png",), ["--image", str(tmp_path / "no.png")]),
                        (("no.npz",), ["--tokens", str(tmp_path / "no.npz")]), (("--image or --tokens",), ["--guidance", "2"]),
                        (("no .npz files",), ["--tokens", str(objects / "views")])):
        refused(*words, call=lambda: sample.main([*flags, *more]))
    np.savez(tmp_path / "a.npz", cond_token=np.ones((4, 5)))
    refused("a.npz", "594", call=lambda: sample.main([*flags, "--tokens", str(tmp_path / "a.npz")]))
    (tmp_path / "two").mkdir()
    for i in (4, 5):
        np.savez(tmp_path / "two" / f"{i}.npz", cond_token=np.ones((i, 594)))
    refused("5.npz", "4 as in", call=lambda: sample.main([*flags[:-4], "--n", "2", "--tokens", str(tmp_path / "two"), "--out", str(tmp_path / "2")]))
    own = [sample.main([*flags[:-2], "--image", view.replace("-0", f"-{i}")]) for i in (0, 1)]
    assert own[0] != own[1] and len(list(own[0].glob("*.npy"))) == 1                       # a second picture does not replace the first's
    ckpt = torch.load(conditioned / "ckpt.pt", weights_only=True)
    ckpt["config"]["tokens"] = None
    torch.save(ckpt, tmp_path / "ckpt.pt")
    refused("--tokens", call=lambda: sample.main(["--ckpt", str(tmp_path / "ckpt.pt"), *flags[2:], "--image", view]))
    assert not (tmp_path / "out").exists()


def test_dinov2_features_all_the_way(objects, tmp_path):
    """If tokens of a ViT were not those of its patches, or pictures were later read by another network than in training."""
    from metrics import dinov2
    for i in range(2):
        torch.manual_seed(i)
        net = dinov2.DINOv2(64, 1, 32, side=2)
        for parameter in net.parameters():
            parameter.data.normal_(0, 0.3)
        torch.save(net.state_dict(), tmp_path / f"dinov2_{i}_pretrain.pth")
    weights = tmp_path / "dinov2_1_pretrain.pth"
    run("tokens", objects / "views", tmp_path / "set", "--weights", weights, "--size", 28)
    ds = data.load("objaverse", tmp_path / "set", points=64)
    assert (ds.n_tokens, ds.token_dim) == (8, 70) and ds.spec["weights_sha256"] == data.file_sha256(weights)
    views = [str(objects / "views" / "train" / "airplane" / f"000005-{i}.png") for i in (0, 1)]
    with torch.no_grad():
        expected = net(torch.from_numpy(data.read_views(views, 28))).flatten(0, 1)
    assert ds.files[0].endswith("airplane/000005.npz") and np.allclose(ds.item(0)[2][:, :64], expected, atol=2e-3)
    train.main(["--dataset", "objaverse", "--data", str(tmp_path / "set"), "--points", "64", "--decode", "32", "--width", "16", "--depth", "1",
                "--latents", "8", "--batch-size", "4", "--steps", "1", "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path / "run"),
                "--workers", "0"])
    flags = ["--ckpt", str(tmp_path / "run"), "--steps", "2", "--device", "cpu", "--n", "1", "--image", views[0], "--out", str(tmp_path / "out")]
    refused("SHA-256", call=lambda: sample.main([*flags, "--features-weights", str(tmp_path / "dinov2_0_pretrain.pth")]))
    refused("expected one file", call=lambda: sample.main([*flags, "--features-weights", str(tmp_path)]))
    assert clouds(sample.main([*flags, "--features-weights", str(weights)])).shape == (1, 64, 3)


# --- what was broken before, or while something ran

def test_pack_again_mends_what_is_damaged(imagenet, tmp_path, monkeypatch, capsys):
    """If packing again took damaged files for good ones, or check did not see them."""
    monkeypatch.setattr(data, "SHARD", 16 * 16 * 3 * 6)
    run("pack", imagenet, tmp_path / "good", "--res", 16)
    whole = {file.name: file.read_bytes() for file in (tmp_path / "good").iterdir()}
    assert len(whole) == 7 and "lock" not in whole
    labels = np.load(tmp_path / "good" / "labels.npy")
    manifest = json.loads(whole["manifest.json"])
    twice = dict(manifest, shards=[manifest["shards"][0], manifest["shards"][0], *manifest["shards"][2:]])

    def saved(array):
        np.save(tmp_path / "x.npy", array)
        return (tmp_path / "x.npy").read_bytes()
    damage = {"pictures-00001.npy": [None, whole["pictures-00001.npy"][:-9], whole["pictures-00001.npy"][:-9] + b"123456789"],
              "labels.npy": [saved(1 - labels.clip(0, 1)), saved(labels - 1), b"", None],
              "files.txt": [b'"one"\n', b"[1]\n" * 22, b"\xff\xfe", None]}
    for name, contents in damage.items():
        for content in contents:
            shutil.rmtree(tmp_path / "set", ignore_errors=True)
            shutil.copytree(tmp_path / "good", tmp_path / "set")
            (tmp_path / "set" / name).unlink()
            if content is not None:
                (tmp_path / "set" / name).write_bytes(content)
            try:
                assert run("check", tmp_path / "set") == 1 and "damaged: " in capsys.readouterr().out
            except data.InputError as error:
                assert name in str(error) or "its files hold" in str(error) or "pictures-00001.npy" in str(error)
            run("pack", imagenet, tmp_path / "set", "--res", 16)
            assert {file.name: file.read_bytes() for file in (tmp_path / "set").iterdir()} == whole, (name, content)
            assert ("packed again from there" in capsys.readouterr().out) == (name[:4] == "pict")
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(twice))
    refused("manifest.json", r"shards[1]", call=lambda: run("check", tmp_path / "set"))


def test_archives_that_are_cut_off_or_damaged(tmp_path):
    """If a download that stopped ended the process (a map is read beyond the file), or an exception of a codec came through."""
    lmdb = pytest.importorskip("lmdb")
    base = tmp_path / "base"
    with lmdb.open(str(base), map_size=2 ** 24) as env, env.begin(write=True) as txn:
        for i in range(40):
            draw(tmp_path / "x.png", i)
            txn.put(f"{i:04}".encode(), (tmp_path / "x.png").read_bytes())
    (base / "data.mdb").write_bytes((base / "data.mdb").read_bytes()[:-4096])
    code, _, error = command("check", base, "--workers", 0)
    assert code == 2 and "data.mdb has" in error and "cut off" in error and error.count("\n") == 1
    for method in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        draw(tmp_path / "x.png", 5)
        with zipfile.ZipFile(tmp_path / "set.zip", "w", method) as archive:
            archive.write(tmp_path / "x.png", "a/1.png")
        raw = bytearray((tmp_path / "set.zip").read_bytes())
        raw[60:80] = bytes(255 - b for b in raw[60:80])
        (tmp_path / "set.zip").write_bytes(raw)
        code, out, _ = command("check", tmp_path / "set.zip", "--workers", 1)
        assert code == 1 and "unreadable: " in out and "a/1.png" in out


def test_no_format_that_pillow_gives_to_a_program(tmp_path):
    """If PostScript were run because a file is called .png."""
    from PIL import EpsImagePlugin
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png", format="EPS")
    assert Image.open(tmp_path / "x.png").format == "EPS" and EpsImagePlugin
    refused("x.png", "not one of JPEG", call=lambda: data.read_image(tmp_path / "x.png"))
    known = {Image.registered_extensions()[suffix] for suffix in data.EXTENSIONS if suffix in Image.registered_extensions()}
    assert {"MPO" if name == "JPEG" else name for name in known} <= {*data.formats(), "MPO"}


def test_clouds_that_are_none_do_not_become_objects(objects, tmp_path, capsys):
    """If tokens were written beside clouds that no training reads, or hung on a file of another kind."""
    for what, array in (("(5, 7)", np.zeros((5, 7))), ("not finite", np.full((50, 3), np.nan)), ("int64", np.zeros((50, 3), int)), ("an .npz", None)):
        shutil.rmtree(tmp_path / "views", ignore_errors=True)
        shutil.copytree(objects / "views", tmp_path / "views")
        with open(tmp_path / "views" / "train" / "chair" / "000001.npy", "wb") as file:
            np.save(file, array) if array is not None else np.savez(file, np.zeros(3))
        refused("000001.npy", what, call=lambda: run("tokens", tmp_path / "views", tmp_path / "set", "--features", "patches", "--size", 28))
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
    refused("--weights", call=lambda: run("tokens", objects / "views", tmp_path / "set", "--features", "patches", "--weights", "x"))
    refused("has 600 points; expected 50", call=lambda: run("render", "solids:train", objects / "views", "--n", 2, "--size", 56, "--points", 50))
    refused("of 56 pixels; expected 64", call=lambda: run("render", "solids:train", objects / "views", "--n", 2, "--size", 64, "--points", 600))
    refused("--val", call=lambda: run("sample-meshes", "solids", tmp_path / "c", "--val", 0.5))
    for scale in ("1e39", "1e-50"):
        (tmp_path / "mesh").mkdir(exist_ok=True)
        (tmp_path / "mesh" / "a.obj").write_text(f"v 0 0 0\nv {scale} 0 0\nv 0 {scale} 0\nf 1 2 3\n")
        refused("a.obj", call=lambda: run("sample-meshes", tmp_path / "mesh", tmp_path / "c", "--points", 9))
    capsys.readouterr()
    run("sample-meshes", tmp_path / "mesh", tmp_path / "c", "--points", 9, "--skip-bad")
    assert "0 of 1 meshes" in capsys.readouterr().out and not (tmp_path / "c").exists()


def test_two_that_write_one_directory(tmp_path):
    """If two processes wrote the same files, or a killed one kept others out."""
    with data.only_one(str(tmp_path)):
        for words in (("pack", tmp_path, tmp_path, "--res", 8), ("render", "solids:train", tmp_path, "--n", 2), ("sample-meshes", "solids:train", tmp_path)):
            code, _, error = command(*words)
            assert code == 2 and ("another process writes it (process " in error or words[0] == "pack") and error.count("\n") == 1
    assert not list(tmp_path.iterdir()) if tmp_path.exists() else True


def test_errors_of_workers_are_one_line(tmp_path):
    """If a full disk or memory in a data process came as its traceback."""
    (tmp_path / "out" / "table" / "train").mkdir(parents=True)
    (tmp_path / "out" / "table" / "train" / "000000.npy.tmp").symlink_to("/dev/full")
    code, _, error = command("sample-meshes", "solids:train", tmp_path / "out", "--workers", 1, "--points", 5000)
    assert code == 2 and "000000.npy: No space left on device" in error and "Traceback" not in error
