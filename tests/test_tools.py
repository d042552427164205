"""tools/: meshes in every format and their point clouds, views, condition tokens, packed sets, and check."""
import json
import math
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image

import data
import toys
from conftest import ROOT, python, refused
from metrics import dinov2
from tools import check, meshes, pack, render, tokens

CUBE = np.array([(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)], float) * (3, 2, 1)     # area 22
QUADS = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
TRIANGLES = [t for a, b, c, d in QUADS for t in ((a, b, c), (a, c, d))]
RED, BLUE = (255, 51, 51), (0, 0, 255)
ONE = "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"

def rows(table, head=""):
    return "".join(head + " ".join(map(str, row)) + "\n" for row in table)

def area(triangles):
    edges = triangles[:, 1:] - triangles[:, :1]
    return np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1).sum() / 2

def is_the_box(triangles):
    a, b, c = np.moveaxis(triangles, 1, 0)
    volume = (a * np.cross(b, c)).sum() / 6                    # 6 only where all faces look the same way
    return len(triangles) == 12 and math.isclose(area(triangles), 22) and math.isclose(abs(volume), 6)

def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return meshes.read_mesh(path)

def ply(n_points, n_faces, form="ascii", colours=()):
    fields = [f"property float {x}" for x in "xyz"] + [f"property uchar {c}" for c in colours]
    fields += [f"element face {n_faces}", "property list uchar int vertex_indices", "end_header", ""]
    return "\n".join(["ply", f"format {form} 1.0", f"element vertex {n_points}", *fields])

def write_meshes(root):
    """One box in several formats."""
    root.mkdir(parents=True)
    (root / "box.mtl").write_text("newmtl a # red\nKd 1 0.2 0.2 # red\n")
    (root / "quads.obj").write_text("mtllib box.mtl\n" + rows(CUBE, "v ") + "usemtl a # red\n"
                                    + rows([[f"{i + 1}/1/1" for i in q] for q in QUADS], "f "))
    (root / "quads.OFF").write_text(f"OFF8 6 0\n{rows(CUBE)}" + rows([(4, *q, *RED) for q in QUADS]))
    (root / "points.off").write_text(f"COFF 8 12 0\n{rows([(*p, 1.0, 0.2, 0.2, 1) for p in CUBE])}"
                                     + rows([(3, *t) for t in TRIANGLES]))
    rgb = "red", "green", "blue"
    painted = [(*p, *RED) for p in CUBE]
    mixed = [(4, *q) for q in QUADS[:5]] + [(3, *t) for t in TRIANGLES[10:]]
    (root / "ascii.PLY").write_text(ply(8, 7, colours=rgb) + rows(painted) + rows(mixed))
    points = np.array(painted, [(c, ">f4") for c in "xyz"] + [(c, "u1") for c in "rgb"])
    faces = b"".join(b"\4" + np.array(q, ">i4").tobytes() for q in QUADS)
    (root / "big.ply").write_bytes(ply(8, 6, "binary_big_endian", rgb).encode() + points.tobytes() + faces)
    facets = np.zeros(12, [("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("spare", "<u2")])
    facets["corners"] = CUBE[np.array(TRIANGLES)]
    (root / "binary.stl").write_bytes(b"solid in name".ljust(80) + np.uint32(12).tobytes() + facets.tobytes())
    loops = [f"OUTER LOOP\n{rows(CUBE[[*t]], 'VERTEX ')}ENDLOOP\n" for t in TRIANGLES]
    facets = "".join(f"FACET NORMAL 0 0 0\n{loop}ENDFACET\n" for loop in loops)
    (root / "capitals.stl").write_text(f"SOLID box\n{facets}ENDSOLID box\n")

def test_every_format_gives_one_surface(tmp_path, capfd):
    """If a reader lost a face, a colour or a byte order, or trimesh's log came through."""
    write_meshes(tmp_path / "box")
    files = [file for file in (tmp_path / "box").iterdir() if file.suffix != ".mtl"]
    assert len(files) == 7
    for file in files:
        triangles, colours = meshes.read_mesh(file)
        assert triangles.dtype == np.float64 and is_the_box(triangles), file
        assert colours is None if file.suffix == ".stl" else (colours == RED).all(), file
    assert capfd.readouterr() == ("", "")

def test_concave_faces(tmp_path):
    """If a fan from the wrong corner left the polygon."""
    rng = np.random.default_rng(0)
    for n in (4, 5, 9):
        angles = np.sort(rng.uniform(0.1, 1.5 * np.pi, n - 1))      # all corners see the one at the origin
        rim = rng.uniform(1, 3, (n - 1, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)
        x, y = np.concatenate([np.zeros((1, 2)), rim]).T
        expected = abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        for start in range(n):
            points = np.roll(np.stack([x, y, 0 * x], 1), start, 0) @ turn
            body = rows(points) + rows([(n, *range(n))])
            for name, text in (("a.obj", rows(points, "v ") + rows([range(1, n + 1)], "f ")),
                               ("a.off", f"OFF {n} 1 0\n{body}"), ("a.ply", ply(n, 1) + body)):
                triangles, _ = read(tmp_path / name, text)
                assert len(triangles) == n - 2
                assert math.isclose(area(triangles), expected, rel_tol=1e-6), (name, n, start)
    radius = [0.4 + 1.6 * (k % 2) for k in range(10)]
    star = [(r * math.cos(k * math.pi / 5), r * math.sin(k * math.pi / 5), 0) for k, r in enumerate(radius)]
    text = rows(star, "v ") + rows([range(1, 11)], "f ")
    refused("a.obj", "concave", call=lambda: read(tmp_path / "a.obj", text))

def test_what_obj_files_hold(tmp_path):
    """If comments, continued lines, libraries or textures changed the surface or its colour."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "one.mtl").write_text("newmtl other\nKd 0 0 1\n")
    cloth = "newmtl cloth\nKd 0 0 0\nmap_Kd ..\\cloth.png\n"
    cloth += cloth.replace("cloth\n", "tiles\n").replace("map_Kd", "map_Kd -s 1 1 1 -clamp on")
    (tmp_path / "in" / "two b.mtl").write_text("newmtl red#1\nKd 1 0.2 0.2\n" + cloth)
    Image.fromarray(np.uint8([[RED, BLUE]])).resize((64, 32), Image.NEAREST).save(tmp_path / "cloth.png")
    points, faces = rows(CUBE, "v "), rows([[i + 1 for i in t] for t in TRIANGLES], "f ")
    library = "mtllib one.mtl\nmtllib two b.mtl\n"
    painted = rows([(*p, 1, 0.2, 0.2) for p in CUBE], "v ")
    places = rows([(0.2, 0.5), (0.3, 0.6), (0.1, 0.4)], "vt ")
    places += rows([[f"{i + 1}/{k}" for k, i in enumerate(t, 1)] for t in TRIANGLES], "f ")
    back = rows([[i - 8 for i in t] for t in TRIANGLES], "f ")
    for text, colour in [
            (points.replace("\n", " # point\n") + "# f 1 2 3\n" + faces.replace("\n", " # side\n"), None),
            (points.replace(" ", " \\\n") + faces.replace(" ", " \\\r\n"), None),
            ((points + faces).replace(" ", "\t").replace("\n", "\r\n"), None), (points + back, None),
            (painted + faces, RED), ("mtllib no.mtl\nusemtl red#1\n" + painted + faces, RED),
            (library + points + "usemtl red#1\n" + faces, RED),
            (library + points + "usemtl cloth\n" + places, RED),
            (library + points + "usemtl cloth\n" + faces, BLUE),    # no places: the middle of the texture
            (library + points + "usemtl no\n" + places, None),
            ("\ufeff" + points + faces, None), (points.replace("\n", "\r") + faces, None),
            ("".join(rows(CUBE[[*t]], "v ") + "f -3 -2 -1\n" for t in TRIANGLES), None),
            (rows([(*p, *RED) for p in CUBE], "v ") + faces, RED),
            ("mtllib .\\two b.mtl\n" + points + "usemtl red#1 # it\n" + faces, RED),
            (library + points + "usemtl tiles\n" + places, RED)]:
        triangles, colours = read(tmp_path / "in" / "a.OBJ", text)
        assert is_the_box(triangles), text
        assert colours is None if colour is None else (colours == colour).all(), text
    several = f"usemtl red#1\n{faces}usemtl no\n{faces}"
    colours = read(tmp_path / "in" / "a.obj", library + points + several)[1]
    assert sorted(map(tuple, colours.tolist())) == 12 * [3 * (meshes.GREY,)] + 12 * [RED]
    hexagon = rows([(math.cos(k), math.sin(k), 0) for k in np.arange(6) * math.pi / 3], "v ")
    mixed = hexagon + "vt 0 0\nf 1/1 3/1 5/1\nf 1 2 3 4 5 6\n"        # six numbers in either face
    assert math.isclose(area(read(tmp_path / "in" / "a.obj", mixed)[0]), 9 / 4 * 3 ** 0.5, rel_tol=1e-5)

def test_what_polygon_files_hold(tmp_path):
    """If colours of faces or of other names and numbers were lost, or half a file passed for a whole."""
    sides = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]
    halves = [tuple(x // 255 for x in side) for side in sides]
    head = ply(8, 6).replace("end_header\n", rows(zip("rgb"), "property {} ") + "end_header\n")
    for number, paint in (("uchar", sides), ("float", sides), ("float", halves), ("int", sides)):
        text = head.format(*3 * [number]) + rows(CUBE)
        text += rows([(4, *q, *side) for q, side in zip(QUADS, paint)])
        off = f"OFF 8 6 0\n{rows(CUBE)}" + rows([(4, *q, *side) for q, side in zip(QUADS, paint)])
        for triangles, colours in (read(tmp_path / "a.ply", text), read(tmp_path / "a.off", off)):
            assert is_the_box(triangles) and (colours == np.repeat(sides, 2, 0)).all()
    names = [f"diffuse_{c}" for c in ("red", "green", "blue")]
    text = ply(8, 12, colours=names) + rows([(*p, *RED) for p in CUBE]) + rows([(3, *t) for t in TRIANGLES])
    assert (read(tmp_path / "a.ply", text)[1] == RED).all()
    refused("fewer faces", call=lambda: read(tmp_path / "a.ply", text[:-8]))
    faces = QUADS[0], (4, 6, 7), (0, 4, 5, 1, 3)
    sizes = b"".join(bytes([len(q)]) + np.array(q, "<i4").tobytes() for q in faces)
    binary = ply(8, 3, "binary_little_endian").encode() + CUBE.astype("<f4").tobytes() + sizes
    refused("several sizes", call=lambda: read(tmp_path / "a.ply", binary))         # as long as three quads
    for text in (off[:-20], off.replace("OFF", "4OFF"), off.replace("4 1 5 7 3", "9 1 5 7 3")):
        refused("found", call=lambda: read(tmp_path / "a.off", text))

def test_what_stl_files_hold(tmp_path):
    """If a word in a name, an end that is missing or colours in either order changed what is read."""
    write_meshes(tmp_path / "box")
    text = (tmp_path / "box" / "capitals.stl").read_text().replace("SOLID box", "solid vertex 1")
    assert is_the_box(read(tmp_path / "a.stl", text.replace("\n", "\r"))[0])
    refused("without an end", call=lambda: read(tmp_path / "a.stl", text + text[:400]))
    raw = np.frombuffer((tmp_path / "box" / "binary.stl").read_bytes(), np.uint8).copy()
    facets = raw[84:].reshape(12, 50)
    for mark, head, colour in ((0xFC00, b"", (255, 0, 0)), (0x7C00, b"COLOR=abc", BLUE),
                               (0x8000, b"COLOR=abc", (97, 98, 99))):
        facets[:, 48:] = np.frombuffer(np.uint16(mark).tobytes(), np.uint8)
        raw[:80] = list(head.ljust(80))
        triangles, colours = read(tmp_path / "a.stl", raw.tobytes())
        assert is_the_box(triangles) and (colours == colour).all()

def gltf(path, kind="f4", material=None, places=None, paint=None, **more):
    """The box as glTF by hand, its numbers of that kind, at (10,0,0), beside primitives without points."""
    points = np.pad(CUBE, ((0, 0), (0, 1))).astype(kind)
    tables = dict(SCALAR=np.array(TRIANGLES, "<u4").reshape(-1, 1), VEC3=points)
    tables |= dict(VEC2=np.float32(8 * [places])) if places else {}
    tables |= dict(VEC4=np.uint8(8 * [(*paint, 255)])) if paint else {}
    names = dict(VEC3="POSITION", VEC2="TEXCOORD_0", VEC4="COLOR_0")
    numbers = dict(f4=5126, i2=5122, u4=5125, u1=5121)
    blob, views, accessors = b"", [], []
    for k, (name, table) in enumerate(tables.items()):
        number = numbers[table.dtype.str[1:]]
        size = dict(byteLength=table.nbytes, byteStride=table[0].nbytes)
        views.append(dict(buffer=0, byteOffset=len(blob), **size))
        accessors.append(dict(bufferView=k, componentType=number, count=len(table), type=name))
        blob += table.tobytes()
    part = dict(attributes={names[name]: k for k, name in enumerate(tables) if k}, indices=0)
    parts = [dict(attributes={}), part, dict(attributes={"NORMAL": 1})]
    tree = dict(asset=dict(version="2.0"), scene=0, scenes=[dict(nodes=[0])], meshes=[dict(primitives=parts)],
                nodes=[dict(mesh=0, translation=[10, 0, 0])], accessors=accessors, bufferViews=views,
                buffers=[dict(byteLength=len(blob))])
    if material is not None:
        part["material"], tree["materials"] = 0, [dict(pbrMetallicRoughness=material)]
    content = b""
    for word, chunk in ((b"JSON", json.dumps(tree | more).encode()), (b"BIN\0", blob)):
        content += struct.pack("<I4s", len(chunk), word) + chunk
    path.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(content)) + content)

def test_gltf(tmp_path, capfd):
    """If a transform, a factor or a texture were lost, or a primitive without points ended it all."""
    Image.fromarray(np.uint8([[RED, BLUE]])).resize((64, 32), Image.NEAREST).save(tmp_path / "cloth.png")
    images = dict(images=[dict(uri="cloth.png")], textures=[dict(source=0)])
    images["images"][0]["uri"] = "clo%74h.png"

    def move(**how):
        return dict(index=0, extensions=dict(KHR_texture_transform=how))
    glossy = dict(extensions=dict(KHR_materials_pbrSpecularGlossiness=dict(diffuseTexture=dict(index=0))))
    box = dict(mesh=0, translation=[10, 0, 0])
    texture, half = dict(baseColorTexture=dict(index=0)), dict(baseColorFactor=[0.5, 0.5, 0.5, 1])
    for options, colour in [
            ({}, None), (dict(kind="i2"), None), (dict(material=dict(baseColorFactor=[1, 0.2, 0.2, 1])), RED),
            (dict(paint=RED), RED), (dict(material={}, paint=RED), RED), (dict(material={}), (255, 255, 255)),
            (dict(material=texture, places=(0.2, 0.5), **images), RED),
            (dict(material=dict(baseColorTexture=move(offset=[-0.6, 0])), places=(0.8, 0.5), **images), RED),
            (dict(material=dict(baseColorTexture=move(scale=[2, 1], rotation=math.pi / 2)), places=(0.3, 0.2),
                  **images), RED),
            (dict(material={}, materials=[glossy], places=(0.2, 0.5), **images), RED),
            (dict(cameras=[{}], scenes=[dict(nodes=[1])], nodes=[box, dict(camera=0, children=[0])]), None),
            (dict(material=texture | half, places=(0.2, 0.5), **images), (128, 26, 26))]:
        gltf(tmp_path / "a.GLB", **options)
        triangles, colours = meshes.read_mesh(tmp_path / "a.GLB")
        assert is_the_box(triangles - (10, 0, 0)), options
        assert colours is None if colour is None else abs(colours.astype(int) - colour).max() <= 1, options
    raw = (tmp_path / "a.GLB").read_bytes()                # the last again, as .gltf beside its .bin
    end = 20 + int.from_bytes(raw[12:16], "little")
    (tmp_path / "a.bin").write_bytes(raw[end + 8:])
    text = raw[20:end].replace(b'"buffers": [{', b'"buffers": [{"uri": "a.bin", ')
    triangles, colours = read(tmp_path / "a.gltf", text)
    assert is_the_box(triangles - (10, 0, 0)) and abs(colours.astype(int) - (128, 26, 26)).max() <= 1
    text = text.replace(b'"VEC3"', b'"VEC3", "normalized": true')
    refused("normalised", call=lambda: read(tmp_path / "a.gltf", text))
    for old, new in ((b'"indices": 0', b'"indices": 0, "mode": 6'), (b'"VEC3"', b'"VEC3", "sparse": {}')):
        refused("trimesh does not read", call=lambda: read(tmp_path / "a.gltf", raw[20:end].replace(
            b'"buffers": [{', b'"buffers": [{"uri": "a.bin", ').replace(old, new)))
    for name in ("KHR_draco_mesh_compression", "EXT_meshopt_compression", "EXT_mesh_gpu_instancing", "X_y"):
        gltf(tmp_path / "b.glb", extensionsRequired=[name])
        refused("b.glb", name, call=lambda: meshes.read_mesh(tmp_path / "b.glb"))
    assert capfd.readouterr() == ("", "")

@pytest.mark.parametrize("name,text", [
    ("a.obj", ""), ("a.obj", "v 0 0 0\n"), ("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n"),
    ("a.obj", "v 0 zero 0\nf 1 1 1\n"), ("a.obj", "v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n"),
    ("a.obj", "v 0 0 0\nv nan 0 0\nv 0 1 0\nf 1 2 3\n"), ("a.off", ""), ("a.off", "OOF\n3 1 0\n"),
    ("a.off", ONE[:-8]), ("a.off", ONE.replace("0 1 2", "0 1 3")), ("a.off", ONE.replace("0 1 2", "0 1 -1")),
    ("a.ply", "no"), ("a.ply", ply(3, 1)), ("a.ply", ply(1, 0) + "0 0 0\n"), ("a.txt", ""),
    ("a.stl", "solid nothing\nendsolid\n"), ("a.stl", "x"), ("a.glb", "glTF"), ("a.gltf", "{}")])
def test_broken_meshes_are_named(tmp_path, name, text, capfd):
    """If a broken file ended in a traceback, or gave a surface."""
    refused(tmp_path / name, "expected", call=lambda: read(tmp_path / name, text))
    assert capfd.readouterr() == ("", "")

# --- point clouds of meshes

def run(tool, *words):
    tool.main([*map(str, words), *(() if "--workers" in words else ("--workers", "0"))])

def test_clouds_of_meshes(tmp_path, capsys):
    """If points were not uniform by area, depended on other files, or fell into the wrong class or split."""
    src, dst, csv = tmp_path / "src", tmp_path / "dst", tmp_path / "all.csv"
    write_meshes(src / "box" / "val")
    for name in ("points.off", "ascii.PLY", "big.ply", "capitals.stl"):
        (src / "box" / "val" / name).unlink()
    model = src / "04256520" / "abc" / "models" / "model_normalized.obj"
    model.parent.mkdir(parents=True)
    corners = (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (3, 0, 1), (0, 1, 1)             # areas 1 : 3
    model.write_text(rows(corners, "v ") + "f 1 2 3\nf 4 5 6\n")
    csv.write_text("id,synsetId,subSynsetId,modelId,split\n1,04256520,04256520,abc,test\n")
    flags = src, dst, "--points", 4000, "--splits", csv
    run(meshes, *flags)
    assert "sofa test: 1\n" in capsys.readouterr().out
    written = {str(f.relative_to(dst)) for f in dst.rglob("*.npy")}
    assert written >= {"04256520/test/abc.npy", "box/val/binary.npy", "box/val/quads.npy"}
    assert len(written) == 4
    cloud = np.load(dst / "04256520" / "test" / "abc.npy")
    assert cloud.shape == (4000, 3) and cloud.dtype == np.float32
    assert abs((cloud[:, 2] > 0.5).mean() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 4000)    # 4 standard errors
    one = meshes.cloud_of((None, "val", "box", "a"), 1, np.eye(3)[None])
    assert np.allclose(one, [[0.13556, 0.855275, 0.009165]], atol=1e-6)         # as in every version
    box = dst / "box" / "val" / "binary.npy"
    first, before = np.load(box), {f: f.stat().st_mtime_ns for f in dst.rglob("*.npy")}
    box.unlink()
    (src / "box" / "val" / "torn.obj").write_text("f 1 2 3")
    refused("torn.obj", "--skip-bad", call=lambda: run(meshes, *flags))
    run(meshes, *flags, "--skip-bad", "--workers", 1)
    assert "left out: " in (out := capsys.readouterr().out) and "4 of 5 meshes" in out
    assert (np.load(box) == first).all()
    assert all(f == box or f.stat().st_mtime_ns == t for f, t in before.items())
    run(meshes, src, tmp_path / "first", "--val", 1, "--n", 1, "--points", 3)
    assert np.load(tmp_path / "first" / "04256520" / "val" / "abc.npy").shape == (3, 3)
    refused("expected 5", call=lambda: run(meshes, src, dst, "--points", 5))
    refused("no meshes", call=lambda: run(meshes, dst, tmp_path / "x"))
    refused("model_normalized.obj", "modelId", call=lambda: run(meshes, src, dst, "--splits", model))
    for name in ("x-y/train/a-b.off", "x-y/a-b.off", "x-y/a/b.off"):
        (src / name).parent.mkdir(parents=True, exist_ok=True)
        (src / name).write_text(ONE)
    refused("a-b.off", "names that differ", call=lambda: run(meshes, src, tmp_path / "y"))

def test_a_full_disk_in_a_worker_is_one_line(tmp_path):
    """If what goes wrong in a worker came as a traceback."""
    (tmp_path / "table" / "train").mkdir(parents=True)
    (tmp_path / "table" / "train" / "000000.npy.tmp").symlink_to("/dev/full")
    _, err = python(ROOT / "tools" / "meshes.py", "solids:train", tmp_path, "--workers", 1, status=2)
    last = err.splitlines()[-1]
    assert last.startswith("meshes.py: ") and "No space left on device" in last and "000000.npy" in last
    assert "Traceback" not in err

# --- views and condition tokens

def test_rasterise_against_each_triangle_alone():
    """If a triangle of any size missed a pixel, or a farther one were seen through a nearer."""
    rng, side = np.random.default_rng(0), 23
    i, j = np.mgrid[:side, :side].reshape(2, -1) + 0.5
    for scale in (2, 10, 50):
        x, y = np.moveaxis(rng.uniform(0, side, (25, 1, 2)) + rng.normal(0, scale, (25, 3, 2)), 2, 0)
        near = rng.uniform(0.2, 0.5, (25, 3))
        expected, depth = np.full(side * side, -1), np.zeros(side * side)
        for t in range(25):
            shares = np.linalg.solve([x[t], y[t], np.ones(3)], np.stack([j, i, np.ones(side * side)]))
            seen = (shares.min(0) >= 0) & (near[t] @ shares > depth)
            expected[seen], depth[seen] = t, (near[t] @ shares)[seen]
        assert (render.rasterise(x, y, near, side).reshape(-1) == expected).all()
    for x in (np.zeros((0, 3)), np.array([[9.0, 10, 11]])):                # nothing, and beside the view
        assert (render.rasterise(x, x * 0 + [[1, 2, 1]], x * 0 + 1, 5) == -1).all()

def test_views_are_those_of_the_paper():
    """If field of view, distance, sides or handedness of the cameras were off."""
    ball = toys.lathe([(math.cos(a), math.sin(a)) for a in np.linspace(-math.pi / 2, math.pi / 2, 65)])
    views = render.render(ball, size=224)
    assert views.shape == (2, 224, 224, 3) and views.dtype == np.uint8
    seen = (views < 250).any(3)
    radius = 112 * math.tan(math.asin(1 / 3.5)) / math.tan(math.radians(20))   # a unit ball, 3.5 away
    assert abs(np.sqrt(seen.sum((1, 2)) / math.pi) - radius).max() < 1
    assert abs(np.argwhere(seen[0]).mean(0) - 111.5).max() < 0.5
    # a block at the far end of x and one on top: right and left, and up, in views from opposite sides
    blocks = np.concatenate([toys.box((0.8, 0, 0), (0.1, 0.1, 0.1)), toys.box((0, 0.8, 0), (0.1, 0.1, 0.1))])
    paint = np.repeat([[255, 0, 0], [0, 0, 255]], 12, 0)
    for view, side in zip(render.render(blocks, paint).astype(int), (1, -1)):
        block, top = (np.argwhere(view[..., c] - view[..., 2 - c] > 50).mean(0) - 223.5 for c in (0, 2))
        assert side * block[1] > 60 and abs(block[0]) < 3 and top[0] < -100 and abs(top[1]) < 3

def test_rays_meet_what_is_seen():
    """If a patch's Plucker ray did not pass through the points that the patch shows."""
    rays = tokens.rays(2, 448)
    d, m = rays[..., :3].astype(float), rays[..., 3:].astype(float)
    assert rays.shape == (2, 1024, 6) and abs((d * m).sum(2)).max() < 1e-6
    assert np.allclose(np.linalg.norm(d, axis=2), 1, atol=1e-6)
    for point in np.random.default_rng(0).uniform(-0.5, 0.5, (4, 3)):
        for v, view in enumerate(render.render(toys.box(point, (0.004, 0.004, 0.004)))):
            i, j = np.argwhere((view < 250).any(2)).mean(0)
            distances = np.linalg.norm(np.cross(point, d[v]) - m[v], axis=1)   # of the point from each ray
            assert distances[int(i // 14) * 32 + int(j // 14)] < min(0.06, distances.min() + 0.02)

@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Rendered solids with raw patches as tokens: views/ and set/, 7 of train and 2 of val."""
    root = tmp_path_factory.mktemp("objects")
    for split, n in (("train", 7), ("val", 2)):
        run(render, f"solids:{split}", root / "views", "--n", n, "--size", 56, "--points", 600)
    run(tokens, root / "views", root / "set", "--features", "patches", "--size", 28)
    return root

def test_views_and_tokens(objects, tmp_path):
    """If a view, a cloud or a token were another's, or an interrupted command did not go on."""
    stem, file = (objects / part / "train" / "chair" / "000001" for part in ("views", "set"))
    file = file.with_suffix(".npz")
    assert Image.open(f"{stem}-0.png").size == Image.open(f"{stem}-1.png").size == (56, 56)
    found = dict(np.load(file, allow_pickle=False))
    assert found["cond_token"].shape == (8, 594) and found["cond_token"].dtype == np.float16
    views = tokens.read_views([f"{stem}-0.png", f"{stem}-1.png"], 28)
    assert np.allclose(found["cond_token"], tokens.tokens(views, tokens.patches), atol=2e-3)
    surface = toys.Solids(split="train").surface(1).reshape(-1, 3)
    assert found["xyz"].shape == (600, 3) and abs(found["xyz"].max(0) - surface.max(0)).max() < 0.1
    image = np.zeros((1, 42, 42, 3), np.uint8)
    image[0, 14:28, 28:42] = 255                                           # patches in the order of rays
    cells = tokens.tokens(image, tokens.patches)
    assert (cells[5, :588] == 1).all() and (np.delete(cells[:, :588], 5, 0) == -1).all()
    assert cells.shape == (9, 594) and (cells[:, 588:] == tokens.rays(1, 42)[0]).all()
    ds = data.load("objaverse", objects / "set", points=512)
    assert len(ds) == 7 and ds.item(1)[2].shape == (8, 594)
    assert ds.spec == dict(features="patches", size=28, views=2, weights_sha256=None)
    before = {f: f.stat().st_mtime_ns for f in objects.rglob("*.*")}
    file.unlink()
    run(render, "solids:val", objects / "views", "--n", 2, "--points", 600)
    run(tokens, objects / "views", objects / "set", "--features", "patches", "--size", 28)
    assert (np.load(file)["cond_token"] == found["cond_token"]).all()
    new = {f for f, t in before.items() if f.stat().st_mtime_ns != t}
    assert new <= {file, objects / "set" / "tokens.json"}
    flags = "--features", "patches", "--size"
    refused("another setting", call=lambda: run(tokens, objects / "views", objects / "set", *flags, 56))
    refused("no views", call=lambda: run(tokens, tmp_path, tmp_path / "x", *flags, 28))
    with pytest.raises(SystemExit):
        run(tokens, objects / "views", tmp_path / "y", *flags, 50)

def test_tokens_of_ones_own_image(objects, tmp_path):
    """If tokens of an image were not those of training, or made with other weights than in training."""
    weights, ckpt = [tmp_path / f"dinov2_{i}_pretrain.pth" for i in (0, 1)], tmp_path / "ckpt.pt"
    for i in (0, 1):
        torch.manual_seed(i)
        net = dinov2.DINOv2(64, 1, 32, side=2)
        for parameter in net.parameters():
            parameter.data.normal_(0, 0.3)
        torch.save(net.state_dict(), weights[i])
    run(tokens, objects / "views", tmp_path / "set", "--weights", weights[1], "--size", 28)
    spec = json.loads((tmp_path / "set" / "tokens.json").read_text())
    assert spec == dict(features="dinov2", size=28, views=2, weights_sha256=pack.sha256(weights[1]))
    torch.save(dict(model={}, ema={}, step=1, config=dict(tokens=spec)), ckpt)
    views = [objects / "views" / "train" / "airplane" / f"000005-{i}.png" for i in (0, 1)]

    def own(*files, weights=weights[1]):
        run(tokens, "--image", *files, "--ckpt", ckpt, "--out", tmp_path / "own.npz", "--weights", weights)
        return np.load(tmp_path / "own.npz")["cond_token"]
    stored = np.load(tmp_path / "set" / "train" / "airplane" / "000005.npz")["cond_token"]
    with torch.no_grad():
        expected = net(torch.from_numpy(tokens.read_views(views, 28))).flatten(0, 1)
    assert np.allclose(own(*views), stored, atol=4e-3) and np.allclose(stored[:, :64], expected, atol=4e-3)
    assert np.allclose(own(views[0]), own(*views)[:4], atol=1e-5)
    refused("SHA-256", call=lambda: own(views[0], weights=weights[0]))
    refused("3 views", call=lambda: own(views[0], *views))
    torch.save(dict(model={}, ema={}, step=1, config=dict(tokens=None)), ckpt)
    refused("ckpt.pt", call=lambda: own(views[0]))

# --- packed sets and check

def draw(path, i, size=(40, 30)):
    """An image whose colours tell item i from all others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(i).integers(0, 256, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.BICUBIC).save(path)

@pytest.fixture()
def images(tmp_path):
    for i in range(22):
        draw(tmp_path / "in" / "ab"[i % 2] / f"{i:02d}.{'jpg' if i % 3 == 0 else 'png'}", i)
    return tmp_path / "in"

def test_packed_is_the_folder_pixel_for_pixel(images, tmp_path):
    """If packing changed a pixel, a class, the order or the mirroring."""
    run(pack, images, tmp_path / "set", "--res", 16, "--workers", 1)
    folder, packed = (data.load("folder", path, res=16, flip=True) for path in (images, tmp_path / "set"))
    assert packed.class_names == folder.class_names == ["a", "b"] and len(packed) == 22
    assert isinstance(packed.images, np.memmap)
    refused("(22, 16, 16, 3)", "--res 8", call=lambda: data.load("folder", tmp_path / "set", res=8))
    for i in range(22):
        for rng in (lambda: None, lambda: np.random.default_rng(i)):
            (x, label), (y, same) = folder.item(i, rng()), packed.item(i, rng())
            assert (x == y).all() and label == same
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["done"] == manifest["count"] == 22 and manifest["file_type"] == "jpeg+png"
    assert sorted(os.listdir(tmp_path / "set")) == ["images.npy", "manifest.json"]
    assert (np.load(tmp_path / "set" / "images.npy")[7] == folder.item(7)[0]).all()    # readable without us
    assert pack.pack(images, tmp_path / "plain", 8, labels=False)["class_names"] == []

def test_interrupted_pack_goes_on_and_gives_the_same_bytes(images, tmp_path, monkeypatch):
    """If an interrupted pack lost, doubled or reordered images, or began again."""
    monkeypatch.setattr(pack, "SAVE_EVERY", 4)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    pack.pack(images, straight, 16)
    item, read = data.Folder.item, []

    def stops(source, i, rng=None):
        read.append(i)
        if len(read) == 11:
            raise KeyboardInterrupt
        return item(source, i, rng)
    monkeypatch.setattr(data.Folder, "item", stops)
    with pytest.raises(KeyboardInterrupt):
        pack.pack(images, stopped, 16)
    assert json.loads((stopped / "manifest.json").read_text())["done"] == 8
    refused("8 of 22", "again", call=lambda: data.load("folder", stopped, res=16))
    pack.pack(images, stopped, 16)
    assert read[11:] == [*range(8, 22)]
    for name in ("images.npy", "manifest.json"):
        assert (stopped / name).read_bytes() == (straight / name).read_bytes()

def test_pack_refusals(images, tmp_path):
    """If a pack of one set were mixed with another, or written into its source."""
    pack.pack(images, tmp_path / "set", 16)
    refused("another res", call=lambda: pack.pack(images, tmp_path / "set", 8))
    refused("other files", call=lambda: pack.pack(images, tmp_path, 16))
    refused("in the source", call=lambda: pack.pack(images, images / "a" / "set", 16))
    (images / "a" / "02.png").rename(images / "a" / "03.png")
    refused("another names", call=lambda: pack.pack(images, tmp_path / "set", 16))
    (images / "a" / "torn.png").write_bytes(b"no image")
    refused("torn.png", "tools/check.py", call=lambda: pack.pack(images, tmp_path / "new", 16))

def test_check_lists_what_is_wrong(images, tmp_path, capsys):
    """If an unreadable, doubled or small image went unnoticed, or a clean set were called wrong."""
    assert check.check(images) == 0
    assert capsys.readouterr().out == f"a: 11\nb: 11\n{images}: 22 items; nothing wrong\n"
    (images / "a" / "torn.png").write_bytes((images / "a" / "02.png").read_bytes()[:60])
    (images / "b" / "twin.png").write_bytes((images / "a" / "02.png").read_bytes())
    draw(images / "b" / "small.png", 77, size=(10, 10))
    (images / "notes.txt").write_text("no image")
    with pytest.raises(SystemExit) as status:
        run(check, images, "--workers", 1)
    out = capsys.readouterr().out.splitlines()
    assert status.value.code == 1 and len(out) == 6 and "b: 13" in out
    assert out[-1].endswith("25 items; 1 unreadable, 1 duplicate, 1 wrong size")
    for what, *names in (("unreadable", "torn.png"), ("duplicate", "twin.png", "02.png"),
                         ("wrong size", "small.png: 10 x 10; expected 40 x 30")):
        assert any(line.startswith(f"{what}: ") and all(name in line for name in names) for line in out)
    assert check.check(images, least=31) == 26 and capsys.readouterr().out.count("wrong size: ") == 24
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
    assert check.check(tmp_path / "a.npz") == 2                                    # all the same
    for split, i in (("train", 0), ("train", 1), ("train", 2), ("val", 3), ("val", 4)):
        path = tmp_path / "clouds" / "03001627" / split / f"{i}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.random.default_rng(i).random((20, 3)))
    assert not check.check(tmp_path / "clouds")
    assert "chair train: 3\nchair val: 2\n" in capsys.readouterr().out
    np.save(path, np.full((20, 3), np.nan))
    assert check.check(tmp_path / "clouds", least=30) == 5
    out = capsys.readouterr().out
    assert "unreadable: " in out and str(path) in out and out.count("wrong size: ") == 4
    assert not check.check(objects / "set")
    assert "no class train: 7\nno class val: 2\n" in capsys.readouterr().out
