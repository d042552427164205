"""metrics/frechet.py and metrics/precision_recall.py: closed forms, merging, rank deficiency, collapsed modes."""
import math
import pickle

import numpy as np
import pytest
import scipy.linalg
import torch

from metrics.frechet import Moments, frechet_distance, sqrt_trace
from metrics.precision_recall import precision_recall, squared_distances


def moments(x):
    return Moments(x.shape[1]).update(x)


def distance(a, b):
    a, b = moments(a), moments(b)
    return frechet_distance(a.mean, a.cov, b.mean, b.cov)


def features(n, d, seed=0, shift=0.0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d)) + shift)


# --- moments

def test_moments_are_those_of_numpy():
    """If mean or covariance were not np.mean and np.cov, or batches changed them."""
    x = features(1003, 17).numpy() * np.arange(1, 18) + 1e3
    m = Moments(17)
    for i in range(0, 1003, 64):
        m.update(x[i:i + 64])
    assert m.n == 1003
    np.testing.assert_allclose(m.mean.numpy(), x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(m.cov.numpy(), np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cut", [0, 1, 400, 999, 1000])
def test_two_parts_merge_to_the_whole(cut):
    """If processes with different shares, or with none, gave other statistics."""
    x = features(1000, 5, shift=3)
    whole = moments(x)
    parts = pickle.loads(pickle.dumps(Moments(5).update(x[:cut]))).merge(Moments(5).update(x[cut:]))
    assert parts.n == 1000
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(parts.cov, whole.cov, rtol=1e-11, atol=1e-12)


def test_float32_features_far_from_the_origin():
    """If sums were kept in float32, a covariance at an offset of 1e3 would lose its digits."""
    x = (features(500, 4) + 1e3).float()
    exact = np.cov(x.double().numpy(), rowvar=False)
    np.testing.assert_allclose(moments(x).cov.numpy(), exact, rtol=1e-9, atol=1e-10)


def test_bad_features_are_named():
    """If NaN or a foreign width went into the statistics."""
    x = features(6, 3)
    x[4, 1] = math.nan
    with pytest.raises(ValueError, match="item 4"):
        moments(x)
    with pytest.raises(ValueError, match=r"item 7"):
        Moments(3).update(features(3, 3)).update(x)
    with pytest.raises(ValueError, match=r"\(6, 3\).*\(b,4\)"):
        Moments(4).update(x)
    with pytest.raises(ValueError, match="at least 2"):
        moments(features(1, 3)).cov


# --- the distance

def test_isotropic_gaussians():
    """If the formula were wrong: N(m, I) against N(0, s^2 I) is |m|^2 + d (1 - s)^2."""
    m = np.arange(8) / 8
    assert frechet_distance(m, np.eye(8), np.zeros(8), 4 * np.eye(8)) == pytest.approx(10.1875, abs=1e-12)


def test_diagonal_gaussians():
    """If the trace of the root were not the sum of roots where matrices commute."""
    a, b, m = np.array([1.0, 4, 9, 0.25]), np.array([2.0, 3, 0.5, 8]), np.array([1.0, -2, 0, 3])
    expected = (m ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(m, np.diag(a), 0 * m, np.diag(b)) == pytest.approx(expected, abs=1e-12)


def test_matrices_that_do_not_commute():
    """If the product were rooted entry by entry or factor by factor: 2 x 2 has a closed form."""
    A, B = np.array([[2.0, 1], [1, 2]]), np.diag([1.0, 3.0])
    assert frechet_distance([0, 0], A, [0, 0], B) == pytest.approx(8 - 2 * math.sqrt(14), abs=1e-12)
    assert frechet_distance([0, 0], A, [0, 0], B) == pytest.approx(0.5166852264521173, abs=1e-12)


def test_identical_sets_are_at_zero_and_the_distance_is_symmetric():
    """If rounding gave a negative or visible distance of a set to itself."""
    a, b = features(300, 20), features(300, 20, 1) * 2
    assert 0 <= distance(a, a) < 1e-10
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-12)


def test_rotation_changes_nothing():
    """If the distance depended on the axes of the features."""
    a, b = features(400, 12), features(500, 12, 1) * torch.linspace(0.5, 2, 12)
    Q = torch.linalg.qr(features(12, 12, 2))[0]
    assert distance(a @ Q, b @ Q) == pytest.approx(distance(a, b), rel=1e-11)


def test_two_samples_of_one_distribution():
    """If the finite-sample bias were off: at d = 64 it is about 0.22 at n = 10,000 and 2.2 at n = 1,000."""
    assert distance(features(10_000, 64, 0), features(10_000, 64, 1)) == pytest.approx(0.22, rel=0.1)
    assert distance(features(1000, 64, 2), features(1000, 64, 3)) == pytest.approx(2.2, rel=0.1)


def test_rank_deficient_covariances_against_sqrtm_and_singular_values():
    """If fewer samples than dimensions gave NaN, an imaginary part or an epsilon's bias (users' row 17)."""
    n, d = 60, 100
    a, b = features(n, d).numpy(), features(n + 7, d, 1).numpy() + 0.1
    S1, S2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    centred = [(x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b)]
    by_features = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    trace = sqrt_trace(S1, S2)
    assert trace == pytest.approx(by_features, rel=3e-8)
    # sqrtm of a singular matrix is only good to the root of rounding
    assert trace == pytest.approx(np.trace(scipy.linalg.sqrtm(S1 @ S2)).real, rel=1e-5)
    assert np.isfinite(distance(torch.from_numpy(a), torch.from_numpy(b)))


def test_full_rank_against_sqrtm():
    """If the symmetric form were not the trace of the root."""
    S1, S2 = (np.cov(features(400, 50, s).numpy() * np.linspace(0.1, 3, 50), rowvar=False) for s in (0, 1))
    assert sqrt_trace(S1, S2) == pytest.approx(np.trace(scipy.linalg.sqrtm(S1 @ S2)).real, rel=1e-10)


def test_degenerate_covariances():
    """If a constant set, whose covariance is zero, divided by zero."""
    zero, S = np.zeros((3, 3)), np.diag([1.0, 4, 9])
    assert frechet_distance([0, 0, 0], zero, [1, 0, 0], S) == pytest.approx(15)
    assert frechet_distance([0, 0, 0], zero, [0, 0, 0], zero) == 0


@pytest.mark.parametrize("bad, words", [
    (([0, 0], np.eye(3), [0, 0], np.eye(2)), "expected"), (([0, 0], np.eye(2), [0, 0, 0], np.eye(3)), "expected"),
    (([0, math.nan], np.eye(2), [0, 0], np.eye(2)), "finite"), (([0, 0], np.full((2, 2), math.inf), [0, 0], np.eye(2)), "finite")])
def test_bad_statistics_are_refused(bad, words):
    """If shapes were broadcast, or NaN went through."""
    with pytest.raises(ValueError, match=words):
        frechet_distance(*bad)
    with pytest.raises(ValueError, match="expected"):
        sqrt_trace(np.eye(2), np.eye(3))


# --- precision and recall

def column(values):
    return np.array(values, float)[:, None]


REF, SMP = column([0, 1, 2, 3, 4]), column([-3, -2.5, 2.5, 7.5, 10])


def test_precision_and_recall_by_hand():
    """If k counted the item itself, or a distance equal to the radius were outside (.4 instead of .6)."""
    assert precision_recall(REF, SMP) == (pytest.approx(0.6), 1.0)


def test_swapped_sets_swap_precision_and_recall():
    """If the two were confused (users' row 8)."""
    assert precision_recall(SMP, REF) == (1.0, pytest.approx(0.6))


def test_identical_and_disjoint_sets():
    """If a set did not cover itself, or covered what is far away."""
    x = features(40, 16)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)


def test_collapsed_fakes_are_precise_and_recall_nothing():
    """If precision and recall were exchanged or both saw only one side (users' row 8)."""
    real = torch.cat([features(50, 8, 0), features(50, 8, 1, shift=20)])
    fake = real[:1] + 1e-3 * features(60, 8, 2)
    precision, recall = precision_recall(real, fake)
    assert precision == 1 and recall <= 0.02
    assert precision_recall(fake, real) == (recall, precision)


def test_copies_of_one_item():
    """If rounding pushed copies, whose ball has radius zero, apart from each other."""
    real = features(30, 200, shift=50)
    fake = real[:1].repeat(10, 1)
    assert precision_recall(real, fake) == (1, pytest.approx(1 / 30))
    assert not squared_distances(fake, fake).any()


def test_block_and_precision_do_not_change_the_result():
    """If rows at the border of a block were lost, or float32 features gave other neighbours than their float64 copies."""
    real, fake = features(101, 12, 0).float(), features(77, 12, 1, shift=0.3).float()
    whole = precision_recall(real, fake)
    assert 0 < whole[0] < 1 and 0 < whole[1] < 1
    for block in (1, 10, 1000):
        assert precision_recall(real, fake, block=block) == whole
    assert precision_recall(real.double(), fake.double()) == whole


def test_precision_recall_against_loops():
    """If the blocked matrix form were another definition than the one in words."""
    real, fake = features(25, 3, 0).numpy(), features(20, 3, 1, shift=0.5).numpy()

    def covered(x, balls, k):
        radius = [sorted(np.linalg.norm(b - o) for o in balls)[k] for b in balls]
        return np.mean([any(np.linalg.norm(p - b) <= r for b, r in zip(balls, radius)) for p in x])
    for k in (1, 3, 5):
        assert precision_recall(real, fake, k=k) == (pytest.approx(covered(fake, real, k)), pytest.approx(covered(real, fake, k)))


@pytest.mark.parametrize("real, fake, words", [
    (features(3, 4), features(9, 4), "at least 4 real items, found 3"), (features(9, 4), features(3, 4), "at least 4 fake items"),
    (features(9, 4), features(9, 5), "fake features are"), (features(9, 4), features(9, 4) * math.nan, "item 0 are not finite")])
def test_bad_sets_are_refused(real, fake, words):
    """If too few items for k, another width or NaN gave a number."""
    with pytest.raises(ValueError, match=words):
        precision_recall(real, fake)
