"""Shared by all tests: the repository root on the path, one thread, run directories of tiny models."""
import os
import pathlib
import signal
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")      # for the processes that tests start

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

TINY = ["--width", "32", "--depth", "2", "--heads", "2", "--latents", "16", "--batch-size", "8",
        "--decode", "64", "--workers", "0", "--device", "cpu", "--sampling-steps", "3", "--dtype", "float32"]

def trained(out, *flags):
    """Runs train.py's main in this process with the smallest model; returns the run directory."""
    import train
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        train.main([*TINY, "--out", str(out), *map(str, flags)])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return out

@pytest.fixture(scope="session")
def glyphs_run(tmp_path_factory):
    """Run directory of an image model after 6 steps: 36 classes, 32 x 32."""
    return trained(tmp_path_factory.mktemp("runs") / "glyphs", "--steps", 6)

@pytest.fixture(scope="session")
def solids_run(tmp_path_factory):
    """Run directory of a point model after 6 steps: 7 classes, 64 points."""
    out = tmp_path_factory.mktemp("runs") / "solids"
    return trained(out, "--dataset", "solids", "--points", 64, "--steps", 6)
