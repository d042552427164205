"""What the quickstart's model has learnt, in numbers: python experiments/glyph_report.py [--ckpt runs/glyphs]

Share of samples that a classifier trained on real glyph renders calls by their class: at the training
resolution, and of finer ones, reduced to it. Samples are 0 to n-1 of seed 0, classes in turn, with white
noise and the guidance and number of Euler steps of the recipe. Prints JSON.
"""
import argparse
import json
import tempfile

import numpy as np

from common import drawn, reduced, renders
import claims
import sample

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="runs/glyphs")
    p.add_argument("--n", type=sample.positive, default=180, help="samples at 32 pixels (default: 180)")
    p.add_argument("--fine", type=sample.natural, default=36, help="at 128 pixels, 0: none (default: 36)")
    args = p.parse_args()
    model, checkpoint = sample.load(args.ckpt)
    names = checkpoint["config"]["class_names"]
    with tempfile.TemporaryDirectory() as place:
        known, unseen = renders(32, 36 * 700, "train"), renders(32, 36 * 20, "test")
        judge = claims.Judge(f"{place}/classifier.pt", known, unseen, 36, epochs=3)
    report = dict(step=checkpoint["step"], n=args.n, classifier_on_real_renders=judge.accuracy)
    for n, res in ((args.n, 32), (args.fine, 128)):
        setting = sample.resolve(model.cfg, checkpoint, (res, res), noise="white", solver="euler", refine=0)
        if n:
            pictures = reduced(drawn(model, setting, range(n))[0], 32)
            right = judge.features(pictures)[2].numpy() == np.arange(n) % 36
            report[f"legible_{res}"] = right.mean()
            report[f"misread_{res}"] = [names[i % 36] for i in np.flatnonzero(~right)]
    print(json.dumps(report, indent=1))

if __name__ == "__main__":
    sample.run_main(main)
