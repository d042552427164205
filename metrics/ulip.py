"""ULIP-I: how well point clouds fit their pictures, by ULIP-2's PointBERT, which is here, and its CLIP.

    ULIP-I = mean over items of cos(point embedding, image embedding)          without logit scale, in [-1,1]

Sources: Xue et al. 2024, "ULIP-2", and github.com/salesforce/ULIP, models/pointbert, for the network; Yu et al. 2022,
"Point-BERT", for its design; github.com/erikwijmans/Pointnet2_PyTorch for its sampling of centres. The released
network of 10,000 coloured points is the default, with image embeddings of OpenCLIP's ViT-bigG-14 (laion2b_s39b_b160k);
that of 8,192 points without colour is told by its weights, and goes with another CLIP. Another network or number of
points gives figures of another scale. Coordinates are float32 and have no unit: each cloud is scaled to the unit
sphere; colours are 0..1. B batch, S clouds of a set, K points of a cloud, M groups, n points of a group, C channels,
D width, d width of a head. Needs torch, numpy and tqdm.

    net = load(path)
    score = ulip_score(features(net, clouds), image_features)       # clouds (S,K,3 or 6), image_features (S,1280)
"""
import argparse
import re
import warnings
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

FILE = "ULIP-2-PointBERT-10k-xyzrgb-pc-vit_g-objaverse_shapenet-pretrained.pt"
URL = "https://huggingface.co/datasets/SFXX/ulip/resolve/main/ULIP-2/pretrained_models/" + FILE
SHA256 = None             # none is published
GREY = 0.4                # colour of clouds without one. Source: ULIP's loader of ModelNet
BATCH = 8                 # of `features`: 1.4 GB of memory at 10,000 points


# ---------------------------------------------------------------------------------------------------------
# Sampling and grouping

def normalise(points):
    """Points (...,K,3) minus their mean, divided by the largest norm: float32 in the unit sphere. Source: ULIP."""
    points = points.float()
    points = points - points.mean(-2, keepdim=True)
    return points / points.norm(dim=-1, keepdim=True).amax(-2, keepdim=True)


def prepare(clouds, channels=6, first=0):
    """Clouds (S,K,3 or 6), xyz and perhaps rgb in 0..1 -> (S,K,channels), xyz normalised, rgb theirs or else GREY.

    float32. Raises ValueError for another shape or other colours, and for a cloud, by its number counted from `first`,
    without extent or not finite."""
    clouds = torch.as_tensor(clouds).float()
    if clouds.dim() != 3 or clouds.shape[2] not in (3, 6) or clouds.shape[1] < 1:
        raise ValueError(f"clouds {tuple(clouds.shape)}: expected (S,K,3), xyz, or (S,K,6), xyz and rgb")
    xyz, rgb = clouds[..., :3], clouds[..., 3:]
    extent = (xyz.amax(1) - xyz.amin(1)).amax(1)
    usable = (extent > 1e-15) & (extent < 1e15)                  # beyond, float32 has no squares; false for NaN
    if not usable.all():
        wrong = int(usable.int().argmin())
        raise ValueError(f"cloud {first + wrong}: its extent is {extent[wrong]:g}; expected 1e-15..1e15")
    if rgb.numel() and not 0 <= rgb.min() <= rgb.max() <= 1:
        raise ValueError(f"colours {rgb.min():g}..{rgb.max():g}: expected rgb in 0..1")
    if not rgb.numel():
        rgb = torch.full_like(xyz, GREY)
    return torch.cat([normalise(xyz), rgb], -1)[..., :channels]


def farthest_points(xyz, count):
    """Indices (B,count), int64, of points (B,K,3), each the farthest from those chosen before it, from point 0 on.

    Points with x^2 + y^2 + z^2 <= 1e-3 are never chosen, except as point 0: furthest_point_sample of Pointnet2_PyTorch
    takes them for padding."""
    B, K, _ = xyz.shape
    rows = torch.arange(B, device=xyz.device)
    last = torch.zeros_like(rows)
    axes = xyz.movedim(-1, 0).contiguous()                  # (3, B, K): sums over a leading axis are the fast ones
    nearest = torch.where(axes.square().sum(0) > 1e-3, 1e10, -1.0)         # squared distance to the chosen; -1: skipped
    chosen = torch.empty(B, count, dtype=torch.int64, device=xyz.device)
    for i in range(count):
        chosen[:, i] = last
        nearest = torch.minimum(nearest, (axes - axes[:, rows, last, None]).square().sum(0))
        last = nearest.argmax(1)
    return chosen


def squared_distances(a, b):
    """(B,M,3), (B,K,3) -> (B,M,K) as |a|^2 + |b|^2 - 2 a.b: the rounding decides between neighbours equally far."""
    return -2 * (a @ b.mT) + a.square().sum(-1)[:, :, None] + b.square().sum(-1)[:, None]


def gather(x, index):
    """(B,K,C), (B,...) -> (B,...,C)"""
    return x[torch.arange(len(x), device=x.device).view(-1, *[1] * (index.dim() - 1)), index]


# ---------------------------------------------------------------------------------------------------------
# The network

class GroupEncoder(nn.Module):
    """Groups (B,M,n,C) -> their embeddings (B,M,256): PointNet twice, the second with the maximum of the first."""

    def __init__(self, channels):
        super().__init__()
        self.first_conv, self.second_conv = (
            nn.Sequential(nn.Conv1d(a, b, 1), nn.BatchNorm1d(b), nn.ReLU(inplace=True), nn.Conv1d(b, 256, 1))
            for a, b in ((channels, 128), (512, 512)))

    def forward(self, groups):
        B, M, n, _ = groups.shape
        x = self.first_conv(groups.flatten(1, 2).mT).view(B, -1, M, n)              # (B, 256, M, n)
        x = torch.cat([x.amax(-1, keepdim=True).expand_as(x), x], 1)                # (B, 512, M, n)
        x = self.second_conv(x.flatten(2)).view(B, -1, M, n)                        # (B, 256, M, n)
        return x.amax(-1).mT                                                        # (B, M, 256)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)       # (B, heads, 1 + M, d)
        x = F.scaled_dot_product_attention(q, k, v)                                           # (B, heads, 1 + M, d)
        return self.proj(x.transpose(1, 2).flatten(2))                                        # (B, 1 + M, D)


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Transformer block with the norms in front. (B, 1 + M, D) -> (B, 1 + M, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PointTransformer(nn.Module):
    """Clouds (B,K,C) -> (B, 2 D): the class token's and the maximum of the group tokens' output."""

    def __init__(self, channels, depth, width=384, heads=6, groups=512, group_size=32):
        super().__init__()
        self.groups, self.group_size = groups, group_size
        self.encoder, self.reduce_dim = GroupEncoder(channels), nn.Linear(256, width)
        self.cls_token, self.cls_pos = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))
        self.blocks = nn.ModuleDict({"blocks": nn.ModuleList(Block(width, heads) for _ in range(depth))})
        self.norm = nn.LayerNorm(width)

    def forward(self, points):
        B, xyz = len(points), points[..., :3].contiguous()
        centres = gather(xyz, farthest_points(xyz, self.groups))                                        # (B, M, 3)
        index = squared_distances(centres, xyz).topk(self.group_size, largest=False, sorted=False)[1]   # (B, M, n)
        groups = gather(points, index)                                                                  # (B, M, n, C)
        groups = torch.cat([groups[..., :3] - centres[:, :, None], groups[..., 3:]], -1)
        tokens = self.reduce_dim(self.encoder(groups))                                                  # (B, M, D)
        x = torch.cat([self.cls_token.expand(B, -1, -1), tokens], 1)                                    # (B, 1 + M, D)
        positions = torch.cat([self.cls_pos.expand(B, -1, -1), self.pos_embed(centres)], 1)             # (B, 1 + M, D)
        for block in self.blocks["blocks"]:
            x = block(x + positions)                     # the positions again in front of each block, as in Point-BERT
        x = self.norm(x)
        return torch.cat([x[:, 0], x[:, 1:].amax(1)], -1)                                               # (B, 2 D)


class PointBERT(nn.Module):
    """Clouds (B,K,C) as `prepare` leaves them, C 3 or 6, K >= 512 -> embeddings (B,dim), of any length.

    The defaults are ULIP-2's for 10,000 coloured points; that for 8,192 without colour is PointBERT(3, 12, 512). Raises
    ValueError for another shape: of fewer than 512 points ULIP would choose some as a centre repeatedly."""

    def __init__(self, channels=6, depth=18, dim=1280):
        super().__init__()
        self.channels = channels
        self.point_encoder = PointTransformer(channels, depth)
        self.pc_projection = nn.Parameter(torch.randn(768, dim) * 768 ** -0.5)

    def forward(self, points):
        if points.dim() != 3 or points.shape[2] != self.channels or points.shape[1] < self.point_encoder.groups:
            raise ValueError(f"clouds {tuple(points.shape)}: this PointBERT expects (B,K,{self.channels}), "
                             f"K >= {self.point_encoder.groups} points")
        return self.point_encoder(points) @ self.pc_projection


# ULIP's trainer keeps its arguments, perhaps NumPy scalars, beside the weights; weights_only refuses these unless told.
SCALAR = np.float64(0).__reduce__()[0]
EXTRAS = [argparse.Namespace, (SCALAR, "numpy.core.multiarray.scalar"), (SCALAR, "numpy._core.multiarray.scalar"),
          np.dtype, *(type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64))]


def load(path):
    """PointBERT in evaluation mode on the CPU, with the weights of a file, ULIP's or the state dict alone, which tell
    its channels, depth and dim. Entries that are not the point tower's are passed over. Raises ValueError naming the
    file and what does not fit."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(EXTRAS):
            warnings.simplefilter("ignore")     # a foreign pickle also draws a warning; the one line below says it all
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:     # a broken or foreign file raises whatever its bytes provoke
        asked = re.search(r"GLOBAL (\S+)", str(e))
        reason = f"its pickle asks for {asked[1]}, save its 'state_dict' alone" if asked else type(e).__name__
        raise ValueError(f"{path}: not a file of tensors ({reason}); expected {FILE} of ULIP-2") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    state = {str(k).removeprefix("module."): v for k, v in (state.items() if isinstance(state, dict) else ())}
    state = {k: v for k, v in state.items() if k.startswith("point_encoder.") or k == "pc_projection"}
    shape = lambda key: tuple(getattr(state.get(key), "shape", ()))
    first, projection = shape("point_encoder.encoder.first_conv.0.weight"), shape("pc_projection")
    depth = len({m[1] for k in state if (m := re.match(r"point_encoder\.blocks\.blocks\.(\d+)\.", k))})
    channels = first[1] if first in ((128, 3, 1), (128, 6, 1)) else 6
    net = PointBERT(channels, depth or 18, projection[1] if len(projection) == 2 else 1280).eval()
    own = net.state_dict()
    wrong = [f"missing {k}" for k in own if k not in state] + [f"unexpected {k}" for k in state if k not in own]
    wrong += [f"{k} is {shape(k)}, expected {tuple(own[k].shape)}"
              for k in own if k in state and shape(k) != own[k].shape]
    if wrong:
        raise ValueError(f"{path}: not the weights of ULIP's PointBERT: {len(wrong)} entries do not fit: "
                         + "; ".join(wrong[:4]) + ("; ..." if len(wrong) > 4 else ""))
    net.load_state_dict(state)
    return net.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------
# The score

@contextmanager
def full_float32():
    """Inside, no product is rounded to TF32, whatever the program around has chosen."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def features(model, clouds, device=None, progress=False):
    """Embeddings (S,dim), float32 on the CPU, of clouds (S,K,3), xyz, or (S,K,6), xyz and rgb in 0..1, an array or a
    tensor in any scale, K >= 512. device: that of the model if None. Costs 54 GFLOP a cloud. Raises ValueError as
    `prepare` and the model do."""
    device = next(model.parameters()).device if device is None else torch.device(device)
    rows = [torch.empty(0, model.pc_projection.shape[1])]
    with full_float32(), torch.no_grad():
        for i in tqdm(range(0, len(clouds), BATCH), desc="PointBERT", disable=None if progress else True):
            x = prepare(clouds[i:i + BATCH], model.channels, first=i).to(device)
            rows.append(model(x).float().cpu())
    return torch.cat(rows)


def ulip_score(point_features, image_features):
    """Mean cosine similarity of embeddings (S,dim) of clouds and (S,dim) of their pictures, row by row, in [-1,1].

    A float, computed in float64. Raises ValueError for other shapes, and for a row, by its number, that is zero or not
    finite."""
    a, b = (torch.as_tensor(x).double().cpu() for x in (point_features, image_features))
    if a.dim() != 2 or a.shape != b.shape or not a.numel():
        raise ValueError(f"point features {tuple(a.shape)}, image features {tuple(b.shape)}: expected (S,dim) of both")
    for name, x in (("point", a), ("image", b)):
        usable = x.isfinite().all(1) & x.any(1)
        if not usable.all():
            raise ValueError(f"{name} features of item {int(usable.int().argmin())}: zero or not finite")
    return F.cosine_similarity(a, b, dim=1, eps=0).mean().item()
