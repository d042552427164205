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
import torch
from PIL import Image

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])

import data  # noqa: E402
import sample  # noqa: E402
import toys  # noqa: E402
from claims import Judge, moments  # noqa: E402
from glyph_report import patches  # noqa: E402
from metrics.frechet import frechet_distance  # noqa: E402
from metrics.precision_recall import precision_recall  # noqa: E402
from upscale import ENLARGE  # noqa: E402

def held_out(args, res):
    """Images (n, res, res, 3) uint8 that training has not seen, and their labels."""
    if not args.real:
        glyphs = toys.Glyphs(res, "test")
        count = 36 * max(8, min(56, 2 ** 21 // res ** 2))
        return (np.stack([glyphs.item(i)[0] for i in range(count)]),
                np.arange(count) % len(glyphs.class_names))
    for file in args.real:
        whole = data.Arrays(file)
        if whole.res == res:
            return np.stack([whole.item(i)[0] for i in range(len(whole))]), np.asarray(whole.labels)
    raise ValueError(f"--real: found no images of {res} pixels")

def drawn(model, checkpoint, args, res, **wishes):
    """The n samples at a size: uint8 (n, res, res, 3), and their labels."""
    setting = sample.resolve(model.cfg, checkpoint, (res, res), guidance=args.guidance, dtype="bfloat16",
                             options=dict(steps=args.steps), seed=args.seed, **wishes)
    batch, found = max(1, 2 ** 16 // res ** 2), []
    for start in range(0, args.n, batch):
        x, _ = sample.draw(model, setting, range(start, min(args.n, start + batch)))
        found += [sample.to_pixels(values, res, res) for values in x]
    return np.stack(found), np.arange(args.n) % len(checkpoint["config"]["class_names"])

def gradient(images):
    x = images.astype(np.float32) / 255
    return float(np.abs(np.diff(x, axis=2)).mean() + np.abs(np.diff(x, axis=1)).mean()) / 2

def reduced(images, res):
    """Images (n, R, R, 3) by means of R/res x R/res pixels."""
    n, R = images.shape[:2]
    return images.reshape(n, res, R // res, res, R // res, 3).mean((2, 4)).round().astype(np.uint8)

def scores(judge, true, images, labels, res):
    deep, _, read = judge.features(reduced(images, res))
    precision, recall = precision_recall(judge.known[0], deep)
    return dict(features=frechet_distance(*moments(judge.known[0]), *moments(deep)),
                patches=frechet_distance(*patches(true), *patches(images)), precision=precision,
                recall=recall,
                read=100 * float((read == torch.as_tensor(labels)).float().mean()), gradient=gradient(images))

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
    table, coarse = {}, None
    for times in args.times:
        res = times * model.cfg.res
        true, labels = held_out(args, res)
        seen = min(res, 2 * model.cfg.res)
        known = reduced(true, seen), labels
        judge = Judge(Path(f"{args.out}-judge{res}.pt"), known, known, labels.max() + 1, 24)
        arms = {"white": drawn(model, checkpoint, args, res, noise="white")}
        for length in args.lengths:
            arms[f"coupled {length:g}"] = drawn(model, checkpoint, args, res, noise="coupled",
                                                noise_length=length)
        coarse = arms if times == 1 else coarse
        for how, kind in ENLARGE.items():
            for arm in ("white", f"coupled {args.lengths[len(args.lengths) // 2]:g}"):
                if times > 1 and coarse:
                    found, classes = coarse[arm]
                    large = [np.asarray(Image.fromarray(image).resize((res, res), kind)) for image in found]
                    arms[f"{how} of {arm}"] = np.stack(large), classes
        print(f"\n{times} x: {args.n} samples, {len(true)} held-out images of {res}\n"
              "| noise | features | patches | precision | recall | read, % | gradient |\n" + "|---" * 7 + "|")
        some = np.random.default_rng(0).permutation(len(true))[:args.n]
        arms["held out"] = true[some], labels[some]
        for arm, (images, classes) in arms.items():
            found = scores(judge, true, images, classes, seen)
            table[f"{times} x, {arm}"] = found
            print(f"| {arm} | " + " | ".join(f"{found[key]:.3g}" for key in found) + " |", flush=True)
        tiles = [image for images, _ in arms.values() for image in images[:8]]
        sample.write_png(f"{args.out}-{times}x.png", sample.grid_image(tiles, 8))
    sample.write_json(f"{args.out}.json", dict(vars(args), table=table))

if __name__ == "__main__":
    sample.run_main(main)
