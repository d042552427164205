"""metrics/clouds.py: distances against known answers and loops, matrices of all pairs, scores."""
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from conftest import refused
from metrics import clouds
from metrics.clouds import (DISTANCES, chamfer, emd_approx, emd_exact, jsd, mmd_cov, normalise_box, one_nna,
                            pairwise)

def known(n):
    """The deterministic clouds of the known answers, float64 (1,n,3)."""
    i = np.arange(n)
    p = 0.5 * np.stack([np.cos(i), np.sin(2 * i), np.cos(3 * i)], 1)
    q = 0.5 * np.stack([np.sin(i), np.cos(2 * i), np.sin(3 * i)], 1)
    return torch.from_numpy(p)[None], torch.from_numpy(q)[None]

def some(S, P=24, seed=0):
    """S clouds, each of its own size and place."""
    r = np.random.default_rng(seed)
    x = r.standard_normal((S, P, 3)) * r.uniform(0.1, 0.3, (S, 1, 3)) + r.uniform(-0.1, 0.1, (S, 1, 3))
    return x.astype(np.float32)

def points(*rows):
    return torch.tensor([rows], dtype=torch.float64)

def one(name, x, y):
    """The distance of two clouds (P,3), in float64."""
    return float(DISTANCES[name](torch.from_numpy(x)[None].double(), torch.from_numpy(y)[None].double()))

# --- Distances

# n: CD, exact EMD, PointFlow (p,q) and (q,p), LION (p,q) and (q,p); by another program in NumPy float64
ANSWERS = {8: (.257875204, .345675353, .346223177, .346123012, .129510698, .129376387),
           64: (.167611872, .317735638, .344648357, .362896831, .147500640, .168991102),
           256: (.164410996, .314696174, .341091703, .362620539, .145638011, .169562348)}

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-7)])
@pytest.mark.parametrize("n", ANSWERS)
def test_known_answers(n, dtype, tolerance):
    """If a level, the ground cost, the order of arguments or the scale were not the published kernels'."""
    p, q = (c.to(dtype) for c in known(n))
    found = [chamfer(p, q), emd_exact(p, q), emd_approx(p, q, "pointflow"), emd_approx(q, p, "pointflow"),
             emd_approx(p, q), emd_approx(q, p)]
    assert [float(x) for x in found] == pytest.approx(ANSWERS[n], abs=tolerance)

def approxmatch(x, y, levels, cost):
    """The matching as the kernels loop it, one pair of points at a time in float64."""
    n, m = len(x), len(y)
    left, right = [max(1.0, m // n)] * n, [max(1.0, n // m)] * m
    match = np.zeros((n, m))
    for level in levels:
        K = [[math.exp(-level * math.dist(p, q) ** 2) for q in y] for p in x]
        a = [left[k] / (1e-9 + sum(K[k][j] * right[j] for j in range(m))) for k in range(n)]
        for j in range(m):
            shipped = right[j] * sum(K[k][j] * a[k] for k in range(n))
            b = min(right[j] / (shipped + 1e-9), 1.0) * right[j]
            right[j] = max(0.0, right[j] - shipped)
            for k in range(n):
                match[k, j] += K[k][j] * a[k] * b
        left = [max(0.0, max(1.0, m // n) - match[k].sum()) for k in range(n)]
    return sum(match[k, j] * cost(math.dist(x[k], y[j])) for k in range(n) for j in range(m)) / n

@pytest.mark.parametrize("n, m", [(12, 12), (12, 6), (5, 15), (7, 10)])
def test_matchings_against_loops(n, m):
    """If the matrix form were not the kernel's, masses or a matching were wrong, or pairs were mixed."""
    x, y = some(1, n)[0].astype(float), some(1, m, 1)[0].astype(float)
    powers = [16384, 4096, 1024, 256, 64, 16, 4, 1, 0.25]
    lion = approxmatch(x.tolist(), y.tolist(), [*powers, 0], lambda d: d * d)
    assert one("lion", x, y) == pytest.approx(lion, rel=1e-9)
    pointflow = approxmatch(x.tolist(), y.tolist(), powers, lambda d: d)
    assert one("pointflow", x, y) == pytest.approx(pointflow, rel=1e-9)
    x, y = some(3, n), some(3, m, 1)
    for name, function in DISTANCES.items() if n == m else ():
        together = function(torch.from_numpy(x), torch.from_numpy(y)).tolist()
        assert together == pytest.approx([one(name, p, q) for p, q in zip(x, y)], abs=1e-4)

def test_distances_by_hand():
    """If a root, a half or one direction of Chamfer were wrong, or a level of the matching missing."""
    assert float(chamfer(points((0, 0, 0)), points((1, 2, 2)))) == 18
    assert float(chamfer(points((0, 0, 0)), points((1, 2, 2), (2, 0, 0)))) == 4 + (9 + 4) / 2
    pair = points((0, 0, 0), (1, 0, 0)), points((0, 0, 0), (0, 1, 0))
    assert float(chamfer(*pair)) == 1
    for a, b in (pair, pair[::-1]):
        assert float(emd_approx(a, b)) == pytest.approx(1.0, abs=1e-4)
        assert float(emd_approx(a, b, "pointflow")) == pytest.approx(0.7071068, abs=1e-4)
    for d in (0.1, 1, 5, 10):              # LION's last level ships far mass, PointFlow never does
        assert float(emd_approx(points((0, 0, 0)), points((d, 0, 0)))) == pytest.approx(d * d, rel=1e-6)
    far = [float(emd_approx(points((0, 0, 0)), points((d, 0, 0)), "pointflow")) for d in (5, 10)]
    assert far == [pytest.approx(5, rel=1e-2), pytest.approx(0.136977, abs=1e-6)]

def test_chamfer_keeps_the_digits_of_near_points():
    """If distances came from |x|^2 + |y|^2 - 2xy, clouds that nearly coincide would differ by rounding."""
    x = some(1, 200)[0].astype(np.float64)
    y = x + 1e-4 * np.random.default_rng(1).standard_normal(x.shape)
    exact = np.square(x[:, None] - y[None]).sum(-1)
    exact = exact.min(1).mean() + exact.min(0).mean()
    x32, y32 = (torch.from_numpy(c).float()[None] for c in (x, y))
    assert float(chamfer(x32, y32)) == pytest.approx(exact, rel=2e-3)
    assert float(pairwise(x32, y32, "chamfer")[0, 0]) == pytest.approx(exact, rel=2e-3)

@pytest.mark.parametrize("bad, words", [
    *((torch.rand(shape), f"{shape}; expected floats (S,P,3)")
      for shape in ((2, 3, 24), (24, 3), (2, 24, 2), (2, 0, 3), (3,), (2, 8, 8, 3))),
    (torch.ones(2, 24, 3, dtype=torch.int64), "torch.int64 (2, 24, 3); expected floats"),
    (np.ones((2, 24, 3), np.uint8), "torch.uint8 (2, 24, 3); expected floats"),
    (torch.full((2, 24, 3), math.nan), "cloud 0 of (2, 24, 3) has points that are not finite"),
    (np.where(np.arange(2)[:, None, None], np.inf, np.ones((2, 24, 3))), "cloud 1 of (2, 24, 3) has points")])
def test_what_is_no_set_of_clouds_is_refused(bad, words):
    """If clouds stored as (S,3,P), one cloud alone, images, indices or holes gave a number."""
    good = torch.rand(2, 24, 3)
    calls = [lambda: normalise_box(bad), lambda: jsd(bad, good), lambda: jsd(good, bad),
             lambda: pairwise(bad, good, "chamfer"), lambda: pairwise(good, bad, "lion"),
             lambda: clouds.scores(bad, good, "chamfer"), lambda: clouds.estimate([(good, bad, "lion")])]
    for function in (chamfer, emd_approx, emd_exact):
        calls += [lambda f=function: f(bad, good), lambda f=function: f(good, bad)]
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        assert words in str(error.value) and "\n" not in str(error.value)
    refused("5 points against 4", call=lambda: emd_exact(some(1, 5), some(1, 4)))

@pytest.mark.filterwarnings("ignore:overflow")
def test_normalise_box():
    """If the factor 0.5, the midrange or the single scale of all axes were missing."""
    c = some(4, 50) * 7 + 100
    n = normalise_box(c)
    assert n.dtype == np.float32
    np.testing.assert_allclose((n.max(1) - n.min(1)).max(1), 1, atol=1e-6)
    np.testing.assert_allclose(n.max(1) + n.min(1), 0, atol=1e-6)
    sides = c.max(1) - c.min(1)
    np.testing.assert_allclose(n.max(1) - n.min(1), sides / sides.max(1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(normalise_box(c * 3 - 5), n, atol=1e-5)
    for bad in (np.zeros((2, 5, 3)), np.full((2, 5, 3), 1e308) * [[[1], [-1], [1], [1], [1]]]):
        refused("cloud 0: its points are all the same, or too far apart", call=lambda: normalise_box(bad))

# --- All pairs

@pytest.mark.parametrize("name", DISTANCES)
def test_pairwise_is_the_distance_of_each_pair_in_any_blocks(name):
    """If orientation, halves, blocks, memory or threads mixed up pairs or changed a bit (users' row 34)."""
    a, b = some(19, 12), some(18, 12, 1)
    whole, own = pairwise(a, b, name, workers=1), pairwise(a, a, name)
    np.testing.assert_allclose(whole, [[one(name, x, y) for y in b] for x in a], atol=1e-4)
    np.testing.assert_allclose(own, [[one(name, x, y) for y in a] for x in a], atol=1e-4)
    assert np.array_equal(own, own.T) == (name in ("chamfer", "exact"))
    before = torch.get_num_threads()
    assert np.array_equal(whole, pairwise(a, b, name, workers=3)) and torch.get_num_threads() == before
    assert np.array_equal(whole, pairwise(a, b, name, memory=0.02, workers=2))
    assert np.array_equal(own, pairwise(a, a, name, memory=0.02, workers=1))
    with ThreadPoolExecutor(1) as pool:                                # two rows high, as on GPUs
        np.testing.assert_allclose(clouds.compute(a[:2], b[:3], name, "cpu", pool), whole[:2, :3], atol=1e-6)

def test_memory_bounds_the_work():
    """If a cloud of 16,384 points silently took gigabytes, or space grew with the sets."""
    with pytest.raises(ValueError, match="needs 138 MiB, more than the 100 of --memory"):
        pairwise(some(2, 3000), some(2, 3000), "lion", memory=100)
    for name, S in itertools.product(DISTANCES, (70, 300)):
        done, rows = np.zeros((S, S), int), np.empty((S, 2048, 3), bool)
        blocks, threads = clouds.cut(rows, rows, name, False, 256, "cpu", 2)
        for block in blocks:
            done[block] += 1
            assert done[block].size <= 256
        assert (done == 1).all() and threads in (1, 2)

@pytest.fixture
def computed(monkeypatch):
    """A function: how many pairs have been computed since it was last asked."""
    sizes, inner = [], clouds.compute

    def compute(rows, cols, *rest):
        sizes.append(len(rows) * len(cols))
        return inner(rows, cols, *rest)

    def ask():
        found, sizes[:] = sum(sizes), []
        return found
    monkeypatch.setattr(clouds, "compute", compute)
    return ask

@pytest.mark.parametrize("name", ["chamfer", "lion"])
def test_cache_continues_and_is_read(name, tmp_path, computed, capsys):
    """If an interrupted run began again, a finished matrix were computed twice, or a damaged one used."""
    a, b = some(6), some(5, seed=1)
    whole = pairwise(a, b, name)
    for pairs in (30, 30, 0):              # without a cache, into it, from it
        assert computed() == pairs
        assert np.array_equal(pairwise(a, b, name, cache=tmp_path), whole)
    file, = tmp_path.glob("*.npy")
    stored = np.load(file, mmap_mode="r+", allow_pickle=False)
    stored[3:, 2:] = np.nan                # as after an interruption
    stored.flush()
    assert np.array_equal(pairwise(a, b, name, cache=tmp_path, workers=1), whole)
    assert 0 < computed() <= 30 and not capsys.readouterr().err
    for content in (b"", b"not an array", file.read_bytes()[:-8]):
        file.write_bytes(content)
        assert np.array_equal(pairwise(a, b, name, cache=tmp_path), whole)
        assert computed() == 30 and "made anew" in capsys.readouterr().err
    pairwise(a, b + np.float32(1e-6), name, cache=tmp_path)            # other content, another file
    assert computed() == 30 and len(list(tmp_path.iterdir())) == 2

@pytest.mark.parametrize("name", ["chamfer", "exact"])
def test_shares_of_two_processes_make_the_whole(name, tmp_path, computed):
    """If processes did the same pairs, left some out, or the time said before ignored what is done."""
    a, b = some(40, 8), some(35, 8, 1)
    whole = pairwise(a, b, name)
    assert computed() == whole.size
    first = pairwise(a, b, name, cache=tmp_path, share=(0, 2))
    assert 0 < np.isnan(first).sum() < whole.size
    pairwise(a, b, name, cache=tmp_path, share=(1, 2))
    assert np.array_equal(pairwise(a, b, name, cache=tmp_path), whole) and computed() == whole.size
    assert clouds.estimate([(a, b, name)]) > 0 == clouds.estimate([(a, b, name)], cache=tmp_path)
    pairwise(a, a, name, cache=tmp_path)
    assert clouds.estimate([(a, a, name)], cache=tmp_path) == 0

def test_a_constant_matrix_is_an_error_unless_clouds_are_equal(monkeypatch):
    """If a distance that returns zeros went into a table (users' row 3), or collapsed samples did not."""
    same = np.repeat(some(1), 4, 0)
    assert not pairwise(same, same, "chamfer").any()
    assert np.ptp(pairwise(same, some(1, seed=1), "lion")) == 0
    assert pairwise(some(2), some(2), "chamfer")[0, 1] > 0
    for value in (0.0, 0.5):
        monkeypatch.setitem(DISTANCES, "lion", lambda x, y: torch.full((len(x),), value))
        for other in (some(3, seed=1), some(3)):
            with pytest.raises(ValueError, match="all distances are .* although the clouds differ"):
                pairwise(some(3), other, "lion")

# --- Scores

def scalars(a, b):
    return np.abs(np.subtract.outer(np.array(a, float), np.array(b, float)))

def test_scores_on_scalars():
    """If rows and columns, references and samples, the leave-one-out or ties were mixed up."""
    ref, smp, far = [0, 1, 10, 11], [.4, 5, 5.4, 20], [100, 101, 103]
    assert mmd_cov(scalars(ref, smp)) == (pytest.approx(2.8), 0.75, pytest.approx(4.45))
    assert one_nna(scalars(ref, ref), scalars(ref, smp), scalars(smp, smp)) == (0.5, 0.5, 0.5)
    assert one_nna(*[scalars(ref, ref)] * 3)[0] == 0 and mmd_cov(scalars(ref, ref)) == (0, 1, 0)      # twins
    assert one_nna(scalars(ref, ref), scalars(ref, far), scalars(far, far)) == (1, 1, 1)
    assert mmd_cov(scalars(ref, [1, 1, 1, 1]))[1] == 1 / 4
    zeros = np.zeros((2, 2))               # ties go to the first, references first
    assert mmd_cov(np.zeros((3, 5)))[1] == 1 / 3 and one_nna(zeros, zeros, zeros) == (0.5, 1.0, 0.0)
    rr, ss = np.array([[0, 1, 1], [9, 0, 9], [9, 9, 0]]), np.array([[0, 9], [9, 0]])
    # along columns, not rows. 0: the samples at 5; 1 and 2: row 0 at 1, a reference; 3 and 4: references at 5
    assert one_nna(rr, np.full((3, 2), 5), ss) == (2 / 5, 2 / 3, 0)

def test_jsd():
    """If the grid, its ball of 10,144 cells or the logarithm were another."""
    line = np.arange(28, dtype=np.float32) / np.float32(27) - np.float32(0.5)
    grid = np.stack(np.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
    cells = grid[np.linalg.norm(grid, axis=1) <= 0.5]
    assert len(cells) == 10144 and jsd(cells[None], cells[None, ::2]) == pytest.approx(0.311278, abs=1e-6)
    a, b = [[0.1, 0.1, 0.1]], [[-0.3, 0.1, 0]]
    assert jsd([a, b], [b, a]) == 0 and jsd([a, a], [b, b]) == pytest.approx(1)
    assert jsd([a, b], [a, a]) == pytest.approx(0.311278, abs=1e-6)
    assert jsd([[[5.0, 5, 5]]], [[[0.28, 0.28, 0.28]]]) == pytest.approx(0)       # outside: the nearest cell
    assert jsd([[[0.499, 0.3, 0]]], [[[0.43, 0.26, 0]]]) == pytest.approx(0)      # of the ball, not the cube

def test_scores_in_published_scales(tmp_path):
    """If MMD-CD were not x 1e3, MMD-EMD not x 1e2, or shares not in percent."""
    ref, smp = some(6), some(6, seed=1)
    for name, scale in (("chamfer", 1e3), ("lion", 1e2), ("exact", 1e2)):
        rr, rs, ss = (pairwise(a, b, name) for a, b in ((ref, ref), (ref, smp), (smp, smp)))
        expected = scale * mmd_cov(rs)[0], 100 * mmd_cov(rs)[1], 100 * one_nna(rr, rs, ss)[0]
        found = clouds.scores(ref, smp, name, cache=tmp_path)
        assert [found[key] for key in ("mmd", "cov", "1nna")] == pytest.approx(expected)
    assert clouds.scores(ref, ref, "chamfer") == {"mmd": 0, "cov": 100, "1nna": 0}
    assert clouds.scores(ref, smp + 50, "chamfer")["1nna"] == 100
    refused("at least 2 of each", call=lambda: clouds.scores(ref[:1], smp, "chamfer"))
