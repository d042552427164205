"""train.py: resuming, processes and accumulation, averages, bad steps, data sets, flags and recipes."""
import argparse
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import data
import model as asft
import sample
import train
from chaos import log, same
from conftest import ROOT, TINY, trained


def ckpt(path):
    return torch.load(path / "ckpt.pt" if path.is_dir() else path, weights_only=True)


def same_training(a, b):
    return all(same(a[k], b[k]) for k in ("model", "ema", "optimizer", "step", "data_position"))


def refused(*flags):
    """The one-line InputError of a run with these flags."""
    with pytest.raises(data.InputError) as caught:
        train.main([*map(str, flags)])
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- resuming

def test_ten_resume_ten_equals_twenty(tmp_path, monkeypatch, capsys):
    """If weights, average, optimizer, data order or noise were not restored, the two runs would part; with the cosine
    schedule, random mirroring, and stopped by a signal."""
    pictures(tmp_path / "set", 21)
    flags = ["--steps", 20, "--log-every", 5, "--warmup", 4, "--dataset", "folder", "--data", tmp_path / "set", "--flip"]
    straight = trained(tmp_path / "straight", *flags)
    inner = train.micro_loss

    def interrupted(net, coords, batch, step, *rest):
        if step == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(net, coords, batch, step, *rest)

    monkeypatch.setattr(train, "micro_loss", interrupted)
    parts = trained(tmp_path / "parts", *flags)
    monkeypatch.undo()
    assert ckpt(parts)["step"] == 10 and "stopped by signal" in capsys.readouterr().out
    trained(parts, "--resume", parts, "--steps", 20)
    assert "resumed at step 10" in capsys.readouterr().out
    assert same_training(ckpt(straight), ckpt(parts)) and ckpt(parts)["data_position"] == 160
    losses = [[(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in log(out)] for out in (straight, parts)]
    assert losses[0] == losses[1] and [row[0] for row in losses[0]] == [5, 10, 15, 20]


def test_resume_of_a_file_a_directory_and_auto(tmp_path, capsys):
    """If one of the ways to name a checkpoint lost the settings or started again at step 0."""
    first = trained(tmp_path / "first", "--steps", 2, "--schedule", "constant", "--save-every", 1)
    trained(tmp_path / "second", "--steps", 4, "--resume", first / "ckpt.pt")
    trained(tmp_path / "third", "--steps", 4, "--resume", first / "ckpt-0000001.pt")
    trained(tmp_path / "fourth", "--resume", "auto", "--steps", 4, "--schedule", "constant")
    said = capsys.readouterr().out
    assert said.count("resumed at step 2") == 1 and said.count("resumed at step 1") == 1 and "starting at step 0" in said
    trained(first, "--resume", "auto", "--steps", 4)
    assert "resumed at step 2" in capsys.readouterr().out
    for other in ("second", "third", "fourth"):
        assert same_training(ckpt(first), ckpt(tmp_path / other)), other
    train.main(["--resume", str(first), "--steps", "5"])                       # no architecture, no --out
    assert ckpt(first)["step"] == 5 and ckpt(first)["config"]["settings"]["width"] == 32


def test_resume_refuses_what_is_not_there_or_does_not_fit(tmp_path, glyphs_run):
    """If a missing checkpoint silently started at step 0, another model were loaded, or a run overwritten."""
    assert "nowhere" in refused(*TINY, "--out", tmp_path / "x", "--resume", tmp_path / "nowhere")
    assert not (tmp_path / "x").exists()
    assert "width" in refused(*TINY, "--out", tmp_path / "x", "--resume", glyphs_run, "--width", 64, "--steps", 7)
    assert "--resume auto" in refused(*TINY, "--out", glyphs_run)


def test_resume_keeps_to_its_run(tmp_path, glyphs_run):
    """If resuming took over another run's directory, or went on with another data order, batch or data set."""
    other = trained(tmp_path / "other", "--steps", 1)
    before = (other / "ckpt.pt").read_bytes()
    assert "--resume auto" in refused("--resume", glyphs_run, "--out", other)
    assert (other / "ckpt.pt").read_bytes() == before
    for flag, value in (("--batch-size", 16), ("--seed", 5), ("--dataset", "solids"), ("--model", "S")):
        text = refused("--resume", glyphs_run, flag, value)
        assert flag in text and "drop the flag" in text


def test_resume_survives_a_broken_log(tmp_path, capsys):
    """If a line cut by a power failure made a good checkpoint useless."""
    out = trained(tmp_path / "run", "--steps", 2, "--log-every", 1)
    with open(out / "log.jsonl", "ab") as f:
        f.write(b'{}\n3\n\xff\xfe\n{"step": 2, "lo')
    train.main(["--resume", str(out), "--steps", "3"])
    assert "4 unreadable lines dropped" in capsys.readouterr().out
    assert [r["step"] for r in log(out)] == [1, 2, 3]


def test_a_bad_item_in_a_worker_ends_the_run(tmp_path):
    """If data processes, which outlive signals so that the main process can save, kept a failed run alive."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "pictures" / "good.png")
    (tmp_path / "pictures" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 50)
    _, err = finished(start([ROOT / "train.py", *TINY, "--workers", 2, "--dataset", "folder", "--data",
                             tmp_path / "pictures", "--out", tmp_path / "run", "--steps", 50]), status=2)
    assert "bad.png" in err and "Traceback" not in err


def start(words, **env):
    return subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def finished(process, status=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    return out, err


def test_sigterm_saves_and_auto_continues(tmp_path):
    """If a scheduler's SIGTERM lost work, or the run that continues were another one."""
    out, flags = tmp_path / "run", [*TINY, "--schedule", "constant", "--log-every", "1", "--sample-every", "100000"]
    process = start([ROOT / "train.py", *flags, "--steps", 100000, "--out", out])
    until = time.time() + 100
    while time.time() < until and process.poll() is None and not ((out / "log.jsonl").exists() and len(log(out)) >= 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = finished(process)
    step = ckpt(out)["step"]
    assert step >= 3 and f"at step {step}" in said
    trained(out, *flags, "--steps", step + 2, "--resume", "auto")
    assert same_training(ckpt(out), ckpt(trained(tmp_path / "straight", *flags, "--steps", step + 2)))


def test_killed_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    """If a crash in the middle of a save destroyed the run."""
    out = trained(tmp_path / "run", "--steps", 2)
    before = ckpt(out)

    def dies(state, f):
        f.write(b"PK half a checkpoint")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(data.InputError, match="ckpt.pt: No space left on device: step 4 is not saved, the checkpoint of step 2 is kept"):
        trained(out, "--steps", 4, "--resume", out)
    monkeypatch.undo()
    assert same(ckpt(out), before)
    trained(out, "--steps", 4, "--resume", out)
    assert ckpt(out)["step"] == 4 and sample.read_checkpoint(out)["step"] == 4


@pytest.mark.parametrize("keep, expected", [(0, []), (2, [3, 4])])
def test_keep(tmp_path, keep, expected):
    """If old checkpoints piled up, or the wrong ones went."""
    out = trained(tmp_path / "run", "--steps", 5, "--save-every", 1, "--keep", keep)
    assert sorted(p.name for p in out.glob("*.pt*")) == sorted(["ckpt.pt"] + [f"ckpt-{s:07d}.pt" for s in expected])
    assert ckpt(out)["step"] == 5
    for s in expected:
        assert ckpt(out / f"ckpt-{s:07d}.pt")["step"] == s


# --- processes and accumulation

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint of step 1 in which every gradient is alive: the zeros that a model starts with are random."""
    out = trained(tmp_path_factory.mktemp("base") / "run", "--steps", 1, "--schedule", "constant")
    state, g = ckpt(out), torch.Generator().manual_seed(0)
    for name, p in state["model"].items():
        if not p.any():
            p.normal_(0, 0.1, generator=g)
        state["ema"][name] = p.clone()
    for entry in state["optimizer"]["state"].values():
        entry["exp_avg"].zero_()
    path = out / "alive.pt"
    torch.save(state, path)
    return path


LAUNCH = """
import functools, os, sys, torch
sys.path.insert(0, sys.argv.pop(1))
torch.set_num_threads(1)
torch.compile = functools.partial(torch.compile, backend="eager")     # what counts is the wrapper
import train
kept, inner = [], train.update_ema
train.update_ema = lambda ema, *rest: (kept.append(ema), inner(ema, *rest))
where = sys.argv[sys.argv.index("--out") + 1]
train.main(sys.argv[1:])
torch.save(kept[-1].state_dict(), os.path.join(where, f"rank{train.RANK}.pt"))
"""

CONTINUE = ["--steps", 4, "--log-every", 1, "--save-every", 1, "--keep", 5, "--sample-every", 3]


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """Steps 1 to 4 in one process without accumulation: what all the others must agree with."""
    return trained(tmp_path_factory.mktemp("alone") / "run", *CONTINUE, "--resume", base)


def agrees(out, alone):
    """Same averaged gradient (Adam's first moment after one step from zero), same losses, same average."""
    got, expected = (ckpt(path / "ckpt-0000002.pt")["optimizer"]["state"] for path in (out, alone))
    assert got.keys() == expected.keys() and len(got) > 30
    for key in got:
        a, b = got[key]["exp_avg"], expected[key]["exp_avg"]
        assert b.any() and torch.allclose(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item()), key
    rows = [[[r[k] for k in ("step", "loss", "grad_norm", "lr")] for r in log(path)] for path in (out, alone)]
    assert [r[0] for r in rows[0]] == [2, 3, 4]
    np.testing.assert_allclose(rows[0], rows[1], rtol=2e-4)
    assert (out / "samples-0000003.png").exists() and (out / "samples-0000004.png").exists()
    state = ckpt(out)
    model = asft.ASFT(asft.Config(**state["config"]["model"]))
    assert state["model"].keys() == state["ema"].keys() == model.state_dict().keys()
    return state


def test_accumulated_gradient_is_the_average(alone, base, tmp_path):
    """If four micro-batches were summed, or drew their noise anew."""
    agrees(trained(tmp_path / "run", *CONTINUE, "--resume", base, "--accumulate", 4), alone)


def test_two_processes_under_torchrun(alone, base, tmp_path, monkeypatch):
    """If 2 processes x 2 micro-batches were another optimizer step than one process's, or did not sample."""
    out = tmp_path / "run"
    words = [*TINY, *CONTINUE, "--resume", base, "--out", out, "--accumulate", 2]
    said, _ = finished(start(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ROOT / "train.py",
                              *words]))
    assert said.count("resumed at step 1") == 1 and "8 = 2 processes x 2 micro-batches of 2" in said
    agrees(out, alone)


def test_two_processes_with_another_local_rank_and_compile(alone, base, tmp_path):
    """If LOCAL_RANK chose the data, ranks had other averages, or wrappers left a prefix in the checkpoint's keys."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out, launch = tmp_path / "run", tmp_path / "launch.py"
    launch.write_text(LAUNCH)
    words = [launch, ROOT, *TINY, *CONTINUE, "--resume", base, "--out", out, "--compile"]
    processes = [start(words, RANK=str(rank), LOCAL_RANK=str(1 - rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(port)) for rank in (0, 1)]
    for process in processes:
        finished(process)
    state = agrees(out, alone)
    assert not [k for k in (*state["model"], *state["ema"]) if k.startswith(("module.", "_orig_mod."))]
    ranks = [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert same(*ranks) and same(ranks[0], state["ema"])


def test_one_process_makes_no_process_group(tmp_path, monkeypatch):
    """If plain `python train.py` needed a free port or a backend."""
    seen, inner = [], train.micro_loss
    monkeypatch.setattr(train, "micro_loss", lambda *a: seen.append(torch.distributed.is_initialized()) or inner(*a))
    trained(tmp_path / "run", "--steps", 1)
    assert seen == [False]


def test_draws_depend_on_step_and_place_alone():
    """If noise, times or decoded pairs depended on how a batch is cut."""
    whole = train.draw(3, 7, range(8), 50, 20, 0.5, "cpu")
    for cut in (range(0, 3), range(3, 8), [5]):
        for part, column in zip(train.draw(3, 7, cut, 50, 20, 0.5, "cpu"), whole):
            assert torch.equal(part, column[list(cut)])
    u, eps, drop, query = whole
    assert u.shape == (8,) and eps.shape == (8, 50, 3) and drop.dtype == torch.bool and query.shape == (8, 20)
    assert all(len(set(row)) == 20 and set(row) <= set(range(50)) for row in query.tolist())
    for other in (train.draw(3, 8, range(8), 50, 20, 0.5, "cpu"), train.draw(4, 7, range(8), 50, 20, 0.5, "cpu")):
        assert not torch.equal(other[1], eps) and not torch.equal(other[0], u)
    u, eps, drop, query = train.draw(0, 0, range(2000), 10, 5, 0.1, "cpu")
    assert abs(u.mean() - 0.5) < 0.03 and abs(eps.std() - 1) < 0.02 and abs(drop.float().mean() - 0.1) < 0.03
    assert abs(torch.corrcoef(torch.stack([u, drop.float(), eps[:, 0, 0]]))[[0, 0, 1], [1, 2, 2]]).max() < 0.1
    never, always = (train.draw(0, 0, range(99), 10, 5, p, "cpu")[2] for p in (0.0, 1.0))
    assert not never.any() and always.all()


# --- averaged weights

def test_ema_formula_and_buffers():
    """If the warm-up were missing, or buffers averaged instead of copied."""
    ema, net = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    with torch.no_grad():
        net.weight.fill_(5.0)
        net.running_mean.fill_(7.0)
        net.num_batches_tracked.fill_(9)
    expected = 1.0
    for step in (0, 1, 5, 1000, 100000):
        d = min(0.99, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * 5.0
        train.update_ema(ema, net, step, 0.99)
        assert torch.allclose(ema.weight, torch.full((3,), expected))
        assert ema.running_mean.tolist() == [7.0] * 3 and ema.num_batches_tracked == 9
    assert net.weight.tolist() == [5.0] * 3


def test_ema_is_updated_once_per_optimizer_step(tmp_path, monkeypatch):
    """If accumulation updated the average once per micro-batch, or sampled weights were not its."""
    calls, trail, inner = [], [], train.update_ema

    def spy(ema, model, step, decay, skipped):
        before = ema.latents.clone()
        inner(ema, model, step, decay, skipped)
        d = min(decay, (1 + step) / (10 + step))
        trail.append(torch.allclose(ema.latents, d * before + (1 - d) * model.latents, atol=1e-7))
        calls.append((step, decay))

    monkeypatch.setattr(train, "update_ema", spy)
    state = ckpt(trained(tmp_path / "run", "--steps", 3, "--accumulate", 4, "--ema", 0.9))
    assert calls == [(0, 0.9), (1, 0.9), (2, 0.9)] and all(trail)
    assert state["ema"].keys() == state["model"].keys() and not same(state["ema"], state["model"])


# --- bad steps

def poisoned(monkeypatch, steps, value=math.inf):
    """data.decode_values, with one value of every batch of these steps replaced."""
    inner, count = data.decode_values, [0]

    def decode(batch, device):
        values = inner(batch, device).clone()
        if count[0] in steps:
            values[0, 0, 0] = value
        count[0] += 1
        return values

    monkeypatch.setattr(data, "decode_values", decode)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_non_finite_step_is_skipped_and_counted(tmp_path, monkeypatch, capsys, value):
    """If one bad batch put NaN into weights, average or optimizer."""
    poisoned(monkeypatch, {3}, value)
    out = trained(tmp_path / "run", "--steps", 6, "--log-every", 2, "--save-every", 1, "--keep", 9)
    before, after, final = ckpt(out / "ckpt-0000003.pt"), ckpt(out / "ckpt-0000004.pt"), ckpt(out)
    assert all(same(before[k], after[k]) for k in ("model", "ema")) and same(before["optimizer"]["state"], after["optimizer"]["state"])
    assert not same(after["model"], final["model"]) and not same(after["ema"], final["ema"])
    assert all(p.isfinite().all() for weights in (final["model"], final["ema"]) for p in weights.values())
    assert [(r["step"], r["skipped"]) for r in log(out)] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1)]
    assert [r["step"] for r in log(out) if r["loss"] is None or not math.isfinite(r["loss"])] == [4]
    items = [data.item_index(2 ** 20, 0, k) for k in range(24, 32)]
    assert [r["bad"] for r in log(out) if "bad" in r] == [[dict(step=4, items=items)]]
    assert "skipped: step 4;" in capsys.readouterr().out


def test_bad_steps_in_a_row_stop_the_run(tmp_path, monkeypatch):
    """If a diverged run went on for days, or overwrote its last good checkpoint with NaN."""
    poisoned(monkeypatch, set(range(4, 99)))
    out = tmp_path / "run"
    with pytest.raises(data.InputError) as caught:
        trained(out, "--steps", 50, "--log-every", 1, "--save-every", 4, "--max-bad-steps", 3)
    text = str(caught.value)
    assert "\n" not in text and "3 steps in a row" in text and "checkpoint of step 4" in text
    assert ckpt(out)["step"] == 4 and all(p.isfinite().all() for p in ckpt(out)["model"].values())
    assert log(out)[-1]["skipped"] == 3


def test_scattered_bad_steps_do_not_stop_the_run(tmp_path, monkeypatch):
    """If steps that are not in a row were counted as if they were."""
    poisoned(monkeypatch, {1, 3, 5, 7})
    out = trained(tmp_path / "run", "--steps", 9, "--log-every", 1, "--max-bad-steps", 2)
    assert log(out)[-1]["skipped"] == 4 and ckpt(out)["step"] == 9


# --- the run directory

def test_sampling_changes_nothing(tmp_path):
    """If drawing pictures moved the random state, the mode or the weights of training."""
    flags = ["--steps", 6, "--save-every", 3, "--log-every", 3]
    often, never = trained(tmp_path / "often", *flags, "--sample-every", 1), trained(tmp_path / "never", *flags)
    assert same_training(ckpt(often), ckpt(never)) and same(ckpt(often)["rng"], ckpt(never)["rng"])
    assert [r["loss"] for r in log(often)] == [r["loss"] for r in log(never)]
    pictures = sorted(p.name for p in often.glob("samples-*.png"))
    assert pictures == [f"samples-{s:07d}.png" for s in range(1, 7)]
    assert len(list(never.glob("samples-*.png"))) == 1
    first, last = (Image.open(often / p) for p in (pictures[0], pictures[-1]))
    assert first.size == last.size and first.size[0] > first.size[1] * 1.5     # 8 columns, 4 rows
    assert (often / "loss.png").exists() and Image.open(often / "loss.png").size == (720, 360)


def test_checkpoint_describes_itself(glyphs_run, solids_run):
    """If sampling needed anything but the file, or the file anything but plain tensors and values."""
    for run, names, normalisation, solver in ((glyphs_run, list("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"), None, "euler"),
                                              (solids_run, list(data.Solids.SHAPES), "box", "sde")):
        state = ckpt(run)
        config = state["config"]
        assert config["class_names"] == names and config["normalisation"] == normalisation
        assert config["model"]["n_classes"] == len(names) and config["model"]["width"] == 32
        assert config["settings"]["batch_size"] == 8 and config["settings"]["seed"] == 0
        assert config["sampling"] == dict(solver=solver, steps=3, guidance=2.0) and config["path"] == "linear"
        assert state["step"] == 6 and state["data_position"] == 48
        assert json.loads((run / "config.json").read_text()) == config
        assert all(p.dtype == torch.float32 for p in state["model"].values())
        model = asft.ASFT(asft.Config(**config["model"]))
        model.load_state_dict(state["ema"])
        row = log(run)[-1]
        assert set(row) >= {"step", "loss", "grad_norm", "lr", "steps_per_s", "samples_per_s", "peak_gb", "skipped"}


# --- data sets

def pictures(folder, count, size=(20, 24)):
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def steps_and_samples(out, *flags):
    run = trained(out, "--steps", 5, *flags)
    assert all(math.isfinite(r["loss"]) for r in log(run)) and log(run)[-1]["step"] == 5
    sample.main(["--ckpt", str(run), "--n", "4", "--steps", "2", "--out", str(run / "drawn")])
    meta = json.loads((run / "drawn" / "samples.json").read_text())
    return ckpt(run), [(s["label"], s["class_name"]) for s in meta["samples"]]


def test_folder_with_classes_and_without(tmp_path):
    """If class count, names or the null class were taken from anywhere but the data."""
    for name in ("dog", "ant", "cow"):
        pictures(tmp_path / "three" / name, 3)
    state, drawn = steps_and_samples(tmp_path / "a", "--dataset", "folder", "--data", tmp_path / "three", "--res", 16)
    assert state["config"]["class_names"] == ["ant", "cow", "dog"] and state["model"]["classes.weight"].shape == (4, 32)
    assert drawn == [(0, "ant"), (1, "cow"), (2, "dog"), (0, "ant")]
    pictures(tmp_path / "flat", 3)
    state, drawn = steps_and_samples(tmp_path / "b", "--dataset", "folder", "--data", tmp_path / "flat", "--res", 16)
    assert state["config"]["class_names"] == [] and "classes.weight" not in state["model"]
    assert drawn == [(None, None)] * 4


def test_npz(tmp_path):
    """If a set in one file did not train, or its labels and resolution were lost."""
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.array([5, 9, 5, 9, 5, 9]))
    state, drawn = steps_and_samples(tmp_path / "a", "--dataset", "npz", "--data", tmp_path / "set.npz")
    assert state["config"]["model"]["res"] == 16 and state["config"]["class_names"] == ["5", "9"]
    assert drawn[:2] == [(0, "5"), (1, "9")]


def test_shapenet(tmp_path):
    """If PointFlow's tree did not train, or the solver of its recipe were not stored."""
    for split in ("train", "test"):
        folder = tmp_path / "tree" / "02691156" / split
        folder.mkdir(parents=True)
        for i in range(2):
            np.save(folder / f"{i}.npy", np.random.default_rng(i).normal(size=(100, 3)).astype(np.float32))
    state, drawn = steps_and_samples(tmp_path / "a", "--dataset", "shapenet", "--data", tmp_path / "tree", "--category",
                                     "airplane", "--points", 64)
    assert state["config"]["sampling"]["solver"] == "sde" and state["config"]["normalisation"] == "box"
    assert state["config"]["class_names"] == [] and drawn == [(None, None)] * 4


VARIANTS = [["--encoder", "linear"], ["--encoder", "perceiver"], ["--path", "cosine", "--times", "logit-normal"],
            ["--path", "vp"], ["--rope"], ["--levels", "2"], ["--encoder-heads", "8"], ["--grad-checkpoint"], ["--dtype", "bfloat16"],
            ["--workers", "1"], ["--drop", "0", "--beta2", "0.9", "--clip", "1", "--warmup", "0"],
            ["--dataset", "solids", "--points", "64", "--encoder", "hash"],
            ["--solver", "heun", "--guidance", "1.5", "--seed", "3"]]


@pytest.mark.parametrize("flags", VARIANTS, ids=" ".join)
def test_variants_train_and_sample(tmp_path, flags):
    """If an option that nobody runs were broken."""
    out = trained(tmp_path / "run", "--steps", 2, "--log-every", 1, *flags)
    assert [r["step"] for r in log(out)] == [1, 2] and all(math.isfinite(r["loss"]) for r in log(out))
    assert (out / "samples-0000002.png").exists()
    settings = ckpt(out)["config"]["settings"]
    for flag, value in zip(flags, flags[1:]):
        if flag.startswith("--") and not value.startswith("--"):
            stored = settings[flag[2:].replace("-", "_")]
            assert type(stored)(value) == stored


def test_a_run_from_before_encoder_heads_goes_on_as_it_was(tmp_path):
    """If a preset that has learnt an option changed the function of a run that was begun without it."""
    out = trained(tmp_path / "run", "--steps", 1, "--encoder-heads", 0)
    old = ckpt(out)
    for part in (old["config"]["model"], old["config"]["settings"]):
        del part["encoder_heads"]
    torch.save(old, out / "ckpt.pt")
    trained(out, "--resume", "auto", "--steps", 2)
    assert ckpt(out)["config"]["model"]["encoder_heads"] == 0 and ckpt(out)["step"] == 2
    assert "encoder_heads" in refused(*TINY, "--out", out, "--resume", "auto", "--steps", 3, "--encoder-heads", 8)


def test_grad_checkpoint_trains_the_same(tmp_path):
    """If recomputing changed what is learned."""
    a, b = (trained(tmp_path / name, "--steps", 3, "--log-every", 1, *flags) for name, flags in
            (("plain", []), ("recomputed", ["--grad-checkpoint"])))
    np.testing.assert_allclose([r["loss"] for r in log(a)], [r["loss"] for r in log(b)], rtol=1e-5)


# --- what goes wrong

def wrong_flags(tmp):
    (tmp / "empty").mkdir()
    (tmp / "solid.npz").write_bytes(b"nothing")
    return {
        "no data": (["--dataset", "folder"], ["--data", "directory of pictures"]),
        "no npz": (["--dataset", "npz"], ["--data", "images"]),
        "no tree": (["--dataset", "shapenet"], ["--data", "ShapeNetCore"]),
        "imagenet": (["--dataset", "imagenet256"], ["--data"]),
        "empty folder": (["--dataset", "folder", "--data", tmp / "empty"], ["empty", "no pictures"]),
        "missing folder": (["--dataset", "folder", "--data", tmp / "gone"], ["gone"]),
        "broken npz": (["--dataset", "npz", "--data", tmp / "solid.npz"], ["solid.npz"]),
        "batch": (["--accumulate", 3], ["--batch-size", "8", "3"]),
        "decode": (["--decode", 1025], ["--decode", "1025", "1024"]),
        "domain": (["--model", "point-tiny"], ["point-tiny", "image"]),
        "other domain": (["--dataset", "solids", "--model", "tiny"], ["tiny", "points"]),
        "grid": (["--res", 34], ["34", "latent"]),
        "heads": (["--heads", 5], ["heads"]),
        "encoder": (["--encoder", "hash"], ["hash"]),
        "levels": (["--levels", 3], ["levels"]),
        "rope": (["--encoder", "perceiver", "--rope"], ["rope"]),
        "ema": (["--ema", 1.0], ["--ema"]),
        "drop": (["--drop", 1.5], ["--drop"]),
        "lr": (["--lr", 0], ["--lr"]),
        "device": (["--device", "abacus"], ["--device", "abacus"]),
        "flip of letters": (["--flip"], ["--flip", "glyphs"]),
    }


@pytest.mark.parametrize("name", ["no data", "no npz", "no tree", "imagenet", "empty folder", "missing folder", "broken npz",
                                  "batch", "decode", "domain", "other domain", "grid", "heads", "encoder", "levels", "rope",
                                  "ema", "drop", "lr", "device", "flip of letters"])
def test_wrong_flags_end_in_one_line(tmp_path, name):
    """If a wrong flag ended in a traceback, in a late failure or in a message that does not name it."""
    flags, words = wrong_flags(tmp_path)[name]
    text = refused(*TINY, "--steps", 1, "--out", tmp_path / "run", *flags)
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("words", [["--model", "M"], ["--dataset", "mnist"], ["--encoder", "x"], ["--path", "x"],
                                   ["--steps", "0"], ["--batch-size", "many"], ["--what"],
                                   ["--workers", "-1"], ["--seed", "-1"], ["--keep", "-1"]])
def test_flags_that_argparse_refuses(words, capsys):
    """If a wrong choice or number were accepted."""
    with pytest.raises(SystemExit) as caught:
        train.main(words)
    assert caught.value.code == 2 and words[0] in capsys.readouterr().err


def test_exit_status_and_one_line_on_stderr(tmp_path):
    """If the script itself, rather than main(), printed a traceback or another status."""
    _, err = finished(start([ROOT / "train.py", "--dataset", "folder", "--out", tmp_path / "run"]), status=2)
    assert err.count("\n") == 1 and "--data" in err and "directory of pictures" in err
    _, err = finished(start([ROOT / "train.py", "--out", tmp_path / "run", "--resume", tmp_path / "none"]), status=2)
    assert err.count("\n") == 1 and "none" in err


# --- schedules and recipes

def test_learning_rate():
    """If the warm-up began at zero, or the cosine did not end at zero."""
    args = argparse.Namespace(lr=2.0, warmup=4, schedule="constant", steps=100)
    assert [train.learning_rate(args, s) for s in (0, 1, 3, 4, 99, 500)] == [0.5, 1.0, 2.0, 2.0, 2.0, 2.0]
    args.schedule, args.warmup = "cosine", 0
    expected = [2.0, 1 + math.cos(math.pi / 4), 1.0, 0.0, 0.0]
    assert [train.learning_rate(args, s) for s in (0, 25, 50, 100, 150)] == pytest.approx(expected)


def test_recipes_are_the_papers():
    """If a number of the paper's training set-up (its Sec. 4 and App. A) drifted."""
    shared = dict(lr=1e-4, warmup=0, schedule="constant", beta2=0.999, clip=2.0, ema=0.999, drop=0.1, path="linear",
                  times="uniform")
    table = {   # model, resolution or points, decoded pairs, batch, steps, solver, sampling steps, guidance
        "imagenet128": ("XL", 128, 4096, 512, 1_700_000, "euler", 100, 1.5),
        "imagenet256": ("XL", 256, 8192, 512, 1_700_000, "euler", 100, 1.5),
        "ffhq256": ("B", 256, 8192, 256, 1_000_000, "euler", 100, 1.0),
        "church256": ("B", 256, 8192, 256, 1_000_000, "euler", 100, 1.0),
        "shapenet": ("point-B", 2048, 2048, 16, 800_000, "sde", 1000, 1.0),
    }
    for name, row in table.items():
        r = train.RECIPES[name]
        assert (r["model"], r.get("res") or r["points"], r["decode"], r["batch_size"], r["steps"], r["solver"],
                r["sampling_steps"], r["guidance"]) == row, name
        assert {k: r[k] for k in shared} == shared, name


def test_optimizer_is_adamw_without_decay(glyphs_run):
    """If weight decay or epsilon were not the paper's."""
    (group,) = ckpt(glyphs_run)["optimizer"]["param_groups"]
    assert tuple(group["betas"]) == (0.9, 0.999) and group["eps"] == 1e-8 and group["weight_decay"] == 0
    assert len(group["params"]) == len(ckpt(glyphs_run)["model"])              # no parameter is left out


def test_every_recipe_builds(tmp_path):
    """If a recipe named a model, a size or a flag that does not fit together."""
    for name, r in train.RECIPES.items():
        assert set(train.DEFAULTS) | set(r) >= {a.dest for a in train.parser()._actions} - {"help"}
        size = dict(points=r["points"]) if "points" in r else dict(res=r.get("res", 32))
        cfg = asft.config(r["model"], **size)
        assert r["decode"] <= (cfg.res ** 2 if cfg.domain == "image" else cfg.points), name


# --- the plan, and what the host waits for

def test_plan_needs_neither_data_nor_gpu(tmp_path, capsys, monkeypatch):
    """If the plan read data, wrote a run, or its figures were not those of the flags."""
    monkeypatch.chdir(tmp_path)
    train.main(["--plan", "--dataset", "imagenet256", "--model", "S", "--batch-size", "256"])
    text = capsys.readouterr().out
    forward, steps = asft.forward_flops(asft.config("S"), 8192)[0], 1_700_000
    days = steps * 3 * 256 * forward / (8 * 989e12 * 0.4) / 86400
    assert f"{forward / 1e9:.1f} GFLOP forward" in text and f"{days:,.1f} days on 8 H100 at 40 %" in text
    assert "435.2M samples" in text and "36.6M" in text and not list(tmp_path.iterdir())
    train.main(["--plan", "--dataset", "imagenet256", "--model", "S", "--batch-size", "256", "--gpus", "4", "--utilisation", "0.8",
                "--grad-checkpoint"])
    text = capsys.readouterr().out
    assert f"{4 / 3 * days:,.1f} days on 4 H100 at 80 %" in text and "64 samples, recomputed" in text
    train.main(["--plan", "--dataset", "shapenet"])
    assert "point-B at 2048 points" in capsys.readouterr().out
    for words in (["--gpus", "3"], ["--utilisation", "2"], ["--decode", "70000"]):
        with pytest.raises(data.InputError, match=words[0] if words[0] != "--gpus" else "3 processes"):
            train.main(["--plan", "--dataset", "imagenet256", *words])


def test_a_step_never_waits_for_the_device(tmp_path, monkeypatch):
    """If anything in a step read a number back to the host, or a shape from the data: on a GPU each would be a wait. Seen
    here as the operators that do so, in the steps between two lines of the log."""
    from torch.utils._python_dispatch import TorchDispatchMode
    seen, active = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if active and name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero"):
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


def test_an_evaluation_never_waits_for_the_device():
    """If the sampler read numbers back between or inside steps (dopri5 must, to choose the next one)."""
    from torch.utils._python_dispatch import TorchDispatchMode
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))
    torch.manual_seed(0)
    model = asft.ASFT(asft.config("tiny", width=32, depth=2, heads=2, latents=16, n_classes=5)).eval()
    velocity = sample.Velocity(model, asft.image_coords(32), torch.tensor([1, 2]), guidance=2.0, chunk=500, context=32 ** 2)
    with torch.no_grad(), Watch():
        velocity(torch.randn(2, 32 ** 2, 3), 0.5)
    assert len(seen) > 100 and not {"_local_scalar_dense", "nonzero", "equal"} & set(seen)
