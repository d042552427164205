"""A checkpoint to give away, as in weights/: python tools/export.py RUN FILE.pt

Averaged weights alone, in bfloat16, without optimizer and without the paths of the run. sample.py,
evaluate.py and train.py --init take it as any checkpoint; to resume needs the whole one.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import find_checkpoint, flag_parser, read_checkpoint, run_main, write_atomic

def export(run, path):
    ckpt = read_checkpoint(find_checkpoint(run))
    ema = {name: x.bfloat16() if x.is_floating_point() else x for name, x in ckpt["ema"].items()}
    settings = ckpt["config"]["settings"] | dict(data=None, out=None, resume=None, init=None)
    state = dict(ema=ema, step=ckpt["step"], config=ckpt["config"] | dict(settings=settings))
    write_atomic(path, lambda f: torch.save(state, f))
    print(f"{path}: step {ckpt['step']}, {sum(x.numel() for x in ema.values()) / 1e6:.2f}M numbers")

def main(argv=None):
    p = flag_parser(__doc__)
    p.add_argument("run", help="checkpoint file or run directory")
    p.add_argument("path", help="file to write")
    export(**vars(p.parse_args(argv)))

if __name__ == "__main__":
    run_main(main)
