"""Released weight files of the metrics' networks: where they come from, how to find and tell them apart.

A file is, in this order, the one that is given; the one in the cache, `weights/` in $ASFT_CACHE, else in
$XDG_CACHE_HOME/asft, else in ~/.cache/asft; or a download, if that is asked for. Nothing else touches the
network, and a download counts only with the published SHA-256. In order: RELEASED, the table of files;
sha256, cache_directory; find and fetch; identify. Needs tqdm.
"""
import hashlib
import http.client
import os
import urllib.request
import zipfile
from pathlib import Path

from tqdm import tqdm

# network -> the file as its authors publish it. sha256 None: none is published, so it is never downloaded.
RELEASED = {
    "inception": dict(
        url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
            "pt_inception-2015-12-05-6726825d.pth",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        megabytes=96),
    "clip": dict(
        url="https://openaipublic.azureedge.net/clip/models/"
            "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        sha256="40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        megabytes=354),
    "pointnet": dict(url="https://openaipublic.azureedge.net/main/point-e/pointnet.pt", sha256=None),
    "ulip": dict(
        url="https://huggingface.co/datasets/SFXX/ulip/resolve/main/ULIP-2/pretrained_models/"
            "ULIP-2-PointBERT-10k-xyzrgb-pc-vit_g-objaverse_shapenet-pretrained.pt",
        sha256=None),
    "bigg": dict(
        url="https://huggingface.co/laion/CLIP-ViT-bigG-14-laion2B-39B-b160k/resolve/main/"
            "open_clip_pytorch_model.bin",
        sha256=None),
    "dinov2": dict(     # Meta states no SHA-256; this is that of three copies by others, which agree
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        sha256="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        megabytes=1218),
}

# A part of one key of each network's state dict. ULIP's file may hold its CLIP, so it comes first; bigG's key
# is of its last layer, since the others are also ViT-B/32's
MARKS = {b"Mixed_5b.branch1x1.conv.weight": "inception", b"sa1.mlp_convs.0.weight": "pointnet",
         b"point_encoder.reduce_dim.weight": "ulip", b"blocks.0.ls1.gamma": "dinov2",
         b"transformer.resblocks.47.": "bigg", b"class_embedding": "clip"}

def sha256(path):
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

def cache_directory():
    """$ASFT_CACHE, else asft in $XDG_CACHE_HOME, else in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ASFT_CACHE") or Path(base) / "asft")

def find(name, given=None, cache=None, download=False, log=print):
    """(path, SHA-256, published) of the weights of a network of RELEASED.

    given: a path that is used whatever its hash. cache: directory, default cache_directory(). download:
    whether the network may be used; log(line) is told of it. published: whether the file has the published
    hash, None if none is known; the caller should warn of another file. ValueError says what to put where."""
    url, expected = RELEASED[name]["url"], RELEASED[name]["sha256"]
    path = Path(given or Path(cache or cache_directory()) / "weights" / url.split("/")[-1])
    if not path.is_file():
        if given:
            raise ValueError(f"{path}: no such file; expected weights of {name}, as in {url}")
        fetch(name, path, download, log)
    digest = sha256(path)
    if expected and digest != expected and not given:
        raise ValueError(f"{path}: its SHA-256 is {digest}, published {expected}; it is damaged, delete it")
    return path, digest, digest == expected if expected else None

def fetch(name, target, download, log):
    """Downloads a released file to target, whole and checked or not at all; ValueError says why not."""
    url, size, expected = (RELEASED[name].get(key) for key in ("url", "megabytes", "sha256"))
    wanted = f"the weights of {name} are missing: put {url} at {target}, or give --weights PATH"
    if expected is None:
        raise ValueError(f"{wanted}; no published SHA-256 of it is known, so it is not downloaded for you")
    wanted = f"{wanted} ({size} MB, SHA-256 {expected})"
    if not download:
        raise ValueError(f"{wanted}; or ask for the metric by name with --metrics to download it")
    log(f"downloading {url} ({size} MB) to {target}")
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as source, open(partial, "wb") as f:
            length = int(source.headers.get("Content-Length") or 0) or None
            with tqdm(total=length, unit="B", unit_scale=True, desc=target.name, disable=None) as bar:
                while block := source.read(2 ** 18):
                    f.write(block)
                    bar.update(len(block))
        if (digest := sha256(partial)) != expected:
            raise ValueError(f"{url}: found the SHA-256 {digest}, published is {expected}; nothing was kept")
        os.replace(partial, target)
    except (OSError, http.client.HTTPException) as e:                  # urllib's errors are OSErrors
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise ValueError(f"{wanted}; the download failed ({reason})") from None
    finally:
        partial.unlink(missing_ok=True)

def identify(path):
    """The network of RELEASED that a file of weights is for, told by the names of its tensors, which nothing
    unpickles. ValueError names the file."""
    try:
        with open(path, "rb") as file:
            head = file.read(2 ** 24)                                  # older files have the names in front
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                if any(name.endswith("constants.pkl") for name in names):    # TorchScript: only CLIP is so
                    return "clip"
                head = b"".join(archive.read(name) for name in names if name.endswith("data.pkl"))
    except Exception as e:     # a broken file raises whatever its bytes provoke
        raise ValueError(f"--weights {path}: not a file of tensors ({type(e).__name__})") from None
    for mark, name in MARKS.items():
        if mark in head:
            return name
    raise ValueError(f"--weights {path}: weights of none of {', '.join(RELEASED)}")
