"""Which noise of the queries gives the best images: python experiments/noise.py --ckpt RUN --times 1 4

Draws the same n seeds of a checkpoint with white and with coupled noise of several lengths, at so many times
the training resolution, and scores them against held-out images: Frechet distance of 96 features of a
classifier (`features`, of images reduced to twice the training resolution) and of all patches of 8 x 8
(`patches`), precision and recall of the features, the share that the classifier reads as its class (`read`),
and mean absolute difference of neighbouring pixels (`gradient`).
Rows `bilinear` and `bicubic` enlarge samples of the training resolution, where --times begins with 1.
--real gives held-out images of each size as .npz with `images` and `labels` (default: built-in glyphs).
Writes --out.json, --out-TIMESx.png (samples 0 to 7 of each arm, in rows) and a table in Markdown.
"""
import argparse
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])

import data  # noqa: E402
import sample  # noqa: E402
from claims import Judge, patch_distance  # noqa: E402
from glyph_report import ENLARGE, drawn, enlarged, renders  # noqa: E402

def held_out(args, res):
    """Images (n, res, res, 3) uint8 that training has not seen, and their labels."""
    if not args.real:
        count = 36 * max(8, min(56, 2 ** 21 // res ** 2))
        return renders(res, count, "test"), np.arange(count) % 36
    for file in args.real:
        whole = data.Arrays(file)
        if whole.res == res:
            return np.stack([whole.item(i)[0] for i in range(len(whole))]), np.asarray(whole.labels)
    raise ValueError(f"--real: found no images of {res} pixels")

def gradient(images):
    x = images.astype(np.float32) / 255
    return float(np.abs(np.diff(x, axis=2)).mean() + np.abs(np.diff(x, axis=1)).mean()) / 2

def reduced(images, res):
    """Images (n, R, R, 3) by means of R/res x R/res pixels."""
    n, R = images.shape[:2]
    return images.reshape(n, res, R // res, res, R // res, 3).mean((2, 4)).round().astype(np.uint8)

def scores(judge, true, images, labels, res):
    found = judge.score(reduced(images, res), labels)
    return dict(features=found["fd"], patches=patch_distance(true, images), precision=found["precision"],
                recall=found["recall"], read=found["read"], gradient=gradient(images))

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", required=True)
    p.add_argument("--real", nargs="+", help="held-out images, an .npz for each size")
    p.add_argument("--times", nargs="+", type=sample.positive, default=[1, 4])
    p.add_argument("--lengths", nargs="+", type=float, default=(1, 2, 4, 8, 32))
    p.add_argument("--n", type=sample.positive, default=300)
    p.add_argument("--seed", type=sample.natural, default=0)
    p.add_argument("--guidance", type=float)
    p.add_argument("--steps", type=sample.positive, default=16)
    p.add_argument("--out", default="noise", help="of the files (default: noise)")
    args = p.parse_args(argv)
    model, checkpoint = sample.load(args.ckpt)
    model.to(sample.start_processes("auto"))
    table, coarse, in_turn = {}, None, np.arange(args.n) % len(checkpoint["config"]["class_names"])
    for times in args.times:
        res = times * model.cfg.res
        true, labels = held_out(args, res)
        seen = min(res, 2 * model.cfg.res)
        known = reduced(true, seen), labels
        judge = Judge(Path(f"{args.out}-judge{res}.pt"), known, known, labels.max() + 1, 24)
        how = dict(guidance=args.guidance, seed=args.seed, dtype="bfloat16", options=dict(steps=args.steps))
        arms = {"white": drawn(model, checkpoint, args.n, res, noise="white", **how)}
        for length in args.lengths:
            arms[f"coupled {length:g}"] = drawn(model, checkpoint, args.n, res, noise="coupled",
                                                noise_length=length, **how)
        coarse = arms if times == 1 else coarse
        for kind in ENLARGE if times > 1 and coarse else ():
            for arm in ("white", f"coupled {args.lengths[len(args.lengths) // 2]:g}"):
                arms[f"{kind} of {arm}"] = enlarged(coarse[arm], res, kind)
        print(f"\n{times} x: {args.n} samples, {len(true)} held-out images of {res}\n"
              "| noise | features | patches | precision | recall | read, % | gradient |\n" + "|---" * 7 + "|")
        some = np.random.default_rng(0).permutation(len(true))[:args.n]
        classes = {"held out": labels[some]}
        arms["held out"] = true[some]
        for arm, images in arms.items():
            found = scores(judge, true, images, classes.get(arm, in_turn), seen)
            table[f"{times} x, {arm}"] = found
            print(f"| {arm} | " + " | ".join(f"{found[key]:.3g}" for key in found) + " |", flush=True)
        tiles = [image for images in arms.values() for image in images[:8]]
        sample.write_png(f"{args.out}-{times}x.png", sample.grid_image(tiles, 8))
    sample.write_json(f"{args.out}.json", dict(vars(args), table=table))

if __name__ == "__main__":
    sample.run_main(main)
