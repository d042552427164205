"""Point-cloud metrics as published: Chamfer and EMD of two clouds; MMD, COV, 1-NNA and JSD of two sets.

Definitions are those of PointFlow (Yang et al. 2019) and LION (Vahdat et al. 2022), read in their evaluation
code. Their tables' EMD is an approximate matching (H. Fan's kernel), in two variants with other ground costs.
Neither is symmetric; exact optimal transport gives other numbers. All three are here.

    scores(ref, smp, "chamfer")             {"mmd": ..., "cov": ..., "1nna": ...} in the published scales
    pairwise(ref, smp, "lion")              M[i,j] = EMD(ref_i, smp_j)

In order: normalise_box, comparable; chamfer, emd_approx, emd_exact; pairwise and estimate, over all pairs;
mmd_cov, one_nna, jsd, scores. Alphabet: S clouds of P points are a set (S,P,3), B pairs at a time X (B,P,3)
and Y (B,Q,3). Needs torch, numpy, scipy and tqdm. """
import hashlib
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from tqdm import tqdm

VERSION = 1        # of the arithmetic below: part of the key under which distances are cached

def check(*sets):
    """Raises ValueError unless each set is finite floats (S,P,3): (S,3,P) would give numbers, too."""
    for clouds in sets:
        x = clouds if isinstance(clouds, torch.Tensor) else torch.from_numpy(np.array(clouds))
        if x.dim() != 3 or x.shape[2] != 3 or 0 in x.shape or not x.is_floating_point():
            raise ValueError(f"clouds are {x.dtype} {tuple(x.shape)}; expected floats (S,P,3)")
        for i in (~x.isfinite().flatten(1).all(1)).nonzero():
            raise ValueError(f"cloud {int(i)} of {tuple(x.shape)} has points that are not finite")

def normalise_box(clouds):
    """Each cloud in its own box: midrange to 0, longest side to 1. Source: LION's norm_box.

    (S,P,3) -> float32 (S,P,3) in [-0.5,0.5]. ValueError for points that are not finite or all the same."""
    check(clouds)
    clouds = np.asarray(clouds, np.float64)
    low, high = clouds.min(1, keepdims=True), clouds.max(1, keepdims=True)
    side = (high - low).max(2, keepdims=True)
    for i in np.flatnonzero(~((side > 0) & (side < np.inf))):
        raise ValueError(f"cloud {i}: its points are all the same, or too far apart")
    return ((clouds - (low + high) / 2) / side).astype(np.float32)

def comparable(smp, ref, box, rules=(None, None), affines=((), ()), warn=print):
    """Samples and references (S,P,3) in one scale, of one P, no more samples than references, as in LION's
    code; the scale in words. rules: how either was normalised, "box", "global", or None where nobody knows;
    affines: either's mean and std, which undo the latter. warn(text) is told of what is odd."""
    if box:
        scale, smp, ref = "box: longest side to 1 (LION)", normalise_box(smp), normalise_box(ref)
    elif affines[1] and rules[0] != "box":
        scale, (mean, std) = "x std + mean of the reference file (LION's global protocol)", affines[0]
        smp, ref = smp * std[:1] + mean[:1], ref * affines[1][1] + affines[1][0]
    else:
        scale = f"samples normalised by {rules[0] or 'unknown'}, references by {rules[1] or 'unknown'}"
        if rules[0] != rules[1] and None not in rules:
            raise ValueError(f"--normalize none: {scale}; expected one rule, or --normalize box")
        if rules[0] != rules[1]:
            warn(f"--normalize none: {scale}; if they differ, the figures mean nothing")
    least, most = sorted((smp.shape[1], ref.shape[1]))
    if most > least:
        warn(f"{smp.shape[1]} points a sample, {ref.shape[1]} a reference: a random {least} are used")
        pick = np.random.default_rng(0).permutation(most)[:least]      # one choice for all (LION)
        smp, ref = (x[:, pick] if x.shape[1] > least else x for x in (smp, ref))
    if len(smp) < len(ref):
        warn(f"{len(smp)} samples against {len(ref)} references: COV and 1-NNA assume as many of each")
    return smp[:len(ref)], ref, scale

# --- Distances of pairs of clouds

def distances(x, y):
    """Euclidean (B,P,Q), from differences: the Gram form |x|^2 + |y|^2 - 2xy loses digits of near points."""
    check(x, y)
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")

def chamfer(x, y):
    """Mean squared distance to the nearest point of the other cloud, both directions added; no half, no root.

    X (B,P,3), Y (B,Q,3) -> (B,), symmetric. Source: PointFlow and LION, which agree."""
    squared = distances(x, y).square_()                                                # (B, P, Q)
    return squared.amin(2).mean(1) + squared.amin(1).mean(1)

# variant -> the sharpness lambda of each level. PVD's kernel is LION's; PointFlow's has no level 0
POWERS = [4.0 ** k for k in range(7, -2, -1)]
LEVELS = {"lion": [*POWERS, 0.0], "pointflow": POWERS}

def emd_approx(x, y, variant="lion"):
    """Approximate matching, the EMD of tables: "lion" (squared ground cost) or "pointflow" (Euclidean).

    X (B,P,3), Y (B,Q,3) of one floating type -> (B,), the cost of the match over P. Not symmetric: X comes
    first. From sharp to blunt, each level lambda ships mass between all pairs in proportion to exp(-lambda
    d^2), as far as what remains allows. Source: LION's PyTorchEMD/cuda/emd_kernel.cu, PointFlow's
    approxmatch.cu."""
    distance = distances(x, y)                                                         # (B, P, Q)
    squared = distance.square()
    cost = distance if variant == "pointflow" else squared
    B, P, Q = distance.shape
    left = x.new_full((B, P), float(max(1, Q // P)))                   # mass that remains on each point
    right = x.new_full((B, Q), float(max(1, P // Q)))
    K, total, tiny = torch.empty_like(squared), x.new_zeros(B), 1e-9
    for level in LEVELS[variant]:
        torch.mul(squared, -level / math.log(2), out=K).exp2_()        # exp(-level d^2): exp2 is faster
        a = left / (tiny + (K @ right[..., None])[..., 0])
        shipped = right * (a[:, None] @ K)[:, 0]
        b = (right / (shipped + tiny)).clamp_max(1) * right
        left = (left - a * (K @ b[..., None])[..., 0]).clamp_min(0)    # the match of this level is a K b
        right = (right - shipped).clamp_min(0)
        K *= cost
        total += (a * (K @ b[..., None])[..., 0]).sum(1)
    return total / P

def emd_exact(x, y):
    """Mean Euclidean distance under the best one-to-one matching: PointFlow's EMD if its kernel is missing.

    X (B,P,3), Y (B,P,3) -> (B,) float64, symmetric. Raises ValueError where the numbers of points differ."""
    check(x, y)
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape:
        raise ValueError(f"exact EMD: {x.shape[1]} points against {y.shape[1]}; expected as many")
    costs = (cdist(p, q) for p, q in zip(x, y))
    return torch.tensor([cost[linear_sum_assignment(cost)].mean() for cost in costs], dtype=torch.float64)

DISTANCES = {"chamfer": chamfer, "lion": partial(emd_approx, variant="lion"),
             "pointflow": partial(emd_approx, variant="pointflow"), "exact": emd_exact}
SYMMETRIC = ("chamfer", "exact")

# --- All pairs of two sets

def pairwise(rows, cols, distance, memory=1024, cache=None, device="cpu", workers=None, share=(0, 1),
             progress=True):
    """M[i,j] = DISTANCES[distance](rows[i], cols[j]), float32 (S,S'); rows (S,P,3), cols (S',Q,3).

    Of one set against itself a symmetric distance is computed for one half. memory: MiB for the pairs under
    way; the result does not depend on it. workers: threads on the CPU (default: all cores). cache: a
    directory with one file a matrix, named by a hash of both sets and the distance, filled as pairs are
    finished; an interrupted run continues. share (rank, world): do the rank-th part alone, for several
    processes with one cache; what is not done yet is NaN. Raises ValueError for sets that are not clouds, a
    pair larger than the memory, and a matrix of one value although the clouds differ."""
    rows, cols = as_set(rows), as_set(cols)
    same = np.array_equal(rows, cols)
    half = same and distance in SYMMETRIC
    matrix = open_cache(rows, cols, distance, cache)
    blocks, threads = cut(rows, cols, distance, half, memory, device, workers)
    mine = blocks[share[0]::share[1]]
    todo = [block for block in mine if np.isnan(matrix[block]).any()]
    total, left = (sum(matrix[block].size for block in some) for some in (mine, todo))
    bar = tqdm(total=total, initial=total - left, unit="pair", desc=distance,
               disable=None if progress and todo else True)            # None: shown on a terminal only
    before = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool, bar:
        for i, j in todo:
            matrix[i, j] = compute(rows[i], cols[j], distance, device, pool)
            bar.update(matrix[i, j].size)
    torch.set_num_threads(before)                                      # what a worker sets is set for all
    matrix = np.array(matrix)
    if half:
        matrix = np.where(np.triu(np.ones(matrix.shape, bool)), matrix, matrix.T)
        np.fill_diagonal(matrix, 0)
    if share == (0, 1):
        check_matrix(matrix, rows, cols, distance, same)
    return matrix

def as_set(clouds):
    check(clouds)
    return np.ascontiguousarray(clouds, np.float32)

def check_matrix(matrix, rows, cols, distance, same):
    """Refuses one value for clouds that differ: the sign of a broken distance, such as a stub of zeros."""
    if not np.isfinite(matrix).all():
        raise ValueError(f"{distance}: some distances are not finite; are the clouds in units near 1?")
    off = matrix[~np.eye(len(matrix), dtype=bool)] if same else matrix.ravel()
    if len(off) and np.ptp(off) == 0:
        r, c = ({cloud[np.lexsort(cloud.T)].tobytes() for cloud in s} for s in (rows, cols))
        if off[0] == 0 and len(r | c) > 1 or len(r) > 1 + same or len(c) > 1 + same:
            raise ValueError(f"{distance}: all distances are {off[0]:g} although the clouds differ")

def cut(rows, cols, distance, half, memory, device, workers):
    """The blocks (slice of rows, slice of columns) of the work and the number of threads, for the memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = workers or cores or 1
    P, Q, space = rows.shape[1], cols.shape[1], memory * 2 ** 20
    need = 4 * 4 * P * Q                                               # of one pair: four float32 (P, Q)
    pairs = int(space // need)
    if torch.device(device).type != "cpu" and distance != "exact":     # whole blocks at once
        tall = wide = max(1, min(64, math.isqrt(pairs)))
    elif distance == "chamfer":                                        # trees of both sides, queries a thread
        need = (2 + threads) * (P + Q) * 64
        tall = wide = max(1, min(16, int(space // need)))              # larger: more waste on the diagonal
    else:                                                              # one pair a thread
        threads = max(1, min(threads, pairs))
        tall, wide = 1, 4 * threads
    if need > space:
        raise ValueError(f"{distance} of {P} against {Q} points needs {math.ceil(need / 2 ** 20)} MiB, "
                         f"more than the {memory} of --memory")
    blocks = [(slice(i, i + tall), slice(j, j + wide)) for i in range(0, len(rows), tall)
              for j in range(0, len(cols), wide) if not half or j + wide > i]
    return blocks, threads

def compute(rows, cols, distance, device, pool):
    """One block of distances: float32 (len(rows), len(cols))."""
    if distance == "chamfer" and torch.device(device).type == "cpu":
        return chamfer_block(rows, cols, pool)
    where = "cpu" if distance == "exact" else device
    x, y = torch.from_numpy(rows).to(where), torch.from_numpy(cols).to(where)
    x, y = x.repeat_interleave(len(cols), 0), y.repeat(len(rows), 1, 1)
    if x.device.type == "cpu":                                         # pair by pair
        found = torch.cat(list(pool.map(DISTANCES[distance], x.split(1), y.split(1))))
    else:
        found = DISTANCES[distance](x, y)
    return found.float().cpu().numpy().reshape(len(rows), len(cols))

def chamfer_block(rows, cols, pool):
    """Chamfer on the CPU: a tree for each cloud, asked at once for all points of the other side.

    They are asked in the order of their own tree: the path of one is then warm in the caches for the next."""
    sets = [list(pool.map(cKDTree, side.astype(np.float64))) for side in (rows, cols)]
    points = [np.concatenate([tree.data[tree.indices] for tree in trees]) for trees in sets]

    def nearest(trees, queries, count):                                # mean squared distance (trees, clouds)
        found = pool.map(lambda tree: np.square(tree.query(queries)[0]).reshape(count, -1).mean(1), trees)
        return np.stack(list(found))
    there, back = nearest(sets[0], points[1], len(cols)), nearest(sets[1], points[0], len(rows))
    return (there + back.T).astype(np.float32)

def open_cache(rows, cols, distance, cache):
    """The matrix to fill, NaN where nothing is done: in memory, or mapped from its file in the cache."""
    empty = np.full((len(rows), len(cols)), np.nan, np.float32)
    if cache is None:
        return empty
    key = hashlib.sha256(f"{VERSION} {distance} {rows.shape} {cols.shape}".encode())
    key.update(rows)
    key.update(cols)
    path = Path(cache) / f"{key.hexdigest()}.npy"
    if path.exists() and path.stat().st_size != 128 + empty.nbytes:    # mapped, a short one grows by zeros
        print(f"{path}: not a readable matrix of distances, made anew", file=sys.stderr)
        path.unlink()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = path.with_name(f"{path.stem}.{os.getpid()}.npy")
        np.save(mine, empty)
        with suppress(FileExistsError):                                # another process made it
            os.link(mine, path)
        mine.unlink()
    return np.load(path, mmap_mode="r+", allow_pickle=False)

def estimate(jobs, memory=1024, cache=None, device="cpu", workers=None):
    """Seconds that pairwise will take for jobs [(rows, cols, distance), ...], less what the cache holds."""
    seconds, pace = 0.0, {}
    for rows, cols, distance in jobs:
        rows, cols = as_set(rows), as_set(cols)
        matrix = open_cache(rows, cols, distance, cache)
        if distance in SYMMETRIC and np.array_equal(rows, cols):
            matrix = np.triu(matrix)
        left = int(np.isnan(matrix).sum())
        n = 8 if distance == "chamfer" else 2                          # n x n pairs are tried
        if distance not in pace and left > n * n:
            for _ in range(1 if distance == "exact" else 2):           # a warm-up, too dear for the exact one
                started = time.time()
                tried = pairwise(rows[:n], cols[-n:], distance, memory, None, device, workers, progress=False)
            pace[distance] = (time.time() - started) / tried.size
        seconds += left * pace.get(distance, 0.0)
    return seconds

# --- From distances to scores. Source: PointFlow metrics/evaluation_metrics.py, which LION follows

def mmd_cov(matrix):
    """matrix (N_ref, N_smp) of M[i,j] = d(ref_i, smp_j) -> (MMD, COV, MMD over samples), floats.

    MMD: mean over references of the distance to the nearest sample. COV: share of references that are nearest
    to some sample; of equally near ones the first counts. The last: MMD with the two sets exchanged."""
    matrix = np.asarray(matrix, np.float64)
    covered = len(np.unique(matrix.argmin(0))) / len(matrix)
    return float(matrix.min(1).mean()), covered, float(matrix.min(0).mean())

def one_nna(rr, rs, ss):
    """Share of clouds whose nearest other one is of their own set (Lopez-Paz & Oquab 2017); 0.5 is best.

    rr (R,R), rs (R,S), ss (S,S), M[i,j] = d(i,j) -> (all, references alone, samples alone). The nearest is
    sought down each column, which matters if d is not symmetric; of equals the first, references first."""
    rr, rs, ss = (np.asarray(m, np.float64) for m in (rr, rs, ss))
    matrix = np.block([[rr, rs], [rs.T, ss]])
    np.fill_diagonal(matrix, np.inf)
    is_ref = np.arange(len(matrix)) < len(rr)
    right = is_ref[matrix.argmin(0)] == is_ref
    return float(right.mean()), float(right[is_ref].mean()), float(right[~is_ref].mean())

def jsd(ref, smp, resolution=28):
    """Jensen-Shannon divergence, base 2, of where the points of two sets lie (Achlioptas et al. 2018): 0..1.

    (S,P,3) in the box [-0.5,0.5]. A point counts for the nearest of the 10,144 points of the grid in the
    ball."""
    check(ref, smp)
    line = np.arange(resolution, dtype=np.float32) / np.float32(resolution - 1) - np.float32(0.5)
    grid = np.stack(np.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
    tree = cKDTree(grid[np.linalg.norm(grid, axis=1) <= 0.5])
    cells = (tree.query(np.reshape(s, (-1, 3)), workers=-1)[1] for s in (ref, smp))
    p, q = (np.bincount(c, minlength=tree.n) / len(c) for c in cells)
    p_bits, q_bits, both = (-(c[c > 0] * np.log2(c[c > 0])).sum() for c in (p, q, (p + q) / 2))
    return float(max(0.0, both - (p_bits + q_bits) / 2))

def scores(ref, smp, distance, **options):
    """{"mmd", "cov", "1nna"} of samples (S,P,3) against references (R,P,3), in the scales of tables.

    MMD is x 1e3 for Chamfer, x 1e2 for EMD; COV and 1-NNA are in percent. options: those of pairwise."""
    check(ref, smp)
    if min(len(ref), len(smp)) < 2:
        raise ValueError(f"{len(ref)} references and {len(smp)} samples: 1-NNA needs at least 2 of each")
    rs = pairwise(ref, smp, distance, **options)
    rr, ss = pairwise(ref, ref, distance, **options), pairwise(smp, smp, distance, **options)
    mmd, cov, _ = mmd_cov(rs)
    scale = 1e3 if distance == "chamfer" else 1e2
    return {"mmd": scale * mmd, "cov": 100 * cov, "1nna": 100 * one_nna(rr, rs, ss)[0]}
