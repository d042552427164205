"""Do clouds follow their pictures? Retrieval, and a picture: python tests/image_report.py RUN SET VIEWS OUT.png

RUN was trained by --dataset objaverse, SET/val and VIEWS/val hold objects it never saw (data.py tokens, data.py render). One
cloud is drawn for each; it counts as right where its Chamfer distance to its own object is smaller than to every other. The
floor is the same test with other points of the very object in place of the sample, chance is 1 / N.
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


def retrieved(found, objects):
    """Which object is nearest to each cloud: (S,P,3), (N,P,3) -> (S,)."""
    return clouds.pairwise(found, objects, "chamfer", progress=False).argmin(1)


def main(run, prepared, views, out, *flags):
    files = data.find_files(str(pathlib.Path(prepared) / "val"), {".npz"})
    points = sample.read_checkpoint(run, mmap=True)["config"]["model"]["points"]
    stored = [data.normalise(np.load(file, allow_pickle=False)["xyz"])[0] for file in files]
    objects, others = (torch.from_numpy(np.stack([cloud[part] for cloud in stored])) for part in (slice(points), slice(points, 2 * points)))
    kinds = [pathlib.Path(file).parent.name for file in files]
    right = retrieved(others, objects) == np.arange(len(files))
    print(f"{len(files)} objects of {len(set(kinds))} kinds, {points} points; chance {1 / len(files):.3f}, floor {right.mean():.3f}")
    drawn = sample.main(["--ckpt", run, "--tokens", str(pathlib.Path(prepared) / "val"), "--samples", str(len(files)), *flags])
    found = torch.from_numpy(np.stack([np.load(drawn / f"{i:06d}.npy", allow_pickle=False) for i in range(len(files))]))
    nearest = retrieved(found, objects)
    same = np.array(kinds)[nearest] == np.array(kinds)
    print(f"nearest to its own object: {(nearest == np.arange(len(files))).mean():.3f}; to one of its kind: {same.mean():.3f}")
    for kind in sorted(set(kinds)):
        of = [i for i, k in enumerate(kinds) if k == kind]
        print(f"  {kind}: {sum(nearest[i] == i for i in of)} of {len(of)}")
    # the first two objects of each kind: a view, the object, the sample
    chosen = [i for kind in sorted(set(kinds)) for i in [k for k, name in enumerate(kinds) if name == kind][:2]]
    columns = []
    for i in chosen:
        view = pathlib.Path(views) / "val" / pathlib.Path(files[i]).relative_to(pathlib.Path(prepared) / "val").with_suffix("")
        picture = np.asarray(Image.open(f"{view}-0.png").convert("RGB").resize((160, 160), Image.Resampling.LANCZOS))
        columns.append(np.concatenate([picture, sample.draw_points(stored[i][:2048], 160), sample.draw_points(found[i].numpy(), 160)]))
    Image.fromarray(np.concatenate(columns, 1)).save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
