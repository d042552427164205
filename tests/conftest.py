"""Shared by all tests: the repository root on the path, one thread, processes, refusals, hostile files, and
checkpoints and run directories of tiny models."""
import os
import pathlib
import signal
import subprocess
import sys
from dataclasses import asdict

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")      # for the processes that tests start

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

TINY = ["--width", "32", "--depth", "2", "--heads", "2", "--latents", "16", "--batch-size", "8",
        "--decode", "64", "--workers", "0", "--device", "cpu", "--sampling-steps", "3", "--dtype", "float32"]

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

def python(*words, cwd=None, status=0):
    """Runs Python in a process of its own, which must end with this status; its stdout and stderr."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr

def refused(*words, call):
    """`call` raises a ValueError that contains every word."""
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert all(str(word) in text for word in words), (words, text)

class Bomb:
    """Unpickled, it makes a file in the working directory."""
    def __reduce__(self):
        return open, ("went_off", "w")

@pytest.fixture
def nothing_goes_off(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "went_off").exists()

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

def checkpoint(folder, net, **config):
    """A run directory as train.py writes it, around a model."""
    folder.mkdir(parents=True, exist_ok=True)
    n, points = net.cfg.n_classes, net.cfg.domain == "points"
    state = dict(model=net.state_dict(), ema=net.state_dict(), optimizer={}, step=7, config=dict(
        model=asdict(net.cfg), class_names=[f"c{i}" for i in range(n)], items=9, tokens=None,
        settings=dict(dataset="solids" if points else "glyphs", category="all", model="tiny", path="linear",
                      solver="sde" if points else "euler", sampling_steps=2, guidance=2.0),
        normalisation="box" if points else None) | config)
    torch.save(state, folder / "ckpt.pt")
    return folder

@pytest.fixture(scope="session")
def glyphs_run(tmp_path_factory):
    """Run directory of an image model after 6 steps: 36 classes, 32 x 32."""
    return trained(tmp_path_factory.mktemp("runs") / "glyphs", "--steps", 6)

@pytest.fixture(scope="session")
def solids_run(tmp_path_factory):
    """Run directory of a point model after 6 steps: 7 classes, 64 points."""
    out = tmp_path_factory.mktemp("runs") / "solids"
    return trained(out, "--dataset", "solids", "--points", 64, "--steps", 6)
