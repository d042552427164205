"""train.py: resuming, processes and accumulation, averages, bad steps, faults, data sets, flags, recipes."""
import argparse
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import model as asft
import sample
import train
from conftest import ROOT, TINY, TORCHRUN, python, refused, trained
from experiments.chaos import log, same, same_run

FLAGS = ["--log-every", 1, "--save-every", 2, "--schedule", "constant"]

def ckpt(path):
    return torch.load(path / "ckpt.pt" if path.is_dir() else path, weights_only=True)

def same_training(a, b):
    return all(same(ckpt(a)[k], ckpt(b)[k]) for k in ("model", "ema", "optimizer", "step"))

def losses(out):
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in log(out)]

def images(folder, count, *classes):
    """Writes so many images, of each class if there are any; the flags that train on them."""
    for name in classes or ("",):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return ["--dataset", "folder", "--data", folder, "--res", 16]

def at_step(monkeypatch, step, do):
    """Runs do() once, within the step of this number."""
    inner, done = train.micro_loss, []

    def micro_loss(net, coords, batch, now, *rest):
        if now == step and not done:
            done.append(do())
        return inner(net, coords, batch, now, *rest)
    monkeypatch.setattr(train, "micro_loss", micro_loss)

def test_ten_resume_ten_equals_twenty(tmp_path, monkeypatch, capsys):
    """If weights, average, optimizer, data order, mirroring, noise or log did not go on after a signal."""
    flags = ["--steps", 20, "--log-every", 5, "--warmup", 4, *images(tmp_path / "set", 21), "--flip"]
    straight = trained(tmp_path / "straight", *flags)
    at_step(monkeypatch, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    parts = trained(tmp_path / "parts", *flags)
    monkeypatch.undo()
    assert ckpt(parts)["step"] == 10 and "stopped by a signal at step 10" in capsys.readouterr().out
    trained(parts, "--resume", parts, "--steps", 20)
    assert "resumed at step 10" in capsys.readouterr().out
    assert same_run(straight, parts)
    assert [r["step"] for r in log(parts)] == [5, 10, 15, 20]

def test_resume_of_a_file_a_directory_and_auto(tmp_path, capsys):
    """If one of them started elsewhere, needed the flags again, or trained what is trained."""
    first = trained(tmp_path / "first", "--steps", 2, "--schedule", "constant", "--save-every", 1)
    trained(tmp_path / "second", "--steps", 4, "--resume", first / "ckpt.pt")
    third = shutil.copytree(first, tmp_path / "third")
    raw = bytearray((third / "ckpt.pt").read_bytes())
    raw[len(raw) // 2] ^= 1                                            # torch does not notice
    (third / "ckpt.pt").write_bytes(raw)
    trained(third, "--steps", 4, "--resume", "auto")                   # from the one before the damaged one
    trained(tmp_path / "fourth", "--resume", "auto", "--steps", 4, "--schedule", "constant")
    said, warned = capsys.readouterr()
    assert "ckpt.pt: not a whole checkpoint" in warned
    assert said.count("resumed at step 2") == said.count("resumed at step 1") == 1
    assert "starting at step 0" in said
    trained(first, "--resume", "auto", "--steps", 4)
    assert all(same_training(first, tmp_path / other) for other in ("second", "third", "fourth"))
    assert [ckpt(file)["step"] for file in sorted(third.glob("*.pt*"))] == [3, 4]
    for steps in ("5", "2"):                                           # no architecture, no --out
        train.main(["--resume", str(first), "--steps", steps])
    assert ckpt(first)["step"] == 5 and ckpt(first)["config"]["settings"]["width"] == 32

def test_resume_refuses_another_run(tmp_path, glyphs_run):
    """If a missing checkpoint started at step 0, or another run were overwritten or taken over."""
    with pytest.raises(OSError, match="nowhere"):
        trained(tmp_path / "x", "--resume", tmp_path / "nowhere")
    assert not (tmp_path / "x").exists()
    refused("--resume auto", call=lambda: trained(glyphs_run))
    other = trained(tmp_path / "other", "--steps", 1)
    refused("--resume auto", call=lambda: trained(other, "--resume", glyphs_run))
    for name, value in dict(width=64, batch_size=16, seed=5, dataset="solids", model="S").items():
        flags = "--resume", glyphs_run, "--steps", 7, f"--{name.replace('_', '-')}", value
        refused(name, call=lambda: trained(tmp_path / "x", *flags))

def test_resume_survives_a_broken_log_and_keeps_counts(tmp_path, monkeypatch, capsys):
    """If a line that a crash cut ended a run, or skipped steps were counted anew."""
    poisoned(monkeypatch, {1, 3})
    out = trained(tmp_path / "run", *FLAGS, "--steps", 3)
    with open(out / "log.jsonl", "ab") as f:
        f.write(b'{}\n3\n\xff\xfe\n{"step": 2, "lo')
    train.main(["--resume", str(out), "--steps", "5"])
    assert capsys.readouterr().out.count("an unreadable line is dropped") == 4
    assert [(r["step"], r["skipped"]) for r in log(out)] == [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]

def test_classes_are_those_of_the_data_and_remain(tmp_path, capsys):
    """If a label came to mean another class, or another number of items were not said."""
    flags = [*FLAGS, *images(tmp_path / "set", 3, "dog", "cat")]
    out = trained(tmp_path / "run", *flags, "--steps", 2)
    assert ckpt(out)["config"]["class_names"] == ["cat", "dog"]
    assert ckpt(out)["model"]["classes.weight"].shape == (3, 32)               # the last is the null class
    os.rename(tmp_path / "set" / "dog", tmp_path / "set" / "cow")
    refused("its run has other classes", call=lambda: trained(out, *flags, "--steps", 4, "--resume", "auto"))
    os.rename(tmp_path / "set" / "cow", tmp_path / "set" / "dog")
    (tmp_path / "set" / "dog" / "0.png").unlink()
    trained(out, *flags, "--steps", 4, "--resume", "auto")
    assert "warning: 5 items, 6 before" in capsys.readouterr().out

@pytest.fixture(scope="module", params=["glyphs", "solids --points 64"])
def base(request, tmp_path_factory):
    """A checkpoint of step 1 where every gradient is alive: the zeros that a model starts with are random."""
    name, *flags = request.param.split()
    out = trained(tmp_path_factory.mktemp(name) / "run", "--steps", 1, "--schedule", "constant",
                  "--dataset", name, *flags)
    state, g = ckpt(out), torch.Generator().manual_seed(0)
    for name, p in state["model"].items():
        if not p.any():
            p.normal_(0, 0.1, generator=g)
        state["ema"][name] = p.clone()
    for entry in state["optimizer"]["state"].values():
        entry["exp_avg"].zero_()
    torch.save(state, out / "alive.pt")
    return out / "alive.pt"

LAUNCH = """
import functools, os, sys, torch
sys.path.insert(0, sys.argv.pop(1))
os.environ["LOCAL_RANK"] = str(1 - int(os.environ["RANK"]))
torch.set_num_threads(1)
import torch._dynamo as dynamo
torch.compile = functools.partial(torch.compile, backend="eager")     # what counts is the wrapper
dynamo.config.error_on_recompile = True
import train
seen, inner = [], train.update_ema
train.update_ema = lambda ema, net, step, *rest: (seen.append((step, ema)), inner(ema, net, step, *rest))
where = sys.argv[sys.argv.index("--out") + 1]
train.main(sys.argv[1:])
assert not dynamo.utils.counters["graph_break"]
assert [step for step, _ in seen] == [1, 2, 3]                        # once an optimizer step
torch.save(seen[-1][1].state_dict(), os.path.join(where, f"rank{train.RANK}.pt"))
"""
CONTINUE = ["--steps", 4, "--log-every", 1, "--save-every", 1, "--keep", 5, "--sample-every", 3]

@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """Steps 1 to 4 in one process without accumulation: what all the others must agree with."""
    return trained(tmp_path_factory.mktemp("alone") / "run", *CONTINUE, "--resume", base)

def agrees(out, alone):
    """Same averaged gradient (Adam's first moment after one step from zero), same losses, same keys."""
    got, expected = (ckpt(path / "ckpt-0000002.pt")["optimizer"]["state"] for path in (out, alone))
    assert got.keys() == expected.keys() and len(got) > 30
    for key in got:
        a, b = got[key]["exp_avg"], expected[key]["exp_avg"]
        assert b.any() and torch.allclose(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item()), key
    np.testing.assert_allclose(losses(out), losses(alone), rtol=2e-4)
    assert [r["step"] for r in log(out)] == [2, 3, 4]
    sheet, other = (np.asarray(Image.open(path / "samples-0000003.png")).astype(int) for path in (out, alone))
    assert (abs(sheet - other) > 3).mean() < 0.01           # shared out or not
    state = ckpt(out)
    keys = asft.ASFT(asft.Config(**state["config"]["model"])).state_dict().keys()
    assert state["model"].keys() == state["ema"].keys() == keys                # no prefix of a wrapper
    return state

def test_accumulated_gradient_is_the_average(alone, base, tmp_path):
    """If micro-batches gave another gradient than the whole batch."""
    agrees(trained(tmp_path / "run", *CONTINUE, "--resume", base, "--accumulate", 4), alone)

def test_two_processes_compiled(alone, base, tmp_path):
    """If ranks had other averages, LOCAL_RANK chose the data, or a micro-batch needed a graph of its own."""
    out, launch = tmp_path / "run", tmp_path / "launch.py"
    launch.write_text(LAUNCH)
    said, _ = python(*TORCHRUN, launch, ROOT, *TINY, *CONTINUE, "--resume", base, "--out", out, "--compile",
                     "--accumulate", 2, *(["--grad-checkpoint"] if "glyphs" in str(base) else []))
    assert said.count("resumed at step 1") == 1 and "2 micro-batches" not in said
    averages = [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert same(*averages) and same(averages[0], agrees(out, alone)["ema"])

def test_draws_depend_on_step_and_place_alone():
    """If noise, times, drops or decoded pairs depended on how a batch is cut, or were badly distributed."""
    whole = train.random_inputs(3, 7, range(8), 50, 20, 0.5, "cpu")
    for cut in (range(0, 3), range(3, 8), range(5, 6)):
        for part, column in zip(train.random_inputs(3, 7, cut, 50, 20, 0.5, "cpu"), whole):
            assert torch.equal(part, column[list(cut)])
    assert all(len(set(row)) == 20 and set(row) <= set(range(50)) for row in whole[3].tolist())
    for other in (train.random_inputs(3, 8, range(8), 50, 20, 0.5, "cpu"),
                  train.random_inputs(4, 7, range(8), 50, 20, 0.5, "cpu")):
        assert not torch.equal(other[1], whole[1]) and not torch.equal(other[0], whole[0])
    u, eps, drop, query = train.random_inputs(0, 0, range(2000), 10, 5, 0.1, "cpu")
    assert abs(u.mean() - 0.5) < 0.03 and abs(eps.std() - 1) < 0.02 and abs(drop.float().mean() - 0.1) < 0.03
    assert abs(torch.corrcoef(torch.stack([u, drop.float(), eps[:, 0, 0]]))[[0, 0, 1], [1, 2, 2]]).max() < 0.1

def test_ema_formula_and_buffers():
    """The decay grows from step to step, a skipped step leaves the average, and buffers are copied."""
    ema, net = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    with torch.no_grad():
        net.weight.fill_(5.0)
        net.running_mean.fill_(7.0)
        net.num_batches_tracked.fill_(9)
    expected = 1.0
    for step in (0, 1, 5, 1000, 100000):
        d = min(0.99, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * 5.0
        train.update_ema(ema, net, step, 0.99, torch.tensor(0.0))
        train.update_ema(ema, net, step, 0.99, torch.tensor(1.0))
        assert torch.allclose(ema.weight, torch.full((3,), expected))
        assert ema.running_mean.tolist() == [7.0] * 3 and ema.num_batches_tracked == 9
    assert net.weight.tolist() == [5.0] * 3

def poisoned(monkeypatch, steps, value=math.inf):
    """Adds `value` to the loss of these steps."""
    inner = train.micro_loss

    def micro_loss(net, coords, batch, step, *rest):
        return inner(net, coords, batch, step, *rest) + (value if step in steps else 0)
    monkeypatch.setattr(train, "micro_loss", micro_loss)

@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_non_finite_step_is_skipped_and_counted(tmp_path, monkeypatch, capsys, value):
    """If it changed weights, average or optimizer, whatever its gradient, or the log did not count it."""
    poisoned(monkeypatch, {3}, value)
    out = trained(tmp_path / "run", "--steps", 6, "--log-every", 2, "--save-every", 1, "--keep", 9)
    before, after, final = ckpt(out / "ckpt-0000003.pt"), ckpt(out / "ckpt-0000004.pt"), ckpt(out)
    assert same(before["model"], after["model"]) and same(before["ema"], after["ema"])
    assert same(before["optimizer"]["state"], after["optimizer"]["state"])
    assert not same(after["model"], final["model"]) and not same(after["ema"], final["ema"])
    assert all(p.isfinite().all() for weights in (final["model"], final["ema"]) for p in weights.values())
    assert [(r["step"], r["skipped"]) for r in log(out)] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1)]
    assert [r["step"] for r in log(out) if r["loss"] is None] == [4]
    assert "1 non-finite steps up to 4" in capsys.readouterr().out

def test_bad_steps_in_a_row_stop_the_run(tmp_path, monkeypatch):
    """A diverged run stops with its last good checkpoint; scattered bad steps do not stop it."""
    poisoned(monkeypatch, {1, 3, 5, 7})
    out = trained(tmp_path / "scattered", "--steps", 9, "--log-every", 1, "--max-bad-steps", 2)
    assert log(out)[-1]["skipped"] == 4 and ckpt(out)["step"] == 9
    monkeypatch.undo()
    poisoned(monkeypatch, set(range(5, 99)))
    out = tmp_path / "diverged"
    with pytest.raises(ValueError, match="3 steps in a row"):
        trained(out, "--steps", 50, "--log-every", 2, "--save-every", 4, "--max-bad-steps", 3)
    assert ckpt(out)["step"] == 4 and log(out)[-1]["skipped"] == 3
    assert all(p.isfinite().all() for p in ckpt(out)["model"].values())

def test_a_full_disk_is_told_and_the_save_is_tried_again(tmp_path, monkeypatch, capsys):
    """If a save that fails ended a run, or changed it."""
    straight = trained(tmp_path / "straight", *FLAGS, "--steps", 6)
    at_step(monkeypatch, 3, lambda: (tmp_path / "run" / "next.pt.tmp").symlink_to("/dev/full"))
    out = trained(tmp_path / "run", *FLAGS, "--steps", 6)
    said = capsys.readouterr().out
    assert said.count("the next interval tries again") == 1 and same_run(out, straight)
    assert sorted(p.name for p in out.glob("*.pt*")) == ["ckpt-0000002.pt", "ckpt.pt"]

def test_a_failed_last_save_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    """If half a file replaced a whole checkpoint, or a lost last step were not said."""
    out = trained(tmp_path / "run", "--steps", 2)
    before = ckpt(out)

    def dies(state, f):
        f.write(b"PK half a checkpoint")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", dies)
    refused("No space left", "--resume auto", call=lambda: trained(out, "--steps", 4, "--resume", out))
    monkeypatch.undo()
    assert same(ckpt(out), before)
    trained(out, "--steps", 4, "--resume", out)
    assert sample.read_checkpoint(out)["step"] == 4

def test_a_checkpoint_that_a_save_moves_is_still_found(glyphs_run, tmp_path, monkeypatch, capsys):
    """If sampling ended where training wrote a new checkpoint between two looks at the old one."""
    out = shutil.copytree(glyphs_run, tmp_path / "run")

    def moved(file, open_zip=sample.zipfile.ZipFile):
        monkeypatch.undo()
        os.replace(file, out / "ckpt-0000001.pt")
        return open_zip(file)
    monkeypatch.setattr(sample.zipfile, "ZipFile", moved)
    assert sample.read_checkpoint(out)["path"].name == "ckpt-0000001.pt" and not capsys.readouterr().err

@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_vanishes_is_told_after_a_save(tmp_path, monkeypatch, workers):
    """If steps since the last checkpoint were lost, or the loss of half a step came into the log."""
    flags = [*FLAGS, "--save-every", 100, *images(tmp_path / "set", 40), "--steps", 12, "--accumulate", 2,
             "--log-every", 4, "--workers", workers]
    straight = trained(tmp_path / "straight", *flags)
    at_step(monkeypatch, 3, lambda: os.rename(tmp_path / "set", tmp_path / "away"))
    refused(".png", "is saved, continue with --resume auto", call=lambda: trained(tmp_path / "run", *flags))
    assert ckpt(tmp_path / "run")["step"] >= 4
    os.rename(tmp_path / "away", tmp_path / "set")
    trained(tmp_path / "run", *flags, "--resume", "auto")
    assert same_training(tmp_path / "run", straight) and losses(tmp_path / "run")[-1] == losses(straight)[-1]

def test_skip_bad_counts_in_the_log(tmp_path):
    """If an image that cannot be read were left out without a word."""
    flags = [*FLAGS, *images(tmp_path / "set", 6), "--steps", 2]
    (tmp_path / "set" / "2.png").write_bytes(b"not an image")
    refused("2.png", call=lambda: trained(tmp_path / "stops", *flags))
    assert [r["left_out"] for r in log(trained(tmp_path / "run", *flags, "--skip-bad"))] == [1, 1]

def test_sampling_changes_nothing(tmp_path):
    """If a sheet changed random state, mode or weights of training, or --keep kept others than the last."""
    flags = ["--steps", 4, "--save-every", 1, "--log-every", 2]
    never = trained(tmp_path / "never", *flags, "--keep", 0)
    often = trained(tmp_path / "often", *flags, "--sample-every", 1)
    assert same_run(often, never)
    sheets = sorted(p.name for p in often.glob("samples-*.png"))
    assert sheets == [f"samples-{s:07d}.png" for s in range(1, 5)]
    assert len([*never.glob("samples-*.png")]) == 1
    assert [*never.glob("*.pt*")] == [never / "ckpt.pt"]
    assert [ckpt(file)["step"] for file in sorted(often.glob("*.pt*"))] == [3, 4]
    width, height = Image.open(often / sheets[0]).size
    assert width > 1.5 * height and Image.open(often / "loss.png").size == (720, 360)

def test_checkpoint_describes_itself(glyphs_run, solids_run):
    """If a checkpoint lacked what sampling and resuming need, or config.json said something else."""
    for run, classes, normalisation in ((glyphs_run, 36, None), (solids_run, 7, "box")):
        config = ckpt(run)["config"]
        assert len(config["class_names"]) == classes and config["normalisation"] == normalisation
        assert config["settings"]["solver"] == "euler"
        assert json.loads((run / "config.json").read_text()) == config
        assert set(ckpt(run)) == {"model", "ema", "optimizer", "step", "config"}
    (group,) = ckpt(glyphs_run)["optimizer"]["param_groups"]
    assert tuple(group["betas"]) == (0.9, 0.999) and group["eps"] == 1e-8 and group["weight_decay"] == 0
    assert len(group["params"]) == len(ckpt(glyphs_run)["model"])              # no parameter is left out

VARIANTS = [["--encoder", "linear", "--path", "vp", "--times", "uniform"],
            ["--encoder", "perceiver", "--no-qk-norm", "--solver", "heun", "--guidance", "1.5"],
            ["--path", "cosine", "--rope", "--levels", "2", "--grad-checkpoint", "--deterministic"],
            ["--encoder-heads", "8", "--dtype", "bfloat16", "--drop", "0", "--beta2", "0.9", "--clip", "1"],
            ["--dataset", "solids", "--points", "64", "--encoder", "hash", "--warmup", "0", "--seed", "3"]]

@pytest.mark.parametrize("flags", VARIANTS, ids=" ".join)
def test_variants_train(tmp_path, flags):
    """If a flag of train.py did not train, or were another in the checkpoint."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    out = trained(tmp_path / "run", "--steps", 2, "--log-every", 1, *flags)
    torch.use_deterministic_algorithms(deterministic)
    assert [r["step"] for r in log(out)] == [1, 2] and all(math.isfinite(r["loss"]) for r in log(out))
    assert ("samples_per_s" in log(out)[0]) == ("--deterministic" not in flags)
    settings = ckpt(out)["config"]["settings"]
    for flag, value in zip(flags, flags[1:]):
        if flag.startswith("--") and not value.startswith("--"):
            stored = settings[flag[2:].replace("-", "_")]
            assert type(stored)(value) == stored

WRONG = {"--dataset folder": "--data", "--dataset folder --data gone": "gone", "--flip": "--flip",
         "--accumulate 3": "--batch-size 8", "--decode 1025": "--decode 1025", "--res 34": "34",
         "--model point-tiny": "point-tiny", "--dataset solids --model tiny": "tiny",
         "--encoder hash": "hash", "--encoder linear --encoder-heads 4": "encoder_heads",
         "--ema 1.0": "--ema", "--drop 1.5": "--drop", "--lr 0": "--lr", "--model M": "--model",
         "--device abacus": "--device abacus", "--steps 0": "--steps", "--seed -1": "--seed"}

@pytest.mark.parametrize("words", WRONG)
def test_wrong_flags_are_named_before_a_run_starts(tmp_path, words, capsys):
    """If a wrong flag made a run directory, or ended in more than one line that names it."""
    with pytest.raises((ValueError, OSError, SystemExit)) as caught:
        train.main([*TINY, "--steps", "1", "--out", str(tmp_path / "run"), *words.split()])
    said = str(caught.value)
    assert WRONG[words] in (capsys.readouterr().err if said == "2" else said) and "\n" not in said
    assert not (tmp_path / "run").exists()

def test_exit_status_and_one_line_on_stderr(tmp_path):
    """If wrong input ended in a traceback, or a status of success."""
    _, err = python(ROOT / "train.py", "--dataset", "folder", "--out", tmp_path / "run", status=2)
    assert err.count("\n") == 1 and err.startswith("train.py: ") and "--data" in err

def test_learning_rate():
    """If the warm-up or the schedule were another than its closed form."""
    args = argparse.Namespace(lr=2.0, warmup=4, schedule="constant", steps=100)
    assert [train.learning_rate(args, s) for s in (0, 1, 3, 4, 99, 500)] == [0.5, 1.0, 2.0, 2.0, 2.0, 2.0]
    args.schedule, args.warmup = "cosine", 0
    expected = [2.0, 1 + math.cos(math.pi / 4), 1.0, 0.0, 0.0]
    assert [train.learning_rate(args, s) for s in (0, 25, 50, 100, 150)] == pytest.approx(expected)

def test_recipes_are_the_papers():
    """Sec. 4 and App. A of the paper."""
    shared = dict(lr=1e-4, warmup=0, schedule="constant", beta2=0.999, clip=2.0, ema=0.999, drop=0.1,
                  path="linear", times="uniform")
    table = {   # model, resolution or points, decoded pairs, batch, steps, solver, sampling steps, guidance
        "imagenet128": ("XL", 128, 4096, 512, 1_700_000, "euler", 100, 1.5),
        "imagenet256": ("XL", 256, 8192, 512, 1_700_000, "euler", 100, 1.5),
        "ffhq256": ("B", 256, 8192, 256, 1_000_000, "euler", 100, 1.0),
        "church256": ("B", 256, 8192, 256, 1_000_000, "euler", 100, 1.0),
        "shapenet": ("point-B", 2048, 2048, 16, 800_000, "sde", 1000, 1.0),
        "objaverse": ("point-objaverse", 16384, 16384, 384, 500_000, "sde", 500, 5.0),
    }
    for name, row in table.items():
        r = train.RECIPES[name]
        names = "decode", "batch_size", "steps", "solver", "sampling_steps", "guidance"
        assert (r["model"], r.get("res") or r["points"], *(r[name] for name in names)) == row, name
        assert {k: r[k] for k in shared} == shared, name
    for name, r in train.RECIPES.items():
        assert {*r} - {"loader", "noise", "noise_length", "refine"} <= {*train.FLAGS}, name
        args = argparse.Namespace(**{**{k: v[0] for k, v in train.FLAGS.items()}, **r})
        size = dict(points=r["points"]) if "points" in r else dict(res=r.get("res", 32))
        assert train.configure(args, 1, **size).width

def test_a_labelled_recipe_needs_classes(tmp_path):
    """If ImageNet were trained without classes since --data named one of its directories."""
    images(tmp_path / "set", 3)
    words = ["--dataset", "imagenet128", "--data", str(tmp_path / "set"), "--batch-size", "2"]
    args, given, _ = train.settings([*words, "--out", str(tmp_path / "run")])
    refused("set: found no classes", "--no-labels trains without", call=lambda: train.build(args, given))
    args, given, _ = train.settings([*words, "--no-labels", "--out", str(tmp_path / "run")])
    assert train.build(args, given)[1].n_classes == 0

def test_a_step_never_waits_for_the_device(tmp_path, monkeypatch):
    """If a step read a number back to the host, or a shape from the data: on a GPU each is a wait."""
    seen, active = [], []
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero")

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if active and name in waits:
                seen.append(name)
            return function(*args, **(kwargs or {}))
    loss, update = train.micro_loss, train.update
    monkeypatch.setattr(train, "micro_loss", lambda *a: active.append(1) or loss(*a))
    monkeypatch.setattr(train, "update", lambda *a: (update(*a), active.clear())[0])
    with Watch():
        trained(tmp_path / "glyphs", "--steps", 4, "--log-every", 4)
        trained(tmp_path / "solids", "--steps", 3, "--log-every", 3, "--dataset", "solids", "--points", 64)
        assert seen == []
        active.append(1)
        torch.ones(1).item()
        assert seen == ["_local_scalar_dense"]                         # the watch sees what it should

def test_init_takes_weights_and_architecture(glyphs_run, tmp_path, capsys):
    """Averaged weights of a checkpoint; classes other than its own are newly drawn, which is said."""
    args, _, ckpt = train.settings(["--init", str(glyphs_run), "--out", str(tmp_path / "new")])
    assert ckpt is None and args.steps == train.RECIPES["glyphs"]["steps"]
    assert (args.model, args.width, args.latents) == ("tiny", 32, 16)
    words = ["--init", "solids", "--dataset", "shapenet", "--device", "cpu", "--out", str(tmp_path / "new")]
    assert train.settings(words)[0].steps == train.ON_CPU["shapenet"]["steps"]
    refused("--init nowhere", call=lambda: train.settings(["--init", "nowhere", *words[-2:]]))
    old, cfg = sample.load(glyphs_run)[0], sample.load(glyphs_run)[0].cfg
    model = asft.ASFT(dataclasses.replace(cfg, n_classes=2))
    drawn = model.classes.weight.clone()
    train.initialise(model, glyphs_run, ["a", "b"])
    assert "2 classes are new" in capsys.readouterr().out
    assert torch.allclose(model.classes.weight, drawn * old.classes.weight.std() / drawn.std())
    assert torch.equal(model.head.weight, old.head.weight)
    names = sample.load(glyphs_run)[1]["config"]["class_names"]
    train.initialise(same_classes := asft.ASFT(dataclasses.replace(cfg, res=64)), glyphs_run, names)
    assert "of 32 pixels" in capsys.readouterr().out
    assert torch.equal(same_classes.classes.weight, old.classes.weight)
    with pytest.raises(ValueError, match="--init .*does not fit --model"):
        train.initialise(asft.ASFT(dataclasses.replace(cfg, width=64)), glyphs_run, names)
    out = trained(tmp_path / "run", "--init", glyphs_run, "--steps", 1, "--lr", 1e-9)
    assert torch.allclose(sample.load(out)[0].head.weight, old.head.weight, atol=1e-6)

def test_scores_during_training_leave_it_alone(tmp_path):
    """--eval-every adds a line to the log; losses are those of a run without it, also when resumed."""
    flags = ["--dataset", "solids", "--points", 64, "--log-every", 3, "--schedule", "constant"]
    scored = [*flags, "--eval-every", 2, "--eval-flags", "--n 3", "--sampling-steps", 2]
    plain = trained(tmp_path / "plain", *flags, "--steps", 4)
    whole = trained(tmp_path / "whole", *scored, "--steps", 4)
    parts = trained(tmp_path / "parts", *scored, "--steps", 2)
    trained(parts, *scored, "--steps", 4, "--resume", "auto")
    scores = [[row for row in log(out) if "eval" in row] for out in (plain, whole, parts)]
    assert [row["step"] for row in scores[1]] == [2, 4] and not scores[0] and scores[1] == scores[2]
    assert 0 <= scores[1][0]["eval"]["1nna_cd"] <= 100
    losses = [[row["loss"] for row in log(out) if "loss" in row] for out in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert same(ckpt(plain)["model"], ckpt(whole)["model"])

def test_boards_are_told_what_the_log_says(tmp_path, monkeypatch):
    """If a board showed other numbers than log.jsonl, or a missing package were not named."""
    told, started = [], []

    class SummaryWriter:
        def __init__(self, path, purge_step):
            started.append(path)

        def __getattr__(self, name):
            return lambda *args, **more: told.append((name, *args))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    wandb = SimpleNamespace(init=lambda **more: started.append(more["project"]))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    out = trained(tmp_path / "run", "--steps", 2, "--log-every", 1, "--wandb", "asft", "--tensorboard")
    assert started == ["asft", out]
    losses = [entry[2:] for entry in told if entry[1:2] == ("loss",)]
    assert losses == [(row["loss"], row["step"]) for row in log(out)]
    assert [entry[3] for entry in told if entry[0] == "add_image"] == [2]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused("pip install", call=lambda: trained(tmp_path / "other", "--steps", 1, "--tensorboard"))

def test_a_step_is_cut_as_little_as_memory_asks_for(monkeypatch, capsys):
    """If not the fewest micro-batches that fit were taken, or blocks recomputed where one item fits."""
    args, model, cpu = argparse.Namespace(batch_size=64), argparse.Namespace(), torch.device("cpu")
    assert train.fits(10 ** 9, args, None, None, None, cpu)
    for most, most_again, pieces in ((64, 64, 1), (63, 64, 2), (5, 64, 16), (0, 5, 16), (0, 0, None)):
        model.grad_checkpoint = False
        monkeypatch.setattr(train, "fits", lambda n, args, model, *rest: n <= (
            most_again if model.grad_checkpoint else most))
        if not pieces:
            with pytest.raises(ValueError, match="one item does not fit"):
                train.micro_batches(args, model, None, None, cpu)
            continue
        assert train.micro_batches(args, model, None, None, cpu) == pieces
        assert model.grad_checkpoint == (most == 0)
        said = capsys.readouterr().out
        assert f"{pieces} micro-batches x {64 // pieces} items" in said
        assert ("recomputed" in said) == model.grad_checkpoint

def test_a_checkpoint_is_written_while_training_goes_on(tmp_path, monkeypatch):
    """If a step waited for the disk: the write ends only after a later step has begun."""
    reached, inner, draws = threading.Event(), train.save, train.random_inputs

    def later(seed, step, *rest):
        if step == 3:
            reached.set()
        return draws(seed, step, *rest)

    def slow(out, state, *rest):
        assert state["step"] > 2 or reached.wait(60)
        return inner(out, state, *rest)
    monkeypatch.setattr(train, "random_inputs", later)
    monkeypatch.setattr(train, "save", slow)
    out = trained(tmp_path / "run", *FLAGS, "--steps", 4)
    assert [file.name for file in sample.checkpoints(out)] == ["ckpt.pt", "ckpt-0000002.pt"]
    monkeypatch.undo()
    two = trained(tmp_path / "two", *FLAGS, "--steps", 2)
    assert same(ckpt(out / "ckpt-0000002.pt")["model"], ckpt(two)["model"])              # a copy of step 2

def test_what_is_said_before_a_run_starts(tmp_path, capsys, monkeypatch):
    """A jump of the learning rate, a missing compiler, the launcher of old."""
    out = trained(tmp_path / "run", "--steps", 3, "--warmup", 0)
    trained(out, "--steps", 30, "--warmup", 0, "--resume", "auto")
    assert re.search(r"learning rate jumps from 0.00075 to 0.00\d+ ", capsys.readouterr().out)
    monkeypatch.setattr(torch, "compile", lambda f: (_ for _ in ()).throw(RuntimeError("no g++\nfound")))
    with pytest.raises(ValueError, match="torch.compile: no g.. found; --no-compile does without it"):
        trained(tmp_path / "compiled", "--steps", 1, "--compile")
    refused("torchrun", call=lambda: train.settings(["--local-rank", "0"]))
