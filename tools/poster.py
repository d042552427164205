"""Images larger than memory: python tools/poster.py --res 16384 --steps 10, or --zoom 0.6,0.4

Such an image is drawn in bands of rows, each with the small context integrated anew, and streamed into a PNG.
A finished band waits in OUT.parts, so that an interrupted command goes on; torchrun shares the bands among
processes. The pixels are those of sample.py up to rounding. --zoom x,y draws four views of --res towards a
place (0..1 from the upper left corner) instead, each 4 times finer, with the frame of the next in red.
"""
import hashlib
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample  # noqa: E402

def pixels(model, setting, index, box, size):
    """The pixels in a box (x0, y0, x1, y1) of sample `index`, drawn at a size, as an image."""
    x, _ = sample.draw(model, setting | dict(size=size, crop=box), [index])
    return Image.fromarray(sample.to_pixels(x[0], box[3] - box[1], box[2] - box[0]))

def poster(model, setting, index, path, rows=None):
    """One image in bands of `rows` rows (default: of 2^20 pixels), streamed into path."""
    (height, width), parts = setting["size"], Path(f"{path}.parts")
    rows = rows or max(1, sample.AT_ONCE // width)
    bands = [(0, y, width, min(y + rows, height)) for y in range(0, height, rows)]
    files = [parts / f"{y0:09d}.png" for _, y0, _, _ in bands]
    parts.mkdir(parents=True, exist_ok=True)
    todo = [i for i in range(sample.RANK, len(bands), sample.WORLD) if not files[i].exists()]
    with sample.progress_bar(len(todo), "band") as bar:
        for i in todo:
            sample.write_png(files[i], pixels(model, setting, index, bands[i], (height, width)))
            bar.update()
    sample.wait_for_all()
    if sample.RANK == 0:
        sample.write_atomic(path, lambda f: stream_png(f, width, height, map(Image.open, files)))
        for file in files:
            file.unlink()
        parts.rmdir()
    sample.wait_for_all()

def stream_png(f, width, height, bands):
    """One PNG from bands of rows: 8-bit RGB, every row less the row above (filter 2 of ISO 15948)."""
    def chunk(kind, body):
        f.write(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))
    f.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    deflate, above = zlib.compressobj(), np.zeros((1, width, 3), np.uint8)
    for band in map(np.asarray, bands):
        rows = np.full((len(band), 1 + 3 * width), 2, np.uint8)
        rows[:, 1:] = (band - np.concatenate([above, band[:-1]])).reshape(len(band), -1)
        above = band[-1:]
        chunk(b"IDAT", deflate.compress(rows))
    chunk(b"IDAT", deflate.flush())
    chunk(b"IEND", b"")

def zoom(model, setting, index, at, views=4, finer=4):
    """Views of one sample around `at`, each `finer` times finer than the one before, side by side."""
    pictures, (H, W) = [], setting["size"]
    for level in range(views):
        size = H * finer ** level, W * finer ** level
        x0, y0 = corner(at, size, H, W)
        picture = pixels(model, setting, index, (x0, y0, x0 + W, y0 + H), size)
        if level + 1 < views:
            h, w = H // finer, W // finer
            x, y = corner(at, size, h, w)
            frame = x - x0 - 1, y - y0 - 1, x - x0 + w, y - y0 + h
            ImageDraw.Draw(picture).rectangle(frame, outline="red")
        pictures.append(np.asarray(picture))
    return sample.grid_image(pictures, columns=views)

def corner(at, size, height, width):
    """Upper left corner of a box of this height and width around `at` in an image of that size."""
    rows = zip(at, size[::-1], (width, height))
    return [min(max(round(share * big - side / 2), 0), big - side) for share, big, side in rows]

def place(text):
    x, y = map(float, text.split(","))
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ValueError
    return x, y

def main(argv=None):
    p = sample.flag_parser(__doc__)
    sample.add_flags(p.add_argument, "1", "4096")
    p.add_argument("--zoom", type=place, metavar="x,y", help="four views towards this place instead")
    p.set_defaults(n=1, res="4096")
    args = p.parse_args(argv)
    model, checkpoint = sample.load(args.ckpt, args.weights)
    if model.cfg.domain != "image":
        raise ValueError(f"{checkpoint['path']}: draws point clouds; expected a model of images")
    model.to(sample.start_processes(args.device, "gloo"))
    size = sample.parse_size(args.res, model.cfg)
    setting = sample.resolve(model.cfg, checkpoint, size=size, **sample.wishes_of(args))
    out = Path(args.out or checkpoint["home"].parent / "posters")
    out.mkdir(parents=True, exist_ok=True)
    kind = "zoom" if args.zoom else "poster"
    code = hashlib.sha256(json.dumps([setting, args.zoom]).encode()).hexdigest()[:8]     # no two settings mix
    for index in range(args.n):
        path = out / f"{kind}-{args.res}-seed{args.seed}-{code}-{index:06d}.png"
        if args.zoom:
            sample.write_png(path, zoom(model, setting, index, args.zoom))
        elif not path.exists():
            poster(model, setting, index, path)
        sample.print0(f"{path}")

if __name__ == "__main__":
    sample.run_main(main)
