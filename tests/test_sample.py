"""sample.py: solvers against closed forms, chunks and seeds, pictures and files, the command line."""
import json
import math
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import model as asft
import sample
from conftest import ROOT
from test_model import close, tiny

MU, SD = 0.6, 0.3


def exact_velocity(path="linear", mu=MU, sd=SD):
    """Velocity of data N(mu, sd^2) on a path: v = a' E[x0 | x] + s' E[eps | x], in float64."""
    def velocity(x, t):
        a, s, da, ds = (z.item() for z in asft.PATHS[path](torch.tensor(t, dtype=torch.float64)))
        gain = (x - a * mu) / (a * a * sd * sd + s * s)
        velocity.calls += 1
        return da * (mu + a * sd * sd * gain) + ds * s * gain
    velocity.calls = 0
    return velocity


def exact_end(x, path="linear", mu=MU, sd=SD):
    """Where the exact flow takes x from t = 1 to t = 0: quantiles are kept, so (x - mean) / std is constant."""
    (a1, a0), (s1, s0) = (z.tolist() for z in asft.PATHS[path](torch.tensor([1.0, 0.0], dtype=torch.float64))[:2])
    return a0 * mu + math.hypot(a0 * sd, s0) * (x - a1 * mu) / math.hypot(a1 * sd, s1)


START = torch.linspace(-2, 2, 15, dtype=torch.float64).view(1, 5, 3)


# --- solvers

@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_solvers_converge_at_their_order(solver, order, path):
    """If a step used the wrong time or direction, the error would not fall by 2^order when steps double."""
    errors = []
    for steps in (40, 80, 160):
        velocity = exact_velocity(path)
        x = sample.SOLVERS[solver](velocity, START, steps)
        errors.append((x - exact_end(START, path)).abs().max().item())
        assert velocity.calls == steps * order
    for coarse, fine in zip(errors, errors[1:]):
        assert abs(math.log2(coarse / fine) - order) < 0.25, errors
    assert errors[-1] < (0.02, 1e-3)[order - 1]


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_dopri5_meets_its_tolerance_within_its_cap(path, capsys):
    """If the embedded error were wrong, tolerances would be missed or evaluations wasted."""
    calls = []
    for tolerance in (1e-3, 1e-5, 1e-7):
        velocity = exact_velocity(path)
        x = sample.dopri5(velocity, START, 1000, rtol=tolerance, atol=tolerance)
        assert (x - exact_end(START, path)).abs().max() < 20 * tolerance
        calls.append(velocity.calls)
    assert calls[0] < 80 and calls == sorted(calls) and all((n - 1) % 6 == 0 for n in calls)
    assert capsys.readouterr().err == ""


def test_dopri5_is_of_fifth_order():
    """If a coefficient of the table were mistyped, the steps that a tiny cap forces would not gain 2^5 per halving."""
    errors = []
    for steps in (1 + 6 * 8, 1 + 6 * 32):
        x = sample.dopri5(exact_velocity("cosine"), START, steps, rtol=1e-15, atol=1e-15)
        errors.append((x - exact_end(START, "cosine")).abs().max().item())
    assert errors[0] / errors[1] > 20 ** 2, errors
    for c, row in zip(sample.DP_C, sample.DP_A):
        assert abs(sum(row) - c) < 1e-14
    assert abs(sum(sample.DP_E)) < 1e-14


def test_dopri5_keeps_its_cap_and_says_so(capsys):
    """If an impossible tolerance ran past the cap, or the forced steps went unsaid."""
    for cap in (7, 12, 13, 50, 100):
        velocity = exact_velocity()
        x = sample.dopri5(velocity, START, cap, rtol=1e-12, atol=1e-12)
        assert velocity.calls <= cap and x.isfinite().all()
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "dopri5" in said and str(cap) in said
    with pytest.raises(data.InputError, match="7"):
        sample.dopri5(exact_velocity(), START, 6)


def test_dopri5_steps_by_the_context_alone():
    """If queries beyond the context changed the steps, they would change the picture (asft.md 5)."""
    x = torch.cat([START, 50 * START], 1)
    alone = sample.dopri5(exact_velocity(), START, 200)
    assert torch.equal(sample.dopri5(exact_velocity(), x, 200, control=5)[:, :5], alone)
    assert not torch.equal(sample.dopri5(exact_velocity(), x, 200)[:, :5], alone)


@pytest.mark.parametrize("diffusion", sample.DIFFUSIONS)
@pytest.mark.parametrize("path", asft.PATHS)
def test_sde_samples_the_data(path, diffusion):
    """If the score, the diffusion or the noise were wrong, mean and spread of the samples would be."""
    g, seen = torch.Generator().manual_seed(0), []

    def noise(i):
        seen.append(i)
        return torch.randn(1, 10000, 3, generator=g, dtype=torch.float64)

    velocity = exact_velocity(path)
    x = sample.sde(velocity, torch.randn(1, 10000, 3, generator=g, dtype=torch.float64), 200, noise=noise, path=path,
                   diffusion=diffusion)
    assert velocity.calls == 200 and seen == list(range(199))                  # the last step adds no noise
    assert abs(x.mean() - MU) < 0.01 and abs(x.std() / SD - 1) < 0.05


def test_sde_of_one_step_takes_the_mean():
    """If a single step added noise or divided by steps - 1."""
    x = sample.sde(exact_velocity(), START, 1, noise=None)
    assert x.isfinite().all()


def test_sde_converges_to_the_data_in_mean_and_spread_from_any_start():
    """If the noise were not injected: an ODE keeps a wrong start's quantiles, the SDE forgets them."""
    g = torch.Generator().manual_seed(0)
    noise = lambda i: torch.randn(1, 4000, 3, generator=g, dtype=torch.float64)
    wrong = torch.full((1, 4000, 3), 1.5, dtype=torch.float64)
    assert sample.euler(exact_velocity(), wrong, 200).std() == 0
    x = sample.sde(exact_velocity(), wrong, 400, noise=noise)
    assert x.std() > 0.5 * SD


def test_sampler_runs_from_noise_at_one_to_data_at_zero():
    """If the sampler's direction disagreed with training's t = 1 for noise."""
    times = {}
    for name, solver in sample.SOLVERS.items():
        seen = times[name] = []
        solver(lambda x, t: seen.append(t) or exact_velocity()(x, t), START, 20, noise=lambda i: 0 * START)
        assert seen[0] == 1 and min(seen) < 0.06 and min(seen) >= 0
    assert times["euler"] == pytest.approx([1 - i / 20 for i in range(20)])
    x0, eps = torch.tensor([[[0.1, 0.2, 0.3]]]), torch.tensor([[[1.0, -1.0, 2.0]]])
    for name, solver in sample.SOLVERS.items():
        if name != "sde":
            close(solver(lambda x, t: eps - x0, eps, 10), x0)


# --- noise

def test_gaussian_depends_on_the_key_and_extends():
    """If a longer draw began otherwise, queries would depend on how many there are."""
    long = sample.gaussian((0, 10000), 3, 1, "context")
    assert long.shape == (10000, 3) and long.dtype == torch.float32
    for a, b in ((0, 1), (0, 4097), (4095, 4097), (5000, 9999), (8192, 10000)):
        assert torch.equal(sample.gaussian((a, b), 3, 1, "context"), long[a:b])
    assert not torch.equal(sample.gaussian((0, 10000), 3, 2, "context"), long)
    assert not torch.equal(sample.gaussian((0, 10000), 4, 1, "context"), long)
    assert abs(long.mean()) < 0.02 and abs(long.std() - 1) < 0.02
    first, second = long[:4096].flatten(), long[4096:8192].flatten()
    assert abs((first * second).mean()) < 0.03                                 # runs do not repeat


def test_gaussian_of_a_box_is_that_of_the_whole():
    """If a crop's noise were not the whole picture's, or two tiles were alike."""
    whole = sample.gaussian((0, 0, 150, 200), 3, 1, (200, 150)).view(200, 150, 3)
    for x0, y0, x1, y1 in ((0, 0, 1, 1), (63, 64, 65, 129), (10, 20, 140, 199), (128, 0, 150, 200)):
        box = sample.gaussian((x0, y0, x1, y1), 3, 1, (200, 150))
        assert torch.equal(box.view(y1 - y0, x1 - x0, 3), whole[y0:y1, x0:x1])
    assert abs(whole.mean()) < 0.02 and abs(whole.std() - 1) < 0.02
    tiles = [whole[y:y + 64, x:x + 64].flatten() for y in (0, 64, 128) for x in (0, 64)]
    for i, a in enumerate(tiles):
        assert all(abs((a * b).mean()) < 0.03 for b in tiles[:i])


# --- from model to samples

SIZES = {"spatial": (20, 12), "perceiver": (20, 12), "levels": (20, 12), "points": 150, "hash": 150}


def run(model, indices=range(2), **options):
    return sample.generate(model, indices, label=torch.tensor([i % 5 for i in indices]), steps=options.pop("steps", 4),
                           **options)


@pytest.mark.parametrize("variant", SIZES)
def test_chunks_do_not_change_the_result(variant):
    """If decoding in chunks were not the same function, at sizes that were not trained and at those that were."""
    # few steps and small gains: a point's features turn at 512, so that rounding in its place grows from step to step
    model, steps = tiny(variant, gain=0.02), 2
    for size in (SIZES[variant], None):
        whole, _ = run(model, size=size, guidance=2.0, steps=steps)
        for chunk in (1, 2 * 37, 300):
            if chunk > 1 or variant == "points":
                assert (run(model, size=size, guidance=2.0, steps=steps, chunk=chunk)[0] - whole).abs().max() <= 1e-5
        count = 256 if variant not in ("points", "hash") else 64
        assert whole.shape == (2, math.prod(size) if isinstance(size, tuple) else size or count, 3)
        assert whole.dtype == torch.float32 and whole.isfinite().all()


@pytest.mark.parametrize("solver", sample.SOLVERS)
@pytest.mark.parametrize("variant", ["spatial", "points"])
def test_context_is_the_same_at_every_size(variant, solver, monkeypatch):
    """If queries fed back into the context, the content would change with the resolution."""
    states, inner = [], sample.SOLVERS[solver]
    monkeypatch.setitem(sample.SOLVERS, solver, lambda *a, **k: states.append(inner(*a, **k)) or states[-1])
    model, N = tiny(variant), 256 if variant == "spatial" else 64
    sizes = (None, (8, 8), (24, 40)) if variant == "spatial" else (None, 17, 200)
    results = [run(model, size=size, solver=solver, steps=13)[0] for size in sizes]
    for state, result in zip(states, results):
        assert (state[:, :N] - states[0]).abs().max() <= 1e-5
    assert torch.equal(results[0], states[0]) and torch.equal(results[1], states[1][:, N:])


def test_larger_picture_shows_the_same_content():
    """If coordinates or noise did not line up: queries on the training grid with its noise must give its picture."""
    model = tiny("spatial")
    x = sample.gaussian((0, 256), 0, 0, "context")[None]
    coords = asft.image_coords(16)
    label = torch.tensor([1])
    velocity = sample.Velocity(model, torch.cat([coords, coords]), label, context=256)
    with torch.no_grad():
        both = sample.euler(velocity, torch.cat([x, x], 1), 5)
    close(both[:, :256], both[:, 256:])


def test_start_noise_does_not_depend_on_the_batch(monkeypatch):
    """If sample i depended on what it is drawn together with (users' row 20)."""
    starts = []
    monkeypatch.setitem(sample.SOLVERS, "euler", lambda v, x, steps, noise=None, **_: starts.append((x, noise(3))) or x)
    model = tiny("spatial")
    for size in (None, (5, 7)):
        starts.clear()
        run(model, range(4), size=size)
        for i in range(4):
            run(model, [i], size=size)
            for together, alone in zip(starts[0], starts[-1]):
                assert torch.equal(together[i:i + 1], alone)
        assert not torch.equal(*starts[0])
        assert not torch.equal(starts[0][0][0], starts[0][0][1])
    run(model, [0], seed=1, size=(5, 7))
    assert not torch.equal(starts[-1][0], starts[0][0][:1])


def test_samples_do_not_depend_on_the_batch():
    """If a batch of 1 gave another sample than a batch of 4, beyond rounding."""
    for variant in ("spatial", "points"):
        model = tiny(variant, gain=0.02)
        together, _ = run(model, range(4), solver="sde")
        for i in range(4):
            alone = sample.generate(model, [i], label=torch.tensor([i]), steps=4, solver="sde")[0]
            assert (together[i] - alone[0]).abs().max() <= 1e-4


@pytest.mark.parametrize("variant", ["spatial", "points"])
def test_guidance(variant):
    """If guidance were not v_null + g (v_cond - v_null), or guidance 1 not bit-equal to none."""
    model = tiny(variant)
    N, image = (256, True) if variant == "spatial" else (64, False)
    coords, x = asft.image_coords(16) if image else None, torch.randn(2, N, 3)
    label, t = torch.tensor([1, 4]), torch.full((2,), 0.7)
    with torch.no_grad():
        cond, null = (model(coords, x, coords, x, t, z) for z in (label, None))
        assert (cond - null).abs().max() > 1e-3
        one = sample.Velocity(model, coords, label, guidance=1.0, context=N)(x, 0.7)
        assert torch.equal(one, cond)
        assert torch.equal(sample.Velocity(model, coords, None, guidance=3.0, context=N)(x, 0.7), null)
        for g in (0.0, 2.5):
            got = sample.Velocity(model, coords, label, guidance=g, context=N)(x, 0.7)
            close(got, null + g * (cond - null), 1e-5)


def test_guidance_by_tokens():
    """If tokens were not dropped in the null half of guidance."""
    model = tiny("point tokens")
    x, tokens, t = torch.randn(2, 64, 3), torch.randn(2, 4, 6), torch.full((2,), 0.7)
    with torch.no_grad():
        cond, null = (model(None, x, None, x, t, None, z) for z in (tokens, None))
        got = sample.Velocity(model, None, None, tokens, guidance=2.0, context=64)(x, 0.7)
        close(got, null + 2 * (cond - null), 1e-5)


@pytest.mark.parametrize("solver, steps, expected", [("euler", 5, 5), ("heun", 5, 10), ("sde", 5, 5), ("dopri5", 20, 19)])
def test_nfe_counts_network_evaluations(solver, steps, expected):
    """If the NFE printed were not the number of calls of the network."""
    model, encodes = tiny("spatial"), []
    inner = model.encode
    model.encode = lambda *args: encodes.append(1) or inner(*args)
    progress = []
    _, nfe = run(model, solver=solver, steps=steps, size=(9, 9), chunk=50, guidance=2.0, progress=progress.append)
    assert nfe == len(encodes) == pytest.approx(sum(progress)) and len(progress) == nfe * math.ceil((256 + 81) / 25)
    assert nfe <= expected if solver == "dopri5" else nfe == expected


# --- pictures and files

def test_draw_points():
    """If previews had no white background, or a farther point hid a nearer one."""
    picture = sample.draw_points(np.zeros((1, 3), np.float32), 64)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert (picture[0, 0] == 255).all() and (picture[32, 32] < 255).any() and (picture == 255).mean() > 0.4
    # two points on the line of sight: the eye sees (0, 0, 1) after turning 30 and tilting 20 degrees
    turn, tilt = math.radians(30), math.radians(20)
    z = np.array([-math.sin(turn) * math.cos(tilt), math.sin(tilt), math.cos(turn) * math.cos(tilt)])
    near, far = 0.8 * z[None], -0.8 * z[None]
    alone = sample.draw_points(np.concatenate([near, near]), 64)
    assert (sample.draw_points(np.concatenate([near, far]), 64) == alone).all()
    assert (sample.draw_points(np.concatenate([far, near]), 64) == alone).all()
    assert (sample.draw_points(np.concatenate([far, far]), 64) != alone).any()
    up, down = (np.flatnonzero((sample.draw_points(np.array([[0, y, 0]]), 64) < 255).any((1, 2))).mean() for y in (0.8, -0.8))
    assert up < 32 < down                                                      # y is up


def test_ply_round_trip(tmp_path):
    """If a viewer could not read the clouds."""
    points = torch.randn(37, 3).numpy()
    sample.write_ply(tmp_path / "x.ply", points)
    header, body = (tmp_path / "x.ply").read_bytes().split(b"end_header\n", 1)
    assert header.decode().splitlines() == ["ply", "format binary_little_endian 1.0", "element vertex 37",
                                            "property float x", "property float y", "property float z"]
    assert struct.unpack(f"<{37 * 3}f", body) == tuple(points.ravel().tolist())


def test_grid_picture_sizes():
    """If tiles were lost, misplaced or the sheet grew without bound."""
    tiles = [np.full((32, 48, 3), 10 * i, np.uint8) for i in range(5)]
    sheet = np.asarray(sample.grid_picture(tiles))
    zoom = max(1, 128 // 48)
    assert sheet.shape == (2 * (32 * zoom + 2) - 2, 3 * (48 * zoom + 2) - 2, 3)
    assert (sheet[5, 5] == 0).all() and (sheet[5, 48 * zoom + 7] == 10).all() and (sheet[-5, 5] == 30).all()
    assert (sheet[-5, -5] == 255).all()                                        # the sixth place is empty
    assert sample.grid_picture(tiles[:4], columns=4).size == (4 * (48 * zoom + 2) - 2, 32 * zoom)
    assert max(sample.grid_picture([np.zeros((3000, 3000, 3), np.uint8)] * 4).size) <= 4096 + 2


def test_picture_round_trip():
    """If values were not rounded back to the pixels they came from."""
    pixels = torch.randint(256, (1, 6, 6, 3), dtype=torch.uint8)
    assert (sample.picture(data.decode_values(pixels, "cpu")[0], (6, 6), True) == pixels[0].numpy()).all()


# --- command line

def cli(*words, capsys=None):
    """sample.main in this process; its standard output."""
    sample.main([str(w) for w in words])
    return capsys.readouterr().out if capsys else None


def listing(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("res, size", [("48", (48, 48)), ("20x40", (20, 40)), ("2x", (64, 64)), (None, (32, 32))])
def test_images_of_any_size(glyphs_run, tmp_path, capsys, res, size):
    """If a size other than the trained one failed, or files or their description were wrong."""
    out = tmp_path / "out"
    text = cli("--ckpt", glyphs_run, "--n", 5, *(["--res", res] if res else []), "--steps", 3, "--out", out, "--npz",
               "--seed", 7, capsys=capsys)
    assert listing(out) == [f"{i:06d}.png" for i in range(5)] + ["grid.png", "samples.json", "samples.npz"]
    meta = json.loads((out / "samples.json").read_text())
    assert [(s["file"], s["index"], s["label"], s["class_name"]) for s in meta["samples"]] == \
        [(f"{i:06d}.png", i, i, "ABCDE"[i]) for i in range(5)]
    expected = dict(weights="ema", seed=7, solver="euler", steps=3, nfe=3, guidance=2.0, step=6, dtype="float32", complete=True, n=5,
                    size=list(size), ckpt=str(glyphs_run), dataset="glyphs", normalisation=None)
    assert {k: meta[k] for k in expected} == expected
    with np.load(out / "samples.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (5, *size, 3) and arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].tolist() == [0, 1, 2, 3, 4]
        for i in range(5):
            assert (np.asarray(Image.open(out / f"{i:06d}.png")) == arrays["arr_0"][i]).all()
    assert "NFE 3" in text and "ema weights" in text and "euler" in text and str(out) in text


@pytest.mark.parametrize("points", [17, 3000, None])
def test_clouds_of_any_size(solids_run, tmp_path, capsys, points):
    """If any number of points but the trained one failed."""
    out, count = tmp_path / "out", points or 64
    cli("--ckpt", solids_run / "ckpt.pt", "--n", 2, *(["--points", points] if points else []), "--steps", 2, "--out", out,
        capsys=capsys)
    assert listing(out) == [f"{i:06d}.{e}" for i in range(2) for e in ("npy", "ply", "png")] + ["grid.png", "samples.json"]
    meta = json.loads((out / "samples.json").read_text())
    assert meta["normalisation"] == "box" and [s["file"] for s in meta["samples"]] == ["000000.npy", "000001.npy"]
    for i in range(2):
        cloud = np.load(out / f"{i:06d}.npy", allow_pickle=False)
        assert cloud.shape == (count, 3) and cloud.dtype == np.float32 and np.isfinite(cloud).all()
        assert (out / f"{i:06d}.ply").read_bytes().endswith(cloud.tobytes())


def test_classes_by_name_or_index_in_turn(glyphs_run, tmp_path):
    """If --class did not take names and indices, a digit's name before its index."""
    cli("--ckpt", glyphs_run, "--n", 5, "--class", "B", "7", "30", "--steps", 1, "--out", tmp_path)
    samples = json.loads((tmp_path / "samples.json").read_text())["samples"]
    assert [(s["label"], s["class_name"]) for s in samples] == [(1, "B"), (33, "7"), (30, "4"), (1, "B"), (33, "7")]


def test_all_classes_in_turn_by_default(solids_run, tmp_path):
    """If a run without --class skipped classes."""
    cli("--ckpt", solids_run, "--n", 9, "--steps", 1, "--points", 5, "--out", tmp_path)
    samples = json.loads((tmp_path / "samples.json").read_text())["samples"]
    assert [s["label"] for s in samples] == [0, 1, 2, 3, 4, 5, 6, 0, 1]


@pytest.mark.parametrize("solver, diffusion", [("euler", "sigma"), ("heun", "sigma"), ("dopri5", "sigma"),
                                               ("sde", "sigma"), ("sde", "sbdm")])
def test_every_solver_from_the_command_line(glyphs_run, tmp_path, capsys, solver, diffusion):
    """If a solver's options were lost between the command line and the solver."""
    text = cli("--ckpt", glyphs_run, "--n", 2, "--solver", solver, "--steps", 13, "--diffusion", diffusion, "--guidance", 1,
               "--out", tmp_path, capsys=capsys)
    meta = json.loads((tmp_path / "samples.json").read_text())
    assert meta["solver"] == solver and meta["diffusion"] == diffusion and meta["guidance"] == 1
    assert meta["nfe"] <= 13 if solver == "dopri5" else meta["nfe"] == {"heun": 26}.get(solver, 13)
    assert f"NFE {meta['nfe']}" in text and len(np.unique(np.asarray(Image.open(tmp_path / "000001.png")))) > 10


def test_weights_ema_or_raw(glyphs_run, tmp_path):
    """If --weights did not choose the weights that it names."""
    ckpt = sample.read_checkpoint(glyphs_run)
    seen = {}
    for name, key in (("ema", "ema"), ("raw", "model")):
        inner = sample.fits
        try:
            sample.fits = lambda cfg, state, path: seen.update({name: state}) or inner(cfg, state, path)
            cli("--ckpt", glyphs_run, "--n", 1, "--steps", 1, "--weights", name, "--out", tmp_path / name)
        finally:
            sample.fits = inner
        assert all(torch.equal(seen[name][k], ckpt[key][k]) for k in ckpt[key])
        assert json.loads((tmp_path / name / "samples.json").read_text())["weights"] == name
    assert any(not torch.equal(ckpt["ema"][k], ckpt["model"][k]) for k in ckpt["ema"])


def test_batch_and_chunk_do_not_change_the_pictures(glyphs_run, tmp_path):
    """If --batch or --chunk changed what is drawn by more than rounding."""
    pictures = []
    for i, words in enumerate((["--batch", 5], ["--batch", 2, "--chunk", 100])):
        cli("--ckpt", glyphs_run, "--n", 5, "--steps", 2, "--res", 40, "--out", tmp_path / str(i), *words)
        pictures.append([np.asarray(Image.open(tmp_path / str(i) / f"{k:06d}.png")).astype(int) for k in range(5)])
    assert np.abs(np.array(pictures[0]) - np.array(pictures[1])).max() <= 1


def test_default_place_and_newest_checkpoint(glyphs_run, tmp_path, monkeypatch, capsys):
    """If sampling without --ckpt or --out did not use the newest run and a folder in it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.InputError, match="--ckpt"):
        sample.main([])
    for name, age in (("old", 1000), ("new", 10 ** 9)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        target = tmp_path / "runs" / name / "ckpt.pt"
        target.write_bytes((glyphs_run / "ckpt.pt").read_bytes())
        os.utime(target, (age, age))
    cli("--n", 1, "--steps", 1, capsys=capsys)
    found = list((tmp_path / "runs").glob("*/samples/*/000000.png"))
    assert len(found) == 1 and found[0].parts[-4] == "new" and "32x32" in found[0].parts[-2]


# --- what goes wrong

class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def bad_checkpoints(run, folder):
    """name -> path of files that are no checkpoint of train.py."""
    good = (run / "ckpt.pt").read_bytes()
    ckpt = torch.load(run / "ckpt.pt", weights_only=True)
    paths = {}

    def put(name, write):
        paths[name] = folder / f"{name}.pt"
        write(paths[name])

    put("noise", lambda p: p.write_bytes(np.random.default_rng(0).bytes(5000)))
    put("empty", lambda p: p.write_bytes(b""))
    put("cut", lambda p: p.write_bytes(good[:len(good) // 2]))
    put("bomb", lambda p: p.write_bytes(pickle.dumps(Bomb(str(folder / "exploded")))))
    put("torchbomb", lambda p: torch.save(dict(ckpt, rng=Bomb(str(folder / "exploded"))), p))
    put("list", lambda p: torch.save([1, 2], p))
    put("other", lambda p: torch.save({"state_dict": {}}, p))
    put("half", lambda p: torch.save(dict(ckpt, ema={k: v for k, v in list(ckpt["ema"].items())[3:]}), p))
    put("shape", lambda p: torch.save(dict(ckpt, config=dict(ckpt["config"], model=dict(ckpt["config"]["model"], width=64))), p))
    put("field", lambda p: torch.save(dict(ckpt, config=dict(ckpt["config"], model=dict(ckpt["config"]["model"], magic=1))), p))
    put("hollow", lambda p: torch.save(dict(ckpt, config={}), p))
    return paths


@pytest.mark.parametrize("name", ["noise", "empty", "cut", "bomb", "torchbomb", "list", "other", "half", "shape", "field",
                                  "hollow", "missing"])
def test_bad_checkpoints_end_in_one_line(glyphs_run, tmp_path, name):
    """If a broken, foreign or hostile file ended in a traceback, or ran its payload."""
    path = bad_checkpoints(glyphs_run, tmp_path).get(name, tmp_path / "nothing.pt")
    with pytest.raises(data.InputError) as caught:
        sample.main(["--ckpt", str(path), "--n", "1", "--steps", "1", "--out", str(tmp_path / "out")])
    text = str(caught.value)
    assert "\n" not in text and path.name in text, text
    assert not (tmp_path / "exploded").exists()
    if name in ("half", "shape"):
        assert {"half": "missing latents", "shape": "expected"}[name] in text


BAD_WORDS = {
    "res zero": ("glyphs", ["--res", "0"], "--res 0"),
    "res text": ("glyphs", ["--res", "big"], "--res big"),
    "res negative": ("glyphs", ["--res", "20x0"], "--res 20x0"),
    "points on images": ("glyphs", ["--points", "5"], "--points"),
    "res on points": ("solids", ["--res", "32"], "--res"),
    "npz on points": ("solids", ["--npz"], "--npz"),
    "crop on points": ("solids", ["--crop", "0,0,1,1"], "--crop"),
    "crop outside": ("glyphs", ["--crop", "0,0,33,32"], "--crop 0,0,33,32"),
    "crop empty": ("glyphs", ["--crop", "5,0,5,32"], "--crop 5,0,5,32"),
    "crop text": ("glyphs", ["--crop", "all"], "--crop all"),
    "zoom outside": ("glyphs", ["--zoom", "0.5,1.5"], "--zoom 0.5,1.5"),
    "zoom nan": ("glyphs", ["--zoom", "nan,0"], "--zoom nan,0"),
    "zoom and crop": ("glyphs", ["--zoom", "0.5,0.5", "--crop", "0,0,3,3"], "--crop"),
    "npz too large": ("glyphs", ["--npz", "--res", "9000"], "--npz"),
    "res times": ("glyphs", ["--res", "0x"], "--res 0x"),
    "class": ("glyphs", ["--class", "dog"], "--class dog"),
    "class index": ("solids", ["--class", "7"], "--class 7"),
    "dopri5 steps": ("glyphs", ["--solver", "dopri5", "--steps", "3"], "--steps 3"),
    "device": ("glyphs", ["--device", "abacus"], "--device abacus"),
    "device index": ("glyphs", ["--device", "cuda:99"], "--device cuda:99"),
    "device kind": ("glyphs", ["--device", "meta"], "--device meta"),
}


@pytest.mark.parametrize("name", BAD_WORDS)
def test_bad_words_end_in_one_line(glyphs_run, solids_run, tmp_path, name):
    """If a wrong flag ended in a traceback or in a message that does not name it."""
    kind, words, expected = BAD_WORDS[name]
    with pytest.raises(data.InputError) as caught:
        cli("--ckpt", glyphs_run if kind == "glyphs" else solids_run, "--n", 1, "--steps", 1, "--out", tmp_path, *words)
    assert "\n" not in str(caught.value) and expected in str(caught.value)


@pytest.mark.parametrize("words", [["--n", "0"], ["--points", "0"], ["--solver", "rk4"], ["--steps", "-1"], ["--chunk", "x"],
                                   ["--weights", "best"], ["--what"]])
def test_words_that_argparse_refuses(words, capsys):
    """If a wrong number or choice were accepted."""
    with pytest.raises(SystemExit) as caught:
        sample.main(words)
    assert caught.value.code == 2 and words[0] in capsys.readouterr().err


def test_unconditional_model_refuses_conditions(glyphs_run, tmp_path):
    """If guidance or classes were silently ignored where there are none."""
    ckpt = torch.load(glyphs_run / "ckpt.pt", weights_only=True)
    ckpt["config"]["class_names"], ckpt["config"]["model"]["n_classes"] = [], 0
    for key in ("model", "ema"):
        del ckpt[key]["classes.weight"]
    torch.save(ckpt, tmp_path / "ckpt.pt")
    for words in (["--guidance", "2"], ["--class", "A"], ["--class", "0"]):
        with pytest.raises(data.InputError, match=words[0]):
            sample.main(["--ckpt", str(tmp_path), "--n", "1", "--steps", "1", *words])
    sample.main(["--ckpt", str(tmp_path), "--n", "2", "--steps", "1", "--out", str(tmp_path / "out"), "--npz"])
    meta = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert meta["guidance"] == 1 and meta["samples"][1]["label"] is None
    with np.load(tmp_path / "out" / "samples.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0"]


def test_exit_status_and_one_line_on_stderr(glyphs_run, tmp_path):
    """If the script itself, rather than main(), printed a traceback or another status."""
    (tmp_path / "noise.pt").write_bytes(b"\x80\x02noise")
    bad = [["--ckpt", tmp_path / "noise.pt"], ["--ckpt", glyphs_run, "--class", "dog"], ["--n", "0"]]
    for words in bad:
        done = subprocess.run([sys.executable, ROOT / "sample.py", *words], cwd=tmp_path, capture_output=True, text=True)
        lines = [line for line in done.stderr.splitlines() if not line.startswith(("usage:", " "))]
        assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--ckpt", glyphs_run, "--n", "1", "--steps", "1", "--out",
                           tmp_path / "out"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "NFE 1" in done.stdout and (tmp_path / "out" / "000000.png").exists()


def test_a_directory_holds_one_setting(tmp_path, glyphs_run):
    """If a second run left files of the first beside its own, or a refused one removed them."""
    run = lambda *flags: sample.main(["--ckpt", str(glyphs_run), "--steps", "2", "--out", str(tmp_path / "o"), *flags])
    names = lambda: sorted(p.name for p in (tmp_path / "o").glob("0*.png"))
    run("--n", "3")
    for wrong in (["--guidance", "nan"], ["--guidance=-1"], ["--solver", "dopri5"]):
        with pytest.raises(data.InputError):
            run("--n", "1", *wrong)
        assert names() == ["000000.png", "000001.png", "000002.png"]
    run("--n", "2", "--seed", "1")
    assert names() == ["000000.png", "000001.png"]


def test_a_rerun_keeps_what_is_finished(tmp_path, glyphs_run, capsys):
    """If an interrupted run began again from nothing, or took a half-written or foreign file for a sample."""
    run = lambda *flags: cli("--ckpt", glyphs_run, "--steps", 2, "--out", tmp_path, *flags, capsys=capsys)
    run("--n", 5)
    whole = {p.name: p.read_bytes() for p in tmp_path.glob("0*.png")}
    record = json.loads((tmp_path / "samples.json").read_text())
    (tmp_path / "samples.json").write_text(json.dumps(dict(record, complete=False)))
    (tmp_path / "000003.png").unlink()
    (tmp_path / "000003.png.tmp").write_bytes(b"half")
    before = (tmp_path / "000001.png").stat().st_mtime_ns
    assert "4 samples of this setting" in run("--n", 5)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("0*.png")} == whole
    assert (tmp_path / "000001.png").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "samples.json").read_text()) == record
    run("--n", 2)                                   # fewer of the same: the others stay, and stay listed
    assert {p.name for p in tmp_path.glob("0*.png")} == set(whole)
    assert json.loads((tmp_path / "samples.json").read_text()) == record


def test_files_without_a_record_are_not_taken_for_samples(tmp_path, glyphs_run):
    """If a foreign picture that bears a sample's name were kept as a finished sample."""
    (tmp_path / "000000.png").write_bytes(b"foreign")
    sample.main(["--ckpt", str(glyphs_run), "--steps", "2", "--n", "2", "--out", str(tmp_path)])
    assert Image.open(tmp_path / "000000.png").size == (32, 32)


def test_processes_share_the_samples(tmp_path, glyphs_run):
    """If another number of processes drew other samples, drew one twice, or wrote another number of files (row 21)."""
    common = ["--ckpt", str(glyphs_run), "--samples", "7", "--steps", "2", "--batch", "2", "--npz"]
    sample.main([*common, "--out", str(tmp_path / "one")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, str(ROOT / "sample.py"), *common,
                           "--out", str(tmp_path / "two")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert listing(tmp_path / "one") == listing(tmp_path / "two")
    one, two = (np.load(tmp_path / name / "samples.npz", allow_pickle=False)["arr_0"].astype(int) for name in ("one", "two"))
    assert abs(one - two).max() <= 1
    records = [json.loads((tmp_path / name / "samples.json").read_text()) for name in ("one", "two")]
    assert [r.pop("processes") for r in records] == [1, 2] and records[0] == records[1]


# --- one picture, however the work is cut (asft.md 5): at most 1 of 255 levels apart

@pytest.fixture(scope="module")
def lively(glyphs_run, solids_run, tmp_path_factory):
    """Run directories of an image and a point model whose output depends on everything, unlike after 6 steps."""
    runs = {}
    for name, source, gain in (("images", glyphs_run, 0.3), ("clouds", solids_run, 0.01)):
        ckpt, g = torch.load(source / "ckpt.pt", weights_only=True), torch.Generator().manual_seed(0)
        for key, p in ckpt["ema"].items():
            if "modulation" in key or key.startswith("head"):
                p += gain * torch.randn(p.shape, generator=g)
        runs[name] = tmp_path_factory.mktemp(name)
        torch.save(ckpt, runs[name] / "ckpt.pt")
    return runs


def drawn(run, out, *words):
    """What sample.py draws, as arrays: uint8 pictures as int, or clouds in levels of 1/127.5."""
    sample.main(["--ckpt", str(run), "--out", str(out), *map(str, words)])
    return read_samples(out)


def read_samples(out):
    files = [out / s["file"] for s in json.loads((out / "samples.json").read_text())["samples"]]
    assert files and json.loads((out / "samples.json").read_text())["complete"]
    return [np.asarray(Image.open(f)).astype(int) if f.suffix == ".png" else 127.5 * np.load(f, allow_pickle=False) for f in files]


def same(one, two):
    assert len(one) == len(two) > 0
    for a, b in zip(one, two):
        assert a.shape == b.shape and abs(a - b).max() <= 1 and a.std() > 1


ODE, SDE = ("--steps", 4, "--solver", "heun"), ("--steps", 6, "--solver", "sde")


@pytest.mark.parametrize("how", [ODE, SDE, ("--steps", 14, "--solver", "dopri5")], ids=["ode", "sde", "adaptive"])
def test_crop_is_the_same_region_of_the_picture(lively, tmp_path, how):
    """If a crop drew other noise, coordinates or steps than the whole; at sizes trained on and not, square and not."""
    for res, size in (("150x200", (150, 200)), ("32", (32, 32))):
        whole, = drawn(lively["images"], tmp_path / f"{res}", "--n", 1, "--res", res, *how)
        assert whole.shape == (*size, 3)
        for x0, y0, x1, y1 in ((3, 5, 19, 30), (0, 31, size[1], 32), (size[1] - 1, 0, size[1], size[0])):
            box = f"{x0},{y0},{x1},{y1}"
            same(drawn(lively["images"], tmp_path / box / res, "--n", 1, "--res", res, "--crop", box, *how),
                 [whole[y0:y1, x0:x1]])
    other, = drawn(lively["images"], tmp_path / "seed", "--n", 1, "--res", 32, "--seed", 1, *how)
    assert abs(other - whole).max() > 30


@pytest.mark.parametrize("how", [ODE, SDE], ids=["ode", "sde"])
@pytest.mark.parametrize("kind, size", [("images", ("--res", 72)), ("clouds", ("--points", 9000))])
def test_chunk_and_batch_do_not_change_a_sample(lively, tmp_path, kind, size, how):
    """If --chunk 4096 = --chunk 262144 or --batch 1 = --batch 16 failed."""
    draw = lambda *words: drawn(lively[kind], tmp_path / "-".join(map(str, words)), "--n", 3, *size, *how, *words)
    one = draw("--chunk", 4096, "--batch", 1)
    same(one, draw("--chunk", 262144, "--batch", 16))
    same(one, draw("--chunk", 1000, "--batch", 2))


@pytest.mark.parametrize("how", [ODE, SDE], ids=["ode", "sde"])
@pytest.mark.parametrize("kind, size", [("images", ("--res", "150x100")), ("clouds", ("--points", 20000))])
def test_parts_make_the_whole(lively, tmp_path, monkeypatch, capsys, kind, size, how):
    """If drawing band by band gave another picture, if an interrupted run began again, or left its parts behind."""
    whole = drawn(lively[kind], tmp_path / "whole", "--n", 2, *size, *how)
    monkeypatch.setattr(sample, "PART", 8192)
    same(drawn(lively[kind], tmp_path / "parts", "--n", 2, *size, *how), whole)
    assert {p.suffix for p in (tmp_path / "parts").iterdir()} == {p.suffix for p in (tmp_path / "whole").iterdir()}

    seen, inner = [], sample.generate
    def killed(*args):
        seen.append(args[12])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return inner(*args)
    monkeypatch.setattr(sample, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        drawn(lively[kind], tmp_path / "again", "--n", 2, *size, *how)
    assert not any((tmp_path / "again").glob("000000.*g")) and len(list((tmp_path / "again" / "000000.parts").iterdir())) == 1
    capsys.readouterr()
    same(drawn(lively[kind], tmp_path / "again", "--n", 2, *size, *how), whole)
    assert "1 of 6 parts of this setting" in capsys.readouterr().out and seen.count(seen[0]) == 2      # once for each sample
    assert not any((tmp_path / "again").glob("*.parts"))
    for a, b in ((0, 1), (1, 0)):                              # parts of another setting are not taken for this one's
        with pytest.raises(KeyboardInterrupt):
            seen.clear()
            drawn(lively[kind], tmp_path / "seed", "--seed", a, "--n", 2, *size, *how)
    same(drawn(lively[kind], tmp_path / "seed", "--n", 2, *size, *how), whole)


@pytest.mark.parametrize("kind, size, n", [("images", ("--res", 100), 1), ("clouds", ("--points", 9000), 5)])
def test_two_processes_draw_what_one_does(lively, tmp_path, kind, size, n):
    """If sharing out samples (many) or queries (few) among processes changed a sample, or the number of files."""
    words = ["--samples", n, *size, *SDE]
    one = drawn(lively[kind], tmp_path / "one", *words)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "sample.py"),
                "--ckpt", str(lively[kind]), "--out", str(tmp_path / "two"), *map(str, words)]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert ("in 2 parts" in done.stdout) == (n == 1) and "NFE 6" in done.stdout
    same(one, read_samples(tmp_path / "two"))
    assert listing(tmp_path / "one") == listing(tmp_path / "two")
    again = subprocess.run(torchrun, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and f"{math.ceil(n / 2) if n > 1 else n} samples of this setting" in again.stdout


def test_no_collective_in_the_sampling_loop():
    """If processes waited for one another between samples: the slowest would set the pace, a dead one hang all (row 21)."""
    import ast
    main = next(f for f in ast.parse((ROOT / "sample.py").read_text()).body if getattr(f, "name", "") == "main")
    loop, = (node for node in main.body if isinstance(node, ast.With))
    words = {n.id for n in ast.walk(loop) if isinstance(n, ast.Name)} | {n.attr for n in ast.walk(loop) if isinstance(n, ast.Attribute)}
    assert "generate" in words and not words & {"dist", "wait_for_all", "barrier", "all_reduce"}


def test_cut():
    """If parts overlapped, left a row out, were too large, or fewer than the processes that wait for work."""
    for size, share in (((16384, 16384), 1), ((100, 300), 1), ((100, 300), 3), ((7, 9), 4), ((2, 9), 8), ((3000, 2 ** 21), 1)):
        parts = sample.cut(size, (0, 0, size[1], size[0]), share, True)
        if parts == [None]:
            assert share == 1
            continue
        assert [p[1] for p in parts[1:]] == [p[3] for p in parts[:-1]] and (parts[0][1], parts[-1][3]) == (0, size[0])
        assert all(p[3] > p[1] and (p[0], p[2]) == (0, size[1]) for p in parts) and len(parts) >= min(share, size[0])
        assert all((p[3] - p[1]) * size[1] <= max(sample.PART, size[1]) for p in parts)
        assert all((p[3] - p[1]) % 64 == 0 for p in parts[:-1]) or size[0] / len(parts) < 64
    assert sample.cut(3 * 2 ** 20, None, 1, False) == [(0, 2 ** 20), (2 ** 20, 2 ** 21), (2 ** 21, 3 * 2 ** 20)]
    assert sample.cut(10001, None, 2, False) == [(0, 5001), (5001, 10001)]


def test_long_runs_tell_how_far_they_are(lively, tmp_path, monkeypatch, capsys):
    """If hours of sampling into a log file said nothing: pixels done, pixels in all, minutes left."""
    clock = iter(range(0, 10 ** 6, 6))
    monkeypatch.setattr(sample, "PART", 64 * 64)
    monkeypatch.setattr(sample.time, "time", lambda: next(clock))
    drawn(lively["images"], tmp_path, "--n", 1, "--res", "256x64", "--steps", 1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "min left" in line]
    assert lines and all(f"of {256 * 64:,} pixels" in line for line in lines) and lines[0].startswith(("4,096", "8,192"))


def test_streamed_png_is_read_by_others(tmp_path):
    """If the PNG writer broke the format: header, filter across bands, checksums."""
    pixels = np.random.default_rng(0).integers(0, 256, (77, 33, 3), dtype=np.uint8)
    for cuts in ([0, 77], [0, 1, 40, 77]):
        with open(tmp_path / "a.png", "wb") as f:
            sample.write_png(f, 33, 77, (pixels[a:b] for a, b in zip(cuts, cuts[1:])))
        with Image.open(tmp_path / "a.png") as picture:
            picture.verify()
        assert (np.asarray(Image.open(tmp_path / "a.png")) == pixels).all()


def test_a_large_picture_has_a_preview(lively, tmp_path, monkeypatch):
    """If the preview of a picture that is drawn in parts were not the picture, smaller."""
    monkeypatch.setattr(sample, "PART", 2 ** 16)
    whole, = drawn(lively["images"], tmp_path, "--n", 1, "--res", "1100x300", "--steps", 1)
    preview = np.asarray(Image.open(tmp_path / "000000-preview.png")).astype(int)
    assert preview.shape == (550, 150, 3)
    assert abs(whole.reshape(550, 2, 150, 2, 3).mean((1, 3)) - preview).max() <= 1
    sample.main(["--ckpt", str(lively["images"]), "--out", str(tmp_path), "--n", "1", "--steps", "1"])
    assert listing(tmp_path) == ["000000.png", "grid.png", "samples.json"]


def test_zoom_is_a_row_of_crops(lively, tmp_path):
    """If a view of the zoom were another than the crop of the picture 4, 16, 64 times finer."""
    strip, = drawn(lively["images"], tmp_path / "zoom", "--n", 1, "--res", "40x48", "--zoom", "0.9,0.4", "--steps", 2)
    scale = strip.shape[0] // 40
    views = [strip[::scale, i * (48 * scale + 2):i * (48 * scale + 2) + 48 * scale:scale] for i in range(4)]
    for view, res, box in zip(views, ("40x48", "160x192", "640x768", "2560x3072"),
                              ("0,0,48,40", "144,44,192,84", "667,236,715,276", "2741,1004,2789,1044")):
        crop, = drawn(lively["images"], tmp_path / res, "--n", 1, "--res", res, "--crop", box, "--steps", 2)
        frame = (view == (255, 0, 0)).all(-1) & (crop != (255, 0, 0)).any(-1)      # but for red pixels of the picture itself
        assert (0 < frame.sum() < 60) == (view is not views[3])
        assert abs(view - crop)[~frame].max() <= 1


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_used_again():
    """If large tensors were still handed back to the kernel and filled with zeros page by page each time."""
    program = """
import resource, sys, torch, sample
if sys.argv[1] == "keep":
    sample.keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for i in range(12):           # a second area may be taken once, where something small settled in the first
    torch.ones(2 ** 24)
    start = start if i > 5 else faults()
print(faults() - start)
"""
    faults = {how: int(subprocess.run([sys.executable, "-c", program, how], cwd=ROOT, capture_output=True, text=True,
                                      check=True).stdout) for how in ("keep", "default")}
    if faults["default"] > 1000:                       # elsewhere than with glibc there may be nothing to save
        assert faults["keep"] < 0.1 * faults["default"]
