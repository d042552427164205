"""Meshes as triangles (`read_mesh`), and as point clouds uniform by area, which --dataset shapenet reads.

    python tools/meshes.py SRC DST [--points 15000] [--n N] [--splits CSV] [--val SHARE] [--skip-bad]

Writes DST/CLASS/SPLIT/NAME.npy, float32 (P,3) in units of the mesh; keeps what is there, so an interrupted
command goes on. In order: `read_mesh`; colours; polygons; a reader for each kind of file, by trimesh, helped
where that goes wrong; jobs and their clouds, which tools/render.py shares. T triangles, P points.
"""
import argparse
import collections
import csv
import hashlib
import io
import json
import logging
import os
import re
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import CATEGORIES, find_files, read_cloud, reading
from sample import natural, positive, run_main, write_atomic
from tools.pack import CORES, in_parallel
from toys import SPLITS, Solids, on_surface

GREY = 200                      # of a triangle without a colour
POLYGON = re.compile(r"(?m)^f(?: +\S+){4,} *$")

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
        largest = 1 if corners.dtype.kind == "f" else np.iinfo(corners.dtype).max
        colours = colours * corners[faces, :3].mean(1) / largest
    return (255 * colours).round().astype(np.uint8)

def first_corners(points, polygons):
    """Of polygons, lists of places in points, the first corner whose fan faces one way, and so fills also a
    concave one. trimesh makes fans from corner 0."""
    points, first = np.array(points, float), np.zeros(len(polygons), int)
    for n in {len(polygon) for polygon in polygons} - {0, 1, 2, 3}:
        left = np.array([i for i, polygon in enumerate(polygons) if len(polygon) == n])
        table = np.zeros((len(polygons), n), int)
        table[left] = [polygons[i] for i in left]
        while len(left):
            turned = (np.arange(n) + first[left, None]) % n
            fan = points[np.take_along_axis(table[left], turned, 1)]                         # (F,n,3)
            normal = np.cross(fan[:, 1:-1] - fan[:, :1], fan[:, 2:] - fan[:, :1])
            along = (normal * normal.sum(1, keepdims=True)).sum(2)
            left = left[(along < -1e-9 * abs(along).max(1, keepdims=True)).any(1)]
            first[left] += 1
            if first.max() == n:
                raise ValueError("found a concave face that no fan of triangles fills")
    return first

def fans(points, polygons):
    """Polygons as triangles (T,3), and the polygon of each (T,)."""
    turned = [[*polygon[k:], *polygon[:k]] for polygon, k in zip(polygons, first_corners(points, polygons))]
    owner = [i for i, polygon in enumerate(turned) for _ in polygon[2:]]
    return [(polygon[0], *edge) for polygon in turned for edge in zip(polygon[1:], polygon[2:])], owner

class Files(dict):
    """What trimesh reads by name: what is put here, else a file in FOLDER or ../ (ShapeNet's textures)."""

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

def read_obj(path):
    """trimesh is given one library, no comments, tabs or continued lines, and polygons from `first_corners`.
    It counts places back from the last point of all."""
    text = re.sub(r"\\\r?\n|[\t\r]", " ", path.read_text("utf-8", "surrogateescape"))
    text = re.sub(r"(?m)^ +|^ *#.*|^( *(?:v|vt|vn|f) [^#\n]*)#.*", r"\1", text)    # names may hold a #
    lines = re.findall(r"(?m)^mtllib +(.*\S)", text)
    names = [path.parent / name for line in lines for name in dict.fromkeys((line, *line.split()))]
    library = b"\n".join(name.read_bytes() for name in names if name.is_file())
    files = Files(FOLDER=path.parent, LIBRARY=re.sub(rb"(?m)^(\s*K\w\s[^#\n]*)#.*", rb"\1", library))
    text = "mtllib LIBRARY\n" + re.sub("(?m)^mtllib .*", "", text)
    if text.rfind("\nv ") > text.find("\nf ") and re.search("(?m)^f .*-", text):
        raise ValueError("found faces that count back from the last point so far, with points after them")
    polygons = [polygon.split()[1:] for polygon in POLYGON.findall(text)]
    if polygons:
        points = np.array(re.findall(r"(?m)^v +(\S+) +(\S+) +(\S+)", text), float)
        numbers = [[int(corner.split("/")[0]) for corner in polygon] for polygon in polygons]
        first = first_corners(points, [[k - (k > 0) for k in polygon] for polygon in numbers])
        turned = iter([" ".join(["f", *polygon[k:], *polygon[:k]]) for polygon, k in zip(polygons, first)])
        text = POLYGON.sub(lambda _: next(turned), text)
    return by_trimesh(path, text.encode("utf-8", "replace"), "obj", files)

def read_off(path):
    """Without trimesh, which drops its colours. ModelNet's counts follow the word OFF without a space."""
    import trimesh
    lines = path.read_text("latin-1").split("\n")
    rows = [row for row in (line.split("#")[0].split() for line in lines) if row]
    kind, _, rest = rows[0][0].upper().partition("OFF")
    counts = [rest, *rows[0][1:]] if rest or rows[0][1:] else rows.pop(1)
    n_points, n_faces = [int(count) for count in counts if count][:2]
    points, faces = rows[1:1 + n_points], rows[1 + n_points:1 + n_points + n_faces]
    corners = np.array([row[:3] for row in points], float)
    triangles, owner = fans(corners, [[int(word) for word in row[1:1 + int(row[0])]] for row in faces])
    mesh = trimesh.Trimesh(corners, triangles, process=False)
    of_faces = [row[1 + int(row[0]):][:3] for row in faces]
    of_points = [row[6:9] if "N" in kind else row[3:6] for row in points if "C" in kind]
    of_faces = [of_faces[i] for i in owner]
    for words, attribute in ((of_points, "vertex_colors"), (of_faces, "face_colors")):
        if words and min(map(len, words)) == 3:                # whole numbers up to 255, or decimals up to 1
            setattr(mesh.visual, attribute, np.array(words, float if "." in str(words) else np.uint8))
    return [(mesh, np.eye(4))]

def read_ply(path):
    try:
        parts = by_trimesh(path)
    except ValueError as error:
        raise ValueError(f"{error} Of a binary .ply trimesh reads faces of one size: triangles") from None
    if not parts:
        raise ValueError("found points without faces")
    mesh = parts[0][0]
    face = mesh.metadata["_ply_raw"]["face"]["data"]
    names = face if isinstance(face, dict) else face.dtype.names
    polygons = face["vertex_index" if "vertex_index" in names else "vertex_indices"]
    polygons = polygons["f1"] if polygons.dtype.names else polygons
    if mesh.visual.kind != "texture" and first_corners(mesh.vertices, polygons).any():
        mesh.faces = fans(mesh.vertices, polygons)[0]
    return parts

def read_gltf(path):
    """The JSON is changed; what follows it in a .glb becomes the buffer of a .gltf."""
    content, files = path.read_bytes(), Files(FOLDER=path.parent)
    if content[:4] == b"glTF":
        end = 20 + int.from_bytes(content[12:16], "little")
        content, files["BUFFER"] = content[20:end], content[end + 8:]
    tree = json.loads(content)
    needs = tree.get("extensionsRequired", tree.get("extensionsUsed", []))
    if "compression" in " ".join(needs):
        raise ValueError(f"found {', '.join(needs)}, which is not decoded here")
    for buffer in tree.get("buffers", []):
        buffer.setdefault("uri", "BUFFER")
    for mesh in tree.get("meshes", []):
        mesh["primitives"] = [part for part in mesh["primitives"] if "POSITION" in part["attributes"]]
        for attributes in (part["attributes"] for part in mesh["primitives"]):
            used = [attributes[name] for name in ("POSITION", "TEXCOORD_0") if name in attributes]
            if any(tree["accessors"][k].get("normalized") for k in used):
                raise ValueError("found normalised integers, which trimesh does not scale")
    return by_trimesh(path, json.dumps(tree).encode(), "gltf", files)

READERS = {".obj": read_obj, ".off": read_off, ".ply": read_ply, ".stl": by_trimesh, ".glb": read_gltf,
           ".gltf": read_gltf}

# ---- Jobs: (source, split, class, name) of every surface; source is a file, or (split, i) of the solids ---

def jobs_of(args):
    kind, _, split = args.src.partition(":")
    if kind == "solids":
        names, split = Solids().class_names, split or "train"
        return [((split, i), split, names[i % len(names)], f"{i:06d}") for i in range(args.n or 1)]
    official, jobs = {}, {}
    if args.splits:
        with reading(args.splits, "a table with columns modelId and split"):
            rows = csv.DictReader(Path(args.splits).read_text().splitlines())
            official = {row["modelId"]: row["split"] for row in rows}
    for file in find_files(args.src, set(READERS))[:args.n]:
        parts = Path(file).relative_to(args.src).with_suffix("").parts
        parts = [part for part in parts if part not in ("models", "model_normalized")] or parts[-1:]
        here = [part for part in parts[:-1] if part in SPLITS]
        parts = [part for part in parts if part not in here]
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
    return [(file, *place) for place, file in jobs.items()]

def surface_of(source):
    if isinstance(source, tuple):
        return Solids(split=source[0]).surface(source[1]), None
    return read_mesh(source)

def cloud_of(job, points, triangles):
    """Points uniform by area, drawn by a generator of the job's split, class and name alone."""
    seed = 104, *os.fsencode("/".join(job[1:]))                # toys.py and data.py have 101 to 103
    return on_surface(triangles, np.random.default_rng(seed).random((points, 3)))

def is_there(path, points):
    """Whether the cloud was written before."""
    if path.exists() and len(read_cloud(path)) != points:
        raise ValueError(f"{path}: found another number of points; expected {points}, or another directory")
    return path.exists()

def write_cloud(job, dst, points):
    path = Path(dst, job[2], job[1], f"{job[3]}.npy")
    if not is_there(path, points):
        cloud = cloud_of(job, points, surface_of(job[0])[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, partial(np.save, arr=cloud))

def run(write, args, **options):
    """write(job, dst, points) of every job; prints how many there are of each class and split."""
    jobs, done = jobs_of(args), collections.Counter()
    write = partial(write, dst=args.dst, points=args.points, **options)
    for (_, split, kind, _), problem in zip(jobs, in_parallel(write, jobs, args.workers, "mesh")):
        if problem and not args.skip_bad:
            raise ValueError(f"{problem}; what is done is kept, --skip-bad leaves such files out")
        if problem:
            print(f"left out: {problem}")
        else:
            done[CATEGORIES.get(kind, kind), split] += 1
    for (kind, split), count in sorted(done.items()):
        print(f"{kind} {split}: {count}")
    print(f"{done.total()} of {len(jobs)} meshes in {args.dst}, {args.points} points each")

def parser(text, points):
    p = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    run(write_cloud, parser(__doc__, 15000).parse_args(argv))

if __name__ == "__main__":
    run_main(main)
