"""Point-cloud metrics as published: Chamfer and Earth Mover's distances; MMD, COV, 1-NNA and JSD of two sets of clouds.

Definitions are those of PointFlow (Yang et al. 2019) and LION (Vahdat et al. 2022), read in their evaluation code. Alphabet:
S clouds in a set, P points of a cloud; a set is (S,P,3). B pairs at a time, X (B,P,3) and Y (B,Q,3).

What tables call EMD is not optimal transport but an approximate matching (H. Fan's kernel), of which LION and PointFlow use
two variants with other ground costs; neither is symmetric, and exact transport gives other numbers. All three are here.

    scores(ref, smp, "chamfer")             {"mmd": ..., "cov": ..., "1nna": ...} in the published scales
    pairwise(ref, smp, "lion")              M[i,j] = EMD(ref_i, smp_j)
"""
import hashlib
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from tqdm import tqdm

VERSION = 1        # of the arithmetic below: part of the key under which distances are cached


def normalise_box(clouds):
    """Each cloud by its own box: midrange to 0, longest side to 1 (LION's norm_box: [-1,1], then times 0.5).

    (S,P,3) -> float32 (S,P,3) in [-0.5,0.5]. Raises ValueError for points that are not finite or all the same."""
    clouds = np.asarray(clouds, np.float64)
    low, high = clouds.min(1, keepdims=True), clouds.max(1, keepdims=True)
    side = (high - low).max(2, keepdims=True)
    for i in np.flatnonzero(~((side > 0) & (side < np.inf))):          # NaN fails too
        raise ValueError(f"cloud {i}: its points are not finite, or all the same")
    return ((clouds - (low + high) / 2) / side).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------
# Distances of pairs of clouds

def distances(x, y):
    """Euclidean (B,P,Q), from differences: the Gram form |x|^2 + |y|^2 - 2xy loses digits between near points."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def chamfer(x, y):
    """Mean squared distance to the nearest point of the other cloud, both directions added; no half, no root.

    X (B,P,3), Y (B,Q,3) -> (B,), symmetric."""
    squared = distances(x, y).square_()                                                   # (B, P, Q)
    return squared.amin(2).mean(1) + squared.amin(1).mean(1)


# variant -> the sharpness lambda of each level, and the ground cost of a distance. LION = PVD; PointFlow's has no level 0
LEVELS = {"lion": [4.0 ** k for k in range(7, -2, -1)] + [0.0], "pointflow": [4.0 ** k for k in range(7, -2, -1)]}
COSTS = {"lion": torch.square, "pointflow": lambda distance: distance}


def emd_approx(x, y, variant="lion"):
    """Approximate matching: what LION, PVD ("lion", squared ground cost) and PointFlow ("pointflow", Euclidean) report as EMD.

    X (B,P,3), Y (B,Q,3) of one floating type -> (B,), the cost of the match over P. Not symmetric: X comes first. From sharp to
    blunt, each level lambda ships mass between all pairs in proportion to exp(-lambda d^2), as far as what remains on either side
    allows. Source: LION third_party/PyTorchEMD/cuda/emd_kernel.cu; PointFlow pytorch_structural_losses/src/approxmatch.cu."""
    B, P, Q = len(x), x.shape[1], y.shape[1]
    distance = distances(x, y)                                                            # (B, P, Q)
    squared, cost = distance.square(), COSTS[variant](distance)
    left = x.new_full((B, P), float(max(1, Q // P)))                   # mass that remains on each point
    right = x.new_full((B, Q), float(max(1, P // Q)))
    K, total, tiny = torch.empty_like(squared), x.new_zeros(B), 1e-9
    rows = lambda v: (K @ v[..., None])[..., 0]                        # (B, Q) -> (B, P)
    columns = lambda v: (v[:, None] @ K)[:, 0]                         # (B, P) -> (B, Q)
    for level in LEVELS[variant]:
        torch.mul(squared, -level / math.log(2), out=K).exp2_()        # exp(-level d^2): exp2 is 4 times faster on a CPU
        a = left / (tiny + rows(right))
        shipped = right * columns(a)
        b = (right / (shipped + tiny)).clamp_max(1) * right
        left = (left - a * rows(b)).clamp_min(0)                       # the match of this level is a K b
        right = (right - shipped).clamp_min(0)
        K *= cost
        total += (a * rows(b)).sum(1)
    return total / P


def emd_exact(x, y):
    """Mean Euclidean distance under the best one-to-one matching; PointFlow's definition where its kernel is not built.

    X (B,P,3), Y (B,P,3) -> (B,) float64, symmetric. Raises ValueError where the numbers of points differ."""
    if x.shape != y.shape:
        raise ValueError(f"exact EMD matches point to point: {x.shape[1]} points against {y.shape[1]}; expected as many")
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    costs = (cdist(p, q) for p, q in zip(x, y))
    return torch.tensor([cost[linear_sum_assignment(cost)].mean() for cost in costs], dtype=torch.float64)


DISTANCES = {"chamfer": chamfer, "lion": lambda x, y: emd_approx(x, y, "lion"),
             "pointflow": lambda x, y: emd_approx(x, y, "pointflow"), "exact": emd_exact}
SYMMETRIC = ("chamfer", "exact")


# ---------------------------------------------------------------------------------------------------------
# All pairs of two sets

def pairwise(rows, cols, distance, memory=1024, cache=None, device="cpu", workers=None, share=(0, 1), progress=True):
    """M[i,j] = DISTANCES[distance](rows[i], cols[j]), float32 (S,S'); rows (S,P,3), cols (S',Q,3).

    Where both are one set and the distance is symmetric only one half is computed. memory: MiB of working space, whatever the
    size of the sets, which bounds the pairs under way at a time; the result does not depend on it. workers: threads on the CPU
    (default: all cores). cache: a directory that keeps one file a matrix, named by a hash of both sets and the distance; it is
    filled as pairs are finished, so that an interrupted run continues, and a finished one is only read.
    share (rank, world): do the rank-th part of the work alone, for several processes with one cache; the result then has NaN for
    what is not done yet. Raises ValueError for sets that are not clouds, for a pair larger than the memory, and for a result that
    is one constant although the clouds are not."""
    rows, cols = as_set(rows, "first"), as_set(cols, "second")
    same = rows.shape == cols.shape and np.array_equal(rows, cols)
    half = same and distance in SYMMETRIC
    matrix = open_cache(rows, cols, distance, cache)
    blocks, threads = cut(rows, cols, distance, half, memory, device, workers)
    size = lambda block: (block[0].stop - block[0].start) * (block[1].stop - block[1].start)
    todo = [block for n, block in enumerate(blocks) if n % share[1] == share[0] and np.isnan(matrix[block]).any()]
    kept = sum(map(size, blocks)) - sum(map(size, todo))
    if kept and share == (0, 1) and todo:
        print(f"{distance}: {kept} of {kept + sum(map(size, todo))} pairs are in the cache", file=sys.stderr)
    bar = tqdm(total=sum(map(size, todo)), unit="pair", desc=distance, disable=None if progress and todo else True)
    with start_threads(threads) as pool:
        for block in todo:
            matrix[block] = compute(rows[block[0]], cols[block[1]], distance, device, pool)
            bar.update(size(block))
    bar.close()
    matrix = np.array(matrix)
    if half:
        upper = np.triu(np.ones(matrix.shape, bool))
        matrix = np.where(upper, matrix, matrix.T)
        np.fill_diagonal(matrix, 0)
    if share == (0, 1):
        check_matrix(matrix, rows, cols, distance, same)
    return matrix


def as_set(clouds, which):
    clouds = np.ascontiguousarray(clouds, np.float32)
    if clouds.ndim != 3 or clouds.shape[2] != 3 or 0 in clouds.shape:
        raise ValueError(f"the {which} set is {clouds.shape}; expected clouds (S,P,3)")
    if not np.isfinite(clouds).all():
        raise ValueError(f"the {which} set: cloud {np.argwhere(~np.isfinite(clouds))[0][0]} has points that are not finite")
    return clouds


def check_matrix(matrix, rows, cols, distance, same):
    """A matrix of one value for clouds that differ is the sign of a broken distance, such as a kernel that returns zeros."""
    if not np.isfinite(matrix).all():
        raise ValueError(f"{distance}: some distances are not finite; are the clouds in units near 1?")
    off = matrix[~np.eye(len(matrix), dtype=bool)] if same else matrix.ravel()
    if len(off) and np.ptp(off) == 0:
        r, c = ({cloud[np.lexsort(cloud.T)].tobytes() for cloud in s} for s in (rows, cols))      # as sets of points
        if off[0] == 0 and len(r | c) > 1 or len(r) > 1 + same or len(c) > 1 + same:
            raise ValueError(f"{distance}: all {len(off)} distances are {off[0]:g} although the clouds differ")


@contextmanager
def start_threads(count):
    """A pool of threads with one thread each for torch."""
    before = torch.get_num_threads()
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool
    torch.set_num_threads(before)                                      # the setting of one thread reaches the others


def cut(rows, cols, distance, half, memory, device, workers):
    """The blocks (slice of rows, slice of columns) of the work and the number of threads, so that it fits into `memory` MiB."""
    threads = workers or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
    P, Q, space = rows.shape[1], cols.shape[1], memory * 2 ** 20
    if torch.device(device).type != "cpu" and distance != "exact":     # whole blocks at once
        pairs, need = int(space // (4 * 4 * P * Q)), 4 * 4 * P * Q
        tall = max(1, min(64, math.isqrt(pairs)))
        wide = max(1, min(64, pairs // tall))
    elif distance == "chamfer":                                        # trees of both sides, queries of one side a thread
        need = (2 + threads) * (P + Q) * 64
        tall = wide = max(1, min(16, int(space // need)))            # larger blocks waste more on the diagonal
    else:                                                              # one pair a thread
        need = 4 * 4 * P * Q
        threads = max(1, min(threads, int(space // need)))
        tall, wide = 1, 4 * threads
    if need > space:
        raise ValueError(f"{distance} of {P} against {Q} points needs {math.ceil(need / 2 ** 20)} MiB, "
                         f"more than the {memory} of --memory")
    starts = lambda n, step: [slice(i, min(i + step, n)) for i in range(0, n, step)]
    blocks = [(i, j) for i in starts(len(rows), tall) for j in starts(len(cols), wide) if not half or j.stop > i.start]
    return blocks, threads


def compute(rows, cols, distance, device, pool):
    """One block of distances: float32 (len(rows), len(cols))."""
    I, J = len(rows), len(cols)
    if torch.device(device).type != "cpu" and distance != "exact":
        x, y = (torch.from_numpy(s).to(device) for s in (rows, cols))
        x, y = x.repeat_interleave(J, 0), y.repeat(I, 1, 1)
        return DISTANCES[distance](x, y).float().cpu().numpy().reshape(I, J)
    if distance == "chamfer":
        return chamfer_block(rows, cols, pool)
    one = lambda ij: float(DISTANCES[distance](torch.from_numpy(rows[ij[0], None]), torch.from_numpy(cols[ij[1], None])))
    return np.array(list(pool.map(one, np.ndindex(I, J))), np.float32).reshape(I, J)


def chamfer_block(rows, cols, pool):
    """Chamfer on the CPU: one tree a cloud and the points of a whole side asked of it at once, in the order of their own
    tree, so that one point's path through the tree is warm for the next."""
    sets = [list(pool.map(lambda cloud: cKDTree(cloud.astype(np.float64)), side)) for side in (rows, cols)]
    points = [np.concatenate([tree.data[tree.indices] for tree in trees]) for trees in sets]

    def nearest(trees, queries, count):
        mean_squared = lambda tree: np.square(tree.query(queries)[0]).reshape(count, -1).mean(1)
        return np.stack(list(pool.map(mean_squared, trees)))
    return (nearest(sets[0], points[1], len(cols)) + nearest(sets[1], points[0], len(rows)).T).astype(np.float32)


def open_cache(rows, cols, distance, cache):
    """The matrix to fill, NaN where nothing is done: in memory, or mapped from its file in the cache."""
    shape = len(rows), len(cols)
    if cache is None:
        return np.full(shape, np.nan, np.float32)
    key = hashlib.sha256(f"{VERSION} {distance} {rows.shape} {cols.shape}".encode())
    for s in (rows, cols):
        key.update(s)
    path = Path(cache) / f"{key.hexdigest()}.npy"
    if path.exists():
        try:
            matrix = np.load(path, mmap_mode="r", allow_pickle=False)   # mapped for writing, a short file would grow by zeros
            if matrix.shape == shape and matrix.dtype == np.float32:
                return np.load(path, mmap_mode="r+", allow_pickle=False)
        except (ValueError, EOFError):
            pass
        print(f"{path}: not a readable matrix of distances, made anew", file=sys.stderr)
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = path.with_name(f"{path.stem}.{os.getpid()}.tmp")
    fresh = np.lib.format.open_memmap(mine, "w+", np.float32, shape)
    fresh[:] = np.nan
    fresh.flush()
    try:
        os.link(mine, path)                                            # unlike a rename, it does not replace another process's
    except FileExistsError:
        pass
    mine.unlink()
    return np.load(path, mmap_mode="r+", allow_pickle=False)


def estimate(jobs, memory=1024, cache=None, device="cpu", workers=None):
    """Seconds that pairwise will take for jobs [(rows, cols, distance), ...], less what the cache holds; tries a few pairs."""
    seconds, pace = 0.0, {}
    for rows, cols, distance in jobs:
        rows, cols = as_set(rows, "first"), as_set(cols, "second")
        half = distance in SYMMETRIC and rows.shape == cols.shape and np.array_equal(rows, cols)
        blocks, threads = cut(rows, cols, distance, half, memory, device, workers)
        matrix = open_cache(rows, cols, distance, cache)
        left = sum(int(np.isnan(matrix[block]).sum()) for block in blocks)
        n = 8 if distance == "chamfer" else 2                          # a side; pairs grow with its square
        if distance not in pace and left > n * n:
            with start_threads(threads) as pool:
                for _ in range(1 if distance == "exact" else 2):       # the first is a warm-up, too dear for the exact one
                    started = time.time()
                    part = compute(rows[:n], cols[-n:], distance, device, pool)
            pace[distance] = (time.time() - started) / part.size
        seconds += left * pace.get(distance, 0.0)
    return seconds


# ---------------------------------------------------------------------------------------------------------
# From distances to scores

def mmd_cov(matrix):
    """matrix (N_ref, N_smp) of M[i,j] = d(ref_i, smp_j) -> (MMD, COV, MMD over samples), floats.

    MMD: mean over references of the distance to the nearest sample. COV: share of references that are the nearest of some
    sample; of equally near ones the first counts. The last: mean over samples of the distance to the nearest reference."""
    matrix = np.asarray(matrix, np.float64)
    return float(matrix.min(1).mean()), len(set(matrix.argmin(0).tolist())) / len(matrix), float(matrix.min(0).mean())


def one_nna(rr, rs, ss):
    """1-NNA: share of clouds whose nearest other one is of their own set (Lopez-Paz & Oquab 2017); 0.5 is best.

    rr (R,R), rs (R,S), ss (S,S), M[i,j] = d(i,j) -> (all, references alone, samples alone). As published, the nearest is sought
    down each column, which matters where d is not symmetric; of equally near ones the first counts, references first."""
    rr, rs, ss = (np.asarray(m, np.float64) for m in (rr, rs, ss))
    matrix = np.block([[rr, rs], [rs.T, ss]])
    np.fill_diagonal(matrix, np.inf)
    is_ref = np.arange(len(matrix)) < len(rr)
    right = is_ref[matrix.argmin(0)] == is_ref
    return float(right.mean()), float(right[is_ref].mean()), float(right[~is_ref].mean())


def jsd(ref, smp, resolution=28):
    """Jensen-Shannon divergence, base 2, of where the points of two sets lie (Achlioptas et al. 2018): 0..1.

    (S,P,3) in units of the box [-0.5,0.5]. Every point counts for the nearest of the grid's points inside the ball of
    diameter 1: 10,144 of 28^3."""
    line = np.arange(resolution, dtype=np.float32) / np.float32(resolution - 1) - np.float32(0.5)
    grid = np.stack(np.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
    tree = cKDTree(grid[np.linalg.norm(grid, axis=1) <= 0.5])
    counts = [np.bincount(tree.query(np.asarray(s).reshape(-1, 3), workers=-1)[1], minlength=tree.n) for s in (ref, smp)]
    p, q = (c / c.sum() for c in counts)
    entropy = lambda p: -(p[p > 0] * np.log2(p[p > 0])).sum()
    return float(max(0.0, entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2))


def scores(ref, smp, distance, **options):
    """{"mmd", "cov", "1nna"} of samples (S,P,3) against references (R,P,3), in the scales of published tables: MMD x 1e3 for
    Chamfer, x 1e2 for EMD; COV and 1-NNA in percent. options: those of pairwise. Raises ValueError for fewer than 2 clouds."""
    if min(len(ref), len(smp)) < 2:
        raise ValueError(f"{len(ref)} references and {len(smp)} samples: 1-NNA needs at least 2 of each")
    rs = pairwise(ref, smp, distance, **options)
    rr, ss = pairwise(ref, ref, distance, **options), pairwise(smp, smp, distance, **options)
    mmd, cov, _ = mmd_cov(rs)
    return {"mmd": mmd * (1e3 if distance == "chamfer" else 1e2), "cov": 100 * cov, "1nna": 100 * one_nna(rr, rs, ss)[0]}
