"""Meshes as triangles (`read_mesh`), and as point clouds uniform by area, which --dataset shapenet reads.

    python tools/meshes.py SRC DST [--points 15000] [--n N] [--splits CSV] [--val SHARE] [--skip-bad]

Writes DST/CLASS/SPLIT/NAME.npy, float32 (P,3) in units of the mesh; keeps what is there, so an interrupted
command goes on. In order: `read_mesh`; colours; polygons; a reader for each kind of file, by trimesh, helped
where that goes wrong; jobs and their clouds, which tools/render.py shares. T triangles, P points.
"""
import collections
import csv
import hashlib
import io
import json
import logging
import math
import os
import re
import sys
import warnings
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import CATEGORIES, find_files, read_cloud, reading
from sample import flag_parser, natural, positive, run_main, write_atomic
from tools.pack import CORES, in_parallel
from toys import SPLITS, Solids, on_surface

GREY = 200                      # of a triangle without a colour
# Extensions of glTF that may be required; UNDECODED ones hide the surface even where they are only used.
DECODED = re.compile("KHR_(materials_|lights_|texture_transform|mesh_quantization)|EXT_texture_webp")
UNDECODED = re.compile("compression|instancing")
TRIANGLE, NORMALS = re.compile(r"f( +[1-9][\d/]*){3} *$"), re.compile(r"(\d/\d*)/-?\d*")
FLIP = np.array([1, -1])        # trimesh's v points up, glTF's down

def read_mesh(path):
    """The surface in a file, in its own units: triangles float64 (T,3,3), colours uint8 (T,3) or None."""
    with reading(path, f"a surface, in one of {' '.join(READERS)}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = READERS[Path(path).suffix.lower()](Path(path))
        if any(mesh.faces.min(initial=0) < 0 for mesh, _ in parts):
            raise ValueError("found a face of a point before the first")
        placed = [mesh.triangles @ matrix[:3, :3].T + matrix[:3, 3] for mesh, matrix in parts]
        triangles = np.concatenate([*placed, np.zeros((0, 3, 3))])
        a, b, c = np.moveaxis(triangles, 1, 0)
        area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
        if not np.isfinite(area).all() or not area.any():
            raise ValueError(f"found {len(area)} triangles without a finite area")
        colours = [colours_of(mesh) for mesh, _ in parts]
    if all(colour is None for colour in colours):
        return triangles, None
    grey = [np.full((len(part), 3), GREY, np.uint8) for part in placed]
    return triangles, np.concatenate([b if a is None else a for a, b in zip(colours, grey)])

def colours_of(mesh):
    """uint8 (T,3): the texture at the middle or the material, in glTF times the mean of the corners; else
    that mean alone; None without. Linear numbers of glTF are taken as they are."""
    from trimesh.visual.material import empty_material
    visual, faces = mesh.visual, mesh.faces
    if visual.kind is None:
        return None
    if visual.kind != "texture":
        return visual.face_colors[:, :3]
    material, gltf = visual.material, hasattr(visual.material, "baseColorFactor")
    image = material.baseColorTexture if gltf else material.image
    if image == empty_material().image:                        # stands for a material that is missing
        return None
    factor = material.baseColorFactor if gltf else material.diffuse
    colours = np.tile([1.0, 1, 1] if factor is None else factor[:3] / 255, (len(faces), 1))
    if image is not None:
        middle = np.full((len(faces), 2), 0.5) if visual.uv is None else visual.uv[faces].mean(1)
        texels = material.to_color(middle)[:, :3] / 255
        colours = texels * colours if gltf else texels         # an OBJ's Kd is often black beside its texture
    corners = visual.vertex_attributes.get("color")
    if corners is not None:
        colours = colours * as_bytes(corners)[faces, :3].mean(1) / 255
    return (255 * colours).round().astype(np.uint8)

def as_bytes(colours):
    """uint8, of whole numbers of 8 or 16 bits, or of others up to 1, or to 255 where one is above 1."""
    colours = np.asarray(colours)
    if colours.dtype in (np.uint8, np.uint16):
        largest = np.iinfo(colours.dtype).max
    else:
        largest = 255 if colours.max(initial=0) > 1 else 1
    return (255 * (colours / largest).clip(0, 1)).round().astype(np.uint8)

def fans(points, polygons):
    """Polygons, lists of numbers of points, as triangles (T,3), and the polygon of each (T,). A fan starts at
    the first corner from which it faces one way, and so fills also a concave polygon."""
    sizes = np.array([len(polygon) for polygon in polygons], int)
    triangles, owner = [np.zeros((0, 3), int)], [np.zeros(0, int)]
    for n in {*sizes.tolist()} - {0, 1, 2}:
        left = np.flatnonzero(sizes == n)
        table = np.array([polygons[i] for i in left], int)
        for _ in range(n):
            fan = np.stack([np.repeat(table[:, :1], n - 2, 1), table[:, 1:-1], table[:, 2:]], 2)   # (F,n-2,3)
            a, b, c = np.moveaxis(points[fan], 2, 0)
            normal = np.cross(b - a, c - a)
            along = (normal * normal.sum(1, keepdims=True)).sum(2)
            turned = (along < -1e-9 * abs(along).max(1, keepdims=True)).any(1)
            triangles.append(fan[~turned].reshape(-1, 3))
            owner.append(np.repeat(left[~turned], n - 2))
            left, table = left[turned], np.roll(table[turned], -1, 1)
        if len(left):
            raise ValueError("found a concave face that no fan of triangles fills")
    owner = np.concatenate(owner)
    order = np.argsort(owner, kind="stable")
    return np.concatenate(triangles)[order], owner[order]

def painted(points, polygons, of_points, of_faces):
    """The one part of a file of polygons, with colours of points or faces, in any numbers."""
    import trimesh
    points = np.asarray(points, float)
    triangles, owner = fans(points, polygons)
    of_points = None if of_points is None else as_bytes(of_points)
    of_faces = None if of_faces is None else as_bytes(of_faces)[owner]
    mesh = trimesh.Trimesh(points, triangles, vertex_colors=of_points, face_colors=of_faces, process=False)
    return [(mesh, np.eye(4))]

class Files(dict):
    """The files that trimesh asks for by name: entries put here, else files of FOLDER or ../."""

    def __missing__(self, name):
        return Path(self["FOLDER"], name.replace("\\", "/")).read_bytes()

    get = dict.__getitem__

def by_trimesh(path, content=None, kind=None, files=None):
    """The meshes of a file, or of content made of it, and where they stand in its scene: matrices (4,4)."""
    import trimesh
    logging.getLogger("trimesh").setLevel(logging.CRITICAL)    # it warns of what is refused here
    content, kind = io.BytesIO(content or path.read_bytes()), kind or path.suffix[1:].lower()
    scene = trimesh.load_scene(content, kind, resolver=files or Files(FOLDER=path.parent), process=False)
    placed = [scene.graph[node] for node in scene.graph.nodes_geometry]
    parts = [(scene.geometry[name], matrix) for matrix, name in placed]
    return [part for part in parts if hasattr(part[0], "faces")]

def plain(path):
    """Text without byte-order mark, tabs, continued lines and comments; a # inside a name stays."""
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    text = re.sub(r"\r\n?", "\n", re.sub(r"\\\r?\n|\t", " ", text))
    return re.sub("(?m)^#.*", "", re.sub(" #.*", "", re.sub("(?m)^ +", "", text)))

def read_obj(path):
    """trimesh is given one library, without options of textures, and what `triangulated` leaves."""
    text = plain(path)
    lines = re.findall("(?m)^mtllib +(.*)", text)
    names = [path.parent / name.replace("\\", "/") for line in lines
             for name in dict.fromkeys((line, *line.split()))]
    library = "\n".join(plain(name) for name in names if name.is_file())
    library = re.sub(r"(?im)^(map_kd)( +-[a-z]+( +(on|off|-?[\d.]+))+)+(?= )", r"\1", library)
    text = "mtllib LIBRARY\n" + triangulated(re.sub("(?m)^mtllib .*", "", text))
    files = Files(FOLDER=path.parent, LIBRARY=library.encode("utf-8", "replace"))
    return by_trimesh(path, text.encode("utf-8", "replace"), "obj", files)

def triangulated(text):
    """An OBJ with faces of three corners POINT/PLACE, counted from the first, and colours up to 1."""
    lines, points, places, corners, polygons = text.split("\n"), {}, 0, [], {}
    for i, line in enumerate(lines):
        if line.startswith("v "):
            points[i] = line.split()[1:]
        elif line.startswith("vt "):
            places += 1
        elif line.startswith("f "):
            lines[i] = line = NORMALS.sub(r"\1", line)
            if not TRIANGLE.match(line):
                numbers = [[int(k) for k in corner.split("/") if k] for corner in line.split()[1:]]
                ends = len(points) + 1, places + 1
                polygons[i] = list(range(len(corners), len(corners) + len(numbers)))
                corners += [[k + end * (k < 0) for k, end in zip(corner, ends)] for corner in numbers]
    colours = [row[3:6] for row in points.values() if len(row) == 6]
    if np.array(colours, float).max(initial=0) > 1:
        for i, row in points.items():
            lines[i] = " ".join(["v", *row[:3], *(str(float(x) / 255) for x in row[3:6])])
    if polygons:
        at = np.array([corner[0] for corner in corners]) - 1
        if at.min() < 0:
            raise ValueError("found a face of a point before the first")
        words = ["/".join(map(str, corner)) for corner in corners]
        table, faces = np.array([row[:3] for row in points.values()], float)[at], list(polygons)
        for i in faces:
            lines[i] = ""
        triangles, owner = fans(table, list(polygons.values()))
        for (a, b, c), k in zip(triangles.tolist(), owner.tolist()):
            lines[faces[k]] += f"f {words[a]} {words[b]} {words[c]}\n"
    return "\n".join(lines)

def read_off(path):
    """Without trimesh, which drops its colours. ModelNet's counts follow the word OFF without a space."""
    rows = [row for row in map(str.split, plain(path).split("\n")) if row]
    kind, word, rest = rows[0][0].upper().partition("OFF")
    if not word or set(kind) - set("STCN"):
        raise ValueError(f"found {rows[0][0]}")
    counts = [rest, *rows[0][1:]] if rest or rows[0][1:] else rows.pop(1)
    n_points, n_faces = [int(count) for count in counts if count][:2]
    points, faces = rows[1:1 + n_points], rows[1 + n_points:1 + n_points + n_faces]
    sizes = [int(row[0]) for row in faces]
    if len(faces) < n_faces or any(len(row) <= size for row, size in zip(faces, sizes)):
        raise ValueError(f"found fewer than {n_faces} whole faces")
    polygons = [[int(word) for word in row[1:1 + size]] for row, size in zip(faces, sizes)]
    of_faces = [row[1 + size:][:3] for row, size in zip(faces, sizes)]
    at = 6 if "N" in kind else 3
    of_points = [row[at:at + 3] for row in points if "C" in kind or not kind]
    colours = [np.array(rows, float) if {*map(len, rows)} == {3} else None for rows in (of_points, of_faces)]
    return painted([row[:3] for row in points], polygons, *colours)

def read_ply(path):
    try:
        parts = by_trimesh(path)
    except ValueError as error:
        raise ValueError(f"{error} Of a binary .ply trimesh reads faces of one size: triangles") from None
    if not parts:
        raise ValueError("found points without faces; strips are not read")
    mesh = parts[0][0]
    vertex, face = (mesh.metadata["_ply_raw"][name] for name in ("vertex", "face"))
    polygons = face["data"][next(name for name in face["properties"] if name.startswith("vertex_ind"))]
    whole = len(polygons) == face["length"]
    if polygons.dtype.names:
        whole, polygons = whole and (polygons["f0"] == polygons["f1"].shape[1]).all(), polygons["f1"]
    if not whole:
        raise ValueError("found fewer faces than its head says, or of several sizes in a binary .ply")
    if mesh.visual.kind == "texture" and colours_of(mesh) is not None:
        return parts
    points = np.column_stack([vertex["data"][axis] for axis in "xyz"])
    return painted(points, polygons, ply_colours(vertex), ply_colours(face))

def ply_colours(element):
    for names in (("red", "green", "blue"), ("diffuse_red", "diffuse_green", "diffuse_blue"), "rgb"):
        if {*names} <= {*element["properties"]}:
            return np.column_stack([element["data"][name] for name in names])

def read_stl(path):
    """Names of solids go, since trimesh takes words in them for its own. Colours of a binary file are
    of 5 bits: red first where the highest bit is set (VisCAM), or last where not, with COLOR= (Magics)."""
    content = path.read_bytes()
    if len(content) != 84 + 50 * int.from_bytes(content[80:84], "little"):
        text = re.sub(r"(?im)^\s*(end)?solid.*", r"\1solid", content.decode("latin-1").replace("\r", "\n"))
        parts = by_trimesh(path, text.encode())
        if sum(len(mesh.faces) for mesh, _ in parts) != text.lower().count("endfacet"):
            raise ValueError("found a solid without an end")
        return parts
    parts = by_trimesh(path, content)
    _, magics, own = content[:80].partition(b"COLOR=")
    for mesh, _ in parts:
        marks = mesh.face_attributes["stl"].astype(int)[:, None]
        colours = as_bytes((marks >> ([0, 5, 10] if magics else [10, 5, 0]) & 31) / 31)
        if magics or (marks >> 15).any():
            other = list(own[:3]) if magics else 3 * [GREY]
            mesh.visual.face_colors = np.where((marks >> 15 == 1) == bool(magics), other, colours)
    return parts

def read_gltf(path):
    """The JSON is changed; what follows it in a .glb becomes the buffer of a .gltf."""
    content, files = path.read_bytes(), Files(FOLDER=path.parent)
    if content[:4] == b"glTF":
        end = 20 + int.from_bytes(content[12:16], "little")
        content, files["BUFFER"] = content[20:end], content[end + 8:]
    tree = json.loads(content)
    needed = [name for name in tree.get("extensionsRequired", []) if not DECODED.match(name)]
    unread = [*needed, *(name for name in tree.get("extensionsUsed", []) if UNDECODED.search(name))]
    if unread:
        raise ValueError(f"found {', '.join(dict.fromkeys(unread))}, which is not decoded here")
    for item in tree.get("buffers", []) + [image for image in tree.get("images", []) if "uri" in image]:
        item["uri"] = unquote(item.get("uri", "BUFFER"))
    for node in tree.get("nodes", []):
        node.pop("camera", None)                               # trimesh would lose what hangs on it
    materials = [*tree.get("materials", []), {}]               # the last of colours without a material
    for k, material in enumerate(materials):
        glossy = material.get("extensions", {}).pop("KHR_materials_pbrSpecularGlossiness", None)
        if glossy is not None:                                 # trimesh would add the gloss to the colour
            names = dict(diffuseFactor="baseColorFactor", diffuseTexture="baseColorTexture")
            material["pbrMetallicRoughness"] = {names[k]: glossy[k] for k in names if k in glossy}
        material["name"] = str(k)
    tree["materials"] = materials
    for mesh in tree.get("meshes", []):
        mesh["primitives"] = [part for part in mesh["primitives"] if "POSITION" in part["attributes"]]
        for part in mesh["primitives"]:
            check_primitive(part, tree)
    parts = by_trimesh(path, json.dumps(tree).encode(), "gltf", files)
    for mesh in {id(mesh): mesh for mesh, _ in parts}.values():
        if mesh.visual.kind == "texture" and mesh.visual.uv is not None:
            move = texture_of(materials[int(mesh.visual.material.name)])[1]
            mesh.visual.uv = moved(mesh.visual.uv * FLIP + (0, 1), move) * FLIP + (0, 1)
    return parts

def texture_of(material):
    """The number n of the TEXCOORD_n that it takes, and its KHR_texture_transform."""
    texture = material.get("pbrMetallicRoughness", {}).get("baseColorTexture", {})
    move = texture.get("extensions", {}).get("KHR_texture_transform", {})
    return move.get("texCoord", texture.get("texCoord", 0)), move

def moved(uv, move):
    """glTF's texture coordinates, v downwards; turned as three.js does (the extension says both)."""
    cos, sin = math.cos(move.get("rotation", 0)), math.sin(move.get("rotation", 0))
    return move.get("scale", [1, 1]) * uv @ [[cos, -sin], [sin, cos]] + move.get("offset", [0, 0])

def check_primitive(part, tree):
    """Its texture coordinates become TEXCOORD_0; ValueError for what trimesh would leave out silently."""
    attributes = part["attributes"]
    if "COLOR_0" in attributes:
        part.setdefault("material", len(tree["materials"]) - 1)
    if "material" in part:
        uv = f"TEXCOORD_{texture_of(tree['materials'][part['material']])[0]}"
        if uv in attributes:
            attributes["TEXCOORD_0"] = attributes[uv]
    numbers, names = attributes | part, ("POSITION", "TEXCOORD_0", "COLOR_0", "indices")
    used = {name: tree["accessors"][numbers[name]] for name in names if name in numbers}
    if part.get("mode") == 6:
        raise ValueError("found a fan of triangles, which trimesh does not read")
    if any("sparse" in table or "bufferView" not in table for table in used.values()):
        raise ValueError("found a sparse accessor, which trimesh does not read")
    if any(table.get("normalized") for name, table in used.items() if name != "COLOR_0"):
        raise ValueError("found normalised integers, which trimesh does not scale")

READERS = {".obj": read_obj, ".off": read_off, ".ply": read_ply, ".stl": read_stl, ".glb": read_gltf,
           ".gltf": read_gltf}

# ---- Jobs: one of every surface; its source is a file, or the number of a solid ------------------------
Job = collections.namedtuple("Job", "source split kind name")

def jobs_of(args):
    kind, _, split = args.src.partition(":")
    if kind == "solids":
        names, split = Solids().class_names, split or "train"
        return [Job(i, split, names[i % len(names)], f"{i:06d}") for i in range(args.n or 1)]
    official, jobs = {}, {}
    if args.splits:
        with reading(args.splits, "a table with columns modelId and split"):
            rows = csv.DictReader(Path(args.splits).read_text().splitlines())
            official = {row["modelId"]: row["split"] for row in rows}
    for file in find_files(args.src, set(READERS))[:args.n]:
        parts = Path(file).relative_to(args.src).with_suffix("").parts
        parts = [part for part in parts if part not in ("models", "model_normalized")] or parts[-1:]
        here = [part for part in parts[:-1] if part in SPLITS]
        parts = [*(part for part in parts[:-1] if part not in here), parts[-1]]
        share = int.from_bytes(hashlib.sha256(os.fsencode("/".join(parts))).digest()[:4], "big") / 2 ** 32
        split = here[0] if here else official.get(parts[-1]) or ("val" if share < args.val else "train")
        place = split, parts[0] if len(parts) > 1 else "objects", "-".join(parts[1:] or parts)
        if place in jobs:                                      # link.obj beside link.stl
            place = *place[:2], place[2] + Path(file).suffix.replace(".", "-")
        if place in jobs:
            raise ValueError(f"{file}: found {jobs[place]} in its place; expected names that differ")
        jobs[place] = file
    if not jobs:
        raise ValueError(f"{args.src}: found no meshes; expected files of {' '.join(READERS)}")
    return [Job(file, *place) for place, file in jobs.items()]

def cloud_of(job, points, triangles):
    """Points uniform by area, drawn by a generator of the job's split, class and name alone."""
    seed = 104, *os.fsencode("/".join(job[1:]))                # toys.py and data.py have 101 to 103
    return on_surface(triangles, np.random.default_rng(seed).random((points, 3)))

def write_job(job, dst, points, template, prepare=None):
    """Writes the cloud of a job at DST/template, if it is not there, as the last of its files: before it
    prepare(path, triangles, colours) may write others, and gives the triangles that the cloud is of."""
    path = Path(dst, template.format(**job._asdict()))
    if path.exists() and len(read_cloud(path)) != points:
        raise ValueError(f"{path}: found another number of points; expected {points}, or another directory")
    if not path.exists():
        if isinstance(job.source, int):
            triangles, colours = Solids(split=job.split).surface(job.source), None
        else:
            triangles, colours = read_mesh(job.source)
        path.parent.mkdir(parents=True, exist_ok=True)
        triangles = prepare(path, triangles, colours) if prepare else triangles
        write_atomic(path, partial(np.save, arr=cloud_of(job, points, triangles)))

def run(args, template, prepare=None):
    """write_job of every job; prints how many there are of each class and split."""
    jobs, done = jobs_of(args), collections.Counter()
    write = partial(write_job, dst=args.dst, points=args.points, template=template, prepare=prepare)
    for job, problem in zip(jobs, in_parallel(write, jobs, args.workers, "mesh")):
        if not problem:
            done[CATEGORIES.get(job.kind, job.kind), job.split] += 1
        elif args.skip_bad:
            print(f"left out: {problem}")
        else:
            raise ValueError(f"{problem}; what is done is kept, --skip-bad leaves such files out")
    for (kind, split), count in sorted(done.items()):
        print(f"{kind} {split}: {count}")
    print(f"{done.total()} of {len(jobs)} meshes in {args.dst}, {args.points} points each")

def parser(text, points):
    p = flag_parser(text)
    p.add_argument("src", help=f"directory of meshes ({' '.join(READERS)}), or solids:SPLIT of toys.py")
    p.add_argument("dst", help="directory to write")
    p.add_argument("--points", type=positive, default=points, help=f"of a cloud (default: {points})")
    p.add_argument("--n", type=positive, help="only the first so many (of solids default: 1)")
    p.add_argument("--splits", metavar="CSV", help="ShapeNet's all.csv, for those not in train, val or test/")
    p.add_argument("--val", type=float, default=0.0, help="else: share of the objects for val (default: 0)")
    p.add_argument("--skip-bad", action="store_true", help="list meshes that cannot be read and go on")
    p.add_argument("--workers", type=natural, default=CORES, help=f"processes (default: one a core, {CORES})")
    return p

def main(argv=None):
    run(parser(__doc__, 15000).parse_args(argv), "{kind}/{split}/{name}.npy")

if __name__ == "__main__":
    run_main(main)
