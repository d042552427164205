"""Pictures of README.md and docs/ that the shipped models draw: python experiments/gallery.py [NAME ...]

resolutions: one seed at 32, 128, 512 and 2048 pixels, below them the same eighth of the side
letters, emoji: samples 0 to 35 at the training resolution, and emoji at 4 times it
solids: samples 0 to 6 of 512 points; dense: samples 0 to 3 of 20,000 points
views: solids 0 to 6 of the held-out split, above the first of two views, below samples given both
zoom: four views into a letter, each 4 times finer than the one before
noise: letters and emoji 0 to 7 at 4 times, each with white noise above coupled noise

Nothing is picked: samples are 0 to n-1 of seed 0. Writes assets/NAME.png (or --out), by default all of them.
"""
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

import common
import sample
from tools import poster, render, tokens

def setting_of(name, **wishes):
    model, checkpoint = sample.load(name)
    model.to(sample.start_processes())
    return model, sample.resolve(model.cfg, checkpoint, **wishes)

def drawn(name, n, first=0, **wishes):
    """Samples first..first+n-1 of a shipped model as uint8 images; of point clouds as pictures."""
    model, setting = setting_of(name, **wishes)
    found, _ = common.drawn(model, setting, range(first, first + n))
    return found if model.cfg.domain == "image" else [sample.draw_points(points, 320) for points in found]

def shown(image, side):
    """An image at another size: whole pixels where it grows, their mean where it shrinks."""
    grows = image.shape[0] <= side
    kind = Image.Resampling.NEAREST if grows else Image.Resampling.BOX
    return np.asarray(Image.fromarray(image).resize((side, side), kind))

def resolutions(name="glyphs", index=10, side=256, sizes=(32, 128, 512, 2048)):
    whole, parts = [], []
    for res in sizes:
        image, = drawn(name, 1, index, size=(res, res))
        top, left = res // 4, 5 * res // 8                             # on an edge of this letter
        whole.append(shown(image, side))
        parts.append(shown(image[top:top + res // 8, left:left + res // 8], side))
    return sample.grid_image([*whole, *parts], len(sizes))

def sheet(name, n, columns, **wishes):
    return sample.grid_image(drawn(name, n, **wishes), columns)

def emoji():
    small = sample.grid_image([shown(image, 126) for image in drawn("emoji", 32)], 8)
    large = sample.grid_image([shown(image, 254) for image in drawn("emoji", 4, size=(256, 256))], 4)
    gap = np.full((2, small.width, 3), 255, np.uint8)
    return Image.fromarray(np.concatenate([small, gap, large]))

def zoom():
    model, setting = setting_of("glyphs", size=(256, 256))
    return poster.zoom(model, setting, 0, (0.668, 0.4))

def noise(n=8, size=(128, 128)):
    pairs = [(name, kind) for name in ("glyphs", "emoji") for kind in sample.NOISES]
    return sample.grid_image([x for name, kind in pairs for x in drawn(name, n, size=size, noise=kind)], n)

def views(n=7, size="112"):
    with tempfile.TemporaryDirectory() as work:
        render.main(["solids:val", f"{work}/views", "--n", str(n), "--size", size, "--points", "2048"])
        tokens.main([f"{work}/views", f"{work}/set", "--features", "patches", "--size", size])
        files = sorted(Path(work).rglob("*-0.png"))                    # by class, as the clouds' tokens
        seen = [np.asarray(Image.open(file).resize((320, 320))) for file in files]
        return sample.grid_image([*seen, *drawn("views", n, size=4096, tokens=f"{work}/set")], n)

PICTURES = {"resolutions": resolutions, "emoji": emoji, "letters": partial(sheet, "glyphs", 36, 12),
            "solids": partial(sheet, "solids", 7, 7), "dense": partial(sheet, "solids", 4, 4, size=20_000),
            "views": views, "zoom": zoom, "noise": noise}

def main(argv=None):
    p = sample.flag_parser(__doc__)
    p.add_argument("names", nargs="*", choices=[[], *PICTURES], metavar="NAME", help=", ".join(PICTURES))
    p.add_argument("--out", type=Path, default=common.ROOT / "assets", help="directory (default: assets)")
    args = p.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names or PICTURES:
        sample.write_png(args.out / f"{name}.png", PICTURES[name]())
        print(args.out / f"{name}.png", flush=True)

if __name__ == "__main__":
    sample.run_main(main)
