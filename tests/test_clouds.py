"""metrics/clouds.py: distances against known answers and brute force, pairwise matrices, scores."""
import itertools
import math
import threading

import numpy as np
import pytest
import torch

from metrics import clouds
from metrics.clouds import DISTANCES, chamfer, emd_approx, emd_exact, jsd, mmd_cov, normalise_box, one_nna, pairwise


def known(n):
    """The deterministic clouds of the known answers, float64 (1,n,3)."""
    i = np.arange(n)
    p = 0.5 * np.stack([np.cos(i), np.sin(2 * i), np.cos(3 * i)], 1)
    q = 0.5 * np.stack([np.sin(i), np.cos(2 * i), np.sin(3 * i)], 1)
    return torch.from_numpy(p)[None], torch.from_numpy(q)[None]


def some(S, P=40, seed=0):
    """S clouds, each of its own size and place."""
    r = np.random.default_rng(seed)
    return (r.standard_normal((S, P, 3)) * r.uniform(0.1, 0.3, (S, 1, 3)) + r.uniform(-0.1, 0.1, (S, 1, 3))).astype(np.float32)


def points(*rows):
    return torch.tensor([rows], dtype=torch.float64)


# --- distances

# n: CD, exact EMD, PointFlow (p,q) and (q,p), LION (p,q) and (q,p); computed in NumPy float64 by another program
ANSWERS = {8: (.257875204, .345675353, .346223177, .346123012, .129510698, .129376387),
           64: (.167611872, .317735638, .344648357, .362896831, .147500640, .168991102),
           256: (.164410996, .314696174, .341091703, .362620539, .145638011, .169562348)}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-7)])
@pytest.mark.parametrize("n", ANSWERS)
def test_known_answers(n, dtype, tolerance):
    """If a level, the ground cost, the order of arguments or the scaling differed from the published kernels."""
    p, q = (c.to(dtype) for c in known(n))
    found = [chamfer(p, q), emd_exact(p, q), emd_approx(p, q, "pointflow"), emd_approx(q, p, "pointflow"), emd_approx(p, q), emd_approx(q, p)]
    assert [float(x) for x in found] == pytest.approx(ANSWERS[n], abs=tolerance)


@pytest.mark.parametrize("n, pointflow, lion", [(64, 6.916e-5, 9.19e-7), (256, 2.727e-4, 3.647e-6)])
def test_approximate_distance_to_itself_is_small_but_not_zero(n, pointflow, lion):
    """If the matching were another one: mass that spills over at blunt levels is part of the published number."""
    p, _ = known(n)
    assert float(emd_approx(p, p, "pointflow")) == pytest.approx(pointflow, rel=2e-3)
    assert float(emd_approx(p, p)) == pytest.approx(lion, rel=2e-3)


def approxmatch(x, y, levels, cost):
    """The matching as the kernels loop it, one pair of points at a time in float64."""
    n, m = len(x), len(y)
    left = [max(1.0, m // n)] * n
    right = [max(1.0, n // m)] * m
    match = np.zeros((n, m))
    for level in levels:
        K = [[math.exp(-level * sum((a - b) ** 2 for a, b in zip(p, q))) for q in y] for p in x]
        a = [left[k] / (1e-9 + sum(K[k][l] * right[l] for l in range(m))) for k in range(n)]
        for l in range(m):
            shipped = right[l] * sum(K[k][l] * a[k] for k in range(n))
            b = min(right[l] / (shipped + 1e-9), 1.0) * right[l]
            right[l] = max(0.0, right[l] - shipped)
            for k in range(n):
                match[k, l] += K[k][l] * a[k] * b
        # what each point has shipped at this level
        for k in range(n):
            done = match[k].sum()
            left[k] = max(0.0, max(1.0, m // n) - done)
    return sum(match[k, l] * cost(math.dist(x[k], y[l])) for k in range(n) for l in range(m)) / n


@pytest.mark.parametrize("n, m", [(12, 12), (12, 6), (5, 15), (7, 10)])
@pytest.mark.parametrize("variant", ["lion", "pointflow"])
def test_approximate_matching_against_loops(n, m, variant):
    """If the matrix form were not the kernel's, or other numbers of points got other masses."""
    x, y = some(1, n)[0].astype(float), some(1, m, 1)[0].astype(float)
    expected = approxmatch(x.tolist(), y.tolist(), clouds.LEVELS[variant], (lambda d: d * d) if variant == "lion" else (lambda d: d))
    assert float(emd_approx(torch.from_numpy(x)[None], torch.from_numpy(y)[None], variant)) == pytest.approx(expected, rel=1e-9)


def test_levels():
    """If a level were missing: nine powers of four, and zero for LION alone."""
    assert clouds.LEVELS["pointflow"] == [16384, 4096, 1024, 256, 64, 16, 4, 1, 0.25]
    assert clouds.LEVELS["lion"] == clouds.LEVELS["pointflow"] + [0]


def test_chamfer_by_hand():
    """If a root, a half or one direction were wrong."""
    assert float(chamfer(points((0, 0, 0)), points((1, 2, 2)))) == 18
    pair = points((0, 0, 0), (1, 0, 0)), points((0, 0, 0), (0, 1, 0))
    assert float(chamfer(*pair)) == 1
    x, y = (torch.from_numpy(some(1, 30, s).astype(float)) for s in (0, 1))
    assert float(chamfer(x, x)) == 0 == float(chamfer(x, x[:, torch.randperm(30)]))
    assert float(chamfer(3 * x, 3 * y)) == pytest.approx(9 * float(chamfer(x, y)))
    assert float(chamfer(x, y[:, :7])) > 0                                 # another number of points


def test_chamfer_keeps_the_digits_of_near_points():
    """If distances came from |x|^2 + |y|^2 - 2xy, clouds that nearly coincide would differ by rounding alone, or be negative."""
    x = some(1, 200)[0].astype(np.float64)
    y = x + 1e-4 * np.random.default_rng(1).standard_normal(x.shape)
    exact = np.square(x[:, None] - y[None]).sum(-1)
    exact = exact.min(1).mean() + exact.min(0).mean()
    x32, y32 = (torch.from_numpy(c).float()[None] for c in (x, y))
    assert float(chamfer(x32, y32)) == pytest.approx(exact, rel=2e-3)
    assert float(pairwise(x32, y32, "chamfer")[0, 0]) == pytest.approx(exact, rel=2e-3)


def test_single_points():
    """If LION's last level were missing, far mass would never be shipped; PointFlow's never is."""
    at = lambda d: points((d, 0, 0))
    for d in (0.1, 1, 5, 10):
        assert float(emd_approx(at(0), at(d))) == pytest.approx(d * d, rel=1e-6)
    assert float(emd_approx(at(0), at(5), "pointflow")) == pytest.approx(5, rel=1e-2)
    assert float(emd_approx(at(0), at(10), "pointflow")) == pytest.approx(0.136977, abs=1e-6)
    pair = points((0, 0, 0), (1, 0, 0)), points((0, 0, 0), (0, 1, 0))
    for a, b in (pair, pair[::-1]):
        assert float(emd_approx(a, b)) == pytest.approx(1.0, abs=1e-4)
        assert float(emd_approx(a, b, "pointflow")) == pytest.approx(0.7071068, abs=1e-4)


def test_variants_are_not_mixed_and_not_symmetric():
    """If one kernel stood in for the other, or the order of arguments did not matter."""
    p, q = known(64)
    assert float(emd_approx(p, q)) < float(emd_approx(p, q, "pointflow"))
    assert abs(float(emd_approx(p, q)) - float(emd_approx(q, p))) > 1e-2
    assert float(emd_approx(p, q)) > float(torch.cdist(p, q).square().amin(2).mean())


@pytest.mark.parametrize("name", ["lion", "pointflow", "exact"])
def test_order_of_points_does_not_matter(name):
    """If the matching depended on the order in which points are stored."""
    p, q = known(64)
    i, j = torch.randperm(64), torch.randperm(64)
    assert float(DISTANCES[name](p[:, i], q[:, j])) == pytest.approx(float(DISTANCES[name](p, q)), abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_exact_against_all_permutations(n):
    """If the assignment were not optimal (users' row 3)."""
    x, y = some(1, n)[0].astype(float), some(1, n, 1)[0].astype(float)
    best = min(np.mean([math.dist(x[i], y[j]) for i, j in enumerate(order)]) for order in itertools.permutations(range(n)))
    assert float(emd_exact(x[None], y[None])) == pytest.approx(best, abs=1e-12)
    assert float(emd_exact(x[None], x[None, ::-1])) == 0
    assert float(emd_exact(x[None], x[None] + [0.01, 0, 0])) == pytest.approx(0.01)


def test_exact_refuses_other_numbers_of_points():
    """If points without a partner were silently left out."""
    with pytest.raises(ValueError, match="5 points against 4"):
        emd_exact(some(1, 5), some(1, 4))


@pytest.mark.parametrize("name", DISTANCES)
def test_batches_and_float32(name):
    """If pairs of a batch were mixed, or float32 were farther from float64 than 1e-6."""
    x, y = (torch.from_numpy(some(3, 30, s)) for s in (0, 1))
    together = DISTANCES[name](x, y)
    assert together.shape == (3,)
    for i in range(3):
        assert float(together[i]) == pytest.approx(float(DISTANCES[name](x[i:i + 1].double(), y[i:i + 1].double())), abs=1e-6)


# --- normalisation

def test_normalise_box():
    """If the factor 0.5, the midrange or the single scale of all axes were missing."""
    c = some(4, 50) * 7 + 100
    n = normalise_box(c)
    assert n.dtype == np.float32
    np.testing.assert_allclose((n.max(1) - n.min(1)).max(1), 1, atol=1e-6)
    np.testing.assert_allclose(n.max(1) + n.min(1), 0, atol=1e-6)
    sides = (c.max(1) - c.min(1))
    np.testing.assert_allclose((n.max(1) - n.min(1)), sides / sides.max(1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(normalise_box(c * 3 - 5), n, atol=1e-5)
    for bad in (np.zeros((2, 5, 3)), np.where(np.arange(2)[:, None, None], np.nan, some(2, 5))):
        with pytest.raises(ValueError, match="cloud [01]: its points"):
            normalise_box(bad)


# --- all pairs

@pytest.mark.parametrize("name", DISTANCES)
def test_pairwise_is_the_distance_of_each_pair(name):
    """If orientation, halves, blocks or threads mixed up pairs: M[i,j] is of (rows[i], cols[j]) in this order."""
    a, b = some(5, 24), some(4, 24, 1)
    one = lambda x, y: float(DISTANCES[name](torch.from_numpy(x)[None].double(), torch.from_numpy(y)[None].double()))
    expected = np.array([[one(x, y) for y in b] for x in a])
    np.testing.assert_allclose(pairwise(a, b, name), expected, atol=1e-6)
    own = pairwise(a, a, name)
    np.testing.assert_allclose(own, [[one(x, y) for y in a] for x in a], atol=1e-6)
    assert np.array_equal(own, own.T) == (name in clouds.SYMMETRIC)


@pytest.mark.parametrize("name", DISTANCES)
def test_memory_and_threads_do_not_change_a_bit(name, monkeypatch):
    """If the value depended on the size of the blocks (users' row 34)."""
    a, b = some(19, 16), some(18, 16, 1)
    whole = pairwise(a, b, name, workers=1)
    assert np.array_equal(whole, pairwise(a, b, name, workers=3))
    assert np.array_equal(whole, pairwise(a, b, name, memory=0.02, workers=2))
    assert np.array_equal(pairwise(a, a, name), pairwise(a, a, name, memory=0.02, workers=1))


def test_a_pair_larger_than_the_memory_is_refused():
    """If a cloud of 16,384 points silently took gigabytes."""
    big = some(2, 3000)
    with pytest.raises(ValueError, match="needs 138 MiB, more than the 100 of --memory"):
        pairwise(big, big, "lion", memory=100)


def test_threads_of_torch_are_restored():
    """If a run of pairwise left torch on one thread."""
    before = torch.get_num_threads()
    pairwise(some(2), some(2, seed=1), "lion", workers=2)
    assert torch.get_num_threads() == before


def counted(monkeypatch):
    """Counts the pairs that are computed."""
    calls, lock, inner = [0], threading.Lock(), clouds.compute

    def compute(rows, cols, *rest):
        with lock:
            calls[0] += len(rows) * len(cols)
        return inner(rows, cols, *rest)
    monkeypatch.setattr(clouds, "compute", compute)
    return calls


@pytest.mark.parametrize("name", ["chamfer", "lion"])
def test_cache_continues_and_is_read(name, tmp_path, monkeypatch, capsys):
    """If an interrupted run began again, or a finished matrix were computed twice."""
    a, b = some(6), some(5, seed=1)
    whole = pairwise(a, b, name)
    calls = counted(monkeypatch)
    assert np.array_equal(pairwise(a, b, name, cache=tmp_path), whole) and calls[0] == 30
    assert np.array_equal(pairwise(a, b, name, cache=tmp_path), whole) and calls[0] == 30
    file, = tmp_path.glob("*.npy")
    stored = np.load(file, mmap_mode="r+", allow_pickle=False)
    stored[3:, 2:] = np.nan                                              # as after an interruption
    stored.flush()
    assert np.array_equal(pairwise(a, b, name, cache=tmp_path, workers=1), whole) and 30 < calls[0] < 60 + 1
    calls[0] = 0
    pairwise(a, b + np.float32(1e-6), name, cache=tmp_path)              # other content, another file
    assert calls[0] == 30 and len(list(tmp_path.glob("*.npy"))) == 2 and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("content", [b"", b"not an array", None])
def test_a_damaged_cache_is_made_anew(content, tmp_path, capsys):
    """If a truncated or foreign cache file gave wrong distances or ended the run."""
    a, b = some(4), some(4, seed=1)
    whole = pairwise(a, b, "chamfer", cache=tmp_path)
    file, = tmp_path.glob("*.npy")
    file.write_bytes(file.read_bytes()[:-8] if content is None else content)
    assert np.array_equal(pairwise(a, b, "chamfer", cache=tmp_path), whole)
    assert "made anew" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["chamfer", "exact"])
def test_shares_of_two_processes_make_the_whole(name, tmp_path, monkeypatch):
    """If processes did the same pairs, or left some out."""
    a, b = some(40, 8), some(35, 8, 1)
    whole = pairwise(a, b, name)
    calls = counted(monkeypatch)
    first = pairwise(a, b, name, cache=tmp_path, share=(0, 2))
    assert 0 < np.isnan(first).sum() < whole.size
    pairwise(a, b, name, cache=tmp_path, share=(1, 2))
    assert calls[0] == whole.size
    assert np.array_equal(pairwise(a, b, name, cache=tmp_path), whole) and calls[0] == whole.size


def test_equal_clouds_are_not_mistaken_for_an_error():
    """If collapsed samples, or two clouds alone, whose one distance is constant, were refused."""
    same = np.repeat(some(1), 4, 0)
    assert not pairwise(same, same, "chamfer").any()
    assert np.ptp(pairwise(same, some(1, seed=1), "lion")) == 0
    assert pairwise(some(2), some(2), "chamfer")[0, 1] > 0


def test_estimate_counts_what_is_left(tmp_path):
    """If the time said before the start ignored the work, or the cache."""
    a = some(30, 64)
    assert clouds.estimate([(a, a, "chamfer"), (a, a[:20], "lion"), (a, a, "exact")], cache=tmp_path) > 0
    pairwise(a, a, "chamfer", cache=tmp_path)
    assert clouds.estimate([(a, a, "chamfer")], cache=tmp_path) == 0


# --- scores

def scalars(a, b):
    return np.abs(np.subtract.outer(np.array(a, float), np.array(b, float)))


def test_scores_on_scalars():
    """If rows and columns, references and samples or the leave-one-out were mixed up."""
    ref, smp = [0, 1, 10, 11], [.4, 5, 5.4, 20]
    assert mmd_cov(scalars(ref, smp)) == (pytest.approx(2.8), 0.75, pytest.approx(4.45))
    assert one_nna(scalars(ref, ref), scalars(ref, smp), scalars(smp, smp)) == (0.5, 0.5, 0.5)


def test_scores_of_copies_and_of_far_sets():
    """If the twin of a cloud did not count as its neighbour, or separate clusters were not told apart."""
    ref, far = [0, 1, 3, 7], [100, 101, 103]
    assert one_nna(*[scalars(ref, ref)] * 3)[0] == 0
    assert mmd_cov(scalars(ref, ref)) == (0, 1, 0)
    assert one_nna(scalars(ref, ref), scalars(ref, far), scalars(far, far)) == (1, 1, 1)
    assert mmd_cov(scalars(ref, [3, 3, 3, 3]))[1] == 1 / 4


def test_ties_go_to_the_first_and_to_references():
    """If equally near clouds were resolved by chance."""
    assert mmd_cov(np.zeros((3, 5)))[1] == 1 / 3
    assert one_nna(np.zeros((2, 2)), np.zeros((2, 2)), np.zeros((2, 2))) == (0.5, 1.0, 0.0)


def test_one_nna_reads_columns():
    """If the neighbour were sought along rows: for an approximate matching they differ."""
    rr, ss = np.array([[0, 9], [1, 0.0]]), np.array([[0, 9], [9, 0.0]])
    rs = np.array([[5, 5], [5, 5.0]])
    # column 0: row 1 at 1, a reference; column 1: the samples at 5; columns 2, 3: references at 5
    assert one_nna(rr, rs, ss) == (0.25, 0.5, 0.0)


def test_one_nna_of_two_samples_of_one_distribution():
    """If the statistic were biased: expected (N-1)/(2N-1) for independent samples of one distribution."""
    found, N = [], 60
    for seed in range(40):
        r = np.random.default_rng(seed)
        ref, smp = r.standard_normal((2, N, 4))
        d = lambda a, b: np.linalg.norm(a[:, None] - b[None], axis=-1)
        found.append(one_nna(d(ref, ref), d(ref, smp), d(smp, smp))[0])
    assert np.mean(found) == pytest.approx((N - 1) / (2 * N - 1), abs=0.03)


def test_jsd():
    """If the grid, its ball or the logarithm were another: 10,144 cells, base 2."""
    line = np.arange(28, dtype=np.float32) / np.float32(27) - np.float32(0.5)
    grid = np.stack(np.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
    assert (np.linalg.norm(grid, axis=1) <= 0.5).sum() == 10144
    a, b = [[0.1, 0.1, 0.1]], [[-0.3, 0.1, 0]]
    assert jsd([a, b], [b, a]) == 0
    assert jsd([a, a], [b, b]) == pytest.approx(1)
    assert jsd([a, b], [a, a]) == pytest.approx(0.311278, abs=1e-6)
    assert jsd([[[5, 5, 5]]], [[[0.28, 0.28, 0.28]]]) == pytest.approx(0)             # outside: the nearest cell


def test_scores_in_published_scales(tmp_path):
    """If MMD-CD were not x 1e3, MMD-EMD not x 1e2, or shares not in percent."""
    ref, smp = some(6), some(6, seed=1)
    for name, scale in (("chamfer", 1e3), ("lion", 1e2), ("exact", 1e2)):
        found = clouds.scores(ref, smp, name, cache=tmp_path)
        mmd, cov, _ = mmd_cov(pairwise(ref, smp, name))
        assert found["mmd"] == pytest.approx(scale * mmd) and found["cov"] == pytest.approx(100 * cov)
        assert found["1nna"] == pytest.approx(100 * one_nna(pairwise(ref, ref, name), pairwise(ref, smp, name), pairwise(smp, smp, name))[0])
    assert clouds.scores(ref, ref, "chamfer") == {"mmd": 0, "cov": 100, "1nna": 0}
    assert clouds.scores(ref, smp + 50, "chamfer")["1nna"] == 100
    with pytest.raises(ValueError, match="at least 2 of each"):
        clouds.scores(ref[:1], smp, "chamfer")
