"""ULIP-I: how well point clouds fit their images, by ULIP-2's PointBERT, which is here, and its CLIP.

    ULIP-I = mean over items of cos(point embedding, image embedding)          without logit scale, in [-1,1]

Sources: Xue et al. 2024 and github.com/salesforce/ULIP, models/pointbert, for the network; Yu et al. 2022 for
its design; github.com/erikwijmans/Pointnet2_PyTorch for its centres. The default is the network of 10,000
coloured points, with image embeddings of OpenCLIP's ViT-bigG-14 (clip.py). That of 8,192 points without
colour is told by its weights and goes with another CLIP; its figures are of another scale. Alphabet: S clouds
of a set, B of a batch, P points of a cloud, G groups of n points around centres, C channels, D width.

In order: sampling of points; PointBERT and load; features, of a set; ulip_score. Needs torch, numpy and tqdm.
"""
import argparse
import textwrap
from collections import OrderedDict

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

GREY = 0.4                # colour of clouds without one. Source: ULIP's loader of ModelNet
BATCH = 8                 # of `features`: 1.4 GB of memory at 10,000 points

# --- Sampling and grouping

def normalise(points, first=0):
    """Points (S,P,3) minus their mean, divided by the largest norm: float32 in the unit sphere.

    Raises ValueError for a cloud, by its number counted from `first`, that is not finite or has no extent."""
    points = points.float()
    extent = (points.amax(-2) - points.amin(-2)).amax(-1)
    for i in (~((extent > 1e-15) & (extent < 1e15))).nonzero():        # beyond, float32 has no squares
        raise ValueError(f"cloud {first + int(i)}: its extent is {float(extent[i]):g}; expected 1e-15..1e15")
    points = points - points.mean(-2, keepdim=True)
    return points / points.norm(dim=-1, keepdim=True).amax(-2, keepdim=True)

def prepare(clouds, channels=6, first=0):
    """Clouds (S,P,3 or 6), xyz and perhaps rgb in 0..1 -> (S,P,channels): xyz normalised, rgb or GREY.

    Raises ValueError for another shape or other colours, and as normalise does."""
    clouds = torch.as_tensor(clouds).float()
    if clouds.dim() != 3 or clouds.shape[2] not in (3, 6) or clouds.shape[1] < 1:
        raise ValueError(f"clouds {tuple(clouds.shape)}: expected (S,P,3), xyz, or (S,P,6), xyz and rgb")
    xyz, rgb = normalise(clouds[..., :3], first), clouds[..., 3:]
    if not rgb.numel():
        rgb = torch.full_like(xyz, GREY)
    if not 0 <= rgb.min() <= rgb.max() <= 1:
        raise ValueError(f"colours {rgb.min():g}..{rgb.max():g}: expected rgb in 0..1")
    return torch.cat([xyz, rgb], -1)[..., :channels]

def farthest_points(xyz, count):
    """Indices (B,count) of points (B,P,3), each the farthest from those before it, from point 0 on.

    Source: Pointnet2_PyTorch, which takes points with x^2 + y^2 + z^2 <= 1e-3 for padding and skips them."""
    B, P, _ = xyz.shape
    rows = torch.arange(B, device=xyz.device)
    last = torch.zeros_like(rows)
    axes = xyz.movedim(-1, 0).contiguous()                 # (3, B, P): sums over a leading axis are faster
    nearest = torch.where(axes.square().sum(0) > 1e-3, 1e10, -1.0)     # squared distance; -1: never chosen
    chosen = torch.empty(B, count, dtype=torch.int64, device=xyz.device)
    for i in range(count):
        chosen[:, i] = last
        nearest = torch.minimum(nearest, (axes - axes[:, rows, last, None]).square().sum(0))
        last = nearest.argmax(1)
    return chosen

def gather(x, index):
    """(B,P,C), (B,...) -> (B,...,C)"""
    return x[torch.arange(len(x), device=x.device).view(-1, *[1] * (index.dim() - 1)), index]

# --- The network

class GroupEncoder(nn.Module):
    """Groups (B,G,n,C) -> embeddings (B,G,256): PointNet twice, the second with the maximum of the first."""

    def __init__(self, channels):
        super().__init__()
        self.first_conv, self.second_conv = (
            nn.Sequential(nn.Conv1d(a, b, 1), nn.BatchNorm1d(b), nn.ReLU(inplace=True), nn.Conv1d(b, 256, 1))
            for a, b in ((channels, 128), (512, 512)))

    def forward(self, groups):
        B, G, n, _ = groups.shape
        x = self.first_conv(groups.flatten(1, 2).mT).view(B, -1, G, n)                # (B, 256, G, n)
        x = torch.cat([x.amax(-1, keepdim=True).expand_as(x), x], 1)                  # (B, 512, G, n)
        x = self.second_conv(x.flatten(2)).view(B, -1, G, n)                          # (B, 256, G, n)
        return x.amax(-1).mT                                                          # (B, G, 256)

class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)                                   # (B, heads, 1 + G, d)
        return self.proj(x.transpose(1, 2).flatten(2))                                # (B, 1 + G, D)

class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        layers = dict(fc1=nn.Linear(width, 4 * width), gelu=nn.GELU(), fc2=nn.Linear(4 * width, width))
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

class PointTransformer(nn.Module):
    """Clouds (B,P,C) -> (B, 2 D): the class token's and the maximum of the group tokens' output."""

    def __init__(self, channels, depth, width=384, heads=6, groups=512, group_size=32):
        super().__init__()
        self.groups, self.group_size = groups, group_size
        self.encoder, self.reduce_dim = GroupEncoder(channels), nn.Linear(256, width)
        self.cls_token, self.cls_pos = (nn.Parameter(torch.randn(1, 1, width)) for _ in range(2))
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))
        self.blocks = nn.ModuleDict(dict(blocks=nn.ModuleList(Block(width, heads) for _ in range(depth))))
        self.norm = nn.LayerNorm(width)

    def forward(self, points):
        B, xyz = len(points), points[..., :3].contiguous()
        centres = gather(xyz, farthest_points(xyz, self.groups))                      # (B, G, 3)
        norms = centres.square().sum(-1)[:, :, None], xyz.square().sum(-1)[:, None]
        squared = -2 * (centres @ xyz.mT) + norms[0] + norms[1]                       # (B, G, P)
        index = squared.topk(self.group_size, largest=False, sorted=False)[1]         # (B, G, n)
        groups = gather(points, index)                                                # (B, G, n, C)
        groups = torch.cat([groups[..., :3] - centres[:, :, None], groups[..., 3:]], -1)
        tokens = self.reduce_dim(self.encoder(groups))                                # (B, G, D)
        x = torch.cat([self.cls_token.expand(B, -1, -1), tokens], 1)                  # (B, 1 + G, D)
        positions = torch.cat([self.cls_pos.expand(B, -1, -1), self.pos_embed(centres)], 1)
        for block in self.blocks["blocks"]:
            x = block(x + positions)           # the positions again in front of each block, as in Point-BERT
        x = self.norm(x)
        return torch.cat([x[:, 0], x[:, 1:].amax(1)], -1)                             # (B, 2 D)

class PointBERT(nn.Module):
    """Clouds (B,P,C) as `prepare` leaves them -> embeddings (B,dim), of any length.

    By default ULIP-2's for 10,000 coloured points; PointBERT(3, 12, 512) is that for 8,192 without colour.
    ValueError for P < 512, where some points would be centres repeatedly, and other shapes."""

    def __init__(self, channels=6, depth=18, dim=1280):
        super().__init__()
        self.channels = channels
        self.point_encoder = PointTransformer(channels, depth)
        self.pc_projection = nn.Parameter(torch.randn(768, dim) * 768 ** -0.5)

    def forward(self, points):
        if points.dim() != 3 or points.shape[2] != self.channels or points.shape[1] < 512:
            raise ValueError(f"clouds {tuple(points.shape)}: expected (B,P,{self.channels}), P >= 512 points")
        return self.point_encoder(points) @ self.pc_projection

# Trainers keep their arguments and NumPy scalars beside the weights; weights_only refuses these unless told
SCALAR = np.float64(0).__reduce__()[0]
EXTRAS = [np.dtype, *(type(np.dtype(kind)) for kind in ("float32", "float64", "int64")), argparse.Namespace,
          (SCALAR, "numpy.core.multiarray.scalar"), (SCALAR, "numpy._core.multiarray.scalar")]

def load(path):
    """PointBERT for evaluation, on the CPU, with the weights of ULIP's file or of its state dict alone.

    They tell its channels, depth and dim; entries that are not the point tower's are passed over. ValueError
    names the file and what does not fit."""
    try:
        with torch.serialization.safe_globals(EXTRAS):
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = {str(k).removeprefix("module."): v for k, v in state.get("state_dict", state).items()}
        state = {k: v for k, v in state.items() if k.startswith("point_encoder.") or k == "pc_projection"}
        channels = state["point_encoder.encoder.first_conv.0.weight"].shape[1]
        depth = len({k.split(".")[3] for k in state if k.startswith("point_encoder.blocks.")})
        net = PointBERT(channels, depth, state["pc_projection"].shape[1])
        net.load_state_dict(state)
    except Exception as e:     # a broken or foreign file raises whatever its bytes provoke
        found = textwrap.shorten(str(e).split("Unpickler error:")[-1], 300)
        raise ValueError(f"{path}: expected ULIP-2's PointBERT; {type(e).__name__}: {found}") from None
    return net.eval().requires_grad_(False)

# --- The score

@torch.no_grad()
def features(model, clouds):
    """Embeddings (S,dim), float32 on the CPU, of clouds as `prepare` takes them, P >= 512. Costs 54 GFLOP a
    cloud."""
    rows = [torch.empty(0, model.pc_projection.shape[1])]
    for i in tqdm(range(0, len(clouds), BATCH), desc="PointBERT", disable=None):
        x = prepare(clouds[i:i + BATCH], model.channels, first=i).to(model.pc_projection.device)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            rows.append(model(x).float().cpu())
    return torch.cat(rows)

def ulip_score(point_features, image_features):
    """Mean cosine similarity of embeddings (S,dim) of clouds and (S,dim) of their images, in float64.

    Raises ValueError for other shapes, and for a row, by its number, that is zero or not finite."""
    a, b = (torch.as_tensor(x).double().cpu() for x in (point_features, image_features))
    if a.dim() != 2 or a.shape != b.shape or not a.numel():
        raise ValueError(f"features of points {tuple(a.shape)}, of images {tuple(b.shape)}: expected (S,dim)")
    for name, x in (("point", a), ("image", b)):
        for i in (~(x.isfinite().all(1) & x.any(1))).nonzero():
            raise ValueError(f"{name} features of item {int(i)}: zero or not finite")
    return F.cosine_similarity(a, b, dim=1, eps=0).mean().item()
