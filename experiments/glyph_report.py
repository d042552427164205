"""What the quickstart's model has learnt, in numbers: python experiments/glyph_report.py [--ckpt runs/glyphs]

Share of samples that a classifier trained on real glyph renders reads as their class. Samples are 0 to n-1
of seed 0, classes in turn, with white noise and the recipe's guidance and number of Euler steps. Prints JSON.
"""
import json
import tempfile

import numpy as np

from common import drawn, renders
import claims
import sample

def main():
    p = sample.flag_parser(__doc__)
    p.add_argument("--ckpt", default="runs/glyphs")
    p.add_argument("--n", type=sample.positive, default=180, help="samples (default: 180)")
    args = p.parse_args()
    model, checkpoint = sample.load(args.ckpt)
    setting = sample.resolve(model.cfg, checkpoint, noise="white", solver="euler")
    with tempfile.TemporaryDirectory() as place:
        known, unseen = (renders(model.cfg.res, n, s) for n, s in ((25_200, "train"), (720, "test")))
        judge = claims.Judge(f"{place}/classifier.pt", known, unseen, 36, epochs=3)
    right = judge.features(drawn(model, setting, range(args.n))[0])[2].numpy() == np.arange(args.n) % 36
    misread = [checkpoint["config"]["class_names"][i % 36] for i in np.flatnonzero(~right)]
    print(json.dumps(dict(step=checkpoint["step"], n=args.n, classifier_on_real_renders=judge.accuracy,
                          legible=right.mean(), misread=misread), indent=1))

if __name__ == "__main__":
    sample.run_main(main)
