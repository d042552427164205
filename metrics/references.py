"""The files in which others publish references and samples. Needs torch and numpy only.

`read` takes an .npz of ADM, Point-E or `evaluate.py stats`, clean-fid's statistics of CLIP, a plain .npy, and
LION's .pt. S items, P points, images uint8 (S,H,W,3), point clouds floating (S,P,3).
"""
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

EXPECTED = ("point clouds, floats (S,P,3), or images (pictures), uint8 (S,H,W,3); in an .npz as images or "
            "arr_0, or statistics mu, sigma; in a .pt a tensor, or LION's `ref`, `mean`, `std`")

@dataclass
class Reference:
    array: np.ndarray = None                           # None: statistics alone
    statistics: dict = field(default_factory=dict)     # mu, sigma, mu_s, sigma_s, mu_clip, sigma_clip, ...
    record: dict = field(default_factory=dict)         # what `evaluate.py stats` wrote beside them
    affine: tuple = ()                                 # of LION's global protocol: mean (S,1,3), std (S,1,1)
    category: str = None                               # of ShapeNet, by LION's names of files

def read(path, statistics=()):
    """The Reference in a file; statistics: names of the arrays to take as such. Raises whatever the reader
    does where the file is damaged, ValueError where it holds something else."""
    path, found = Path(path), Reference()
    kind = path.suffix.lower()
    if kind == ".npy":
        found.array = np.load(path, mmap_mode="r", allow_pickle=False)
    elif kind == ".npz":
        with np.load(path, allow_pickle=False) as file:
            found.statistics = {key: file[key] for key in statistics if key in file}
            found.record = json.loads(str(file["meta"])) if "meta" in file else {}
            found.array = next((file[key] for key in ("images", "arr_0") if key in file), None)
            if found.array is None and not found.statistics:
                raise ValueError(f"found {', '.join(file.files[:8])}")
        if len(found.statistics.get("mu", ())) == 512:                 # clean-fid's files of CLIP features
            found.statistics.update({f"{key}_clip": found.statistics.pop(key) for key in ("mu", "sigma")})
    else:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content = content if isinstance(content, dict) else {"ref": content}
        found.array = content["ref"]
        found.array = (found.array.float() if found.array.is_floating_point() else found.array).numpy()
        found.affine = [content[key].float().numpy() for key in ("mean", "std") if key in content]
        found.category = path.stem.removeprefix("ref_val_").removeprefix("PF2_val_")
    if found.array is not None:
        found.array = as_items(found.array)
    return found

def paper(dataset):
    """{row: {metric: figure}} of the ASFT paper for a data set (name, category or resolution), in units of
    evaluate.py, from paper.json beside this file; of ShapeNet also `references`, how many."""
    rows = json.loads(Path(__file__).with_name("paper.json").read_text())
    return rows.get(" ".join(map(str, dataset or ())), {})

def as_items(array):
    """Images or point clouds, grey images in three channels. Raises ValueError for any other array."""
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] != 3:        # that would be one in RGB
        array = np.broadcast_to(array[..., None], (*array.shape, 3))
    image, form = array.dtype == np.uint8, (array.dtype.kind, array.ndim, array.shape[-1:])
    if not image and form != ("f", 3, (3,)) or image and form[1:] != (4, (3,)) or 0 in array.shape:
        raise ValueError(f"found {array.dtype} {array.shape}")
    return array
