"""Released weight files of the metrics' networks: where they come from, how they are found, checked and told apart.

A file is, in this order, the one that is given; the one in the cache, `weights/` in $ASFT_CACHE, else in
$XDG_CACHE_HOME/asft, else in ~/.cache/asft; or a download, if that is asked for. Nothing else touches the network, and
what is downloaded counts only with the published SHA-256. Needs torch, numpy and tqdm.
"""
import argparse
import hashlib
import http.client
import os
import urllib.error
import urllib.request
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

# network -> the file as its authors publish it; sha256 None: no published hash is known, so it is never downloaded for
# you. licence: what the repository that publishes the file states
RELEASED = {
    "inception": dict(
        file="pt_inception-2015-12-05-6726825d.pth", megabytes=96, licence="Apache-2.0 (mseitzer/pytorch-fid)",
        url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
            "pt_inception-2015-12-05-6726825d.pth",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"),
    "clip": dict(
        file="ViT-B-32.pt", megabytes=354, licence="MIT (openai/CLIP)",
        url="https://openaipublic.azureedge.net/clip/models/"
            "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        sha256="40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "pointnet": dict(
        file="pointnet.pt", megabytes=None, licence="MIT (openai/point-e)",
        url="https://openaipublic.azureedge.net/main/point-e/pointnet.pt", sha256=None),
    "ulip": dict(
        file="ULIP-2-PointBERT-10k-xyzrgb-pc-vit_g-objaverse_shapenet-pretrained.pt", megabytes=402,
        licence="BSD-3-Clause (salesforce/ULIP)", sha256=None,
        url="https://huggingface.co/datasets/SFXX/ulip/resolve/main/ULIP-2/pretrained_models/"
            "ULIP-2-PointBERT-10k-xyzrgb-pc-vit_g-objaverse_shapenet-pretrained.pt"),
    "bigg": dict(
        file="open_clip_pytorch_model.bin", megabytes=None, sha256=None,
        licence="MIT (laion/CLIP-ViT-bigG-14-laion2B-39B-b160k)",
        url="https://huggingface.co/laion/CLIP-ViT-bigG-14-laion2B-39B-b160k/resolve/main/open_clip_pytorch_model.bin"),
}

# one key of each network's state dict, behind whatever prefix a wrapper put before it
MARKS = {"Mixed_5b.branch1x1.conv.weight": "inception", "sa1.mlp_convs.0.weight": "pointnet",
         "point_encoder.reduce_dim.weight": "ulip"}

# Trainers keep their arguments and NumPy scalars beside the weights; weights_only refuses these unless told.
SCALAR = np.float64(0).__reduce__()[0]
EXTRAS = [argparse.Namespace, (SCALAR, "numpy.core.multiarray.scalar"), (SCALAR, "numpy._core.multiarray.scalar"),
          np.dtype, *(type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64))]


def sha256(path):
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2 ** 20):
            digest.update(block)
    return digest.hexdigest()


def cache_directory():
    """$ASFT_CACHE, else asft in $XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("ASFT_CACHE") or
                Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asft")


def find(name, given=None, cache=None, download=False, log=print):
    """(path, SHA-256, published) of the weights of a network of RELEASED.

    given: a path that is used whatever its hash. cache: directory, default cache_directory(). download: whether the
    network may be used. log(line) is told of a download. published: whether the file has the published hash, None where
    none is known; a given file may be another, and the caller should say so. Raises ValueError in one line that says
    what to put where."""
    released = RELEASED[name]
    target = Path(cache or cache_directory()) / "weights" / released["file"]
    path = target if given is None else Path(given)
    if given is not None and not path.is_file():
        raise ValueError(f"{path}: no such file; expected weights of {name}, as in {released['file']}")
    if not path.is_file():
        fetch(name, target, download, log)
    digest = sha256(path)
    published = None if released["sha256"] is None else digest == released["sha256"]
    if published is False and given is None:
        raise ValueError(f"{path}: its SHA-256 is {digest}, the published one {released['sha256']}; "
                         f"delete the file, it is damaged")
    return path, digest, published


def fetch(name, target, download, log):
    """Downloads a released file to target, whole and checked or not at all; raises ValueError where that cannot be."""
    released = RELEASED[name]
    size = f", {released['megabytes']} MB" if released["megabytes"] else ""
    check = f", SHA-256 {released['sha256']}" if released["sha256"] else ""
    wanted = (f"the weights of {name} are missing: put {released['url']} ({released['file']}{size}{check}) at "
              f"{target}, or give --weights PATH")
    if released["sha256"] is None:
        raise ValueError(f"{wanted}; no published SHA-256 of it is known, so it is not downloaded for you")
    if not download:
        raise ValueError(f"{wanted}; or ask for the metric by name with --metrics to download it")
    log(f"downloading {released['url']} ({released['megabytes']} MB) to {target}")
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with urllib.request.urlopen(released["url"], timeout=30) as source, open(partial, "wb") as f:
            length = int(source.headers.get("Content-Length") or 0)
            with tqdm(total=length or None, unit="B", unit_scale=True, desc=released["file"], disable=None) as bar:
                while block := source.read(2 ** 18):
                    f.write(block)
                    digest.update(block)
                    bar.update(len(block))
        if digest.hexdigest() != released["sha256"]:
            raise ValueError(f"{released['url']}: what came has the SHA-256 {digest.hexdigest()}, the published one is "
                             f"{released['sha256']}; nothing was kept")
        os.replace(partial, target)
    except (OSError, http.client.HTTPException) as e:                  # urllib's errors are OSErrors
        reason = " ".join(str(getattr(e, "reason", None) or e).split())
        raise ValueError(f"{wanted}; the download failed ({type(e).__name__}: {reason})") from None
    finally:
        partial.unlink(missing_ok=True)


def identify(path):
    """Which network of RELEASED a file of weights is for, told by its keys. Raises ValueError naming the file."""
    try:
        if not Path(path).is_file():
            raise FileNotFoundError("no such file")
        names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        if any(name.endswith("constants.pkl") for name in names):       # TorchScript: only CLIP is released as such
            return "clip"
        with warnings.catch_warnings(), torch.serialization.safe_globals(EXTRAS):
            warnings.simplefilter("ignore")                             # a foreign pickle also draws a warning
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=bool(names))
    except Exception as e:     # a broken, foreign or hostile file raises whatever its bytes provoke
        reason = str(e).splitlines()[0][:80] if isinstance(e, OSError) else type(e).__name__
        raise ValueError(f"--weights {path}: not a file of tensors that can be read ({reason})") from None
    for wrapper in ("state_dict", "model_state_dict"):
        content = content.get(wrapper, content) if isinstance(content, dict) else {}
    for mark, name in MARKS.items():
        if any(str(key).endswith(mark) for key in content):
            return name
    for key, value in content.items():      # last: a ULIP checkpoint may have its CLIP inside
        if str(key).endswith("conv1.weight") and getattr(value, "ndim", 0) == 4 and value.shape[-1] in (14, 32):
            return "clip" if value.shape[-1] == 32 else "bigg"
    raise ValueError(f"--weights {path}: weights of none of {', '.join(RELEASED)}")
