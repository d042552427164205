"""PointNet++ of P-FID and P-IS: the classifier that Point-E's evaluation takes its features of point clouds from.

Single-scale grouping, 40 classes (ModelNet40), no normals, twice the usual width. Sources: Qi et al. 2017,
"PointNet++", for the network; github.com/openai/point-e, point_e/evals, for every choice the figures depend on: how
clouds are normalised, where the sampling starts, what a ball keeps. Coordinates are float32 and have no unit: each
cloud is scaled to the unit sphere. B batch, S clouds of a set, K points of a cloud, M centres, n neighbours of a
centre, C and D channels. Needs torch, numpy and tqdm.

    net = load(path)
    x = features(net, clouds)          # clouds (S,K,3), K >= 512 -> (S,512)
"""
import warnings
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

FILE = "pointnet.pt"
URL = "https://openaipublic.azureedge.net/main/point-e/" + FILE
SHA256 = None             # none is published
BATCH = 64                # of Point-E's evaluation; it sets where the sampling of a cloud starts


# ---------------------------------------------------------------------------------------------------------
# Sampling and grouping

def normalise(points):
    """Points (...,K,3) minus their mean, divided by the largest norm: float32 in the unit sphere. Source: Point-E."""
    points = points.float()
    points = points - points.mean(-2, keepdim=True)
    return points / points.norm(dim=-1, keepdim=True).amax(-2, keepdim=True)


def farthest_points(xyz, count, start=None):
    """Indices (B,count), int64, of points (B,K,3), each the farthest from those chosen before it; of equals, the first.

    start: index of the first choice, an int or int64 (B,); None is Point-E's, the position in the batch. Where
    count > K, points repeat. Raises ValueError for a start outside 0..K-1."""
    B, K, _ = xyz.shape
    rows = torch.arange(B, device=xyz.device)
    last = rows if start is None else torch.as_tensor(start, device=xyz.device).expand(B)
    if B and not 0 <= int(last.min()) <= int(last.max()) < K:
        raise ValueError(f"start {last.min()}..{last.max()}: clouds of {K} points have the indices 0..{K - 1}")
    axes = xyz.movedim(-1, 0).contiguous()                  # (3, B, K): sums over a leading axis are the fast ones
    nearest = xyz.new_full((B, K), 1e10)                    # squared distance to the chosen ones
    chosen = torch.empty(B, count, dtype=torch.int64, device=xyz.device)
    for i in range(count):
        chosen[:, i] = last
        nearest = torch.minimum(nearest, (axes - axes[:, rows, last, None]).square().sum(0))
        last = nearest.argmax(1)
    return chosen


def squared_distances(a, b):
    """(B,M,3), (B,K,3) -> (B,M,K) as |a|^2 + |b|^2 - 2 a.b: the rounding decides which points a ball's edge keeps."""
    return -2 * (a @ b.mT) + a.square().sum(-1)[:, :, None] + b.square().sum(-1)[:, None]


def ball_query(xyz, centres, radius, count):
    """Indices (B,M,count), int64, of the first `count` points (B,K,3), in the order of the cloud, within radius of
    each centre (B,M,3), the edge included. Free places repeat the first. A ball around a point of the cloud holds at
    least that; one that holds none gives the index K."""
    B, K, _ = xyz.shape
    index = torch.arange(K, device=xyz.device, dtype=torch.int32)                        # half the memory of int64
    index = torch.where(squared_distances(centres, xyz) > radius ** 2, K, index)         # (B, M, K)
    index = index.topk(min(count, K), largest=False, sorted=True).values.long()          # (B, M, count)
    index = torch.where(index == K, index[..., :1], index)
    return torch.cat([index, index[..., :1].expand(-1, -1, count - index.shape[-1])], -1)


def gather(x, index):
    """(B,K,C), (B,...) -> (B,...,C)"""
    return x[torch.arange(len(x), device=x.device).view(-1, *[1] * (index.dim() - 1)), index]


# ---------------------------------------------------------------------------------------------------------
# The network

class SetAbstraction(nn.Module):
    """Points (B,K,3) with features (B,K,C) or None -> M centres (B,M,3) and the features of their balls (B,M,D).

    Without `centres`, all points are one group, in coordinates of their own."""

    def __init__(self, channels, widths, centres=None, radius=None, neighbours=None):
        super().__init__()
        self.centres, self.radius, self.neighbours = centres, radius, neighbours
        widths = [channels, *widths]
        self.mlp_convs = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(widths, widths[1:]))
        self.mlp_bns = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])

    def forward(self, xyz, features, start=None):
        if self.centres is None:
            centres, groups = None, torch.cat([xyz, features], -1)[:, None]                     # (B, 1, K, 3 + C)
        else:
            centres = gather(xyz, farthest_points(xyz, self.centres, start))                    # (B, M, 3)
            index = ball_query(xyz, centres, self.radius, self.neighbours)                      # (B, M, n)
            groups = gather(xyz, index) - centres[:, :, None]                                   # (B, M, n, 3)
            groups = groups if features is None else torch.cat([groups, gather(features, index)], -1)
        x = groups.permute(0, 3, 1, 2)                                                          # (B, 3 + C, M, n)
        for conv, bn in zip(self.mlp_convs, self.mlp_bns):
            x = F.relu(bn(conv(x)), inplace=True)                                               # (B, D, M, n)
        return centres, x.amax(-1).mT                                                           # (B, M, D)


class PointNet2(nn.Module):
    """Clouds (B,K,3), normalised, K >= 512 -> features (B,512), before the ReLU, and log-probabilities (B,40).

    start: int64 (B,), where farthest point sampling starts in each; None is Point-E's, the position in the batch.
    Raises ValueError for another shape: of fewer than 512 points Point-E would choose some as a centre repeatedly."""

    def __init__(self):
        super().__init__()
        self.sa1 = SetAbstraction(3, (128, 128, 256), centres=512, radius=0.2, neighbours=32)
        self.sa2 = SetAbstraction(256 + 3, (256, 256, 512), centres=128, radius=0.4, neighbours=64)
        self.sa3 = SetAbstraction(512 + 3, (512, 1024, 2048))
        self.fc1, self.bn1 = nn.Linear(2048, 1024), nn.BatchNorm1d(1024)
        self.fc2, self.bn2 = nn.Linear(1024, 512), nn.BatchNorm1d(512)
        self.fc3 = nn.Linear(512, 40)

    def forward(self, points, start=None):
        if points.dim() != 3 or points.shape[2] != 3 or points.shape[1] < 512:
            raise ValueError(f"clouds {tuple(points.shape)}: PointNet++ expects (B,K,3), K >= 512 points")
        xyz, x = self.sa1(points, None, start)                       # (B, 512, 3), (B, 512, 256)
        xyz, x = self.sa2(xyz, x, start)                             # (B, 128, 3), (B, 128, 512)
        _, x = self.sa3(xyz, x)                                      # (B, 1, 2048)
        x = F.relu(self.bn1(self.fc1(x[:, 0])))                      # (B, 1024)
        features = self.bn2(self.fc2(x))                             # (B, 512)
        return features, self.fc3(F.relu(features)).log_softmax(-1)  # (B, 40)


# Trainers of this family keep accuracies as NumPy scalars beside the weights, which weights_only refuses unless told.
SCALAR = np.float64(0).__reduce__()[0]
NUMPY = [(SCALAR, "numpy.core.multiarray.scalar"), (SCALAR, "numpy._core.multiarray.scalar"), np.dtype,
         *(type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64))]


def load(path):
    """PointNet2 in evaluation mode on the CPU, with the weights of a file: Point-E's, or the state dict alone. Raises
    ValueError naming the file and what does not fit."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(NUMPY):
            warnings.simplefilter("ignore")     # a foreign pickle also draws a warning; the one line below says it all
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:     # a broken or foreign file raises whatever its bytes provoke
        raise ValueError(f"{path}: not a file of tensors ({type(e).__name__}); expected {FILE} of Point-E") from None
    state = state.get("model_state_dict", state) if isinstance(state, dict) else None
    net = PointNet2().eval()
    own, state = net.state_dict(), state if isinstance(state, dict) else {}
    wrong = [f"missing {k}" for k in own if k not in state] + [f"unexpected {k}" for k in state if k not in own]
    wrong += [f"{k} is {tuple(getattr(state[k], 'shape', ()))}, expected {tuple(own[k].shape)}"
              for k in own if k in state and getattr(state[k], "shape", None) != own[k].shape]
    if wrong:
        raise ValueError(f"{path}: not the weights of {FILE} of Point-E: {len(wrong)} entries do not fit: "
                         + "; ".join(wrong[:4]) + ("; ..." if len(wrong) > 4 else ""))
    net.load_state_dict(state)
    return net.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------
# Features of a set

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
    """Features (S,512), float32 on the CPU, of clouds (S,K,3), an array or a tensor in any scale, K >= 512.

    In batches of 64 in their order, because cloud i is sampled from its point i % 64, as in Point-E on one device: a
    process that takes whole batches of 64 gets what one that takes all gets. device: that of the model if None. Costs
    7 GFLOP a cloud. Raises ValueError for another shape, and for a cloud, by number, without extent or not finite."""
    device = next(model.parameters()).device if device is None else torch.device(device)
    if clouds.ndim != 3 or clouds.shape[2] != 3 or clouds.shape[1] < 512:
        raise ValueError(f"clouds {tuple(clouds.shape)}: PointNet++ expects (S,K,3), K >= 512 points")
    rows = [torch.empty(0, 512)]
    with full_float32(), torch.no_grad():
        for i in tqdm(range(0, len(clouds), BATCH), desc="PointNet++", disable=None if progress else True):
            x = torch.as_tensor(clouds[i:i + BATCH]).to(device)
            extent = (x.amax(1) - x.amin(1)).amax(1).double()
            usable = (extent > 1e-15) & (extent < 1e15)          # beyond, float32 has no squares; false for NaN
            if not usable.all():
                wrong = int(usable.int().argmin())
                raise ValueError(f"cloud {i + wrong}: its extent is {extent[wrong]:g}; expected 1e-15..1e15")
            rows.append(model(normalise(x))[0].float().cpu())
    return torch.cat(rows)
