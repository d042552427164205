"""The pictures of README.md and docs/, drawn by the shipped models: python experiments/gallery.py [NAME ...]

resolutions: one seed at 32, 128, 512 and 2048 pixels, below them the same eighth of the side
letters, emoji: samples 0 to 35 at the training resolution, and emoji at 4 times it
solids: samples 0 to 6 of 512 points; dense: samples 0 to 3 of 20,000 points
zoom: four views into a letter, each 4 times finer than the one before

Nothing is picked: samples are 0 to n-1 of seed 0. Writes assets/NAME.png (or --out), by default all of them.
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
from tools import poster  # noqa: E402

def setting_of(name, **wishes):
    model, checkpoint = sample.load(name)
    model.to(sample.start_processes())
    return model, sample.resolve(model.cfg, checkpoint, **wishes)

def drawn(name, n, first=0, **wishes):
    """Samples first..first+n-1 of a shipped model as uint8 images; of point clouds as pictures."""
    model, setting = setting_of(name, **wishes)
    found = [sample.draw(model, setting, [i])[0][0] for i in range(first, first + n)]
    if model.cfg.domain == "points":
        return [sample.draw_points(points, 320) for points in found]
    return [sample.to_pixels(values, *setting["shape"]) for values in found]

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

def letters():
    return sample.grid_image(drawn("glyphs", 36), 12)

def emoji():
    small = sample.grid_image([shown(image, 126) for image in drawn("emoji", 32)], 8)
    large = sample.grid_image([shown(image, 254) for image in drawn("emoji", 4, size=(256, 256))], 4)
    sheet = Image.new("RGB", (small.width, small.height + large.height + 2), "white")
    sheet.paste(small, (0, 0))
    sheet.paste(large, (0, small.height + 2))
    return sheet

def solids():
    return sample.grid_image(drawn("solids", 7), 7)

def dense():
    return sample.grid_image(drawn("solids", 4, size=20_000), 4)

def zoom():
    model, setting = setting_of("glyphs", size=(256, 256))
    return poster.zoom(model, setting, 0, (0.596, 0.4))

PICTURES = {"resolutions": resolutions, "letters": letters, "emoji": emoji, "solids": solids, "dense": dense,
            "zoom": zoom}

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", choices=[[], *PICTURES], metavar="NAME", help=", ".join(PICTURES))
    p.add_argument("--out", type=Path, default=ROOT / "assets", help="directory (default: assets)")
    args = p.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names or PICTURES:
        began = time.time()
        sample.write_png(args.out / f"{name}.png", PICTURES[name]())
        print(f"{args.out / name}.png: {time.time() - began:.0f} s", flush=True)

if __name__ == "__main__":
    sample.run_main(main)
