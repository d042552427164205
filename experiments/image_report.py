"""Do point clouds follow their images? python experiments/image_report.py RUN SET VIEWS OUT.png

RUN was trained by --dataset objaverse, SET/val and VIEWS/val hold objects it never saw (tools/tokens.py,
tools/render.py). One cloud is drawn for each; right is one that is nearest to its own object, by Chamfer
distance. The floor is the same test with other points of the object in place of the sample, chance 1 / N.
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from common import drawn
import data
import sample
from metrics import clouds

def retrieved(distance, kinds, of_each):
    """Share of clouds nearest to their own object, among so many of each kind; mean over disjoint groups."""
    places = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in kinds}
    shares = []
    for first in range(0, min(map(len, places.values())) - of_each + 1, of_each):
        group = np.array([i for kind in sorted(places) for i in places[kind][first:first + of_each]])
        shares.append((distance[np.ix_(group, group)].argmin(1) == np.arange(len(group))).mean())
    return np.mean(shares)

def main(run, prepared, views, out):
    prepared, views = Path(prepared, "val"), Path(views, "val")
    files = [Path(file) for file in data.find_files(str(prepared), {".npz"})]
    model, checkpoint = sample.load(run)
    points = model.cfg.points
    stored = [data.normalise(np.load(file, allow_pickle=False)["xyz"])[0] for file in files]
    objects, others = (np.stack([cloud[part] for cloud in stored])
                       for part in (slice(points), slice(points, 2 * points)))
    kinds = [file.parent.name for file in files]
    setting = sample.resolve(model.cfg, checkpoint, tokens=str(prepared))
    found, _ = drawn(model.to(sample.start_processes()), setting, range(len(files)))
    ours, floor = (clouds.pairwise(x, objects, "chamfer", progress=False) for x in (found, others))
    right = np.mean([kinds[j] == kind for j, kind in zip(ours.argmin(1), kinds)])
    print(f"{len(files)} held-out objects of {len(set(kinds))} kinds, {points} points: nearest to one of its "
          f"kind {right:.3f}\namong N objects, nearest to its own; floor; chance")
    of_each = min(map(kinds.count, kinds))
    for k in sorted({1, 2, of_each // 2, of_each} - {0}):
        n = k * len(set(kinds))
        print(f"{n:>4}  {retrieved(ours, kinds, k):.3f}  {retrieved(floor, kinds, k):.3f}  {1 / n:.3f}")
    # the first two objects of each kind: a view, the object, the sample
    chosen = [i for kind in sorted(set(kinds))
              for i in [k for k, name in enumerate(kinds) if name == kind][:2]]
    seen = [Image.open(f"{views / files[i].relative_to(prepared).with_suffix('')}-0.png") for i in chosen]
    tiles = [np.asarray(view.convert("RGB").resize((160, 160), Image.Resampling.LANCZOS)) for view in seen]
    tiles += [sample.draw_points(cloud[i][:2048], 160) for cloud in (stored, found) for i in chosen]
    sample.grid_image(tiles, len(chosen)).save(out)

if __name__ == "__main__":
    main(*sys.argv[1:])
