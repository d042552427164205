"""Tab. 9 for any checkpoint of images: samples finer than trained, against enlargements of the same seeds.
python experiments/upscale.py --ckpt RUN --real Y --times 4 --n 1000 [flags of evaluate.py]

Draws the n samples at the training resolution and --times finer, enlarges the former, and scores all three by
evaluate.py. They and metrics-ARM.json are kept in --out (default: upscale/ in the run). The paper has
ASFT 23.09, bilinear 35.05, bicubic 24.34 (FID of FFHQ-256 at 512).
"""
from pathlib import Path

from PIL import Image

from common import ENLARGE
import evaluate
import sample

def enlarge(src, dst, side, how):
    """Every image of a directory of sample.py, enlarged by one of ENLARGE; returns the directory of them."""
    dst.mkdir(exist_ok=True)
    for file in src.glob("[0-9]*.png"):
        sample.write_png(dst / file.name, Image.open(file).resize((side, side), ENLARGE[how]))
    return dst

def main(argv=None):
    p = sample.flag_parser(__doc__)
    p.add_argument("--ckpt", help="as for sample.py (default: the newest run, else glyphs)")
    p.add_argument("--real", required=True, help="reference images, as for evaluate.py")
    p.add_argument("--times", type=sample.positive, default=4, help="how much finer (default: 4)")
    p.add_argument("--n", "--samples", type=sample.positive, default=1000, help="default: 1000")
    p.add_argument("--steps", type=sample.positive, help="default: the recipe's")
    p.add_argument("--out", help="directory (default: upscale/ in the run)")
    args, more = p.parse_known_args(argv)
    model, checkpoint = sample.load(args.ckpt)
    model.to(sample.start_processes())
    out, side = Path(args.out or checkpoint["home"].parent / "upscale"), args.times * model.cfg.res
    options = {"steps": args.steps} if args.steps else {}
    coarse, fine = (sample.sample(model, checkpoint, args.n, out / f"{res}", size=(res, res), options=options)
                    for res in (model.cfg.res, side))
    arms, found = {"drawn": fine} | {how: enlarge(coarse, out / how, side, how) for how in ENLARGE}, {}
    for arm, folder in arms.items():
        words = ["--fake", folder, "--real", args.real, "--res", side, "--n", args.n, "--json",
                 out / f"metrics-{arm}.json", *more]
        print(f"\n{arm}:")
        found[arm] = evaluate.main([*map(str, words)])["metrics"]
    print(f"\n{args.n} samples of a model trained at {model.cfg.res} pixels, at {side}")
    evaluate.print_table(found)

if __name__ == "__main__":
    sample.run_main(main)
