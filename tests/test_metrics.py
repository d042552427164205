"""metrics/: what each file refuses, and that each works when copied alone."""
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT
from metrics import clouds, dinov2, pointnet, ulip, weights

rng = np.random.default_rng(0)
SETS = rng.normal(size=(6, 20, 3)).astype(np.float32), rng.normal(size=(5, 20, 3)).astype(np.float32)


@pytest.mark.parametrize("call", [
    lambda x: clouds.chamfer(torch.from_numpy(x), torch.from_numpy(x)),
    lambda x: clouds.emd_approx(torch.from_numpy(x), torch.from_numpy(x)),
    lambda x: clouds.emd_exact(torch.from_numpy(x), torch.from_numpy(x)),
    lambda x: clouds.pairwise(x, x, "chamfer", progress=False), lambda x: clouds.jsd(x, x), clouds.normalise_box])
def test_what_is_no_set_of_point_clouds_is_refused_with_its_shape(call):
    """Clouds stored channels first, and images, were cut to three columns and scored."""
    for shape in ((4, 3, 20), (4, 28, 28), (4, 20)):
        with pytest.raises(ValueError, match=str(shape[-1])):
            call(rng.normal(size=shape).astype(np.float32))


def test_a_broken_distance_is_refused(monkeypatch):
    """A kernel that returns zeros, or one constant, for clouds that differ."""
    for value in (0.0, 1.0):
        monkeypatch.setitem(clouds.DISTANCES, "exact", lambda x, y: torch.full((len(x),), value, dtype=torch.float64))
        with pytest.raises(ValueError, match="although the clouds differ"):
            clouds.pairwise(*SETS, "exact", progress=False)


@pytest.mark.parametrize("distance", clouds.DISTANCES)
def test_blocks_and_threads_do_not_change_the_distances(distance):
    whole = clouds.pairwise(*SETS, distance, progress=False)
    assert np.array_equal(whole, clouds.pairwise(*SETS, distance, memory=1, workers=1, progress=False))
    parts = [clouds.pairwise(SETS[0][i:i + 1], SETS[1], distance, progress=False) for i in range(6)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_missing_weights_say_what_to_put_where(tmp_path):
    for name in weights.RELEASED:
        with pytest.raises(ValueError) as caught:
            weights.find(name, cache=tmp_path)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value) and "http" in str(caught.value)
    with pytest.raises(ValueError, match="gone"):
        weights.find("inception", tmp_path / "gone")
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize("module", [pointnet, ulip, dinov2])
def test_weights_of_something_else_are_refused(module, tmp_path):
    """One line that names the file, for foreign tensors and for files of no tensors."""
    path = tmp_path / "w.pth"
    for content in ({"weight": torch.ones(2)}, None):
        path.write_bytes(b"no tensors")
        if content:
            torch.save(content, path)
        with pytest.raises(ValueError, match="w.pth"):
            module.load(path)


@pytest.mark.parametrize("path", sorted((ROOT / "metrics").glob("*.py")), ids=lambda path: path.stem)
def test_every_file_works_alone(path, tmp_path):
    """It needs no other file of this repository, and does nothing when it is imported."""
    shutil.copy(path, tmp_path)
    code = f"import torch, {path.stem}; print(torch.cuda.is_initialized())"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.stdout == "False\n" and run.stderr == ""
