"""Speeds as ratios within one run: python tests/bench.py metrics

Each row times two ways of doing the same work in turn and compares their medians. Nothing passes or fails here: machines differ.
"""
import argparse
import pathlib
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import scipy.linalg  # noqa: E402
import torch  # noqa: E402
from scipy.optimize import linear_sum_assignment  # noqa: E402
from scipy.spatial import cKDTree  # noqa: E402
from scipy.spatial.distance import cdist  # noqa: E402

from data import Solids  # noqa: E402
from metrics import clouds, frechet  # noqa: E402


def row(name, ours, theirs, goal, rounds=5, note=""):
    """Prints the medians of ours() and theirs(), each seconds for the same amount of work, taken in turn, and their ratio."""
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    a, b = (statistics.median(column) for column in zip(*pairs))
    print(f"{name:<52} {a:>9.4f} s {b:>9.4f} s {b / a:>7.2f} x   {goal:<8} {note}", flush=True)


def timed(function):
    """A function that runs another and returns the seconds per unit of the work that it reports having done."""
    def run():
        started = time.perf_counter()
        units = function()
        return (time.perf_counter() - started) / units
    return run


def metrics():
    """Square-root trace, Chamfer and Earth Mover's distances; seconds per call or per pair of clouds of 2048 points."""
    threads = torch.get_num_threads()
    print(f"{'':<52} {'ours':>11} {'theirs':>11} {'ratio':>9}   goal      ({threads} threads)")
    r = np.random.default_rng(0)
    S1, S2 = (np.cov(r.standard_normal((4096, 2048)) * np.linspace(0.1, 2, 2048), rowvar=False) for _ in range(2))
    values = {}

    def sqrtm():
        values["theirs"] = np.trace(scipy.linalg.sqrtm(S1 @ S2)).real
        return 1

    def trace():
        values["ours"] = frechet.sqrt_trace(S1, S2)
        return 1
    row("square-root trace, 2048 dimensions / sqrtm", timed(trace), timed(sqrtm), ">= 5", rounds=3)
    print(f"{'':<52} relative difference {abs(values['ours'] / values['theirs'] - 1):.1e}")

    solids = Solids(2048)
    sets = clouds.normalise_box(np.stack([solids.item(i)[0] for i in range(48)]))
    ref, smp = sets[:24], sets[24:]

    def two_trees():
        for x, y in zip(ref, smp):
            a, b = cKDTree(x), cKDTree(y)
            np.square(a.query(y)[0]).mean() + np.square(b.query(x)[0]).mean()
        return len(ref)

    def approximate():
        clouds.pairwise(ref[:4], smp[:4], "lion", progress=False)
        return 16

    def assignment(workers):
        def one(pair):
            cost = cdist(*pair)
            return cost[linear_sum_assignment(cost)].mean()

        def run():
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(one, [(ref[i].astype(float), smp[i].astype(float)) for i in range(4)]))
            return 4
        return run

    def exact(workers):
        def run():
            clouds.pairwise(ref[:2], smp[:2], "exact", workers=workers, progress=False)
            return 4
        return run
    chamfer = lambda: clouds.pairwise(ref, smp, "chamfer", progress=False).size
    row("Chamfer / a loop that builds two trees per pair", timed(chamfer), timed(two_trees), ">= 2")
    row("approximate EMD (lion) / exact assignment", timed(approximate), timed(assignment(threads)), ">= 4", rounds=3)
    row(f"exact EMD, {threads} threads / 1", timed(exact(threads)), timed(exact(1)), "-", rounds=3)


SECTIONS = {"metrics": metrics}

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("section", nargs="*", choices=[[], *SECTIONS], help=f"of {', '.join(SECTIONS)} (default: all)")
    for name in p.parse_args().section or SECTIONS:
        print(f"{name}: {SECTIONS[name].__doc__}")
        SECTIONS[name]()
