"""Views: every mesh as two cameras see it, with a point cloud of it (App. G of the paper).

    python tools/render.py SRC DST [--size 448] [--points 32768] [and the flags of tools/meshes.py]

Writes DST/SPLIT/CLASS/NAME-0.png, NAME-1.png and NAME.npy, float32 (P,3) in [-1,1]; keeps what is there.
In order: a camera; `render`, the views of a surface; `rasterise`, the triangle of each pixel; files.
T triangles, S side of a view.
"""
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import normalise
from sample import positive, run_main, write_png
from tools import meshes

# App. G: 40 degrees of view, 3.5 units away, on opposite sides along x and z, looking at the origin. Surfaces
# are scaled into the unit sphere, the largest that is seen whole: asin(1 / 3.5) = 16.6 < 20 degrees.
FIELD, EYES = math.radians(40), 3.5 / math.sqrt(2) * np.array([(1.0, 0, 1), (-1.0, 0, -1)])

def camera(eye):
    """Right, up and forward of a camera at `eye` that looks at the origin, y up: rows of a (3,3)."""
    forward = -eye / np.linalg.norm(eye)
    right = np.cross(forward, (0, 1, 0))
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(right, forward), forward])

def render(triangles, colours=None, size=448):
    """Views of a surface (T,3,3) in the unit sphere from EYES: uint8 (2,S,S,3), white behind.

    Both sides of a triangle are seen, in one shade each; colours uint8 (T,3), None for grey. Twice the size
    inside, then averaged."""
    S, views = 2 * size, []
    normal = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-30)
    if colours is None:
        colours = np.full((len(triangles), 3), meshes.GREY)
    for eye in EYES:
        axes = camera(eye)
        x, y, depth = np.moveaxis((triangles - eye) @ axes.T, -1, 0)                   # (T,3) each
        scale = S / 2 / math.tan(FIELD / 2)
        seen = rasterise(S / 2 + scale * x / depth, S / 2 - scale * y / depth, 1 / depth, S)
        # light from beside the camera, upper left, on whichever side it sees
        light = np.array((-0.35, 0.6, -1)) @ axes
        facing = np.sign(((eye - triangles[:, 0]) * normal).sum(1, keepdims=True)) * normal
        shade = 0.35 + 0.65 * np.clip(facing @ (light / np.linalg.norm(light)), 0, 1)
        palette = np.concatenate([colours * shade[:, None], np.full((1, 3), 255.0)])   # -1: nothing there
        views.append(palette[seen].reshape(size, 2, size, 2, 3).mean((1, 3)).round().astype(np.uint8))
    return np.stack(views)

def rasterise(x, y, near, side):
    """Which triangle each pixel sees: int64 (side,side), -1 for none.

    x, y, near (T,3): corners in pixels, and 1 / depth, which is linear on the screen. Triangles of like size
    are filled many at a time, each in a square of pixels around it."""
    depth, seen = np.zeros(side * side), np.full(side * side, -1)
    low = np.stack([np.ceil(z.min(1) - 0.5).clip(0, side) for z in (x, y)], 1).astype(np.int64)
    high = np.stack([np.floor(z.max(1) - 0.5).clip(-1, side - 1) for z in (x, y)], 1).astype(np.int64)
    wide, high = (high - low + 1).clip(0).T
    extent = np.maximum(wide, high) * (np.minimum(wide, high) > 0)
    (ax, bx, cx), (ay, by, cy) = x.T, y.T
    area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    size = 1
    while size < 2 * extent.max(initial=0):
        group = np.flatnonzero((extent > size // 2) & (extent <= size) & (area != 0))
        group = group[np.argsort(wide[group] - high[group], kind="stable")]
        parts = min(len(group), math.ceil(len(group) * size * size / 2 ** 17))
        for some in np.array_split(group, max(parts, 1)):
            px = low[some, 0, None, None] + np.arange(wide[some].max(initial=0))           # (t,1,w) pixels
            py = low[some, 1, None, None] + np.arange(high[some].max(initial=0))[:, None]  # (t,h,1)
            x0, x1, x2 = (z[some, None, None] - px - 0.5 for z in (ax, bx, cx))
            y0, y1, y2 = (z[some, None, None] - py - 0.5 for z in (ay, by, cy))
            u = (x1 * y2 - y1 * x2) / area[some, None, None]              # shares of the corners a and b
            v = (x2 * y0 - y2 * x0) / area[some, None, None]
            inside = (u >= 0) & (v >= 0) & (u + v <= 1) & (px < side) & (py < side)
            t, i, j = np.nonzero(inside)
            u, v = u[inside], v[inside]
            a, b, c = near[some[t]].T
            closeness = u * a + v * b + (1 - u - v) * c
            pixel = (low[some[t], 1] + i) * side + low[some[t], 0] + j
            front = closeness > depth[pixel]
            order = np.argsort(closeness[front], kind="stable")           # the nearest is written last
            pixel, t = pixel[front][order], some[t[front][order]]
            depth[pixel], seen[pixel] = closeness[front][order], t
        size *= 2
    return seen.reshape(side, side)

def write_views(path, triangles, colours, size):
    """Writes the views beside the path of the cloud; gives the surface in units of its own box."""
    triangles = normalise(triangles.reshape(-1, 3))[0].astype(np.float64).reshape(-1, 3, 3)
    for i, view in enumerate(render(triangles / np.linalg.norm(triangles, axis=2).max(), colours, size)):
        write_png(path.with_name(f"{path.stem}-{i}.png"), Image.fromarray(view))
    return triangles

def main(argv=None):
    p = meshes.parser(__doc__, 32768)
    p.add_argument("--size", type=positive, default=448, help="side of a view in pixels (default: 448)")
    args = p.parse_args(argv)
    meshes.run(args, "{split}/{kind}/{name}.npy", partial(write_views, size=args.size))

if __name__ == "__main__":
    run_main(main)
