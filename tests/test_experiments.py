"""tools/poster.py and tools/plan.py, and that every script of experiments/ starts."""
import importlib
import json
import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.weak import WeakIdKeyDictionary

import model as asft
import sample
import train
from conftest import ROOT, refused
from tools import plan, poster

@pytest.fixture
def experiment(monkeypatch):
    """Imports a script of experiments/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    return importlib.import_module

@pytest.fixture
def small_set(tmp_path):
    """An .npz of 120 images of noise, 8 x 8, in two classes."""
    images = np.random.default_rng(0).integers(0, 256, (120, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(120) % 2)
    return str(tmp_path / "set.npz")

def test_a_poster_has_the_pixels_of_sample_py(glyphs_run, tmp_path):
    """In bands, continued after an interruption, and streamed into one PNG."""
    words = ["--ckpt", str(glyphs_run), "--res", "256x272", "--steps", "2", "--device", "cpu",
             *"--noise coupled --solver sde --refine 0.3 --out".split()]
    sample.main([*words, str(tmp_path / "whole"), "--n", "1"])
    model, checkpoint = sample.load(glyphs_run)
    setting = sample.resolve(model.cfg, checkpoint, (256, 272), noise="coupled", solver="sde", refine=0.3,
                             options=dict(steps=2))
    path = tmp_path / "poster.png"
    (tmp_path / "poster.png.parts").mkdir()
    poster.poster(model, setting, 0, path, rows=100)
    a, b = (np.asarray(Image.open(p)).astype(int) for p in (path, tmp_path / "whole" / "000000.png"))
    assert a.shape == (256, 272, 3) and abs(a - b).max() <= 1 and not (tmp_path / "poster.png.parts").exists()
    poster.main([*words, str(tmp_path / "zoom"), "--zoom", "0.5,0.5"])
    (sheet,) = (tmp_path / "zoom").glob("*.png")
    assert Image.open(sheet).size[0] > 4 * 272

def test_the_plan_needs_neither_data_nor_gpu(capsys, tmp_path, monkeypatch):
    """If it asked for them, or GFLOP of a training image were others."""
    monkeypatch.chdir(tmp_path)
    plan.main(["--dataset", "imagenet256", "--model", "S", "--batch-size", "256"])
    text = capsys.readouterr().out
    assert "102.9 GFLOP" in text and "days on 8 H100" in text and not list(tmp_path.iterdir())
    refused("3 processes", call=lambda: plan.main(["--dataset", "imagenet256", "--gpus", "3"]))

@pytest.mark.parametrize("again", [False, True])
def test_the_plan_is_what_a_real_step_holds(again, monkeypatch):
    """S at 256, float32, within a tenth; with recomputed blocks the peak comes late, beside the gradients."""
    monkeypatch.setattr(asft.WindowAttention, "AT_A_TIME", {"cpu": 2 ** 28, "cuda": 2 ** 28})
    cfg, decoded = asft.config("S", n_classes=10), 8192
    planned = plan.activation_bytes(cfg, decoded, 1, again, torch.float32)
    net = asft.ASFT(cfg)
    net.grad_checkpoint = again
    for p in net.parameters():                                         # gates at zero would stop gradients
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    N, coords = cfg.res ** 2, asft.image_coords(cfg.res)
    x0, eps, query = torch.randn(1, N, 3), torch.randn(1, N, 3), torch.randperm(N)[None, :decoded]
    with plan.Alive() as alive:
        alive.known = WeakIdKeyDictionary()
        asft.cicfm_loss(net, coords, x0, eps, torch.rand(1), query, label=torch.tensor([1])).backward()
    gradients = 4 * sum(p.numel() for p in net.parameters())
    assert abs((planned + again * gradients) / alive.peak - 1) < 0.1

NAMES = "bench", "chaos", "claims", "gallery", "glyph_report", "gpu", "noise", "peer", "upscale"

@pytest.mark.parametrize("name", NAMES)
def test_experiments_start(name, capsys, monkeypatch, experiment):
    """If a script did not start, or its help did not say how it is called."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "experiments" / f"{name}.py"), run_name="__main__")
    assert f"experiments/{name}.py" in capsys.readouterr().out

def test_the_checks_for_a_gpu_run_on_the_cpu(tmp_path, monkeypatch, experiment):
    """If experiments/gpu.py failed on the CPU (but for the killed run, see chaos.py), or asked for no GPU."""
    gpu = experiment("gpu")
    with pytest.raises(SystemExit) as ended:
        gpu.main(["numbers", "compiled", "speed", "sampling", "metrics", "--dry", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert ended.value.code == 0 and len(rows) > 20 and all(row["ok"] for row in rows), rows
    assert (tmp_path / "gpu.md").read_text().count("\n| ") == len(rows) + 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("no CUDA device", call=lambda: gpu.main(["numbers"]))

def test_a_claim_runs_whole_and_is_not_done_twice(tmp_path, monkeypatch, experiment, small_set):
    """If an arm of a claim could not be trained, judged or drawn, or were trained again."""
    claims = experiment("claims")
    monkeypatch.setattr(claims.Pictures, "steps_drawn", 2)
    words = ["linear", "--data", small_set, "--steps", "1", "--n", "100", "--seeds", "1", "--out"]
    claims.main([*words, str(tmp_path / "out")])
    monkeypatch.setattr(train, "main", lambda words: pytest.fail("trained again"))
    claims.main([*words, str(tmp_path / "out")])
    result = tmp_path / "out" / "results" / "linear-set-1.json"
    assert result.exists() and result.with_suffix(".png").exists()

def test_the_peer_is_judged_at_each_budget(tmp_path, monkeypatch, capsys, experiment, small_set):
    """If an arm missed a budget, or a patch were put back elsewhere."""
    peer = experiment("peer")
    cfg = asft.config("tiny", res=8, width=32, heads=2, latents=4, n_classes=2)
    net, coords = peer.DiT(cfg, 4), asft.image_coords(8)
    torch.nn.init.normal_(net.head.weight)                             # gates at zero: a patch sees itself
    x, t = torch.randn(2, 1, 64, 3)[:, 0].requires_grad_(), torch.rand(2)
    order = torch.randperm(64)
    v = net(coords, x, coords[order], x[:, order], t)
    assert torch.equal(v, net(coords, x, coords, x, t)[:, order])
    v[:, order == 8 * 5 + 2].sum().backward()                          # row 5, column 2
    seen = x.grad.abs().sum((0, 2)).view(8, 8) > 0
    assert seen[4:, :4].all() and seen.sum() == 16
    small = dict(width=32, heads=2, depth=1, decode=64, sampling_steps=1)
    monkeypatch.setitem(train.RECIPES, "npz", train.RECIPES["npz"] | small)
    peer.main(["--data", small_set, "--minutes", "0.001", "0.002", "--n", "100", "--arms", "asft",
               "dit/4@5e-4", "--out", str(tmp_path)])
    assert capsys.readouterr().out.count(" min |") == 6
    assert len([*tmp_path.glob("set-*.png")]) == 3

def mean_colours(images):
    return images.float().mean((2, 3))

def test_upscale_enlarges_the_same_samples(glyphs_run, tmp_path, monkeypatch, capsys, experiment):
    """If the arms were not the same seeds, or the enlargement another than Pillow's."""
    upscale = experiment("upscale")
    monkeypatch.chdir(tmp_path)
    out, own = tmp_path / "up", ["--features", "test_experiments:mean_colours", "--metrics", "fd"]
    words = ["--ckpt", str(glyphs_run), "--real", "glyphs:val", "--n", "6", "--steps", "2", "--times", "2"]
    upscale.main([*words, "--out", str(out), *own])
    assert "trained at 32 pixels, at 64" in capsys.readouterr().out
    small, fine = (Image.open(out / side / "000001.png") for side in ("32", "64"))
    assert small.size == (32, 32) and fine.size == (64, 64)
    for name, how in (("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)):
        enlarged = Image.open(out / name / "000001.png")
        assert (np.asarray(enlarged) == np.asarray(small.resize((64, 64), how))).all()
        assert (out / f"metrics-{name}.json").exists()
