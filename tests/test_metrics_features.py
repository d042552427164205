"""metrics/frechet.py, precision_recall.py, inception_score, ulip_score: closed forms and loops."""
import math
import pickle

import numpy as np
import pytest
import scipy.linalg
import torch

from metrics.frechet import Moments, frechet_distance, kid, sqrt_trace
from metrics.inception import inception_score
from metrics.precision_recall import density_coverage, precision_recall, squared_distances
from metrics.ulip import ulip_score

def features(n, d, seed=0, shift=0.0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d)) + shift)

def moments(x):
    return Moments(x.shape[1]).update(x)

def distance(a, b):
    a, b = moments(a), moments(b)
    return frechet_distance(a.mean, a.cov, b.mean, b.cov)

# --- Moments

def test_moments_are_those_of_numpy():
    """If mean or covariance were not NumPy's, batches changed them, or sums were in float32."""
    x = features(1003, 17).numpy() * np.arange(1, 18) + 1e3
    m = Moments(17)
    for i in range(0, 1003, 64):
        m.update(x[i:i + 64])
    assert m.n == 1003
    np.testing.assert_allclose(m.mean.numpy(), x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(m.cov.numpy(), np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)
    far = (features(500, 4) + 1e3).float()
    exact = np.cov(far.double().numpy(), rowvar=False)
    np.testing.assert_allclose(moments(far).cov.numpy(), exact, rtol=1e-9, atol=1e-10)

@pytest.mark.parametrize("cut", [0, 1, 400, 999, 1000])
def test_two_parts_merge_to_the_whole(cut):
    """If processes with different shares, or with none, gave other statistics."""
    x = features(1000, 5, shift=3)
    whole = moments(x)
    parts = pickle.loads(pickle.dumps(moments(x[:cut]))).to("cpu").merge(moments(x[cut:]))
    assert parts.n == 1000
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(parts.cov, whole.cov, rtol=1e-11, atol=1e-12)

def test_bad_features_are_named():
    """If NaN or a foreign width went into the statistics."""
    x = features(6, 3)
    x[4, 1] = math.nan
    for action, words in ((lambda: moments(x), "item 4"),
                          (lambda: moments(features(3, 3)).update(x), "item 7"),
                          (lambda: Moments(4).update(x), r"\(6, 3\).*\(b,4\)"),
                          (lambda: Moments(4).merge(Moments(3)), "width 3: expected width 4"),
                          (lambda: moments(features(1, 3)).cov, "at least 2")):
        with pytest.raises(ValueError, match=words):
            action()

# --- Frechet distance

def test_closed_forms():
    """If the formula were wrong, or the product rooted entry by entry or factor by factor."""
    m = np.arange(8) / 8                   # N(m, I) against N(0, s^2 I): |m|^2 + d (1 - s)^2
    assert frechet_distance(m, np.eye(8), 0 * m, 4 * np.eye(8)) == pytest.approx(10.1875, abs=1e-12)
    a, b, m = np.array([1.0, 4, 9, 0.25]), np.array([2.0, 3, 0.5, 8]), np.array([1.0, -2, 0, 3])
    expected = (m ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(m, np.diag(a), 0 * m, np.diag(b)) == pytest.approx(expected, abs=1e-12)
    A, B = np.array([[2.0, 1], [1, 2]]), np.diag([1.0, 3.0])           # they do not commute
    assert frechet_distance([0, 0], A, [0, 0], B) == pytest.approx(8 - 2 * math.sqrt(14), abs=1e-12)
    zero, S = np.zeros((3, 3)), np.diag([1.0, 4, 9])                   # a set of one value
    assert frechet_distance([0, 0, 0], zero, [1, 0, 0], S) == pytest.approx(15)
    assert frechet_distance([0, 0, 0], zero, [0, 0, 0], zero) == 0

@pytest.mark.parametrize("n, d, tolerance", [(400, 50, 1e-10), (60, 100, 1e-5)])
def test_trace_against_sqrtm_and_singular_values(n, d, tolerance):
    """If fewer samples than dimensions gave NaN, an imaginary part or an epsilon's bias (users' row 17)."""
    a, b = (features(n + 7 * s, d, s).numpy() * np.linspace(0.1, 3, d) + s for s in (0, 1))
    S1, S2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    centred = [(x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b)]
    trace = sqrt_trace(S1, S2)
    singular = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    assert trace == pytest.approx(singular, rel=3e-8)
    # sqrtm of a singular matrix is only good to the root of rounding
    assert trace == pytest.approx(np.trace(scipy.linalg.sqrtm(S1 @ S2)).real, rel=tolerance)
    for x in (a, b):
        assert 0 <= distance(*[torch.from_numpy(x)] * 2) < 1e-8        # nor does rounding
    direct = (a.mean(0) - b.mean(0)) @ (a.mean(0) - b.mean(0)) + np.trace(S1) + np.trace(S2) - 2 * singular
    assert distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(direct, rel=1e-7)

@pytest.mark.parametrize("bad, words", [
    (([0, 0], np.eye(3), [0, 0], np.eye(2)), "expected"), (([0, 0], np.eye(2), [0], np.eye(3)), "expected"),
    (([0, math.nan], np.eye(2), [0, 0], np.eye(2)), "finite"), (([], np.eye(0), [], np.eye(0)), "expected"),
    (([0, 0], np.full((2, 2), math.inf), [0, 0], np.eye(2)), "finite")])
def test_bad_statistics_are_refused(bad, words):
    """If shapes were broadcast, or NaN went through."""
    with pytest.raises(ValueError, match=words):
        frechet_distance(*bad)
    with pytest.raises(ValueError, match="expected"):
        sqrt_trace(np.eye(2), np.eye(3))

def test_kid_against_loops_and_by_hand():
    """If KID were biased, of another kernel or scale, or its subsets were not those of its seed."""
    def mean(a, b, same=False):
        return np.mean([(p @ q / 5 + 1) ** 3 for i, p in enumerate(a) for j, q in enumerate(b)
                        if not same or i != j])
    x, y, order, slow = features(12, 5), features(9, 5, 1, shift=0.5), torch.Generator().manual_seed(0), []
    for _ in range(4):
        a, b = (s[torch.randperm(len(s), generator=order)[:6]].numpy() for s in (x, y))
        slow.append(1e3 * (mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b)))
    assert kid(x, y, 4, 6) == pytest.approx((np.mean(slow), np.std(slow)), rel=1e-9)
    assert kid(x, y, 4, 6) == kid(x.numpy(), y, 4, 6) != kid(x, y, 4, 6, seed=1)
    assert kid([[0.0], [0.0]], [[1.0], [1.0]]) == (7000, 0)            # (1 + 8 - 2 x 1) x 1e3
    for bad in (x[0], x[:1], x[:, :4], x * math.nan, x[None]):
        with pytest.raises(ValueError, match=r"^KID of features .*expected finite \(n,d\) twice[^\n]*$"):
            kid(x, bad)

# --- Precision and recall

def test_precision_and_recall_by_hand():
    """If k counted the item itself, a distance equal to the radius were outside, or the two were swapped."""
    ref, smp = (np.array([x]).T for x in ([0.0, 1, 2, 3, 4], [-3, -2.5, 2.5, 7.5, 10]))
    assert precision_recall(ref, smp) == (pytest.approx(0.6), 1.0)     # .4 with a strict comparison
    assert precision_recall(smp, ref) == (1.0, pytest.approx(0.6))
    x = features(40, 16)
    assert precision_recall(x, x) == (1, 1) and precision_recall(x, x + 100) == (0, 0)
    real = features(30, 200, shift=50)     # of a copy: the radius is zero, and rounding pushes none apart
    copies = real[:1].repeat(10, 1)
    assert precision_recall(real, copies) == (1, pytest.approx(1 / 30))
    assert not squared_distances(copies, copies).any()

def test_precision_recall_against_loops():
    """If blocks, float32 or the matrix form gave another definition than the one in words."""
    real, fake = features(25, 3, 0).float(), features(20, 3, 1, shift=0.5).float()

    def covered(x, balls, k):
        radius = [sorted(math.dist(b, o) for o in balls)[k] for b in balls]
        return np.mean([any(math.dist(p, b) <= r for b, r in zip(balls, radius)) for p in x])
    for k in (1, 3, 5):
        expected = covered(fake.tolist(), real.tolist(), k), covered(real.tolist(), fake.tolist(), k)
        for block in (1, 7, 1024):
            assert precision_recall(real, fake, k, block) == pytest.approx(expected)
        assert precision_recall(real.double() + 1e4, fake.double() + 1e4, k) == pytest.approx(expected)

def test_density_and_coverage():
    """If k, the comparison, the divisor or the side of the balls were not those of Naeem et al. 2020."""
    ref, smp = (np.array([x]).T for x in ([0.0, 1, 2, 3, 4], [-3, -2.5, 2.5, 7.5, 10]))
    # k = 2, radii 2 1 1 1 2, edges outside: 2.5 lies in the balls of 2, 3 and 4, all others in none
    assert density_coverage(ref, smp, 2) == (3 / (2 * 5), 3 / 5)
    x = features(40, 16)
    assert density_coverage(x, x) == (1, 1) and density_coverage(x, x + 100) == (0, 0)
    real, fake = features(25, 3), features(20, 3, 1, shift=0.5)
    radius = [sorted(math.dist(b, o) for o in real)[5] for b in real]
    inside = np.array([[math.dist(p, b) < r for b, r in zip(real, radius)] for p in fake])
    assert density_coverage(real, fake, block=7) == pytest.approx((inside.sum() / 100, inside.any(0).mean()))
    found = [density_coverage(features(200, 4, i), features(200, 4, 99 - i)) for i in range(20)]
    coverage = 1 - math.prod((200 - i) / (400 - i) for i in range(1, 6))           # the paper's closed form
    assert np.mean(found, 0) == pytest.approx([1, coverage], abs=0.02)

@pytest.mark.parametrize("real, fake, words", [
    (features(3, 4), features(9, 4), "k = 3 needs at least 4 real items, found 3"),
    (features(9, 4)[None], features(9, 4), r"real features are \(1, 9, 4\): expected \(n,d\)"),
    (features(9, 4)[0], features(9, 4), "real"), (features(9, 4), features(3, 4), "at least 4 fake"),
    (features(9, 4), features(9, 5), r"fake features are \(9, 5\): expected \(n,d\)"),
    (features(9, 4), features(9, 4) * math.nan, "item 0 are not finite")])
def test_bad_sets_are_refused(real, fake, words):
    """If too few items for k, another width or NaN gave a number."""
    with pytest.raises(ValueError, match=words):
        precision_recall(real, fake)

# --- Inception Score and ULIP-I

def test_inception_score_by_hand():
    """If the score of known predictions were wrong, or items were shuffled before they are split."""
    assert inception_score(torch.full((100, 7), 1 / 7)) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    assert inception_score(torch.eye(5).repeat(20, 1)) == (pytest.approx(5), pytest.approx(0, abs=1e-12))
    two = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64).repeat(50, 1)
    assert inception_score(two)[0] == pytest.approx(2 * math.exp(0.9 * math.log(0.9) + 0.1 * math.log(0.1)))
    p = torch.eye(2).repeat_interleave(50, 0)
    assert [inception_score(p, splits)[0] for splits in (2, 1)] == [pytest.approx(1), pytest.approx(2)]
    mixed = torch.cat([p[:50], torch.eye(2).repeat(25, 1)])
    assert inception_score(mixed, splits=2) == (pytest.approx(1.5), pytest.approx(0.5))       # ddof 0
    for bad, splits, words in ((p[:9], 10, "N >= 10"), (p, 0, "0 splits"), (p * math.nan, 2, "finite"),
                               (-p, 2, "negative"), (p[0], 1, r"\(2,\)")):
        with pytest.raises(ValueError, match=words):
            inception_score(bad, splits)

def test_ulip_score_by_hand():
    """If the score were not the mean cosine: it is no product of lengths, and pairs item by item."""
    a = torch.eye(4)
    assert ulip_score(a, 7 * a) == 1 and ulip_score(a, a.roll(1, 0)) == 0 and ulip_score(a, -a) == -1
    assert ulip_score(a[:2], torch.stack([a[0], a[0]])) == 0.5
    assert ulip_score([[3.0, 4.0]], np.array([[4, 3]], np.float16)) == pytest.approx(0.96, abs=1e-15)
    assert ulip_score(1e-30 * a, a) == pytest.approx(1, abs=1e-12)
    zero, ones = torch.tensor([[1.0, 2, 3], [0, 0, 0]]), torch.ones(2, 3)
    for bad, words in (((ones, torch.ones(2, 4)), r"\(2, 3\), of images \(2, 4\)"),
                       ((ones[:0], ones[:0]), "expected"), ((ones[0], ones[0]), "expected"),
                       ((zero, ones), "point features of item 1"),
                       ((ones, ones * math.nan), "image features of item 0")):
        with pytest.raises(ValueError, match=words):
            ulip_score(*bad)
