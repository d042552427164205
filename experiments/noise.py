"""Which noise of the queries gives the best images: python experiments/noise.py --ckpt RUN --times 1 4

Draws samples 0 to n-1 of seed 0 with white and with coupled noise of several lengths, at so many times the
training resolution, and scores them against held-out images as claims.py does: features and pixels of images
reduced to twice the training resolution, and patches. `gradient` is the mean absolute difference of
neighbouring pixels. Rows `bilinear` and `bicubic` enlarge samples of white noise, where --times begins
with 1. --real gives held-out images of each size as .npz with `images` and `labels` (default: glyphs).
Writes --out.json, --out-TIMESx.png (samples 0 to 7 of each arm, in rows) and a table in Markdown.
"""

import numpy as np

from common import ENLARGE, drawn, enlarged, reduced, renders
import data
import sample
from claims import Judge, distance, patches, table

def held_out(files, res):
    """Images (n, res, res, 3) uint8 that training has not seen, and their labels."""
    if not files:
        return renders(res, 36 * max(8, min(56, 2 ** 21 // res ** 2)), "test")
    for whole in map(data.Arrays, files):
        if whole.res == res:
            return np.stack([whole.item(i)[0] for i in range(len(whole))]), whole.labels
    raise ValueError(f"--real: found no images of {res} pixels")

def gradient(images):
    x = images.astype(np.float32) / 255
    return float(np.abs(np.diff(x, axis=2)).mean() + np.abs(np.diff(x, axis=1)).mean()) / 2

def main(argv=None):
    p = sample.flag_parser(__doc__)
    p.add_argument("--ckpt", required=True)
    p.add_argument("--real", nargs="+", help="held-out images, an .npz for each size")
    p.add_argument("--times", nargs="+", type=sample.positive, default=[1, 4])
    p.add_argument("--n", type=sample.positive, default=300)
    p.add_argument("--guidance", type=float)
    p.add_argument("--steps", type=sample.positive, default=16)
    p.add_argument("--out", default="noise", help="of the files (default: noise)")
    args = p.parse_args(argv)
    model, checkpoint = sample.load(args.ckpt)
    model.to(sample.start_processes("auto"))
    coarse, in_turn = None, np.arange(args.n) % len(checkpoint["config"]["class_names"])
    how = dict(guidance=args.guidance, dtype="bfloat16", options=dict(steps=args.steps))
    noises = {"white": dict(noise="white")}
    noises |= {f"coupled {x:g}": dict(noise="coupled", noise_length=x) for x in (1, 2, 4, 8, 32)}
    result = dict(vars(args), claim="noise", floor={}, arms={})
    for times in args.times:
        res = times * model.cfg.res
        true, labels = held_out(args.real, res)
        seen = min(res, 2 * model.cfg.res)
        known = reduced(true, seen), labels
        judge = Judge(f"{args.out}-judge{res}.pt", known, known, labels.max() + 1, 24)
        settings = {arm: sample.resolve(model.cfg, checkpoint, (res, res), **how, **noise)
                    for arm, noise in noises.items()}
        arms = {arm: drawn(model, setting, range(args.n))[0] for arm, setting in settings.items()}
        coarse = arms["white"] if times == 1 else coarse
        for kind in ENLARGE if times > 1 and coarse is not None else ():
            arms[kind] = enlarged(coarse, res, kind)
        some = np.random.default_rng(0).permutation(len(true))[:args.n]
        arms["true images"] = true[some]
        for arm, images in arms.items():
            classes = labels[some] if arm == "true images" else in_turn
            figures = judge.score(reduced(images, seen), classes)
            figures.update(patches=distance(patches(true), patches(images)), gradient=gradient(images))
            result["arms"][f"{times} x, {arm}"] = dict(seeds=[figures])
        tiles = [image for images in arms.values() for image in images[:8]]
        sample.write_png(f"{args.out}-{times}x.png", sample.grid_image(tiles, 8))
    sample.write_json(f"{args.out}.json", result)
    print(table(result))

if __name__ == "__main__":
    sample.run_main(main)
