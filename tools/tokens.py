"""Condition tokens of images, one for each patch of a view: its features, then its ray (App. G of the paper).

    python tools/tokens.py SRC DST [--features dinov2] [--size 448] [--weights FILE] [--device cpu]
    python tools/tokens.py --image FILE [FILE2] --ckpt RUN --out tokens.npz [--weights FILE] [--device cpu]

The first makes of what tools/render.py wrote what --dataset objaverse reads: an .npz of `xyz`, `cond_token`
per object, and tokens.json, which says how. It keeps what is there. The second makes tokens of your own image
or of two from opposite sides, as for the training of a checkpoint; sample.py --tokens reads them.
In order: tokens of views; the two commands. V views, S side of a view, n patches of one, C features.
"""
import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import find_files, fit, read_cloud, read_image
from metrics import dinov2
from metrics.dinov2 import PATCH
from metrics.weights import sha256
from sample import (find_checkpoint, flag_parser, natural, positive, read_checkpoint, run_main, write_atomic,
                    write_json)
from tools.pack import CORES, in_parallel
from tools.render import EYES, FIELD, camera

def rays(views=2, size=448):
    """Plucker coordinates (d, o x d), |d| = 1, of the ray from the eye o through the centre of each patch,
    row by row: float32 (V,n,6)."""
    side = size // PATCH
    centre = (2 * (np.arange(side) + 0.5) / side - 1) * math.tan(FIELD / 2)
    at = np.stack([*np.meshgrid(centre, -centre), np.ones((side, side))], -1).reshape(-1, 3)
    found = []
    for eye in EYES[:views]:
        way = at @ camera(eye)
        way /= np.linalg.norm(way, axis=1, keepdims=True)
        found.append(np.concatenate([way, np.cross(eye, way)], 1))
    return np.stack(found).astype(np.float32)

def patches(views):
    """The pixels of each patch, in [-1,1]: uint8 (V,S,S,3) -> float32 (V,n,588)."""
    V, S = views.shape[:2]
    cells = views.reshape(V, S // PATCH, PATCH, S // PATCH, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return (cells / np.float32(127.5) - 1).reshape(V, (S // PATCH) ** 2, -1)

def features(kind, weights=None, device="cpu"):
    """A function uint8 (V,S,S,3) -> float32 (V,n,C), and the SHA-256 of its weights."""
    if kind == "patches":
        return patches, None
    path = dinov2.find(weights or torch.hub.get_dir())
    net = dinov2.load(path).to(device)
    return lambda views: net(torch.from_numpy(views).to(device)).float().cpu().numpy(), sha256(path)

def read_views(files, size):
    """Image files, cropped and resized as training images are: uint8 (V,S,S,3)."""
    return np.stack([fit(read_image(file), size) for file in files])

def tokens(views, extract):
    """uint8 (V,S,S,3) -> float32 (V n, C + 6)."""
    return np.concatenate(np.concatenate([extract(views), rays(*views.shape[:2])], 2))

def read_object(stem, size):
    """The views and the cloud that tools/render.py wrote."""
    return read_views([f"{stem}-{i}.png" for i in range(len(EYES))], size), read_cloud(f"{stem}.npy")

def of_objects(src, dst, spec, extract, workers):
    stems = [file.removesuffix("-0.png") for file in find_files(src, {".png"}) if file.endswith("-0.png")]
    if not stems:
        raise ValueError(f"{src}: found no views; expected a directory that tools/render.py wrote")
    about = Path(dst, "tokens.json")
    if about.exists() and json.loads(about.read_text()) != spec:
        raise ValueError(f"{about}: found another setting; expected {spec}, or another directory")
    about.parent.mkdir(parents=True, exist_ok=True)
    write_json(about, spec)
    out = {stem: Path(dst, f"{Path(stem).relative_to(src)}.npz") for stem in stems}
    todo = [stem for stem in stems if not out[stem].exists()]
    objects = in_parallel(partial(read_object, size=spec["size"]), todo, workers, "object")
    for stem, found in zip(todo, objects):
        if isinstance(found, ValueError):
            raise found
        cond_token = tokens(found[0], extract).astype(np.float16)
        out[stem].parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out[stem], partial(np.savez, xyz=found[1], cond_token=cond_token))
    print(f"{len(stems)} objects in {dst}, {len(todo)} of them new")

def of_image(files, ckpt, out, weights=None, device="cpu"):
    spec = read_checkpoint(find_checkpoint(ckpt))["config"]["tokens"]
    if spec is None or len(files) > spec["views"]:
        raise ValueError(f"{ckpt}: found training tokens {spec}, not of tools/tokens.py, {len(files)} views")
    extract, digest = features(spec["features"], weights, device)
    if digest != spec["weights_sha256"]:
        raise ValueError(f"--weights: found SHA-256 {digest}; expected {spec['weights_sha256']}, training's")
    cond_token = tokens(read_views(files, spec["size"]), extract)
    write_atomic(out, partial(np.savez, cond_token=cond_token))
    print(f"{len(cond_token)} tokens: python sample.py --ckpt {ckpt} --tokens {out}")

def main(argv=None):
    p = flag_parser(__doc__)
    p.add_argument("src", nargs="?", help="directory that tools/render.py wrote")
    p.add_argument("dst", nargs="?", help="directory to write")
    p.add_argument("--features", choices=("dinov2", "patches"), default="dinov2", help="default: dinov2")
    p.add_argument("--size", type=positive, default=448, help="side of the views, resized (default: 448)")
    p.add_argument("--image", nargs="+", metavar="FILE", help="one, or two of opposite sides")
    p.add_argument("--ckpt", help="with --image: checkpoint, run directory or shipped model")
    p.add_argument("--out", help="with --image: .npz to write")
    p.add_argument("--weights", help="DINOv2's state dict or its directory (default: torch.hub's own)")
    p.add_argument("--device", default="cpu", help="for the features (default: cpu)")
    p.add_argument("--workers", type=natural, default=CORES, help=f"processes (default: one a core, {CORES})")
    args = p.parse_args(argv)
    if args.size % PATCH or not (args.dst or args.image and args.ckpt and args.out):
        p.error(f"expected SRC and DST, or --image, --ckpt and --out; and as --size a multiple of {PATCH}")
    if args.image:
        return of_image(args.image, args.ckpt, args.out, args.weights, args.device)
    extract, digest = features(args.features, args.weights, args.device)
    spec = dict(features=args.features, size=args.size, views=len(EYES), weights_sha256=digest)
    of_objects(args.src, args.dst, spec, extract, args.workers)

if __name__ == "__main__":
    run_main(main)
