"""evaluate.py: what it reads, what it computes, what it refuses and warns of, its processes and files."""
import json
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import sample
from conftest import ROOT, TORCHRUN, checkpoint, python
from metrics import clouds, frechet, references, weights
from model import ASFT, config

FEATURES = "def pixels(x):\n    return (x.float()[:, :, ::8, ::8] if x.dim() == 4 else x[:, :9]).flatten(1)\n"
MINE = ("--features", "mine:pixels")

@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Every test in an empty folder with a feature function, a cache of its own, and no network."""
    def refuse(*args, **kwargs):
        raise OSError("no network in this test")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(weights.urllib.request, "urlopen", refuse)
    monkeypatch.setenv("ASFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("mine.py").write_text(FEATURES)
    sys.modules.pop("mine", None)

def run(*words):
    return evaluate.main([str(word) for word in words])

def images(n=12, res=24, seed=0, low=0):
    return np.random.default_rng(seed).integers(low, 256, (n, res, res, 3), dtype=np.uint8)

def folder(path, arrays, suffix=".png"):
    Path(path).mkdir(parents=True)
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(f"{path}/{i:03d}{suffix}")

def shapes(n=6, P=30, seed=0, scale=(1, 1, 1)):
    return (np.random.default_rng(seed).standard_normal((n, P, 3)) * scale).astype(np.float32)

def lion(path, ref):
    """A reference file of LION."""
    mean, std = torch.ones(len(ref), 1, 3), torch.full((len(ref), 1, 1), 2.0)
    torch.save(dict(ref=torch.from_numpy(ref), mean=mean, std=std), path)

SMALL = dict(width=16, depth=1, heads=1, latents=16)

@pytest.fixture
def image_run(tmp_path):
    return checkpoint(tmp_path / "run", ASFT(config("tiny", encoder_heads=1, **SMALL)))

@pytest.fixture
def network(monkeypatch):
    """Small features in the place of Inception's, with weights that are not the published ones."""
    class Small(torch.nn.Module):
        def forward(self, x):
            x = x.float().mean((2, 3)) if x.shape[1] == 3 else x.float().mean((1, 2))
            return x, torch.cat([x, x.square()], 1), x / 9
    monkeypatch.setattr(evaluate.inception, "load", lambda path: Small())
    find, small = weights.find, ("net.pth", "f00d", False)
    monkeypatch.setattr(weights, "find", lambda net, *rest: small if net == "inception" else find(net, *rest))

def test_a_set_against_itself(network, capsys):
    """If FID(A,A) were not 0, or the protocol did not say how the figures came about (users' row 1)."""
    folder("a", images())
    result = run("--fake", "a", "--real", "a", "--metrics", "all", "--cache", "cache")
    found, protocol = result["metrics"], result["protocol"]
    assert {*found} == {*"fid sfid is is_std precision recall density coverage kid kid_std".split()}
    assert found["fid"] < 1e-3 and found["sfid"] < 1e-3 and found["precision"] == found["recall"] == 1
    assert json.loads(Path("metrics.json").read_text()) == json.loads(json.dumps(result))
    assert protocol["n_fake"] == protocol["n_real"] == 12 and protocol["file_type_real"] == "png"
    assert protocol["real_sha256"] == protocol["fake_sha256"] and len(protocol["real_sha256"]) == 64
    assert protocol["networks"]["inception"] == dict(file="net.pth", sha256="f00d", published=False)
    assert {"split", "ckpt_sha256", "weights", "solver", "nfe", "guidance", "seed", "resize"} <= {*protocol}
    for part in ("f00d, is not the published file", "fid, sfid, is of 12 samples, 12 real items", "same set",
                 "left out: fid_clip: ", "left out: fdd: ", "left out: fd: "):
        assert part in " ".join(result["warnings"])
    assert capsys.readouterr().err.count("WARNING:") == len(result["warnings"])

def test_every_image_source_gives_the_same_distance():
    """If a folder, ADM's npz, our npz or TorchScript gave other images, or the wrong distance."""
    a, b = images(), images(30, seed=1, low=60)
    folder("a/deeper", a, ".PNG")
    folder("b", b)
    np.savez("a.npz", arr_0=a, mu_fd=np.zeros(27), sigma_fd=np.eye(27))          # ADM's files hold both
    np.savez_compressed("b.NPZ.npz", images=b, labels=np.zeros(30, int))
    class Pixels(torch.nn.Module):
        def forward(self, x):
            return x.float()[:, :, ::8, ::8].flatten(1)
    torch.jit.script(Pixels()).save("pixels.pt")
    found = [run("--fake", x, "--real", y, "--features", f)["metrics"] for x, y, f in (
        ("a", "b", "mine:pixels"), ("a.npz", "b", "mine:pixels"), ("a", "b.NPZ.npz", "pixels.pt"))]
    assert set(found[0]) == {"fd", "precision", "recall", "density", "coverage", "kid", "kid_std"}
    assert found[0] == found[1] == found[2]
    x, y = (s[:, ::8, ::8].transpose(0, 3, 1, 2).reshape(len(s), -1).astype(float) for s in (a, b))
    moments = x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False)
    assert found[0]["fd"] == pytest.approx(frechet.frechet_distance(*moments), rel=1e-9)
    assert (found[0]["kid"], found[0]["kid_std"]) == pytest.approx(frechet.kid(y, x), rel=1e-9)
    assert run("--fake", "a", "--real", "b", *MINE, "--res", 16)["protocol"]["fake_size"] == (16, 16, 3)

@pytest.mark.parametrize("batch", [1, 5, 64])
def test_statistics_of_a_set(batch):
    """If a batch that does not divide the set lost or repeated an image (users' row 6)."""
    a = images(13)
    folder("a/deeper", a)
    np.savez("b.npz", images(11, seed=1))
    run("stats", "--data", "a", "--res", 24, "--out", "ref.npz", *MINE, "--batch", batch, "--workers", 1)
    with np.load("ref.npz", allow_pickle=False) as ref:
        x = a[:, ::8, ::8].transpose(0, 3, 1, 2).reshape(13, -1).astype(float)
        np.testing.assert_allclose(ref["mu_fd"], x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(ref["sigma_fd"], np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)
        assert ref["n"] == json.loads(str(ref["meta"]))["n"] == 13 and ref["features"].shape == (13, 27)
    direct = run("--fake", "b.npz", "--real", "a", *MINE)["metrics"]
    stored = run("--fake", "b.npz", "--real", "ref.npz", *MINE)
    assert stored["metrics"] == pytest.approx(direct, rel=1e-6) and stored["protocol"]["n_real"] == 13

def test_adm_statistics(network):
    """If stored mu, sigma were not used, or precision and recall ran on statistics alone (users' row 8)."""
    np.savez("b.npz", images(12))
    run("stats", "--data", "b.npz", "--out", "full.npz")
    with np.load("full.npz", allow_pickle=False) as full:
        assert full["mu"].shape == (3,) and full["mu_s"].shape == (6,)
        np.savez("adm.npz", **{key: full[key] for key in ("mu", "sigma", "mu_s", "sigma_s")})
    result = run("--fake", "b.npz", "--real", "adm.npz")
    assert set(result["metrics"]) == {"fid", "sfid", "is", "is_std"} and result["metrics"]["fid"] < 1e-3
    assert any("precision" in w and "statistics alone" in w for w in result["warnings"])
    with pytest.raises(ValueError, match="recall: adm.npz holds statistics alone"):
        run("--fake", "b.npz", "--real", "adm.npz", "--metrics", "fid", "recall")
    found = run("--fake", "b.npz", "--real", "full.npz", "--metrics", "precision", "recall")["metrics"]
    assert found == {"precision": 1, "recall": 1}
    said = run("--fake", "b.npz", "--real", "adm.npz", "--resize", "clean")["warnings"]
    assert not any("reference was made" in w for w in said)            # it does not say how
    said = run("--fake", "b.npz", "--real", "full.npz", "--resize", "clean")["warnings"]
    assert any("reference was made with tf1" in w for w in said)
    assert set(run("--fake", "b.npz")["metrics"]) == {"is", "is_std"}

def test_fdd_is_of_resized_images_and_of_vit_l(monkeypatch):
    """If FDD's images were not 224 x 224, its features no class tokens, or another network were used."""
    class Small(torch.nn.Module):
        registers, blocks, norm = 0, range(24), torch.nn.LayerNorm(1024)
        def forward(self, x, which):
            return x.float().mean((1, 2)) * (which == "class") * x.shape[2]
    monkeypatch.setattr(evaluate.dinov2, "load", lambda path: Small())
    monkeypatch.setattr(weights, "find", lambda *rest: ("d.pth", "f00d", True))
    moments, words = [], ("--fake", "0.npz", "--real", "1.npz", "--metrics", "fdd")
    for seed in (0, 1):
        np.savez(f"{seed}.npz", images(seed=seed))
        x = [224 * np.mean(Image.fromarray(i).resize((224, 224), 3), (0, 1)) for i in images(seed=seed)]
        moments += [np.mean(x, 0), np.cov(x, rowvar=False)]
    assert run(*words)["metrics"] == {"fdd": pytest.approx(frechet.frechet_distance(*moments), rel=1e-4)}
    Small.registers = 4
    with pytest.raises(ValueError, match=r"\(1024, 24, 4\); expected ViT-L/14"):
        run(*words)

def test_nearest_items_of_the_training_set():
    """If the sheet showed other items, or the ratio were not that of the mean distances to the nearest."""
    b = np.concatenate([images(9), images(5, seed=2)])
    a = np.stack([b[4], images(1, seed=3)[0], b[8]])
    folder("train", b[:9])
    np.savez("held.npz", b[9:])
    np.savez("a.npz", a)
    result = run("--fake", "a.npz", "--real", "train", "--nearest", 2, "--held-out", "held.npz")
    rms = np.array([[np.sqrt(np.mean((x.astype(float) - y) ** 2)) for y in b] for x in a[:2]])
    near, far, found = rms[:, :9].min(1).mean(), rms[:, 9:].min(1).mean(), result["nearest"]
    assert found["items"] == rms[:, :9].argsort(1)[:, :3].tolist() and found["items"][0][0] == 4
    figures = [found[key] for key in ("train", "held_out", "ratio")]
    assert figures == pytest.approx([near, far, near / far], rel=1e-5) and result["metrics"] == {}
    sheet = np.asarray(Image.open("metrics.nearest.png"))[:120:5]      # five times as large, 2 pixels apart
    assert np.array_equal(sheet[:, :120:5], a[0]) and np.array_equal(sheet[:, 122:242:5], a[0])
    np.save("c.npy", shapes(4) * 3 + 5)
    np.save("d.npy", shapes(8, 40))
    result = run("--fake", "c.npy", "--real", "d.npy", "--nearest", 9, "--metrics", "jsd")
    a, b = (torch.from_numpy(clouds.normalise_box(x)) for x in (shapes(4), shapes(8, 40)))
    near = torch.stack([clouds.chamfer(a, y.expand(4, -1, -1)) for y in b], 1).amin(1).mean().item()
    assert result["nearest"]["train"] == pytest.approx(near, rel=1e-4) and "jsd" in result["metrics"]
    with pytest.raises(ValueError, match="--nearest N needs"):
        run("--fake", "c.npy", "--real", "d.npy", "--held-out", "d.npy")

def test_file_types_sizes_and_few_items_are_flagged():
    """If JPEG samples were compared with PNG references, other sizes, or themselves, without a word."""
    folder("a", images(), ".jpg")
    folder("b", images(res=22))
    folder("c", images(res=22, seed=2), ".bmp")
    warned = " ".join(run("--fake", "a", "--real", "b", *MINE)["warnings"])
    for part in ("file types differ: jpg samples, png references", "sizes differ", "rank-deficient"):
        assert part in warned
    warned = " ".join(run("--fake", "b", "--real", "c", *MINE)["warnings"])
    assert "differ" not in warned and "same set" not in warned
    folder("d", images(res=22))                             # the content of b
    np.save("e.npy", shapes())
    for words in (["b", "--real", "d", *MINE], ["e.npy", "--real", "./e.npy", "--metrics", "jsd"]):
        assert "the same set" in " ".join(run("--fake", *words)["warnings"])

def test_checkpoint_is_sampled_and_kept(image_run):
    """If samples were thrown away, the protocol lacked their setting, or a second run drew them again."""
    words = ("--fake", image_run, "--real", "glyphs:val", *MINE, "--n", 7, "--steps", 2, "--out", "drawn")
    result = run(*words)
    protocol = result["protocol"]
    expected = dict(n_fake=7, n_real=7, solver="euler", nfe=2, guidance=1, seed=0, weights="ema", split="val")
    assert {key: protocol[key] for key in expected} == expected
    assert protocol["ckpt_sha256"] == weights.sha256(image_run / "ckpt.pt")
    before = os.stat("drawn/000003.png").st_mtime_ns
    assert run(*words)["metrics"] == result["metrics"] and os.stat("drawn/000003.png").st_mtime_ns == before
    assert run("--fake", "drawn", "--real", "glyphs:val", *MINE, "--n", 7)["metrics"] == result["metrics"]

def test_a_name_is_the_shipped_model_of_fakes_and_a_data_set_with_a_split():
    words = "--real", "glyphs:val", *MINE, "--n", 4
    drawn = run("--fake", "glyphs", *words, "--steps", 1, "--out", "drawn")["protocol"]
    assert drawn["ckpt"] == str(sample.WEIGHTS / "glyphs.pt") and Path("drawn/000003.png").exists()
    assert run("--fake", "glyphs:train", *words)["protocol"]["fake"] == "glyphs:train"

def test_nothing_is_drawn_before_all_is_known_to_be_right(image_run, monkeypatch):
    """If hours of drawing ended in a wrong flag."""
    monkeypatch.setattr(sample, "sample", lambda *args, **kwargs: pytest.fail("drew samples"))
    for words in (["--real", "nowhere"], ["--features", "mine:nothing"], ["--real", "solids"],
                  ["--metrics", "fid"], ["--json", "no/x.json", *MINE]):
        with pytest.raises((ValueError, OSError)):
            run("--fake", image_run, "--real", "glyphs", *words)

def test_point_checkpoint_draws_as_many_as_there_are_references(tmp_path):
    """If the number of samples were not the references', or normalisations differed (users' row 11)."""
    cloud_run = checkpoint(tmp_path / "run", ASFT(config("point-tiny", points=64, **SMALL)))
    np.save("b.npy", shapes(4, 64))
    result = run("--fake", cloud_run, "--real", "b.npy", "--steps", 2, "--out", "drawn")
    assert result["protocol"]["n_fake"] == 4 and len(list(Path("drawn").glob("*.npy"))) == 4
    lion("ref.pt", shapes(4, 64))
    with pytest.raises(ValueError, match="normalised by box, references by global"):
        run("--fake", "drawn", "--real", "ref.pt", "--normalize", "none")
    assert "unknown" in " ".join(run("--fake", "drawn", "--real", "b.npy", "--normalize", "none")["warnings"])

def test_two_processes_agree_with_one(image_run):
    """If processes counted an image twice or none, or drew other samples (users' rows 6, 20)."""
    np.savez("ref.npz", images(5, 32))
    words = ["--fake", str(image_run), "--real", "ref.npz", "--samples", "7", "--steps", "2", *MINE]
    one = run(*words, "--out", "drawn1")
    python(*TORCHRUN, ROOT / "evaluate.py", *words, "--out", "drawn2", "--json", "two.json")
    two = json.loads(Path("two.json").read_text())
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-2) and two["protocol"]["processes"] == 2
    assert two["protocol"]["real_sha256"] == one["protocol"]["real_sha256"]

def test_clouds_of_every_source_agree():
    """If .npy, folders, .ply, LION's files or an npz were read differently, or twin files counted twice."""
    a, b = shapes(), shapes(seed=1, scale=(1, 2, 1))
    np.save("a.npy", a)
    np.savez("a.npz", a)
    torch.save(torch.from_numpy(b), "b.pt")
    Path("b").mkdir()
    trimesh = pytest.importorskip("trimesh")
    for i, cloud in enumerate(b):
        trimesh.PointCloud(cloud if i % 2 else 2 * cloud[:4]).export(f"b/{i}.ply")
        os.rename(f"b/{i}.ply", f"b/{i}.PLY")
        if i % 2 == 0:
            np.save(f"b/{i}.npy", cloud)                    # is read, and not its twin
    found = [run("--fake", x, "--real", y)["metrics"] for x in ("a.npy", "a.npz") for y in ("b.pt", "b")]
    assert all(one == pytest.approx(found[0], rel=1e-5) for one in found)
    ref, smp = clouds.normalise_box(b), clouds.normalise_box(a)
    expected = clouds.scores(ref, smp, "chamfer") | {"jsd": clouds.jsd(ref, smp)}
    for key, value in expected.items():
        assert found[0][key if key == "jsd" else f"{key}_cd"] == value
    np.save("a.npy", a * 3 + 5)                             # --normalize box: units and place do not matter
    assert run("--fake", "a.npy", "--real", "b.pt")["metrics"] == pytest.approx(found[0], rel=1e-3)

def test_emd_by_name_and_pairs_from_the_cache(monkeypatch):
    """If --emd chose another distance than it names, or a second run computed the pairs again (row 34)."""
    np.save("a.npy", shapes())
    np.save("b.npy", shapes(seed=1))
    words = ("--fake", "a.npy", "--real", "b.npy", "--metrics", "mmd_emd", "--emd")
    found = [run(*words, name)["metrics"]["mmd_emd"] for name in ("lion", "exact", "pointflow")]
    assert found[0] < found[1] < found[2]
    assert len(list(Path("cache/pairs").glob("*.npy"))) == 9
    monkeypatch.setattr(clouds, "compute", lambda *args: pytest.fail("computed again"))
    assert run(*words, "exact", "--memory", 16)["metrics"] == {"mmd_emd": found[1]}

def test_lion_s_global_protocol_and_the_paper_s_rows(capsys):
    """If x std + mean were not applied to both sets, or the paper's row stood beside another protocol."""
    ref = shapes(3, 64)
    np.save("a.npy", shapes(3, 64, 1))
    np.save("b.npy", ref)
    lion("ref_val_chair.pt", ref)
    words = "--fake", "a.npy", "--normalize", "none", "--metrics", "mmd_cd"
    scaled, raw = run(*words, "--real", "ref_val_chair.pt"), run(*words, "--real", "b.npy")
    assert scaled["metrics"]["mmd_cd"] == pytest.approx(4 * raw["metrics"]["mmd_cd"], rel=1e-4)
    assert "3.6310" in capsys.readouterr().out and not raw["paper"]
    assert scaled["paper"]["ASFT-L (Tab. 4)"]["1nna_cd"] == 50.52
    assert "against 662" in " ".join(scaled["warnings"])
    assert references.paper(("imagenet256", 256))["ASFT-XL (Tab. 3)"]["fid"] == 3.74

def test_more_samples_or_points_than_references():
    """If more samples than references were scored, or clouds of other numbers of points compared."""
    np.save("a.npy", shapes(9, 50, 1))
    np.save("a6.npy", shapes(9, 50, 1)[:6])
    np.save("b.npy", shapes(6, 30))
    result = run("--fake", "a.npy", "--real", "b.npy")
    assert result["metrics"] == run("--fake", "a6.npy", "--real", "b.npy")["metrics"]
    assert result["protocol"]["points"] == 30 and any("a random 30" in w for w in result["warnings"])
    assert any("COV and 1-NNA assume" in w for w in run("--fake", "b.npy", "--real", "a.npy")["warnings"])

def test_ulip_of_given_features():
    """If precomputed features needed weights or samples, or were paired wrongly."""
    features = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    np.save("p.npy", features)
    np.save("i.npy", 3 * features)
    found = run("--metrics", "ulip_i", "--point-features", "p.npy", "--images", "i.npy")["metrics"]
    assert found == {"ulip_i": pytest.approx(1)}

REFUSED = {     # words -> what the line must say
    "--real good.npy": "--fake is missing",
    "--fake good.npy": "--real is missing",
    "--fake none --real good.npy": "--fake none: no",
    "--fake nan.npy --real good.npy": "nan.npy: item 4 has 0 finite points of 30",
    "--fake first.npy --real good.npy": "first.npy: found float32 (6, 3, 30)",
    "--fake grey.npy --real good.npy": "(6, 8, 8); expected",
    "--fake rgb.npy --real good.npy": "float64 (6, 8, 8, 3); expected point clouds, floats (S,P,3)",
    "--fake whole.pt --real good.npy": "int64 (6, 30, 3); expected",
    "--fake bytes.npy --real whole.npz": "uint8 (24, 24, 3); expected",
    "--fake same.npy --real good.npy": "all the same",
    "--fake other.npz --real whole.npz": "other.npz: found weights; expected",
    "--fake mixed --real whole.npz --features mine:pixels": "item 1 is (24, 24, 3)",
    "--fake broken --real whole.npz --features mine:pixels": "001.png",
    "--fake ragged --real good.npy": "item 1 has 31 finite points",
    "--fake good.npy --real whole.npz": "of one domain",
    "--fake whole.npz --real whole.npz": "weights of inception are missing",
    "--fake whole.npz --real whole.npz --metrics fid": "download failed",
    "--fake whole.npz --real whole.npz --features nowhere:f": "--features nowhere:f: needs nowhere",
    "--fake whole.npz --real whole.npz --features text.pt": "--features text.pt: cannot be read",
    "stats --data good.npy --out r.npz": "expected images",
    "stats --data whole.npz --out r.txt": "ends in .npz",
}

@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    path, a = tmp_path_factory.mktemp("bad") / "files", shapes()
    path.mkdir()
    nan = np.where(np.arange(6)[:, None, None] == 4, np.nan, a)
    arrays = dict(nan=nan, good=a, same=0 * a, first=a.transpose(0, 2, 1), grey=np.ones((6, 8, 8)),
                  rgb=np.ones((6, 8, 8, 3)), whole=np.ones(a.shape, int), bytes=images(1)[0])
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)
    torch.save(torch.from_numpy(arrays["whole"]), path / "whole.pt")
    np.savez(path / "whole.npz", arr_0=images(4))
    np.savez(path / "other.npz", weights=np.zeros(3))
    (path / "text.pt").write_text("hello")
    folder(path / "mixed", [images(1, 20)[0], images(1, 24)[0]])
    folder(path / "broken", images(3, 20))
    (path / "broken" / "001.png").write_bytes(b"not an image")
    (path / "ragged").mkdir()
    np.save(path / "ragged" / "0.npy", a[0])
    np.save(path / "ragged" / "1.npy", shapes(1, 31)[0])
    (path / "mine.py").write_text(FEATURES)
    return path

@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_ends_in_one_line(words, bad, monkeypatch):
    """If wrong input ended in a traceback, a number, or a half-written file."""
    monkeypatch.chdir(bad)
    with pytest.raises((ValueError, OSError)) as error:
        run(*words.split())
    text = str(error.value)
    assert REFUSED[words] in text and "\n" not in text, text
    assert not Path("metrics.json").exists() and not Path("r.npz").exists()
