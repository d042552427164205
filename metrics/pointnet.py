"""PointNet++ of P-FID and P-IS: the classifier whose features of point clouds Point-E's evaluation takes.

Single-scale grouping, 40 classes (ModelNet40), no normals, twice the usual width. Sources: Qi et al. 2017 for
the network; github.com/openai/point-e, point_e/evals, for every choice the figures depend on: how clouds are
normalised, where the sampling starts, what a ball keeps. Alphabet: S clouds of a set, B of a batch, P points
of a cloud, G groups with a centre each, n points of a group, C and D channels. Needs torch, numpy and tqdm.

In order: sampling and grouping of points; PointNet2 and load; features, of a set.
"""
import textwrap

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

BATCH = 64                # of Point-E's evaluation; it sets where the sampling of a cloud starts

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

def farthest_points(xyz, count):
    """Indices (B,count) of points (B,P,3), each the farthest from those before it; the first of equals.

    As in Point-E, cloud b of a batch starts at its point b."""
    B, P, _ = xyz.shape
    last = rows = torch.arange(B, device=xyz.device)
    axes = xyz.movedim(-1, 0).contiguous()                 # (3, B, P): sums over a leading axis are faster
    nearest = xyz.new_full((B, P), 1e10)                   # squared distance to the chosen ones
    chosen = torch.empty(B, count, dtype=torch.int64, device=xyz.device)
    for i in range(count):
        chosen[:, i] = last
        nearest = torch.minimum(nearest, (axes - axes[:, rows, last, None]).square().sum(0))
        last = nearest.argmax(1)
    return chosen

def ball_query(xyz, centres, radius, count):
    """Indices (B,G,count) of the first `count` points (B,P,3) within radius of each centre (B,G,3).

    First in the order of the cloud, the edge included; free places repeat the first. Source: Point-E, whose
    form |a|^2 + |b|^2 - 2 a.b is kept: its rounding decides which points the edge includes."""
    P = xyz.shape[1]
    squared = -2 * (centres @ xyz.mT) + centres.square().sum(-1)[:, :, None] + xyz.square().sum(-1)[:, None]
    index = torch.arange(P, device=xyz.device, dtype=torch.int32)             # half the memory of int64
    index = torch.where(squared > radius ** 2, P, index)                      # (B, G, P)
    index = index.topk(count, largest=False, sorted=True).values.long()       # (B, G, count)
    return torch.where(index == P, index[..., :1], index)

def gather(x, index):
    """(B,P,C), (B,...) -> (B,...,C)"""
    return x[torch.arange(len(x), device=x.device).view(-1, *[1] * (index.dim() - 1)), index]

# --- The network

class SetAbstraction(nn.Module):
    """Points (B,P,3), features (B,P,C) or None -> centres (B,G,3) and the features of their balls (B,G,D).

    Without a number of centres, all points are one group, in coordinates of their own."""

    def __init__(self, channels, widths, centres=None, radius=None, neighbours=None):
        super().__init__()
        self.centres, self.radius, self.neighbours = centres, radius, neighbours
        widths = [channels, *widths]
        self.mlp_convs = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(widths, widths[1:]))
        self.mlp_bns = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])

    def forward(self, xyz, features):
        if self.centres is None:
            centres, groups = None, torch.cat([xyz, features], -1)[:, None]   # (B, 1, P, 3 + C)
        else:
            centres = gather(xyz, farthest_points(xyz, self.centres))         # (B, G, 3)
            index = ball_query(xyz, centres, self.radius, self.neighbours)    # (B, G, n)
            groups = gather(xyz, index) - centres[:, :, None]                 # (B, G, n, 3)
            groups = groups if features is None else torch.cat([groups, gather(features, index)], -1)
        x = groups.permute(0, 3, 1, 2)                                        # (B, 3 + C, G, n)
        for conv, bn in zip(self.mlp_convs, self.mlp_bns):
            x = F.relu(bn(conv(x)), inplace=True)                             # (B, D, G, n)
        return centres, x.amax(-1).mT                                         # (B, G, D)

class PointNet2(nn.Module):
    """Normalised clouds (B,P,3) -> features (B,512), before the ReLU, and log-probabilities (B,40).

    Raises ValueError for P < 512, where some points would be centres repeatedly, and other shapes."""

    def __init__(self):
        super().__init__()
        self.sa1 = SetAbstraction(3, (128, 128, 256), centres=512, radius=0.2, neighbours=32)
        self.sa2 = SetAbstraction(256 + 3, (256, 256, 512), centres=128, radius=0.4, neighbours=64)
        self.sa3 = SetAbstraction(512 + 3, (512, 1024, 2048))
        self.fc1, self.bn1 = nn.Linear(2048, 1024), nn.BatchNorm1d(1024)
        self.fc2, self.bn2 = nn.Linear(1024, 512), nn.BatchNorm1d(512)
        self.fc3 = nn.Linear(512, 40)

    def forward(self, points):
        if points.dim() != 3 or points.shape[2] != 3 or points.shape[1] < 512:
            raise ValueError(f"clouds {tuple(points.shape)}: PointNet++ expects (B,P,3), P >= 512 points")
        xyz, x = self.sa1(points, None)                                       # (B, 512, 3), (B, 512, 256)
        xyz, x = self.sa2(xyz, x)                                             # (B, 128, 3), (B, 128, 512)
        _, x = self.sa3(xyz, x)                                               # (B, 1, 2048)
        x = F.relu(self.bn1(self.fc1(x[:, 0])))                               # (B, 1024)
        features = self.bn2(self.fc2(x))                                      # (B, 512)
        return features, self.fc3(F.relu(features)).log_softmax(-1)           # (B, 40)

# Trainers of this family keep NumPy scalars beside the weights, which weights_only refuses unless told
SCALAR = np.float64(0).__reduce__()[0]
EXTRAS = [np.dtype, *(type(np.dtype(kind)) for kind in ("float32", "float64", "int64")),
          (SCALAR, "numpy.core.multiarray.scalar"), (SCALAR, "numpy._core.multiarray.scalar")]

def load(path):
    """PointNet2 for evaluation, on the CPU, with Point-E's weights. ValueError names what is wrong."""
    net = PointNet2()
    try:
        with torch.serialization.safe_globals(EXTRAS):
            state = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict(state.get("model_state_dict", state))
    except Exception as e:     # a broken or foreign file raises whatever its bytes provoke
        found = textwrap.shorten(str(e).split("Unpickler error:")[-1], 300)
        raise ValueError(f"{path}: expected Point-E's pointnet.pt; {type(e).__name__}: {found}") from None
    return net.eval().requires_grad_(False)

# --- Features of a set

@torch.no_grad()
def features(model, clouds):
    """Features (S,512), float32 on the CPU, of clouds (S,P,3), an array or a tensor in any scale, P >= 512.

    In batches of 64 in their order, because cloud i is sampled from its point i % 64, as in Point-E on one
    device. Costs 7 GFLOP a cloud."""
    device, rows = next(model.parameters()).device, [torch.empty(0, 512)]
    for i in tqdm(range(0, len(clouds), BATCH), desc="PointNet++", disable=None):
        x = normalise(torch.as_tensor(clouds[i:i + BATCH]).to(device), i)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            rows.append(model(x)[0].float().cpu())
    return torch.cat(rows)
