"""sample.py: solvers against known solutions, samples however the work is cut, files, processes, input."""
import functools
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import model as asft
import sample
from conftest import ROOT, TORCHRUN, Bomb, checkpoint, python, refused

def linear(rate):
    """dx/dt = rate x: x(0) = x(1) exp(-rate)."""
    def velocity(x, t):
        velocity.calls += 1
        return rate * x
    velocity.calls = 0
    return velocity

@pytest.mark.parametrize("solver, order, per_step", [(sample.euler, 1, 1), (sample.heun, 2, 2)])
def test_order_of_convergence_and_evaluations(solver, order, per_step):
    """If halving the steps did not divide the error by 2 or 4, or a step cost more evaluations."""
    x, errors = torch.ones(1, 1, 3, dtype=torch.float64), []
    for steps in (20, 40):
        v = linear(1.5)
        errors.append(abs(solver(v, x, steps)[0, 0, 0].item() - math.exp(-1.5)))
        assert v.calls == per_step * steps
    assert 2 ** order * 0.8 < errors[0] / errors[1] < 2 ** order * 1.25

def test_solvers_see_the_time_from_noise_to_data():
    """dx/dt = 2t: x(0) = x(1) - 1, and t = 1 comes first."""
    for name, options in (("euler", dict(steps=4000)), ("heun", dict(steps=5)),
                          ("dopri5", dict(evaluations=60))):
        seen = []
        x = sample.SOLVERS[name](lambda x, t: seen.append(t) or torch.full_like(x, 2 * t),
                                 torch.ones(1, 2, 3), **options)
        assert seen[0] == 1.0 and min(seen) >= 0 and x.abs().max() < 1e-3, name

def test_dopri5_keeps_tolerance_and_cap(capsys):
    """If it missed its tolerance, its number of evaluations, or let queries set the step."""
    x = torch.ones(1, 1, 3, dtype=torch.float64)
    v = linear(3.0)
    assert abs(sample.dopri5(v, x, 1000, rtol=1e-8, atol=1e-8)[0, 0, 0]
               - math.exp(-3)) < 1e-7 and v.calls < 400
    for cap in (7, 13, 50):
        v = linear(30.0)
        assert sample.dopri5(v, x, cap, rtol=1e-9, atol=1e-9).isfinite().all() and v.calls <= cap
    assert "--evaluations 50 forced" in capsys.readouterr().err
    refused("at least 7", call=lambda: sample.dopri5(v, x, 6))
    both = torch.cat([x, 1e6 * x], 1)                                  # only the context sets the step
    v, w = linear(2.0), linear(2.0)
    sample.dopri5(v, both, 500, rtol=0, atol=1e-6, control=1)
    sample.dopri5(w, both, 500, rtol=0, atol=1e-6)
    assert v.calls < w.calls

@pytest.mark.parametrize("path, diffusion", [     # vp with sbdm needs more steps than a test has
    ("linear", "sigma"), ("linear", "sbdm"), ("cosine", "sigma"), ("cosine", "sbdm"), ("vp", "sigma")])
def test_sde_draws_the_data_distribution(path, diffusion):
    """Data N(1, 0.5^2): the exact velocity is affine in x, and the SDE ends in that distribution."""
    def velocity(x, t):
        a, s, da, ds = (z.item() for z in asft.PATHS[path](torch.tensor(t, dtype=torch.float64)))
        variance = (a * 0.5) ** 2 + s ** 2
        x0 = 1 + a * 0.25 / variance * (x - a)
        return da * x0 + ds * s / variance * (x - a)
    g = torch.Generator().manual_seed(0)
    noise = [torch.randn(1, 20000, 3, generator=g) for _ in range(201)]
    x = sample.sde(velocity, noise[200], 200, noise.__getitem__, asft.PATHS[path],
                   sample.DIFFUSIONS[diffusion])
    assert abs(x.mean() - 1) < 0.03 and abs(x.std() - 0.5) < 0.04

def small(domain="image", **changes):
    """A model with random weights everywhere, so that nothing is zero."""
    torch.manual_seed(0)
    preset = "tiny" if domain == "image" else "point-tiny"
    size = dict(encoder_heads=2) if domain == "image" else dict(points=64)
    cfg = asft.config(preset, width=32, depth=2, heads=2, latents=16, **size, **changes)
    net = asft.ASFT(cfg).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return net

OPTIONS = [dict(solver="euler", steps=3), dict(solver="heun", steps=2), dict(solver="dopri5", evaluations=13),
           dict(solver="sde", steps=3, path="linear", diffusion="sigma")]

COUPLED = [dict(solver="euler", steps=3, noise="coupled"),
           dict(solver="sde", steps=3, path="linear", diffusion="sigma", noise="coupled", noise_length=8)]

@pytest.mark.parametrize("options", OPTIONS + COUPLED, ids=lambda o: o["solver"] + o.get("noise", ""))
def test_images_do_not_depend_on_batch_chunk_or_crop(options):
    """If a sample were another in another batch, in other chunks, or as part of its image."""
    net, label = small(n_classes=3), torch.tensor([0, 1, 2])
    whole, nfe = sample.generate(net, range(3), 5, (40, 150), None, label, guidance=2.0, **options)
    assert whole.shape == (3, 6000, 3)
    assert nfe == {"euler": 3, "heun": 4, "dopri5": 13, "sde": 3}[options["solver"]]
    crop, _ = sample.generate(net, [2], 5, (40, 150), (60, 3, 140, 33), label[2:], guidance=2.0, chunk=700,
                              **options)
    expected = whole[2].view(40, 150, 3)[3:33, 60:140].reshape(-1, 3)
    assert (crop[0] - expected).abs().max() < 1e-5
    trained, _ = sample.generate(net, [1], 5, None, (2, 4, 20, 30), label[1:2], guidance=2.0, **options)
    expected = sample.generate(net, [1], 5, None, None, label[1:2], guidance=2.0, **options)[0]
    expected = expected.view(32, 32, 3)[4:30, 2:20]
    assert (trained[0] - expected.reshape(-1, 3)).abs().max() < 1e-5

@pytest.mark.parametrize("options", OPTIONS[::3], ids=lambda o: o["solver"])
def test_points_do_not_depend_on_batch_chunk_or_part(options):
    """If a cloud were another in another batch, in other chunks, or some of its points alone."""
    net = small("points")
    whole, _ = sample.generate(net, [0, 4], 1, 5000, chunk=999, **options)
    part, _ = sample.generate(net, [4], 1, 5000, (0, 4000, 1, 4200), **options)
    assert whole.shape == (2, 5000, 3) and (part[0] - whole[1, 4000:4200]).abs().max() < 1e-3
    for points in (1, 17, 64, 2048):
        assert sample.generate(net, [0], 1, points, **options)[0].shape == (1, points, 3)

def test_compiled_sampling_needs_no_new_graph_after_the_first_step(monkeypatch):
    """With guidance and a last chunk of another size, images and points."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for net, size in ((small(n_classes=3), (40, 50)), (small("points", n_classes=3), 700)):
        torch._dynamo.reset()
        graphs, options = [], dict(size=size, label=torch.tensor([1]), guidance=2.0, steps=3, chunk=900)
        expected, _ = sample.generate(net, [0], **options)
        sample.compile_parts(net)
        inner = net.prepare

        def counted(*args):
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            return inner(*args)
        net.prepare = counted
        found, _ = sample.generate(net, [0], **options)
        assert (found - expected).abs().max() < 1e-4
        assert graphs[0] < graphs[1] == graphs[2] and not torch._dynamo.utils.counters["graph_break"]

def test_guidance_is_its_formula_inside_of_an_interval():
    """If it were not v_null + g (v_cond - v_null), or outside cost more than the conditional pass alone."""
    net, label, x, seen = small(n_classes=3), torch.tensor([1]), torch.ones(1, 1024, 3), []
    coords, inner = asft.image_coords(32), net.encode

    def counted(context, values, t, *rest):
        seen.append(len(t))
        return inner(context, values, t, *rest)
    net.encode = counted
    always, never = (sample.Velocity(net, coords, 1024, label, guidance=g) for g in (3.0, 1.0))
    null = sample.Velocity(net, coords, 1024)(x, 0.5)
    assert torch.allclose(always(x, 0.5), null + 3 * (never(x, 0.5) - null), atol=1e-5)
    assert (never(x, 0.5) - null).abs().max() > 1e-3
    seen.clear()
    v = sample.Velocity(net, coords, 1024, label, guidance=3.0, interval=(0.2, 0.6))
    for t, other in ((0.1, never), (0.2, always), (0.6, always), (0.7, never)):
        assert torch.equal(v(x, t), other(x, t))
    assert seen == [1, 1, 2, 2, 2, 2, 1, 1]

def test_noise_is_normal_and_every_key_gives_its_own():
    """If noise were not standard normal, or the same for another purpose, seed, step or sample."""
    samples = torch.tensor([1, 5])
    x = sample.normals(sample.random_words("query", 0, 0, samples, 20_000))
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01 and abs(x.pow(4).mean() - 3) < 0.1
    assert torch.corrcoef(x.flatten(0, 1).T).sub(torch.eye(3)).abs().max() < 0.02
    keys = [("query", 0, 1), ("query", 1, 0), ("query", 2 ** 32, 0), ("context", 0, 1), ("query", 0, 0)]
    draws = [sample.random_words(*key, samples, 8) for key in keys]
    assert all(not (a == b).any() for i, a in enumerate(draws) for b in draws[:i])

def test_philox_gives_the_published_words():
    """Random123's kat_vectors, philox4x32 of 10 rounds."""
    ones = 2 ** 32 - 1
    for counter, key, words in (
            ((0, 0, 0, 0), (0, 0), (0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8)),
            ((ones,) * 4, (ones,) * 2, (0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd)),
            ((0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344), (0xa4093822, 0x299f31d0),
             (0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1))):
        assert tuple(sample.philox(torch.tensor(counter), key).tolist()) == words

def test_coupled_noise_is_one_smooth_field_at_every_size():
    """Each value is standard normal; the slow form of the definition; one field at 32 and at 96 pixels."""
    draws = sample.smooth(torch.randn(4000, 4, 4, 3), (8, 8), (0, 0, 8, 8))
    assert draws.mean(0).abs().max() < 0.08 and (draws.std(0) - 1).abs().max() < 0.06
    cells, size = 5, (32, 48)
    grid = torch.randn(1, cells, cells, 3)
    field, white = sample.smooth(grid, size, (0, 0, 48, 32)).view(32, 48, 3), grid[0].double()
    for row, column in ((0, 0), (31, 47), (13, 30)):
        y, x = (row + 0.5) / 32 * cells, (column + 0.5) / 48 * cells
        weight = torch.tensor([[math.exp(-((y - i - 0.5) ** 2 + (x - j - 0.5) ** 2) / (2 * 0.5 ** 2))
                                for j in range(cells)] for i in range(cells)], dtype=torch.float64)
        expected = (weight[..., None] * white).sum((0, 1)) / weight.square().sum().sqrt()
        assert (field[row, column] - expected).abs().max() < 1e-5
    fine = sample.smooth(grid, (96, 144), (3, 6, 144, 96)).view(90, 141, 3)
    assert (fine[1::3, 1::3] - field[2:, 1:]).abs().max() < 1e-5
    one = sample.smooth(torch.randn(2, 1, 1, 3), (32, 32), (0, 0, 32, 32))
    assert torch.allclose(one, one[:, :1].expand(2, 1024, 3))

@pytest.mark.parametrize("options", COUPLED, ids=lambda o: o["solver"])
def test_interpolated_velocities_are_within_their_tolerance(options):
    """refine decodes a part of the pixels, errs by no more than asked for, and crops agree with the whole."""
    net, label, shares = small(n_classes=3), torch.tensor([1]), []
    size, box = (301, 270), (33, 41, 200, 301)

    def draw(refine, part=None, progress=lambda share: None):
        return sample.generate(net, [2], 5, size, part, label, guidance=2.0, refine=refine,
                               progress=progress, **options)[0]
    assert sample.cell_size(net.cfg, size, "coupled", 0.1) == 2
    assert sample.cell_size(net.cfg, (255, 999), "coupled", 0.1) == 0
    assert sample.cell_size(net.cfg, size, "white", 0.1) == sample.cell_size(net.cfg, size, "coupled", 0) == 0
    exact, none = draw(0.0), draw(1e-12)
    assert (exact - none).abs().max() < 1e-5
    crop, decoded, inner = draw(0.02, box), [], net.decode

    def counted(prepared, coords, x):
        decoded.append(x.shape[1])
        return inner(prepared, coords, x)
    net.decode = counted
    rough = draw(0.02, progress=shares.append)
    assert sum(decoded) < 3 * (1024 + 0.8 * math.prod(size))
    assert 0 < (rough - exact).abs().max() < 0.1 and sum(shares) == pytest.approx(3, abs=1e-3)
    assert (crop - rough.view(1, *size, 3)[:, 41:, 33:200].flatten(1, 2)).abs().max() < 1e-5

def test_every_step_of_the_sde_has_noise_of_its_own(monkeypatch):
    """If two steps added the same noise."""
    keys, inner = [], sample.random_words

    def recorded(purpose, seed, step, samples, *items):
        keys.append((purpose, seed, step, samples.tolist()))
        return inner(purpose, seed, step, samples, *items)
    monkeypatch.setattr(sample, "random_words", recorded)
    sample.generate(small(), [3], 1, solver="sde", steps=4)
    assert keys == [("context", 1, step, [3]) for step in range(4)]

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("runs") / "image", small(n_classes=3))

@pytest.fixture(scope="module")
def points_run(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("runs") / "points", small("points"))

def main(run, *words):
    sample.main(["--ckpt", str(run), "--device", "cpu", *map(str, words)])

def pixels(path):
    return np.asarray(Image.open(path)).astype(int)

def test_files_record_and_rerun(run, tmp_path, capsys):
    """Exactly n files, what samples.json says of them, and a rerun that only adds what is missing."""
    out = tmp_path / "out"
    main(run, "--n", 5, "--out", out, "--npz", "--class", "c2", "0", "--batch", 2, "--seed", 3)
    record = json.loads((out / "samples.json").read_text())
    assert sorted(p.name for p in out.iterdir()) == [*(f"{i:06d}.png" for i in range(5)), "grid.png",
                                                     "samples.json", "samples.npz"]
    assert [row["label"] for row in record["samples"]] == [2, 0, 2, 0, 2]
    assert record["samples"][0]["class_name"] == "c2"
    assert (record["nfe"], record["complete"], record["step"], record["weights"]) == (2, True, 7, "ema")
    with np.load(out / "samples.npz", allow_pickle=False) as adm:
        assert adm["arr_0"].shape == (5, 32, 32, 3) and adm["arr_1"].tolist() == [2, 0, 2, 0, 2]
        assert (adm["arr_0"][3] == pixels(out / "000003.png")).all()
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("0*.png")}
    (out / "000001.png").unlink()
    main(run, "--n", 6, "--out", out, "--class", "c2", "0", "--seed", 3, "--batch", 5)
    after = {p.name: p.stat().st_mtime_ns for p in out.glob("0*.png")}
    assert len(after) == 6 and [n for n in before if after[n] != before[n]] == ["000001.png"]
    (out / "000005.png").unlink()
    main(run, "--n", 2, "--out", out, "--class", "c2", "0", "--seed", 3)
    assert len(json.loads((out / "samples.json").read_text())["samples"]) == 5
    refused("another seed", call=lambda: main(run, "--n", 5, "--out", out, "--class", "c2", "0", "--seed", 4))
    assert "NFE 2" in capsys.readouterr().out

def test_default_directory_is_named_by_the_setting(run, capsys):
    main(run, "--n", 1)
    main(run, "--n", 1, "--seed", 1)
    main(run, "--n", 2)
    names = sorted(p.name for p in (run / "samples").iterdir())
    assert len(names) == 2 and len(list((run / "samples").glob("*seed0*/0*.png"))) == 2

def test_two_processes_and_a_crop_give_the_pixels_of_one(run, tmp_path):
    """If processes drew other samples than one, a crop another part, or sizes were read otherwise."""
    words = ["--samples", 3, *"--steps 2 --solver sde --noise coupled --noise-length 8 --out".split()]
    main(run, "--res", "2x", *words, tmp_path / "one")
    main(run, "--res", 64, "--crop", "10,20,50,31", *words, tmp_path / "crop")
    words = ["--ckpt", run, "--device", "cpu", "--res", "64x64", *words, tmp_path / "two"]
    python(*TORCHRUN, ROOT / "sample.py", *words)
    for i in range(3):
        a, b, crop = (pixels(tmp_path / name / f"{i:06d}.png") for name in ("one", "two", "crop"))
        assert a.shape == (64, 64, 3) and abs(a - b).max() <= 1
        assert crop.shape == (11, 40, 3) and abs(a[20:31, 10:50] - crop).max() <= 1

def test_points_are_written_as_npy_ply_and_preview(points_run, tmp_path):
    main(points_run, "--n", 2, "--points", 100, "--out", tmp_path / "out", "--solver", "sde", "--last", 0.01)
    cloud, raw = np.load(tmp_path / "out" / "000001.npy"), (tmp_path / "out" / "000001.ply").read_bytes()
    assert cloud.shape == (100, 3) and cloud.dtype == np.float32
    assert b"element vertex 100\n" in raw and raw.partition(b"end_header\n")[2] == cloud.tobytes()
    image = pixels(tmp_path / "out" / "000001.png")
    assert image.shape == (256, 256, 3) and (image < 250).any()
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record["normalisation"] == "box" and record["options"]["last"] == 0.01

def test_tokens(tmp_path):
    """If condition tokens were not read, or those of another width were."""
    run = checkpoint(tmp_path / "run", small("points", token_dim=10))
    for i in range(2):
        np.savez(tmp_path / f"{i}.npz", cond_token=np.full((4, 10), i, np.float16))
    main(run, "--n", 3, "--tokens", tmp_path, "--guidance", 2, "--out", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("0*.npy"))) == 3
    np.savez(tmp_path / "2.npz", cond_token=np.zeros((4, 9), np.float16))
    refused("--tokens", call=lambda: main(run, "--tokens", tmp_path, "--out", tmp_path / "x"))

WRONG = {"--res 0": "--res", "--res 3y": "--res", "--crop 1,2,3": "crop", "--crop 0,0,33,9": "crop",
         "--points 9": "--points", "--class zebra": "zebra", "--rtol 1e-3": "--rtol",
         "--refine 1": "coupled noise", "--guidance-interval 1 0": "interval", "--guidance nan": "nan",
         "--device abacus": "--device", "--res 8192": "poster", "--tokens x": "okens",
         "--solver dopri5 --evaluations 3": "evaluations", "--solver dopri5 --steps 3": "--steps"}

@pytest.mark.parametrize("words", WRONG)
def test_wrong_input_is_named(run, tmp_path, words, capsys):
    """If a wrong flag did not end before a sample is drawn, in a line that names it."""
    with pytest.raises((ValueError, OSError, SystemExit)) as caught:
        main(run, "--n", 1, "--out", tmp_path / "out", *words.split())
    assert WRONG[words] in str(caught.value) + capsys.readouterr().err
    assert not list(tmp_path.glob("out/0*"))

@pytest.mark.parametrize("words", ["--guidance 2", "--res 64", "--guidance-interval 0 0.5"])
def test_what_a_model_of_points_without_classes_refuses(points_run, tmp_path, words):
    """If guidance without anything to guide by, or a size of images, were ignored."""
    refused(words.split()[0], call=lambda: main(points_run, *words.split(), "--out", tmp_path / "x"))

def test_samples_that_are_not_finite_are_refused(tmp_path):
    net = small(n_classes=3)
    net.head.bias.data.fill_(math.nan)
    run = checkpoint(tmp_path / "run", net)
    refused("non-finite", call=lambda: main(run, "--n", 1, "--out", tmp_path / "out"))

@pytest.mark.usefixtures("nothing_goes_off")
@pytest.mark.parametrize("damage", ["bomb", "truncated", "bit", "text", "foreign", "keys"])
def test_broken_checkpoints_are_refused_or_replaced(run, tmp_path, damage, capsys):
    """If a file were executed, or of a run directory not the checkpoint before the damaged one used."""
    file = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("samples")) / "ckpt.pt"
    shutil.copy(file, file.with_name("ckpt-0000005.pt"))
    raw, buffer = bytearray(file.read_bytes()), io.BytesIO()
    raw[len(raw) // 2] ^= 1
    torch.save({"model": Bomb()} if damage == "bomb" else {"weights": torch.ones(2)}, buffer)
    content = dict(bomb=buffer.getvalue(), foreign=buffer.getvalue(), truncated=raw[:9999], bit=raw,
                   text=b"hello")
    if damage == "keys":
        state = torch.load(file, weights_only=True)
        del state["ema"]["head.bias"]
        torch.save(state, file)
        with pytest.raises(ValueError, match="head.bias"):
            sample.load(file)
        return
    file.write_bytes(content[damage])
    refused("ckpt.pt: no readable checkpoint", call=lambda: sample.load(file))
    assert sample.load(file.parent)[1]["path"].name == "ckpt-0000005.pt"
    assert "ckpt.pt: not a whole checkpoint" in capsys.readouterr().err

def test_averaged_and_raw_weights(tmp_path):
    """If samples were drawn from the last weights without being asked for."""
    run = checkpoint(tmp_path / "run", small())
    state = torch.load(run / "ckpt.pt", weights_only=True)
    state["ema"] = {name: torch.zeros_like(x) for name, x in state["ema"].items()}
    torch.save(state, run / "ckpt.pt")
    assert not sample.load(run)[0].head.weight.any() and sample.load(run, "raw")[0].head.weight.any()

def test_shipped_models_have_names(run, tmp_path, monkeypatch, capsys):
    """A name stands for weights/NAME.pt; without --ckpt: the newest run, else glyphs, and that is said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "WEIGHTS", tmp_path / "weights")
    for words in ([], ["--ckpt", "nowhere"]):
        with pytest.raises(ValueError, match=f"{words[-1] if words else None}: .*python train.py"):
            sample.main(words)
    (tmp_path / "weights").mkdir()
    for name in ("glyphs", "emoji"):
        shutil.copy(run / "ckpt.pt", tmp_path / "weights" / f"{name}.pt")
    assert sample.find_checkpoint("emoji") == tmp_path / "weights" / "emoji.pt"
    assert sample.find_checkpoint() == tmp_path / "weights" / "glyphs.pt"
    assert "glyphs.pt" in capsys.readouterr().out
    assert sample.load("emoji")[1]["home"] == Path("samples", "emoji")
    (tmp_path / "runs").mkdir()
    shutil.copytree(run, tmp_path / "runs" / "own")
    assert sample.find_checkpoint() == Path("runs", "own")
    with pytest.raises(ValueError, match="emojis.*shipped model .emoji, glyphs"):
        sample.find_checkpoint("emojis")

def test_two_copied_files_sample(run, tmp_path):
    """sample.py with model.py alone, in an empty folder; the script ends in one line and status 2."""
    for name in ("sample.py", "model.py"):
        shutil.copy(ROOT / name, tmp_path)
    python("sample.py", "--ckpt", run, "--n", 1, "--out", "drawn", cwd=tmp_path)
    assert (tmp_path / "drawn" / "000000.png").exists()
    _, err = python("sample.py", "--ckpt", "gone.pt", cwd=tmp_path, status=2)
    assert err.startswith("sample.py: ") and err.count("\n") == 1 and "gone.pt" in err
