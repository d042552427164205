"""What is shipped: the default's loss curve, and the results behind the tables of docs/results.md."""
import argparse
import json

import numpy as np
import pytest

import sample
import toys
import train
from conftest import ROOT, trained

README = (ROOT / "README.md").read_text()
SHIPPED = (ROOT / "tests" / "expected" / "glyphs_loss.jsonl").read_text()
CURVE = [json.loads(line) for line in SHIPPED.splitlines()]

def loss_until(step, curve=CURVE, steps=100):
    """Mean loss of the last steps up to one: every line of a log is the mean since the line before."""
    return np.mean([row["loss"] for row in curve if step - steps < row["step"] <= step])

def test_default_loss_follows_the_shipped_curve(tmp_path, monkeypatch):
    """If a change slowed or broke learning of the default preset; float32 for bfloat16 moves it by 0.7 %."""
    rate, last = train.learning_rate, CURVE[-1]["step"]
    monkeypatch.setattr(train, "learning_rate", lambda args, step: rate(
        argparse.Namespace(**vars(args) | dict(steps=last)), step))
    monkeypatch.setattr(train, "sample_sheet", lambda *args: None)
    with monkeypatch.context() as m:
        m.setattr("conftest.TINY", ["--workers", "0", "--device", "cpu"])
        out = trained(tmp_path / "run", "--steps", 60)
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == [row["step"] for row in CURVE[:6]]
    for step in (30, 60):
        assert abs(loss_until(step, found, 30) / loss_until(step, steps=30) - 1) < 0.03
    assert abs(found[0]["loss"] / CURVE[0]["loss"] - 1) < 0.01               # same data, noise and start

def test_expected_losses_of_the_page_are_those_of_the_curve():
    assert CURVE[-1]["step"] == train.RECIPES["glyphs"]["steps"]
    for step in (100, 1000, 3000, CURVE[-1]["step"]):
        assert f"| {step:,} | {loss_until(step):.3f} |" in README

def shapes(images):
    """Grey images as vectors of mean 0 and length 1: (n, H W)."""
    grey = images.reshape(len(images), -1, 3).mean(2)
    grey = grey - grey.mean(1, keepdims=True)
    return grey / np.linalg.norm(grey, axis=1, keepdims=True)

def test_shipped_letters_are_letters_and_the_same_at_every_resolution():
    """If samples of a trained model were no longer of their class, or another size showed another sample."""
    net, ckpt = sample.load("glyphs")
    images = {}
    for res in (32, 64):
        setting = sample.resolve(net.cfg, ckpt, (res, res), options={"steps": 6})
        x, _ = sample.draw(net, setting, range(8))
        images[res] = np.stack([sample.to_pixels(values, res, res) for values in x]).astype(float)
    halved = images[64].reshape(8, 32, 2, 32, 2, 3).mean((2, 4))
    assert np.abs(halved - images[32]).mean() < 5                            # of 255; of other letters 60
    glyphs = toys.Glyphs(32, "test")
    real = shapes(np.stack([glyphs.item(i)[0] for i in range(36 * 10)]))     # light on dark or dark on light
    nearest = np.abs(shapes(images[32]) @ real.T).argmax(1) % 36
    assert (nearest == np.arange(8)).mean() >= 0.5                           # by chance 0.03

@pytest.mark.parametrize("name", ["glyphs", "solids", "emoji", "views"])
def test_shipped_models_hold_no_path_and_no_optimizer(name):
    state = sample.read_checkpoint(sample.find_checkpoint(name))
    settings = state["config"]["settings"]
    assert state.keys() == {"ema", "step", "config", "path"} and not settings["data"] and not settings["out"]

@pytest.mark.parametrize("path", sorted((ROOT / "experiments" / "results").glob("*.json")),
                         ids=lambda path: path.stem)
def test_tables_of_results_are_those_of_the_shipped_results(path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import claims
    assert claims.table(json.loads(path.read_text())) in (ROOT / "docs" / "results.md").read_text()
