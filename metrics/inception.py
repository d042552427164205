"""Inception-v3 of FID, sFID and the Inception Score: TensorFlow's graph of 2015-12-05, in torch.

Weights are those of the port by pytorch-fid and torch-fidelity (one file, keys in torchvision's names). The
network differs from torchvision's: average pools of the branches leave the padding out of the mean, Mixed_7c
pools by the maximum, there are 1008 classes and no auxiliary head. Needs torch, numpy and Pillow.

In order: the three resizes in use; Unit and Mixed, a block; InceptionV3; load, features; inception_score.
"""
import textwrap

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

# --- Images to inputs: uint8 (B,H,W,3) -> float32 (B,3,299,299). Here evaluators disagree most.

def planes(images):
    """uint8 (B,H,W,3) -> float32 (B,3,H,W) in 0..255. ValueError for others: 0..1 would pass unnoticed."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}: expected uint8 (B,H,W,3)")
    return images.permute(0, 3, 1, 2).float()

def tf1_axis(x, dim, size=299):
    """Bilinear along one axis as TensorFlow 1 samples it: source = i * in/out, without half-pixel shift."""
    n = x.shape[dim]
    at = torch.arange(size, device=x.device, dtype=torch.float32) * (n / size)
    low = at.floor().long().clamp_max(n - 1)
    share = (at - low).view([size if d == dim else 1 for d in range(x.dim())])
    a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp_max(n - 1))
    return a + (b - a) * share

def resize_tf1(images):
    """As ADM's evaluator and torch-fidelity: TensorFlow 1's bilinear, then (x - 128) / 128."""
    return (tf1_axis(tf1_axis(planes(images), 2), 3) - 128) / 128

def resize_pytorch_fid(images):
    """As pytorch-fid: half-pixel bilinear without antialiasing, then (x - 127.5) / 127.5."""
    x = planes(images) / 255
    return 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1

def resize_clean(images):
    """As clean-fid: Pillow's antialiased bicubic in float32, clipped to 0..255, then (x - 128) / 128."""
    channels = (Image.fromarray(c, mode="F") for c in planes(images).cpu().flatten(0, 1).numpy())
    x = np.stack([c.resize((299, 299), Image.Resampling.BICUBIC) for c in channels])
    x = torch.from_numpy(x).view(-1, 3, 299, 299).clamp(0, 255)
    return (x.to(images.device) - 128) / 128

RESIZES = {"tf1": resize_tf1, "pytorch-fid": resize_pytorch_fid, "clean": resize_clean}

# --- The network

class Unit(nn.Module):
    """Convolution without bias, batch normalisation (eps 1e-3), ReLU. By default the size stays."""

    def __init__(self, channels, out, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))

AVERAGE = nn.AvgPool2d(3, 1, 1, count_include_pad=False)            # of what lies inside the image
MAXIMUM, HALVE = nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 2)

class Mixed(nn.Module):
    """Branches side by side, their outputs joined: rows of units (out, kernel[, stride, padding]).

    Units of a branch are called BRANCH_1, ..., a single one BRANCH, two in a list, which stand side by side,
    BRANCH_1a and BRANCH_1b. The last branch begins with `pool`."""

    def __init__(self, channels, pool, **branches):
        super().__init__()
        self.pool, self.paths = pool, []
        for branch, steps in branches.items():
            width, path = channels, []
            for n, step in enumerate(steps, 1):
                name = branch if len(steps) == 1 else f"{branch}_{n}"
                units = {name: step} if isinstance(step, tuple) else dict(zip((f"{name}a", f"{name}b"), step))
                for unit, (out, *options) in units.items():
                    self.add_module(unit, Unit(width, out, *options))
                path.append([*units])
                width = sum(out for out, *_ in units.values())
            self.paths.append(path)

    def forward(self, x):
        outputs = []
        for path in self.paths:
            y = self.pool(x) if path is self.paths[-1] else x
            for names in path:
                y = torch.cat([getattr(self, name)(y) for name in names], 1)
            outputs.append(y)
        return torch.cat(outputs, 1)

def mixed_5(channels, pool):
    """35 x 35: Mixed_5b, 5c, 5d."""
    return Mixed(channels, AVERAGE, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                 branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(pool, 1)])

def mixed_6(c):
    """17 x 17 with 7 x 7 convolutions in two halves: Mixed_6b to 6e. c: channels between these."""
    wide, high = (1, 7), (7, 1)
    return Mixed(768, AVERAGE, branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, wide), (192, high)],
                 branch7x7dbl=[(c, 1), (c, high), (c, wide), (c, high), (192, wide)], branch_pool=[(192, 1)])

def mixed_7(channels, pool):
    """8 x 8: Mixed_7b, 7c. `pool` is the mean in 7b and, a quirk of the graph, the maximum in 7c."""
    halves = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(channels, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), halves],
                 branch3x3dbl=[(448, 1), (384, 3), halves], branch_pool=[(192, 1)])

class InceptionV3(nn.Module):
    """(B,3,299,299) float32, scaled as a resize above leaves it -> (pool, spatial, logits):

    pool (B,2048): the features of FID. spatial (B,2023): those of sFID, the first 7 channels of mixed_6/conv,
    in ADM's order of rows, columns, channels. logits (B,1008): without bias, for the Inception Score."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Unit(3, 32, 3, 2, 0), Unit(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Unit(64, 80, 1), Unit(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_5(192, 32), mixed_5(256, 64), mixed_5(288, 64)
        self.Mixed_6a = Mixed(288, HALVE, branch3x3=[(384, 3, 2, 0)],
                              branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2, 0)], branch_pool=[])
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(mixed_6, (128, 160, 160, 192))
        self.Mixed_7a = Mixed(768, HALVE, branch3x3=[(192, 1), (320, 3, 2, 0)], branch7x7x3=[
            (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, 0)], branch_pool=[])
        self.Mixed_7b, self.Mixed_7c = mixed_7(1280, AVERAGE), mixed_7(2048, MAXIMUM)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)                          # (B, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))            # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(HALVE(x)))                         # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(HALVE(x))))                    # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))                           # (B, 768, 17, 17)
        spatial = self.Mixed_6d.branch1x1(x)[:, :7]                                  # mixed_6/conv
        x = self.Mixed_6e(self.Mixed_6d(x))                                          # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                           # (B, 2048, 8, 8)
        pool = x.mean((2, 3))                                                        # (B, 2048)
        spatial = spatial.permute(0, 2, 3, 1).flatten(1)                             # (B, 2023)
        return pool, spatial, pool @ self.fc.weight.mT                               # logits (B, 1008)

def load(path):
    """InceptionV3 for evaluation, on the CPU, with the port's weights. ValueError names what is wrong."""
    net = InceptionV3()
    counters = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}
    try:
        net.load_state_dict(counters | torch.load(path, map_location="cpu", weights_only=True))
    except Exception as e:     # a broken or foreign file raises whatever its bytes provoke
        found = textwrap.shorten(str(e).split("Unpickler error:")[-1], 300)
        raise ValueError(f"{path}: expected pytorch-fid's Inception; {type(e).__name__}: {found}") from None
    # channels last: twice as fast on a CPU, and what tensor cores want
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)

def features(net, images, resize="tf1"):
    """{feature: (B,d)} of uint8 (B,H,W,3): pool of FID, spatial of sFID, classes of the Inception Score."""
    pool, spatial, logits = net(RESIZES[resize](images))
    return {"pool": pool, "spatial": spatial, "classes": logits.double().softmax(1)}

# --- Inception Score

def inception_score(probs, splits=10):
    """exp of the mean KL divergence of class probabilities from their mean (Salimans et al. 2016).

    probs (N,C), rows that sum to 1 -> (mean, standard deviation with ddof 0) over `splits` equal runs of
    consecutive items, as in ADM's evaluator; float64. Raises ValueError for fewer items than splits."""
    probs = torch.as_tensor(probs).double()
    if probs.dim() != 2 or not 1 <= splits <= len(probs):
        raise ValueError(f"probabilities {tuple(probs.shape)}: {splits} splits need (N,C) with N >= {splits}")
    if not ((probs >= 0) & probs.isfinite()).all():
        raise ValueError("probabilities of the Inception Score must be finite and not negative")
    kls = (torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(0)) for p in probs.tensor_split(splits))
    scores = torch.stack([kl.sum(1).mean().exp() for kl in kls])
    return scores.mean().item(), scores.std(correction=0).item()
