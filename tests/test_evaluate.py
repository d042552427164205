"""evaluate.py: what it reads, what it computes, what it refuses, processes and files."""
import json
import os
import pickle
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import sample
from conftest import ROOT
from metrics import inception, weights
from test_image_networks import Bomb, randomised

FEATURES = "def pixels(x):\n    return (x.float()[:, :, ::8, ::8] if x.dim() == 4 else x[:, :9]).flatten(1)\n"


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Every test in an empty folder with a feature function, a cache of its own, and no network."""
    def refuse(*args, **kwargs):
        raise OSError("no network in this test")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("ASFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(FEATURES)
    sys.modules.pop("mine", None)


def run(*words):
    return evaluate.main([str(w) for w in words])


def images(n=12, res=24, seed=0, low=0):
    return np.random.default_rng(seed).integers(low, 256, (n, res, res, 3), dtype=np.uint8)


def folder(path, arrays, suffix=".png"):
    path.mkdir(parents=True)
    for i, a in enumerate(arrays):
        Image.fromarray(a).save(path / f"{i:03d}{suffix}")
    return path


def shapes(n=6, P=30, seed=0, scale=(1, 1, 1)):
    return (np.random.default_rng(seed).standard_normal((n, P, 3)) * scale).astype(np.float32)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(randomised(inception.InceptionV3()), path)
    return path


# --- pictures

def test_a_set_against_itself(network, tmp_path, capsys):
    """If FID(A,A) were not 0, or the protocol did not say how the figures came about (users' row 1)."""
    folder(tmp_path / "a", images())
    result = run("--fake", "a", "--real", "a", "--weights", network, "--metrics", "all")
    found = result["metrics"]
    assert list(found) == ["fid", "sfid", "is", "precision", "recall", "is_std"]
    assert 0 <= found["fid"] < 1e-3 and 0 <= found["sfid"] < 1e-3 and (found["precision"], found["recall"]) == (1, 1)
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(result))
    p = result["protocol"]
    assert p["n_fake"] == p["n_real"] == 12 and p["file_type_fake"] == p["file_type_real"] == "png" and p["resize"] == "tf1"
    assert p["inception_sha256"] == weights.sha256(network) and p["real_sha256"] == p["fake_sha256"] and len(p["real_sha256"]) == 64
    for key in ("split", "ckpt_sha256", "weights", "solver", "nfe", "guidance", "seed", "quantisation", "normalisation_real", "k"):
        assert key in p
    text = capsys.readouterr()
    assert "WARNING: inception" in text.err and "not the published file" in text.err
    assert any("50,000" in w for w in result["warnings"]) and any("not the published" in w for w in result["warnings"])


def test_all_leaves_out_what_has_no_weights(network, tmp_path):
    """If `all` failed for a file that cannot be had, or left a figure out in silence."""
    np.save("a.npy", shapes())
    result = run("--fake", "a.npy", "--real", "a.npy", "--metrics", "all")
    assert "p_fid" not in result["metrics"] and any("pointnet.pt" in w and "all leaves out" in w for w in result["warnings"])
    folder(tmp_path / "a", images())
    with pytest.raises(ValueError, match="weights of clip are missing.*ViT-B-32.pt"):
        run("--fake", "a", "--real", "a", "--weights", network, "--metrics", "fid_clip")


def test_own_features_and_every_picture_source(tmp_path):
    """If a folder, ADM's npz, an npz of training data or another type gave other pictures, or the wrong distance."""
    a, b = images(), images(15, seed=1, low=60)
    folder(tmp_path / "a", a)
    np.savez("a.npz", a)
    np.savez_compressed("b.npz", images=b, labels=np.zeros(15, int))
    folder(tmp_path / "b", b)
    found = [run("--fake", x, "--real", y, "--features", "mine:pixels")["metrics"] for x in ("a", "a.npz") for y in ("b", "b.npz")]
    assert all(f == found[0] for f in found) and list(found[0]) == ["precision", "recall", "fd"]
    from metrics.frechet import frechet_distance
    x, y = (s[:, ::8, ::8].transpose(0, 3, 1, 2).reshape(len(s), -1).astype(float) for s in (a, b))
    expected = frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert found[0]["fd"] == pytest.approx(expected, rel=1e-9)


def test_torchscript_features(tmp_path):
    """If a TorchScript file were not taken for --features, or got other pictures than a function does."""
    class Pixels(torch.nn.Module):
        def forward(self, x):
            return x.float()[:, :, ::8, ::8].flatten(1)
    torch.jit.script(Pixels()).save("pixels.pt")
    np.savez("a.npz", images())
    np.savez("b.npz", images(seed=1))
    both = [run("--fake", "a.npz", "--real", "b.npz", "--features", f)["metrics"] for f in ("pixels.pt", "mine:pixels")]
    assert both[0] == both[1]


def test_large_arrays_are_mapped(tmp_path, monkeypatch):
    """If an uncompressed npz were read into memory, or mapped at the wrong place."""
    a = images(40, 16)
    np.savez("a.npz", arr_0=a, arr_1=np.arange(40))
    monkeypatch.setattr(evaluate, "MAPPED", 1000)
    found = evaluate.map_npz(tmp_path / "a.npz", "arr_0")
    assert isinstance(found, np.memmap) and (found == a).all()


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_statistics_of_a_set(tmp_path, batch):
    """If a batch that does not divide the set lost or repeated a picture (users' row 6), or the file did not stand in for it."""
    a, b = images(13), images(11, seed=1)
    folder(tmp_path / "a" / "deeper", a)
    np.savez("b.npz", b)
    run("stats", "--data", "a", "--res", 24, "--out", "ref.npz", "--features", "mine:pixels", "--batch", batch)
    with np.load("ref.npz", allow_pickle=False) as ref:
        x = a[:, ::8, ::8].transpose(0, 3, 1, 2).reshape(13, -1).astype(float)
        np.testing.assert_allclose(ref["mu_fd"], x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(ref["sigma_fd"], np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)
        assert ref["n"] == 13 and json.loads(str(ref["meta"]))["n"] == 13 and ref["features"].shape == (13, 27)
    direct = run("--fake", "b.npz", "--real", "a", "--features", "mine:pixels")["metrics"]
    stored = run("--fake", "b.npz", "--real", "ref.npz", "--features", "mine:pixels")
    assert stored["metrics"] == pytest.approx(direct, rel=1e-6) and stored["protocol"]["n_real"] == 13


def test_adm_statistics(network, tmp_path, capsys):
    """If stored mu, sigma, mu_s, sigma_s were not used, or precision and recall ran on statistics alone (users' row 8)."""
    np.savez("b.npz", images(12))
    run("stats", "--data", "b.npz", "--res", 24, "--out", "full.npz", "--weights", network)
    with np.load("full.npz", allow_pickle=False) as full:
        assert full["mu"].shape == (2048,) and full["mu_s"].shape == (2023,)
        np.savez("adm.npz", **{k: full[k] for k in ("mu", "sigma", "mu_s", "sigma_s")})
    found = run("--fake", "b.npz", "--real", "adm.npz", "--weights", network)["metrics"]
    assert "precision" not in found and found["fid"] < 1e-3 and found["sfid"] < 1e-3
    assert "precision and recall are left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds statistics alone; precision and recall need"):
        run("--fake", "b.npz", "--real", "adm.npz", "--weights", network, "--metrics", "fid", "recall")
    found = run("--fake", "b.npz", "--real", "full.npz", "--weights", network, "--metrics", "precision", "recall")["metrics"]
    assert found == {"precision": 1, "recall": 1}


def test_file_types_that_differ_are_flagged(tmp_path):
    """If JPEG samples were compared with PNG references without a word."""
    folder(tmp_path / "a", images(), ".jpg")
    folder(tmp_path / "b", images())
    assert any("file types differ" in w for w in run("--fake", "a", "--real", "b", "--features", "mine:pixels")["warnings"])
    assert not any("file types" in w for w in run("--fake", "b", "--real", "b", "--features", "mine:pixels")["warnings"])


def test_checkpoint_is_sampled_and_kept(glyphs_run, tmp_path):
    """If samples of a checkpoint were thrown away, the protocol lacked their setting, or a second run drew them again."""
    words = ("--fake", glyphs_run, "--real", "glyphs:val", "--features", "mine:pixels", "--n", 7, "--steps", 2, "--guidance", 1.5,
             "--out", "drawn", "--seed", 3)
    result = run(*words)
    p = result["protocol"]
    assert (p["n_fake"], p["n_real"], p["solver"], p["nfe"], p["guidance"], p["seed"], p["weights"]) == (7, 7, "euler", 2, 1.5, 3, "ema")
    assert p["ckpt_sha256"] == sample.sha256(glyphs_run / "ckpt.pt") and p["split"] == "val" and "rounded" in p["quantisation"]
    before = (tmp_path / "drawn" / "000003.png").stat().st_mtime_ns
    assert run(*words)["metrics"] == result["metrics"]
    assert (tmp_path / "drawn" / "000003.png").stat().st_mtime_ns == before
    assert run("--fake", "drawn", "--real", "glyphs:val", "--features", "mine:pixels", "--n", 7)["metrics"] == result["metrics"]


def test_two_processes_agree_with_one(glyphs_run, tmp_path):
    """If processes counted a picture twice or none, or drew other samples (users' rows 6, 20)."""
    folder(tmp_path / "a", images(13))
    common = ["--features", "mine:pixels", "--device", "cpu"]
    jobs = {"stats": ["stats", "--data", "a", "--res", "24", *common],
            "fd": ["--fake", str(glyphs_run), "--real", "glyphs:val", "--samples", "7", "--steps", "2", *common]}
    for name, words in jobs.items():
        for world in (1, 2):
            out = ["--out", f"{name}{world}.npz"] if name == "stats" else ["--out", f"drawn{world}", "--json", f"{name}{world}.json"]
            if world == 1:
                run(*words, *out)
                continue
            done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                                   str(ROOT / "evaluate.py"), *words, *out], capture_output=True, text=True, timeout=200)
            assert done.returncode == 0, done.stderr
    with np.load("stats1.npz", allow_pickle=False) as one, np.load("stats2.npz", allow_pickle=False) as two:
        for key in ("mu_fd", "sigma_fd", "features", "n"):
            np.testing.assert_allclose(one[key], two[key], rtol=1e-6, atol=1e-6)
        assert json.loads(str(one["meta"]))["sha256"] == json.loads(str(two["meta"]))["sha256"]
    one, two = (json.loads((tmp_path / f"fd{w}.json").read_text()) for w in (1, 2))
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-2) and two["protocol"]["processes"] == 2


def test_paper_s_figures_stand_beside_ours(tmp_path, capsys):
    """If the paper's rows were printed for another data set, or not at all."""
    torch.save({"ref": torch.from_numpy(shapes()), "mean": torch.zeros(6, 1, 3), "std": torch.ones(6, 1, 1)}, "ref_val_chair.pt")
    np.save("mine.npy", shapes(seed=1))
    result = run("--fake", "mine.npy", "--real", "ref_val_chair.pt")
    text = capsys.readouterr().out
    assert "ASFT-B (Tab. 4)" in text and "3.6310" in text and result["paper"]["ASFT-L (Tab. 4)"]["1nna_cd"] == 50.52
    np.save("other.npy", shapes())
    assert any("against 662" in w for w in result["warnings"])
    assert run("--fake", "mine.npy", "--real", "other.npy")["paper"] == {}
    assert evaluate.paper_rows(("imagenet256", 256), ["fid"])["ASFT-XL (Tab. 3)"]["fid"] == 3.74
    assert evaluate.paper_rows(("imagenet256", 128), ["fid"]) == {}


# --- clouds

def test_clouds_of_every_source_agree(tmp_path):
    """If .npy, folders, .ply, LION's files or samples of ours were read differently."""
    a, b = shapes(), shapes(seed=1, scale=(1, 2, 1))
    np.save("a.npy", a)
    np.savez("a.npz", a)
    torch.save(torch.from_numpy(b), "b.pt")
    (tmp_path / "b").mkdir()
    for i, cloud in enumerate(b):
        sample.write_ply(tmp_path / "b" / f"{i}.ply", cloud)
        if i % 2:
            np.save(tmp_path / "b" / f"{i}.npy", cloud)                # its twin: counted once
    (tmp_path / "c").mkdir()
    for i, cloud in enumerate(b):
        lines = [" ".join(map(repr, row)) + " 7" for row in cloud.tolist()]
        head = "ply\nformat ascii 1.0\ncomment x\nelement vertex 30\nproperty float x\nproperty float y\nproperty double z\n" \
               "property uchar red\nelement face 0\nproperty list uchar int vertex_indices\nend_header\n"
        (tmp_path / "c" / f"{i}.ply").write_text(head + "\n".join(lines) + "\n")
    found = [run("--fake", x, "--real", y)["metrics"] for x in ("a.npy", "a.npz") for y in ("b.pt", "b", "c")]
    assert list(found[0]) == [*evaluate.PAIRS, "jsd"] and all(f == found[0] for f in found)
    moved = run("--fake", "a.npy", "--real", "b.pt")["metrics"]
    np.save("a.npy", a * 3 + 5)                                        # --normalize box: units and place do not matter
    assert run("--fake", "a.npy", "--real", "b.pt")["metrics"] == pytest.approx(moved, rel=1e-3)


def test_emd_by_name(tmp_path):
    """If --emd chose another distance than it names, or the JSON did not say which."""
    np.save("a.npy", shapes())
    np.save("b.npy", shapes(seed=1))
    found = {}
    for name in ("lion", "pointflow", "exact"):
        result = run("--fake", "a.npy", "--real", "b.npy", "--emd", name, "--metrics", "mmd_emd")
        assert list(result["metrics"]) == ["mmd_emd"] and result["protocol"]["emd"] == name
        found[name] = result["metrics"]["mmd_emd"]
    assert found["lion"] < found["exact"] < found["pointflow"]


def test_normalisations_that_differ_are_refused(tmp_path, solids_run):
    """If samples in their own boxes were compared with references in raw units (users' row 11)."""
    sample.main(["--ckpt", str(solids_run), "--n", "3", "--steps", "2", "--out", "s"])
    ref = shapes(3, 64)
    torch.save({"ref": torch.from_numpy(ref), "mean": torch.ones(3, 1, 3), "std": torch.full((3, 1, 1), 2.0)}, "ref.pt")
    with pytest.raises(ValueError, match="normalised by box, the references by global"):
        run("--fake", "s", "--real", "ref.pt", "--normalize", "none")
    result = run("--fake", "s", "--real", "ref.pt")
    assert result["protocol"]["normalisation_fake"] == "box" and "longest side to 1" in result["protocol"]["normalisation"]
    np.save("a.npy", shapes(3, 64, 1))
    torch.save(torch.from_numpy(shapes(3, 64, 1)), "a.pt")
    scaled = run("--fake", "a.pt", "--real", "ref.pt", "--normalize", "none", "--metrics", "mmd_cd")["metrics"]["mmd_cd"]
    np.save("b.npy", ref)
    raw = run("--fake", "a.npy", "--real", "b.npy", "--normalize", "none", "--metrics", "mmd_cd")
    assert scaled == pytest.approx(4 * raw["metrics"]["mmd_cd"], rel=1e-4)          # LION: x std + mean on both sets
    assert any("unknown" in w for w in run("--fake", "s", "--real", "b.npy", "--normalize", "none")["warnings"])


def test_more_samples_or_points_than_references(tmp_path, capsys):
    """If more samples than references were scored, or clouds of another number of points compared point to point."""
    np.save("a.npy", shapes(9, 50, 1))
    np.save("a6.npy", shapes(9, 50, 1)[:6])
    np.save("b.npy", shapes(6, 30))
    result = run("--fake", "a.npy", "--real", "b.npy")
    assert result["metrics"] == run("--fake", "a6.npy", "--real", "b.npy")["metrics"]
    assert result["protocol"]["points"] == 30 and any("a random 30" in w for w in result["warnings"])
    assert "the first 6 of 9 samples are used" in capsys.readouterr().out
    assert any("COV and 1-NNA assume" in w for w in run("--fake", "b.npy", "--real", "a.npy")["warnings"])


def test_point_checkpoint_draws_as_many_as_there_are_references(solids_run, tmp_path):
    """If the number of samples did not follow the reference, as LION's protocol wants."""
    np.save("b.npy", shapes(4, 64))
    result = run("--fake", solids_run, "--real", "b.npy", "--steps", 2, "--out", "drawn")
    assert result["protocol"]["n_fake"] == 4 and len(list((tmp_path / "drawn").glob("*.npy"))) == 4


def test_ulip_of_given_features(tmp_path):
    """If precomputed features needed weights, or were paired wrongly."""
    f = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    np.save("p.npy", f)
    np.save("i.npy", 3 * f)
    words = ("--metrics", "ulip_i", "--point-features", "p.npy", "--images", "i.npy")
    assert run(*words)["metrics"] == {"ulip_i": pytest.approx(1)}
    np.save("i.npy", f[:4])
    with pytest.raises(ValueError, match="5 clouds and 4 pictures"):
        run(*words)


# --- what is refused

def bad_files(path):
    path.mkdir()
    a = shapes()
    np.save(path / "nan.npy", np.where(np.arange(6)[:, None, None] == 4, np.nan, a))
    np.save(path / "flat.npy", a[0])
    np.save(path / "object.npy", np.array([None, 1], object), allow_pickle=True)
    np.save(path / "ints.npy", np.zeros((2, 3, 3), int))
    np.save(path / "same.npy", np.zeros((6, 30, 3), np.float32))
    np.savez(path / "whole.npz", arr_0=images(4))
    (path / "cut.npz").write_bytes((path / "whole.npz").read_bytes()[:3000])
    np.savez(path / "other.npz", weights=np.zeros(3))
    np.savez(path / "half.npz", mu=np.zeros(4))
    np.savez(path / "misshapen.npz", mu=np.zeros(4), sigma=np.zeros((3, 3)))
    (path / "text.pt").write_text("hello")
    (path / "bomb.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"a": 1}, path / "foreign.pt")
    (path / "x.ply").write_bytes(b"ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nend_header\n1\n2\n")
    (path / "plys").mkdir()
    (path / "plys" / "a.ply").write_bytes((path / "x.ply").read_bytes())
    (path / "empty").mkdir()
    folder(path / "mixed", [images(1, 20)[0], images(1, 24)[0]])
    folder(path / "broken", images(3, 20))
    (path / "broken" / "001.png").write_bytes(b"not a picture")
    (path / "shapes").mkdir()
    for i, P in enumerate((30, 31)):
        np.save(path / "shapes" / f"{i}.npy", shapes(1, P)[0])
    np.save(path / "good.npy", a)
    np.save(path / "one.npy", a[:1])
    np.savez(path / "few.npz", arr_0=images(3))
    (path / "picture.txt").write_text("x")
    return path


REFUSED = {     # words -> what the line must say
    "--real good.npy": "--fake is missing", "--fake good.npy": "--real is missing", "--fake none --real good.npy": "none: no such file",
    "--fake nan.npy --real good.npy": "nan.npy: 30 points are NaN or infinite, the first is cloud 4",
    "--fake flat.npy --real good.npy": "flat.npy: found float32 (30, 3); expected floats (S,P,3)",
    "--fake object.npy --real good.npy": "object.npy: not a plain .npy", "--fake ints.npy --real good.npy": "ints.npy: found int64",
    "--fake same.npy --real good.npy": "all the same", "--fake cut.npz --real whole.npz": "cut.npz: cannot be read as a .zip",
    "--fake other.npz --real whole.npz": "other.npz: found weights; expected", "--fake half.npz --real whole.npz": "half.npz: found one of",
    "--fake misshapen.npz --real whole.npz": "misshapen.npz: `mu`", "--fake text.pt --real good.npy": "text.pt: not a file of tensors",
    "--fake bomb.pt --real good.npy": "bomb.pt: not a file of tensors", "--fake foreign.pt --real good.npy": "foreign.pt: found a; expected",
    "--fake x.ply --real good.npy": "x.ply: one cloud", "--fake plys --real good.npy": "a.ply: not a readable .ply",
    "--fake empty --real good.npy": "empty: neither pictures nor clouds", "--fake picture.txt --real good.npy": "expected a directory, or a file",
    "--fake mixed --real whole.npz --features mine:pixels": "001.png is (24, 24, 3)",
    "--fake broken --real whole.npz --features mine:pixels": "001.png: cannot be read as a picture",
    "--fake shapes --real good.npy": "1.npy has 31 points", "--fake one.npy --real good.npy": "at least 2 of each",
    "--fake few.npz --real whole.npz --features mine:pixels": "at least 4 fake items, found 3",
    "--fake good.npy --real whole.npz": "the samples are clouds", "--fake whole.npz --real whole.npz": "weights of inception are missing",
    "--fake whole.npz --real whole.npz --metrics fid": "download failed", "--fake whole.npz --real whole.npz --metrics fdi": "--metrics fdi: expected all",
    "--fake whole.npz --real whole.npz --metrics mmd_cd": "that is a metric of clouds",
    "--fake good.npy --real good.npy --metrics fd": "needs --features", "--fake good.npy --real good.npy --metrics ulip_i": "needs --images",
    "--fake whole.npz --real whole.npz --features nowhere:f": "--features nowhere:f: expected module:callable",
    "--fake whole.npz --real whole.npz --features picture.txt": "picture.txt: not a TorchScript file",
    "--fake whole.npz --real whole.npz --weights picture.txt": "picture.txt: not a file of tensors",
    "--fake whole.npz --real whole.npz --features mine:pixels --json a/b.json": "--json a/b.json: expected a file",
    "--fake good.npy --real shapenet": "--data is missing", "--fake good.npy --real good.npy --memory 0": None,
    "--fake good.npy --real good.npy --emd sinkhorn": None, "stats --data good.npy --out r.npz": "holds clouds; expected pictures",
    "stats --data whole.npz --out r.txt": "expected the name of an .npz", "stats --data whole.npz --out r.npz --metrics fd": "needs --features"}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    return bad_files(tmp_path_factory.mktemp("bad") / "files")


@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_ends_in_one_line(words, refused, tmp_path, monkeypatch):
    """If wrong input ended in a traceback, a number, or a half-written file."""
    monkeypatch.chdir(refused)
    (refused / "mine.py").write_text(FEATURES)
    (refused / "metrics.json").unlink(missing_ok=True)
    monkeypatch.setattr(weights.urllib.request, "urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(SystemExit if REFUSED[words] is None else (ValueError, OSError)) as e:
        run(*words.split())
    if REFUSED[words] is not None:
        text = data.message(e.value)
        assert REFUSED[words] in text and "\n" not in text, text
    assert not (refused / "metrics.json").exists() and not (refused / "r.npz").exists() and not (refused / "exploded").exists()


def test_exit_status_and_one_line_on_stderr(tmp_path):
    """If the script itself, rather than main(), printed a traceback or another status."""
    np.save("a.npy", shapes())
    done = subprocess.run([sys.executable, str(ROOT / "evaluate.py"), "--fake", "a.npy", "--real", "nothing"], capture_output=True,
                          text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and "nothing" in done.stderr


def test_point_metrics_touch_no_network_and_continue_from_the_cache(tmp_path, capsys):
    """If point metrics needed weights (users' row 18), or a second run computed the pairs again (row 34)."""
    np.save("a.npy", shapes())
    np.save("b.npy", shapes(seed=1))
    first = run("--fake", "a.npy", "--real", "b.npy")
    assert "about" in capsys.readouterr().out and len(list((tmp_path / "cache" / "pairs").glob("*.npy"))) == 6
    assert run("--fake", "a.npy", "--real", "b.npy", "--memory", 16, "--workers", 1)["metrics"] == first["metrics"]


# --- Tab. 9

def test_upscale_compares_with_enlargements_of_the_same_samples(glyphs_run, tmp_path, monkeypatch, capsys):
    """If the arms were not the same seeds, or the enlargement another than Pillow's at the finer resolution."""
    seen, inner = {}, evaluate.extract
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pixelmeans.py").write_text("def features(x):\n    return x[:, :, ::8, ::8].flatten(1).float() / 255\n")

    def extract(items, *rest):
        seen.setdefault(items.source, []).append(np.stack([items.item(i) for i in range(3)]))
        return inner(items, *rest)
    monkeypatch.setattr(evaluate, "extract", extract)
    words = ["--real", "glyphs:val", "--n", "6", "--steps", "2", "--features", "pixelmeans:features", "--metrics", "fd", "--k", "2"]
    results = evaluate.main(["upscale", "--fake", str(glyphs_run), "--times", "2", *words, "--json", "up.json"])
    assert set(results) == {"drawn", "bilinear", "bicubic"} == set(json.loads((tmp_path / "up.json").read_text()))
    text = capsys.readouterr().out
    assert "trained at 32 pixels, at 64" in text and "bicubic" in text.splitlines()[-2]
    assert len({r["metrics"]["fd"] for r in results.values()}) == 3
    fine, coarse = (next(v for k, v in seen.items() if f"/{side}x{side}-" in k) for side in (64, 32))
    assert len(fine) == 1 and len(coarse) == 2 and all(x.shape == (3, 64, 64, 3) for x in fine + coarse)
    folder = next(k for k in seen if "/32x32-" in k)
    for pictures, how in zip(coarse, (Image.BILINEAR, Image.BICUBIC)):
        small = Image.open(f"{folder}/000001.png")
        assert (pictures[1] == np.asarray(small.resize((64, 64), how))).all()
    for bad, word in ((["--res", "64"], "--res"), (["--fake", "glyphs"], "--fake")):
        with pytest.raises(data.InputError, match=word):
            evaluate.main(["upscale", "--fake", str(glyphs_run), *words, *bad])
    with pytest.raises(data.InputError, match="--res is missing"):
        evaluate.main(["--fake", folder, "--enlarge", "bicubic", *words])
