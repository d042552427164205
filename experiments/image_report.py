"""Do point clouds follow their images? Retrieval, and a picture.

    python experiments/image_report.py RUN SET VIEWS OUT.png


RUN was trained by --dataset objaverse, SET/val and VIEWS/val hold objects it never saw (data.py tokens,
data.py render). One cloud is drawn for each; it counts as right where its Chamfer distance to its own object
is smaller than to every other. The floor is the same test with other points of the very object in place of
the sample, chance is 1 / N.
"""
import pathlib
import sys

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import sample  # noqa: E402
from metrics import clouds  # noqa: E402

def chamfer(found, objects):
    """(S,P,3), (N,P,3) -> squared distances (S,N)."""
    return clouds.pairwise(found, objects, "chamfer", progress=False)

def retrieved(distance, kinds, of_each):
    """Share of clouds that are nearest to their own object, among as many objects of each kind; mean over
    disjoint groups."""
    places = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in kinds}
    shares = []
    for first in range(0, min(map(len, places.values())) - of_each + 1, of_each):
        group = np.array([i for kind in sorted(places) for i in places[kind][first:first + of_each]])
        shares.append((distance[np.ix_(group, group)].argmin(1) == np.arange(len(group))).mean())
    return np.mean(shares)

def main(run, prepared, views, out, *flags):
    files = data.find_files(str(pathlib.Path(prepared) / "val"), {".npz"})
    points = sample.read_checkpoint(run, mmap=True)["config"]["model"]["points"]
    stored = [data.normalise(np.load(file, allow_pickle=False)["xyz"])[0] for file in files]
    objects, others = (torch.from_numpy(np.stack([cloud[part] for cloud in stored]))
                       for part in (slice(points), slice(points, 2 * points)))
    kinds = [pathlib.Path(file).parent.name for file in files]
    drawn = sample.main(["--ckpt", run, "--tokens", str(pathlib.Path(prepared) / "val"), "--samples",
                         str(len(files)), *flags])
    found = torch.from_numpy(np.stack([np.load(drawn / f"{i:06d}.npy", allow_pickle=False)
                                       for i in range(len(files))]))
    ours, floor = chamfer(found, objects), chamfer(others, objects)
    print(f"{len(files)} held-out objects of {len(set(kinds))} kinds, {points} points: nearest to one of "
          f"its kind "
          f"{np.mean([kinds[j] == kind for j, kind in zip(ours.argmin(1), kinds)]):.3f}\namong N objects, "
          f"nearest to its own; floor; chance")
    of_each = min(map(kinds.count, kinds))
    for k in sorted({1, 2, of_each // 2, of_each} - {0}):
        n = k * len(set(kinds))
        print(f"{n:>4}  {retrieved(ours, kinds, k):.3f}  {retrieved(floor, kinds, k):.3f}  {1 / n:.3f}")
    # the first two objects of each kind: a view, the object, the sample
    chosen = [i for kind in sorted(set(kinds))
              for i in [k for k, name in enumerate(kinds) if name == kind][:2]]
    columns = []
    for i in chosen:
        view = pathlib.Path(views) / "val" / pathlib.Path(files[i]).relative_to(pathlib.Path(prepared)
                                                                                / "val").with_suffix("")
        picture = np.asarray(Image.open(f"{view}-0.png").convert("RGB").resize((160, 160),
                                                                               Image.Resampling.LANCZOS))
        columns.append(np.concatenate([picture, sample.draw_points(stored[i][:2048], 160),
                                       sample.draw_points(found[i].numpy(), 160)]))
    Image.fromarray(np.concatenate(columns, 1)).save(out)

if __name__ == "__main__":
    main(*sys.argv[1:])
