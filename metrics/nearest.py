"""Memorisation: how near training items are to samples, beside items that no training has seen.

    items, near = nearest(samples, train.item, len(train))             # (N,keep) each
    near[:, 0].mean() / held_out[:, 0].mean()          # about 1 for as many items, if none is learnt by heart

N samples, images uint8 (H,W,3) or clouds (P,3), against S items, read one by one. Needs numpy and scipy."""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.spatial import cKDTree

def pixels(samples):
    """A function: image -> (N,), its root mean square difference in levels from each of the samples."""

    def distance(image):
        if {np.shape(image)} != {np.shape(sample) for sample in samples}:
            raise ValueError(f"images are {np.shape(samples[0])}, {np.shape(image)}; expected one size")
        return np.sqrt([np.square(sample - np.float32(image)).mean() for sample in samples])
    return distance

def chamfer(samples):
    """A function: cloud -> (N,), its Chamfer distance (that of clouds.py) from each of the samples."""
    trees = [cKDTree(sample) for sample in samples]

    def distance(cloud):
        tree = cKDTree(cloud)
        pairs = ((tree.query(other.data)[0], other.query(tree.data)[0]) for other in trees)
        return np.array([np.square(there).mean() + np.square(back).mean() for there, back in pairs])
    return distance

def nearest(samples, item, count, workers=1, done=lambda items: None, keep=3):
    """The `keep` items nearest to each sample and their distances, (N,keep) each, of item(i), i < count.

    Images by pixels, others by Chamfer distance, on threads; done(n) is told of every n items."""
    distance, columns = (pixels if samples[0].dtype == np.uint8 else chamfer)(samples), []
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, count, 256):                             # no million results in waiting
            block = range(start, min(start + 256, count))
            columns += pool.map(lambda i: distance(item(i)), block)
            done(len(block))
    found = np.stack(columns, 1).astype(np.float64)                    # (N, S)
    order = found.argsort(1, kind="stable")[:, :keep]
    return order, np.take_along_axis(found, order, 1)
