"""What is shipped: the default's loss curve, and the results behind the tables of docs/results.md."""
import argparse
import json

import numpy as np
import pytest

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
        out = trained(tmp_path / "run", "--steps", 100)
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == [row["step"] for row in CURVE[:10]]
    for step in (50, 100):
        assert abs(loss_until(step, found, 50) / loss_until(step, steps=50) - 1) < 0.03
    assert abs(found[0]["loss"] / CURVE[0]["loss"] - 1) < 0.01               # same data, noise and start

def test_expected_losses_of_the_page_are_those_of_the_curve():
    assert CURVE[-1]["step"] == train.RECIPES["glyphs"]["steps"]
    for step in (100, 1000, 3000, CURVE[-1]["step"]):
        assert f"| {step:,} | {loss_until(step):.3f} |" in README

@pytest.mark.parametrize("path", sorted((ROOT / "experiments" / "results").glob("*.json")),
                         ids=lambda path: path.stem)
def test_tables_of_results_are_those_of_the_shipped_results(path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import claims
    assert claims.table(json.loads(path.read_text())) in (ROOT / "docs" / "results.md").read_text()
