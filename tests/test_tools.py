"""tools/: meshes in every format and the point clouds of them, views, condition tokens, packed sets, and check."""
import argparse
import base64
import json
import math
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import toys
from conftest import ROOT
from metrics import dinov2
from tools import check, meshes, pack, render, tokens

CUBE = np.array([(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)], float) * (3, 2, 1)       # area 22
QUADS = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
TRIANGLES = [t for a, b, c, d in QUADS for t in ((a, b, c), (a, c, d))]
RED = (255, 51, 51)


def refused(*words, call):
    """The call ends in a ValueError of one line that holds the words."""
    with pytest.raises(ValueError) as error:
        call()
    text = str(error.value)
    assert all(str(word) in text for word in words) and "\n" not in text, text


def lines(rows, head=""):
    return "\n".join(head + " ".join(map(str, row)) for row in rows) + "\n"


def area(triangles):
    edges = triangles[:, 1:] - triangles[:, :1]
    return np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1).sum() / 2


def volume(triangles):
    a, b, c = np.moveaxis(triangles, 1, 0)
    return (a * np.cross(b, c)).sum() / 6


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return meshes.read_mesh(path)


# --- meshes

def write_meshes(root):
    """One box in several formats."""
    root.mkdir(parents=True)
    (root / "box.mtl").write_text("newmtl a # red\nKd 1 0.2 0.2 # red\n")
    (root / "quads.obj").write_text("mtllib box.mtl\n" + lines(CUBE, "v ") + "usemtl a # red\n"
                                    + lines([[f"{i + 1}/1/1" for i in q] for q in QUADS], "f "))
    (root / "quads.off").write_text(f"OFF\n# comment\n8 6 12\n{lines(CUBE)}" + lines([(4, *q) for q in QUADS]))
    (root / "joined.OFF").write_text(f"OFF8 12 0\n{lines(CUBE)}" + lines([(3, *t, *RED) for t in TRIANGLES]))
    (root / "points.off").write_text(f"COFF 8 12 0\n{lines([(*p, 1.0, 0.2, 0.2, 1) for p in CUBE])}"
                                     + lines([(3, *t) for t in TRIANGLES]))
    head = "ply\nformat {} 1.0\nelement vertex 8\n" + lines([(f"property float {x}",) for x in "xyz"])
    head += lines([(f"property uchar {c}",) for c in ("red", "green", "blue")])
    head += "element face {}\nproperty list uchar int vertex_indices\nend_header\n"
    (root / "ascii.PLY").write_text(head.format("ascii", 7) + lines([(*p, *RED) for p in CUBE])
                                    + lines([(4, *q) for q in QUADS[:5]]) + lines([(3, *t) for t in TRIANGLES[10:]]))
    for order, name in (("<", "little"), (">", "big")):
        kinds = [(c, order + "f4") for c in "xyz"] + [(c, "u1") for c in "rgb"]
        faces = b"".join(b"\4" + np.array(q, order + "i4").tobytes() for q in QUADS)
        (root / f"{name}.ply").write_bytes(head.format(f"binary_{name}_endian", 6).encode()
                                           + np.array([(*p, *RED) for p in CUBE], kinds).tobytes() + faces)
    facets = np.zeros(12, [("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("spare", "<u2")])
    facets["corners"] = CUBE[np.array(TRIANGLES)]
    (root / "binary.stl").write_bytes(b"solid in name only".ljust(80) + np.uint32(12).tobytes() + facets.tobytes())
    loops = [f"FACET NORMAL 0 0 0\nOUTER LOOP\n{lines(CUBE[[*t]], 'VERTEX ')}ENDLOOP\nENDFACET\n" for t in TRIANGLES]
    (root / "capitals.stl").write_text("SOLID box\n" + "".join(loops) + "ENDSOLID box\n")


def test_every_format_gives_one_surface(tmp_path, capfd):
    """If a reader lost a face, a colour, a byte order, or turned a face over."""
    write_meshes(tmp_path / "box")
    for file in sorted((tmp_path / "box").glob("[!b]*[!l]")) + [tmp_path / "box" / "big.ply", tmp_path / "box" / "binary.stl"]:
        triangles, colours = meshes.read_mesh(file)
        assert triangles.shape == (12, 3, 3) and triangles.dtype == np.float64, file
        assert math.isclose(area(triangles), 22) and math.isclose(abs(volume(triangles)), 6), file
        if file.suffix == ".stl" or file.name == "quads.off":
            assert colours is None
        else:
            assert colours.dtype == np.uint8 and (colours == RED).all(), file
    assert capfd.readouterr() == ("", "")


def polygon(rng, n):
    """A concave polygon whose corners all see the middle, with the middle as one corner: area known by its fan."""
    angles = np.sort(rng.uniform(0.1, 1.5 * np.pi, n - 1))
    rim = rng.uniform(1, 3, (n - 1, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)
    flat = np.concatenate([np.zeros((1, 2)), rim])
    x, y = flat.T
    return flat, abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2


def test_concave_faces(tmp_path):
    """If a fan from the wrong corner left the polygon, or its colour went to another."""
    rng = np.random.default_rng(0)
    for n in (4, 5, 6, 9):
        flat, expected = polygon(rng, n)
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        for start in range(n):
            points, face = np.column_stack([np.roll(flat, start, 0), np.zeros(n)]) @ turn, range(n)
            obj = lines(points, "v ") + lines([[k + 1 for k in face]], "f ")
            off = f"OFF {n} 1 0\n{lines(points)}" + lines([(n, *face, *RED)])
            ply = f"ply\nformat ascii 1.0\nelement vertex {n}\n" + lines([(f"property double {x}",) for x in "xyz"])
            ply += f"element face 1\nproperty list uchar int vertex_index\nend_header\n{lines(points)}" + lines([(n, *face)])
            for name, text in (("a.obj", obj), ("a.off", off), ("a.ply", ply)):
                triangles, colours = read(tmp_path / name, text)
                assert len(triangles) == n - 2 and math.isclose(area(triangles), expected), (name, n, start)
                assert colours is None or (colours == RED).all()
    radius = [0.4 + 1.6 * (k % 2) for k in range(10)]
    star = [(r * math.cos(k * math.pi / 5), r * math.sin(k * math.pi / 5), 0) for k, r in enumerate(radius)]
    refused("a.obj", "concave", call=lambda: read(tmp_path / "a.obj", lines(star, "v ") + "f " + " ".join(map(str, range(1, 11)))))


def test_what_obj_files_hold(tmp_path):
    """If comments, continued lines, libraries, relative places or textures changed the surface or its colour."""
    (tmp_path / "one.mtl").write_text("newmtl other\nKd 0 0 1\n")
    (tmp_path / "two b.mtl").write_text("newmtl red#1\nKd 1 0.2 0.2\nnewmtl cloth\nKd 0 0 0\nmap_Kd textures\\cloth.png\n")
    (tmp_path / "textures").mkdir()
    Image.fromarray(np.uint8([[RED, (0, 0, 255)]])).resize((64, 32), Image.NEAREST).save(tmp_path / "textures" / "cloth.png")
    points = lines(CUBE, "v ")
    faces = lines([[i + 1 for i in t] for t in TRIANGLES], "f ")
    libraries = "mtllib one.mtl\nmtllib two b.mtl\n"
    painted = lines(np.column_stack([CUBE, np.tile((1, 0.2, 0.2), (8, 1))]), "v ")
    corners = lines([(0.2, 0.5), (0.3, 0.6), (0.1, 0.4)], "vt ") + lines([[f"{i + 1}/{k}" for k, i in enumerate(t, 1)] for t in TRIANGLES], "f ")
    for name, text, colour in [
            ("comments", points.replace("\n", " # point\n") + "# f 1 2 3\n" + faces.replace("\n", " # side\n"), None),
            ("continued", points.replace(" ", " \\\n") + faces.replace(" ", " \\\r\n"), None),
            ("tabs", (points + faces).replace(" ", "\t").replace("\n", "\r\n"), None),
            ("corners", painted + faces, RED), ("no library", "mtllib no.mtl\nusemtl red#1\n" + painted + faces, RED),
            ("two", libraries + points + "usemtl red#1\n" + faces, RED), ("one line", "mtllib one.mtl ./two\\ b.mtl\n" + points + faces, None),
            ("texture", libraries + points + "usemtl cloth\n" + corners, RED),
            ("missing", libraries + points + "usemtl no\n" + corners, None)]:
        triangles, colours = read(tmp_path / "a.OBJ", text)
        assert len(triangles) == 12 and math.isclose(area(triangles), 22) and math.isclose(abs(volume(triangles)), 6), name
        assert colours is None if colour is None else (colours == colour).all(), name
    flat = read(tmp_path / "a.obj", libraries + points + "usemtl cloth\n" + faces)[1]           # no places in the texture
    assert (flat.max(1) > 100).all()
    relative = "".join(lines(CUBE[[*t]], "v ") + "vt 0 0\nf -3/-1 -2/-1 -1/-1\n" for t in TRIANGLES)
    assert math.isclose(abs(volume(read(tmp_path / "a.obj", relative)[0])), 6)
    both = libraries + points + "usemtl red#1\n" + "\n".join(faces.split("\n")[:6]) + "\nusemtl no\n" + "\n".join(faces.split("\n")[6:])
    colours = read(tmp_path / "a.obj", both)[1]
    assert sorted(map(tuple, colours.tolist())) == 6 * [3 * (meshes.GREY,)] + 6 * [RED]


def gltf(path, kind="f4", material=None, places=None, paint=None, **more):
    """The box as glTF by hand, quantised where kind says so, at (10,0,0), beside primitives without points."""
    arrays = dict(POSITION=CUBE.astype(kind))
    if places:
        arrays["TEXCOORD_0"] = np.tile(np.float32(places), (8, 1))
    if paint:
        arrays["COLOR_0"] = np.tile(np.uint8((*paint, 255)), (8, 1))
    tables = [np.array(TRIANGLES, "<u2").reshape(-1, 1), *arrays.values()]
    numbers = dict(f4=5126, i2=5122, u2=5123, u1=5121)
    blob, views, accessors = b"", [], []
    for k, table in enumerate(tables):
        rows = np.zeros((len(table), -(-table[0].nbytes // 4) * 4 // table.itemsize if k else 1), table.dtype)
        rows[:, :table.shape[1]] = table
        views.append(dict(buffer=0, byteOffset=len(blob), byteLength=rows.nbytes, byteStride=rows[0].nbytes))
        accessors.append(dict(bufferView=k, componentType=numbers[table.dtype.str[1:]], count=len(table),
                              type="SCALAR" if not k else f"VEC{table.shape[1]}", normalized=k == 3))
        blob += rows.tobytes()
    part = dict(attributes={name: k for k, name in enumerate(arrays, 1)}, indices=0)
    tree = dict(asset=dict(version="2.0"), scene=0, scenes=[dict(nodes=[0])], accessors=accessors, bufferViews=views,
                nodes=[dict(mesh=0, translation=[10, 0, 0])], buffers=[dict(byteLength=len(blob))],
                meshes=[dict(primitives=[dict(attributes={}), part, dict(attributes={"NORMAL": 1}, mode=1)])]) | more
    if material is not None:
        part["material"], tree["materials"] = 0, [dict(pbrMetallicRoughness=material)]
    if path.suffix == ".gltf":
        path.with_suffix(".bin").write_bytes(blob)
        tree["buffers"][0]["uri"] = "a.bin"
        return path.write_text(json.dumps(tree))
    text = json.dumps(tree).encode()
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(blob), b"BIN\0") + blob
    path.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks)


def test_gltf(tmp_path, capfd):
    """If a transform, a factor or a texture were lost, or a primitive without points ended it all."""
    cloth = Image.fromarray(np.uint8([[RED, (0, 0, 255)]])).resize((64, 32), Image.NEAREST)
    cloth.save(tmp_path / "cloth.png")
    images = dict(images=[dict(uri="cloth.png")], textures=[dict(source=0)])
    texture, half = dict(baseColorTexture=dict(index=0)), dict(baseColorFactor=[0.5, 0.5, 0.5, 1])
    for suffix, options, colour in [
            ("glb", {}, None), ("gltf", {}, None), ("GLB", dict(kind="u2"), None), ("glb", dict(kind="i2"), None),
            ("glb", dict(material=dict(baseColorFactor=[1, 0.2, 0.2, 1])), RED), ("glb", dict(paint=RED), RED),
            ("glb", dict(material={}, paint=RED), RED), ("gltf", dict(material={}), (255, 255, 255)),
            ("glb", dict(material=texture, places=(0.2, 0.5), **images), RED),
            ("gltf", dict(material=texture, places=(0.7, 0.5), **images), (0, 0, 255)),
            ("glb", dict(material=texture | half, places=(0.2, 0.5), **images), (128, 26, 26))]:
        gltf(tmp_path / f"a.{suffix}", **options)
        triangles, colours = meshes.read_mesh(tmp_path / f"a.{suffix}")
        assert len(triangles) == 12 and math.isclose(area(triangles), 22, rel_tol=1e-6), options
        assert (triangles.reshape(-1, 3).min(0) == (10, 0, 0)).all()
        assert colours is None if colour is None else abs(colours.astype(int) - colour).max() <= 1, options
    for options in (dict(extensionsRequired=["KHR_draco_mesh_compression"]), dict(extensionsRequired=["EXT_meshopt_compression"])):
        gltf(tmp_path / "b.glb", **options)
        refused("b.glb", *options["extensionsRequired"], call=lambda: meshes.read_mesh(tmp_path / "b.glb"))
    gltf(tmp_path / "b.glb")
    raw = (tmp_path / "b.glb").read_bytes().replace(b'"VEC3", "normalized": false', b'"VEC3", "normalized": true ')
    refused("b.glb", "normalised", call=lambda: read(tmp_path / "b.glb", raw))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name,text", [
    ("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n"), ("a.obj", "v 0 0 0\n"), ("a.obj", "v 0 zero 0\nf 1 1 1\n"), ("a.obj", ""),
    ("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf -4 1 2\n"), ("a.obj", "v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n"),
    ("a.obj", "v 0 0 0\nv nan 0 0\nv 0 1 0\nf 1 2 3\n"), ("a.off", "OOF\n3 1 0\n"), ("a.off", ""), ("a.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n"),
    ("a.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 3\n"), ("a.ply", "ply\nformat ascii 1.0\nelement vertex 1\n"), ("a.ply", "no"), ("a.txt", ""),
    ("a.ply", "ply\nformat ascii 1.0\nelement vertex 1\n" + "".join(f"property float {x}\n" for x in "xyz") + "end_header\n0 0 0\n"),
    ("a.stl", "solid nothing\nendsolid\n"), ("a.stl", "x"), ("a.glb", "glTF"), ("a.gltf", "{}")])
def test_broken_meshes_are_named(tmp_path, name, text, capfd):
    """If a broken file ended in a traceback, or gave a surface."""
    refused(tmp_path / name, "expected", call=lambda: read(tmp_path / name, text))
    assert capfd.readouterr() == ("", "")


def test_missing_trimesh_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trimesh", None)
    refused("a.stl: needs trimesh: pip install trimesh", call=lambda: read(tmp_path / "a.stl", ""))


# --- point clouds of meshes

def sampled(src, dst, *more):
    meshes.main([*map(str, (src, dst, "--workers", 0, *more))])


def test_clouds_of_meshes(tmp_path, capsys):
    """If points were not uniform by area, depended on other files, or fell into the wrong class or split."""
    write_meshes(tmp_path / "src" / "box" / "val")
    for name in ("points.off", "ascii.PLY", "big.ply"):
        (tmp_path / "src" / "box" / "val" / name).unlink()
    model = tmp_path / "src" / "04256520" / "abc" / "models" / "model_normalized.obj"
    model.parent.mkdir(parents=True)
    model.write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nv 3 0 1\nv 0 1 1\nf 1 2 3\nf 4 5 6\n")            # areas 1 : 3
    (tmp_path / "all.csv").write_text("id,synsetId,subSynsetId,modelId,split\n1,04256520,04256520,abc,test\n")
    flags = [tmp_path / "src", tmp_path / "dst", "--points", 4000, "--splits", tmp_path / "all.csv"]
    sampled(*flags)
    assert "sofa test: 1\n" in capsys.readouterr().out
    written = {str(f.relative_to(tmp_path / "dst")) for f in (tmp_path / "dst").rglob("*.npy")}
    names = ("binary", "capitals", "joined", "little", "quads", "quads-off")
    assert written == {"04256520/test/abc.npy", *(f"box/val/{name}.npy" for name in names)}
    cloud = np.load(tmp_path / "dst" / "04256520" / "test" / "abc.npy")
    assert cloud.shape == (4000, 3) and cloud.dtype == np.float32
    assert abs((cloud[:, 2] > 0.5).mean() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 4000)                      # four standard errors
    box = tmp_path / "dst" / "box" / "val" / "quads.npy"
    first, before = np.load(box), {f: f.stat().st_mtime_ns for f in (tmp_path / "dst").rglob("*.npy")}
    assert abs((first[:, 0] < 1e-6).mean() - 2 / 22) < 4 * math.sqrt(2 / 22 * 20 / 22 / 4000)              # one side of area 2
    box.unlink()
    (tmp_path / "src" / "box" / "val" / "torn.obj").write_text("f 1 2 3")
    refused("torn.obj", "--skip-bad", call=lambda: sampled(*flags))
    sampled(*flags, "--skip-bad", "--workers", 1)
    assert "left out: " in (out := capsys.readouterr().out) and "7 of 8 meshes" in out
    assert (np.load(box) == first).all() and all(f == box or f.stat().st_mtime_ns == t for f, t in before.items())
    assert len(data.load("shapenet", tmp_path / "dst", points=512, category="sofa", split="test")) == 1
    refused("binary.npy", "expected 5", call=lambda: sampled(*flags[:2], "--points", 5))
    refused("no meshes", call=lambda: sampled(tmp_path / "dst", tmp_path / "x"))
    refused("model_normalized.obj", "modelId", call=lambda: sampled(*flags[:-1], model))
    for name in ("x-y/train/a-b.off", "x-y/a-b.off", "x-y/a/b.off"):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    refused("a-b.off", "names that differ", call=lambda: sampled(tmp_path / "src", tmp_path / "y"))


def test_solids_and_the_share_of_val(tmp_path):
    """If a solid had another class, or the share set aside were not about as asked, or changed with the other files."""
    sampled("solids:val", tmp_path / "named", "--n", 14, "--points", 8)
    assert len(data.load("shapenet", tmp_path / "named", points=8, split="val", category="chair")) == 2
    surface = toys.Solids(split="val").surface(1).reshape(-1, 3)
    cloud = np.load(tmp_path / "named" / "chair" / "val" / "000001.npy")
    assert (cloud >= surface.min(0) - 1e-6).all() and (cloud <= surface.max(0) + 1e-6).all()
    for i in range(60):
        (tmp_path / "src" / f"{i}").mkdir(parents=True)
        (tmp_path / "src" / f"{i}" / "a.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    args = argparse.Namespace(src=str(tmp_path / "src"), n=None, splits=None, val=0.3)
    chosen = {file for file, split, *_ in meshes.jobs_of(args) if split == "val"}
    assert 8 <= len(chosen) <= 30
    args.n = 30
    assert {file for file, split, *_ in meshes.jobs_of(args) if split == "val"} == {f for f, *_ in meshes.jobs_of(args) if f in chosen}


def test_a_full_disk_in_a_worker_is_one_line(tmp_path):
    """If what is wrong in a worker, or the command of old, came as a traceback."""
    (tmp_path / "table" / "train").mkdir(parents=True)
    (tmp_path / "table" / "train" / "000000.npy.tmp").symlink_to("/dev/full")
    command = [sys.executable, ROOT / "tools" / "meshes.py", "solids:train", tmp_path, "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("meshes.py: ") and "No space left on device" in last
    assert "Traceback" not in done.stderr


# --- views

def test_rasterise_against_a_loop_over_pixels():
    """If a triangle of any size missed a pixel, or a farther one were seen through a nearer."""
    rng, side = np.random.default_rng(0), 23
    for scale in (2, 10, 50):
        x, y = np.moveaxis(rng.uniform(0, side, (25, 1, 2)) + rng.normal(0, scale, (25, 3, 2)), 2, 0)
        near = rng.uniform(0.2, 0.5, (25, 3))
        expected, depth = np.full((side, side), -1), np.zeros((side, side))
        i, j = np.mgrid[:side, :side]
        for t in range(25):
            shares = np.linalg.solve([x[t], y[t], np.ones(3)], np.stack([j + 0.5, i + 0.5, np.ones((side, side))]).reshape(3, -1))
            z = (near[t] @ shares).reshape(side, side)
            seen = (shares.min(0) >= 0).reshape(side, side) & (z > depth)
            expected[seen], depth[seen] = t, z[seen]
        assert (render.rasterise(x, y, near, side) == expected).all()
    assert (render.rasterise(*np.zeros((3, 0, 3)), 5) == -1).all()
    beside = render.rasterise(np.array([[9.0, 10, 11]]), np.array([[1.0, 2, 1]]), np.ones((1, 3)), 5)
    assert (beside == -1).all()


def test_views_are_those_of_the_paper():
    """If field of view, distance, sides or handedness of the cameras were off."""
    ball = toys.lathe([(math.cos(a), math.sin(a)) for a in np.linspace(-math.pi / 2, math.pi / 2, 65)])
    views = render.render(ball, size=224)
    assert views.shape == (2, 224, 224, 3) and views.dtype == np.uint8
    seen = (views < 250).any(3)
    radius = 112 * math.tan(math.asin(1 / 3.5)) / math.tan(math.radians(20))           # of a unit ball 3.5 units away
    assert abs(np.sqrt(seen.sum((1, 2)) / math.pi) - radius).max() < 1
    assert abs(np.argwhere(seen[0]).mean(0) - 111.5).max() < 0.5
    # a block at the far end of x and one on top: right and left, and up, in views from opposite sides
    blocks = np.concatenate([toys.box((0.8, 0, 0), (0.1, 0.1, 0.1)), toys.box((0, 0.8, 0), (0.1, 0.1, 0.1))])
    red = np.repeat([[255, 0, 0], [0, 0, 255]], 12, 0)
    for view, side in zip(render.render(blocks, red).astype(int), (1, -1)):
        block, top = (np.argwhere(view[..., c] - view[..., 2 - c] > 50).mean(0) - 223.5 for c in (0, 2))
        assert side * block[1] > 60 and abs(block[0]) < 3 and top[0] < -100 and abs(top[1]) < 3
    # a nearer plate hides a farther one
    plates = np.concatenate([toys.box((0, 0, z), (0.5, 0.5, 0.01)) for z in (0.1, -0.1)])
    front, back = render.render(plates, red)[:, 224, 224]
    assert front[0] > 80 > front[2] and back[2] > 80 > back[0]


def test_rays_meet_what_is_seen():
    """If a patch's Plucker ray did not pass through the points that the patch shows."""
    rays = tokens.rays(2, 448)
    d, m = rays[..., :3].astype(float), rays[..., 3:].astype(float)
    assert rays.shape == (2, 1024, 6) and abs((d * m).sum(2)).max() < 1e-6
    assert np.allclose(np.linalg.norm(d, axis=2), 1, atol=1e-6)
    for point in np.random.default_rng(0).uniform(-0.5, 0.5, (4, 3)):
        views = render.render(toys.box(point, (0.004, 0.004, 0.004)))
        for v in range(2):
            i, j = np.argwhere((views[v] < 250).any(2)).mean(0)
            distances = np.linalg.norm(np.cross(point, d[v]) - m[v], axis=1)               # of the point from every ray
            assert distances[int(i // 14) * 32 + int(j // 14)] < min(0.06, distances.min() + 0.02)


# --- condition tokens

@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Rendered solids with raw patches as tokens: views/ and set/, 7 of train and 2 of val."""
    root = tmp_path_factory.mktemp("objects")
    for split, n in (("train", 7), ("val", 2)):
        render.main([f"solids:{split}", str(root / "views"), "--n", str(n), "--size", "56", "--points", "600", "--workers", "0"])
    made(root / "views", root / "set")
    return root


def made(src, dst, *more):
    tokens.main([str(src), str(dst), "--features", "patches", "--size", "28", "--workers", "0", *more])


def test_views_and_tokens(objects, tmp_path):
    """If a view, a cloud or a token were another's, or an interrupted command did not go on."""
    stem = objects / "views" / "train" / "chair" / "000001"
    assert Image.open(f"{stem}-0.png").size == Image.open(f"{stem}-1.png").size == (56, 56)
    file = objects / "set" / "train" / "chair" / "000001.npz"
    found = dict(np.load(file, allow_pickle=False))
    assert found["cond_token"].shape == (8, 594) and found["cond_token"].dtype == np.float16
    views = tokens.read_views([f"{stem}-0.png", f"{stem}-1.png"], 28)
    assert np.allclose(found["cond_token"], tokens.tokens(views, tokens.patches), atol=2e-3)
    surface = toys.Solids(split="train").surface(1).reshape(-1, 3)
    assert found["xyz"].shape == (600, 3) and abs(found["xyz"].max(0) - surface.max(0)).max() < 0.1
    assert (found["xyz"] > surface.min(0) - 1e-3).all() and (found["xyz"] < surface.max(0) + 1e-3).all()
    image = np.zeros((1, 42, 42, 3), np.uint8)                                             # patches in the order of rays
    image[0, 14:28, 28:42] = 255
    cells = tokens.tokens(image, tokens.patches)
    assert (cells[5, :588] == 1).all() and (np.delete(cells[:, :588], 5, 0) == -1).all()
    assert cells.shape == (9, 594) and (cells[:, 588:] == tokens.rays(1, 42)[0]).all()
    ds = data.load("objaverse", objects / "set", points=512)
    assert (len(ds), ds.item(1)[2].shape, ds.spec) == (7, (8, 594), dict(features="patches", size=28, views=2, weights_sha256=None))
    before = {f: f.read_bytes() for f in objects.rglob("*.np[yz]")}
    file.unlink()
    made(objects / "views", objects / "set")
    render.main(["solids:val", str(objects / "views"), "--n", "2", "--points", "600", "--workers", "0"])
    assert {f: f.read_bytes() for f in objects.rglob("*.np[yz]")}.keys() == before.keys()
    assert (np.load(file)["cond_token"] == found["cond_token"]).all()
    refused("another setting", call=lambda: made(objects / "views", objects / "set", "--size", "56"))
    refused("no views", call=lambda: made(tmp_path, tmp_path / "x"))
    with pytest.raises(SystemExit):
        made(objects / "views", tmp_path / "y", "--size", "50")


def test_tokens_of_ones_own_image(objects, tmp_path):
    """If tokens of an image were not those of training, or made with other weights than in training."""
    for i in range(2):
        torch.manual_seed(i)
        net = dinov2.DINOv2(64, 1, 32, side=2)
        for parameter in net.parameters():
            parameter.data.normal_(0, 0.3)
        torch.save(net.state_dict(), tmp_path / f"dinov2_{i}_pretrain.pth")
    weights = tmp_path / "dinov2_1_pretrain.pth"
    tokens.main([*map(str, (objects / "views", tmp_path / "set", "--weights", weights, "--size", 28, "--workers", 0))])
    spec = json.loads((tmp_path / "set" / "tokens.json").read_text())
    assert spec == dict(features="dinov2", size=28, views=2, weights_sha256=pack.file_sha256(weights))
    ckpt = dict(model={}, ema={}, step=1, config=dict(tokens=spec))
    torch.save(ckpt, tmp_path / "ckpt.pt")
    views = [str(objects / "views" / "train" / "airplane" / f"000005-{i}.png") for i in (0, 1)]

    def own(*files, weights=weights):
        out = tmp_path / "own.npz"
        tokens.main(["--image", *files, *map(str, ("--ckpt", tmp_path / "ckpt.pt", "--out", out, "--weights", weights))])
        return np.load(out)["cond_token"]
    stored = np.load(tmp_path / "set" / "train" / "airplane" / "000005.npz")["cond_token"]
    with torch.no_grad():
        expected = net(torch.from_numpy(tokens.read_views(views, 28))).flatten(0, 1)
    assert np.allclose(own(*views), stored, atol=4e-3) and np.allclose(stored[:, :64], expected, atol=4e-3)
    assert np.allclose(own(views[0]), own(*views)[:4], atol=1e-5)
    refused("SHA-256", call=lambda: own(views[0], weights=tmp_path / "dinov2_0_pretrain.pth"))
    refused("3 views", call=lambda: own(views[0], *views))
    torch.save(ckpt | dict(config=dict(tokens=None)), tmp_path / "ckpt.pt")
    refused("ckpt.pt", call=lambda: own(views[0]))


# --- packed sets

def draw(path, i, size=(40, 30)):
    """An image whose colours tell item i from all others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(i).integers(0, 256, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.BICUBIC).save(path)


@pytest.fixture()
def images(tmp_path):
    for i in range(22):
        draw(tmp_path / "in" / "ab"[i % 2] / f"{i:02d}.{('png', 'jpg')[i % 3 == 0]}", i)
    return tmp_path / "in"


def test_packed_is_the_folder_pixel_for_pixel(images, tmp_path):
    """If packing changed a pixel, a class, the order or the mirroring."""
    pack.main([*map(str, (images, tmp_path / "set", "--res", 16, "--workers", 1))])
    folder, packed = (data.load("folder", path, res=16, flip=True) for path in (images, tmp_path / "set"))
    assert packed.class_names == folder.class_names == ["a", "b"] and len(packed) == 22
    for seed in (None, 3):
        for i in range(22):
            (x, label), (y, same) = (ds.item(i, seed and np.random.default_rng((seed, i))) for ds in (folder, packed))
            assert (x == y).all() and label == same
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert (manifest["count"], manifest["done"], manifest["res"], manifest["file_type"]) == (22, 22, 16, "jpeg+png")
    assert sorted(os.listdir(tmp_path / "set")) == ["images.npy", "manifest.json"]
    assert (np.load(tmp_path / "set" / "images.npy")[7] == folder.item(7)[0]).all()          # readable without us
    assert pack.pack(images, tmp_path / "plain", 8, labels=False)["class_names"] == []


def test_interrupted_pack_goes_on_and_gives_the_same_bytes(images, tmp_path, monkeypatch):
    """If an interrupted pack lost, doubled or reordered images, or began again."""
    monkeypatch.setattr(pack, "SAVE_EVERY", 4)
    pack.pack(images, tmp_path / "straight", 16)
    item, read = data.Folder.item, []

    def stops(source, i, rng=None):
        read.append(i)
        if len(read) == 11:
            raise KeyboardInterrupt
        return item(source, i, rng)
    monkeypatch.setattr(data.Folder, "item", stops)
    with pytest.raises(KeyboardInterrupt):
        pack.pack(images, tmp_path / "stopped", 16)
    assert json.loads((tmp_path / "stopped" / "manifest.json").read_text())["done"] == 8
    refused("8 of 22", "again", call=lambda: data.load("folder", tmp_path / "stopped", res=16))
    pack.pack(images, tmp_path / "stopped", 16)
    assert read[11:] == [*range(8, 22)]
    for name in ("images.npy", "manifest.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_pack_refusals(images, tmp_path):
    """If a pack of one set were mixed with another, or written into its source."""
    pack.pack(images, tmp_path / "set", 16)
    refused("another res", call=lambda: pack.pack(images, tmp_path / "set", 8))
    refused("other files", call=lambda: pack.pack(images, tmp_path, 16))
    refused("in the source", call=lambda: pack.pack(images, images / "a" / "set", 16))
    (images / "a" / "torn.png").write_bytes(b"no image")
    refused("another", "count", call=lambda: pack.pack(images, tmp_path / "set", 16))
    refused("torn.png", "tools/check.py", call=lambda: pack.pack(images, tmp_path / "new", 16))
    (images / "a" / "torn.png").rename(images / "a" / "99.png")
    (images / "a" / "02.png").unlink()
    refused("names", call=lambda: pack.pack(images, tmp_path / "set", 16))
    (tmp_path / "set" / "manifest.json").write_text("{")
    refused("set", call=lambda: pack.pack(images, tmp_path / "set", 16))


# --- check

def checked(path, *more):
    with pytest.raises(SystemExit) as status:
        check.main([str(path), "--workers", "0", *map(str, more)])
    return status.value.code


def test_check_lists_what_is_wrong(images, tmp_path, capsys):
    """If an unreadable, doubled or small image went unnoticed, or a clean set were called wrong."""
    assert checked(images) == 0
    assert capsys.readouterr().out == f"a: 11\nb: 11\n{images}: 22 items; nothing wrong\n"
    (images / "a" / "torn.png").write_bytes((images / "a" / "02.png").read_bytes()[:60])
    (images / "b" / "twin.png").write_bytes((images / "a" / "02.png").read_bytes())
    draw(images / "b" / "small.png", 77, size=(10, 10))
    (images / "notes.txt").write_text("no image")
    assert checked(images, "--workers", 1) == 1
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 6 and "b: 13" in out and "25 items; 1 unreadable, 1 duplicate, 1 wrong size" in out[-1]
    assert any(line.startswith("unreadable: ") and "torn.png" in line for line in out)
    assert any(line.startswith("duplicate: ") and "twin.png" in line and "02.png" in line for line in out)
    assert any(line.startswith("wrong size: ") and "small.png: 10 x 10; expected 40 x 30" in line for line in out)
    assert checked(images, "--least", 31) == 1 and capsys.readouterr().out.count("wrong size: ") == 24
    refused("nothing", call=lambda: check.check(tmp_path / "nothing"))


def test_check_of_packed_sets_and_clouds(images, objects, tmp_path, capsys):
    """If a damaged packed set, or a bad cloud, were not found."""
    pack.pack(images, tmp_path / "set", 16)
    assert not check.check(tmp_path / "set")
    raw = bytearray((tmp_path / "set" / "images.npy").read_bytes())
    raw[-5] ^= 1
    (tmp_path / "set" / "images.npy").write_bytes(raw)
    assert check.check(tmp_path / "set") == 1 and "damaged: " in capsys.readouterr().out
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 4, 4, 3), np.uint8))
    assert check.check(tmp_path / "a.npz") == 2                                            # all the same
    for split, n in (("train", 3), ("val", 2)):
        for i in range(n):
            path = tmp_path / "clouds" / "03001627" / split / f"{i}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.random.default_rng((n, i)).random((20, 3)))
    assert not check.check(tmp_path / "clouds")
    assert "chair train: 3\nchair val: 2\n" in capsys.readouterr().out
    np.save(path, np.full((20, 3), np.nan))
    assert check.check(tmp_path / "clouds", least=30) == 5
    out = capsys.readouterr().out
    assert "unreadable: " in out and str(path) in out and out.count("wrong size: ") == 4
    assert not check.check(objects / "set") and "no class train: 7\nno class val: 2\n" in capsys.readouterr().out
