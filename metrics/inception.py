"""Inception-v3 of FID, sFID and the Inception Score: the network of the TensorFlow graph of 2015-12-05, in torch.

Weights are those of the port by pytorch-fid and torch-fidelity (one file, keys in torchvision's names). It differs from
torchvision's Inception: average pools of the branches leave the padding out of the mean, Mixed_7c pools by the maximum,
there are 1008 classes and no auxiliary head. B pictures of 299 x 299; needs torch, and for one of the resizes Pillow.

    net, resize = load(path), RESIZES["tf1"]
    pool, spatial, logits = net(resize(pictures))          # pictures uint8 (B,H,W,3)
"""
import warnings

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + FILE
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


# ---------------------------------------------------------------------------------------------------------
# Pictures to inputs: uint8 (B,H,W,3) -> float32 (B,3,299,299). The main source of disagreement between evaluators.

def planes(pictures):
    """uint8 (B,H,W,3) -> float32 (B,3,H,W) in 0..255. ValueError for anything else: 0..1 would pass unnoticed."""
    if pictures.dtype != torch.uint8 or pictures.dim() != 4 or pictures.shape[3] != 3:
        raise ValueError(f"pictures are {pictures.dtype} {tuple(pictures.shape)}: expected uint8 (B,H,W,3)")
    return pictures.permute(0, 3, 1, 2).float()


def tf1_axis(x, dim, size=299):
    """Bilinear along one axis as TensorFlow 1 samples it: source = i * in/out, no half-pixel shift, no antialiasing, the
    upper neighbour clamped to the edge."""
    n = x.shape[dim]
    at = torch.arange(size, device=x.device, dtype=torch.float32) * (n / size)
    low = at.floor().long().clamp_max(n - 1)
    shape = [1] * x.dim()
    shape[dim] = size
    share = (at - low).view(shape)
    a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp_max(n - 1))
    return a + (b - a) * share


def resize_tf1(pictures):
    """As ADM's evaluator and torch-fidelity: TensorFlow 1's bilinear, then (x - 128) / 128."""
    x = planes(pictures)
    return (tf1_axis(tf1_axis(x, 2), 3) - 128) / 128


def resize_pytorch_fid(pictures):
    """As pytorch-fid: half-pixel bilinear without antialiasing, then (x - 127.5) / 127.5."""
    x = planes(pictures) / 255
    return 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1


def resize_clean(pictures):
    """As clean-fid: Pillow's antialiased bicubic per channel in float32, clipped to 0..255, then (x - 128) / 128."""
    channel = lambda c: np.asarray(Image.fromarray(c, mode="F").resize((299, 299), Image.Resampling.BICUBIC))
    x = np.stack([[channel(c) for c in p] for p in planes(pictures).cpu().numpy()])
    return (torch.from_numpy(x).clamp(0, 255).to(pictures.device) - 128) / 128


RESIZES = {"tf1": resize_tf1, "pytorch-fid": resize_pytorch_fid, "clean": resize_clean}


# ---------------------------------------------------------------------------------------------------------
# The network

class Unit(nn.Module):
    """Convolution without bias, batch normalisation (eps 1e-3), ReLU."""

    def __init__(self, channels, out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def chain(x, *units):
    for unit in units:
        x = unit(x)
    return x


def average(x):
    """3 x 3 mean of what lies inside the picture."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class A(nn.Module):
    """35 x 35: Mixed_5b, 5c, 5d."""

    def __init__(self, channels, pool):
        super().__init__()
        self.branch1x1 = Unit(channels, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Unit(channels, 48, 1), Unit(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(channels, 64, 1), Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, padding=1)
        self.branch_pool = Unit(channels, pool, 1)

    def forward(self, x):
        return torch.cat([self.branch1x1(x), chain(x, self.branch5x5_1, self.branch5x5_2),
                          chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
                          self.branch_pool(average(x))], 1)


class B(nn.Module):
    """35 x 35 to 17 x 17: Mixed_6a."""

    def __init__(self, channels):
        super().__init__()
        self.branch3x3 = Unit(channels, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(channels, 64, 1), Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, 2)

    def forward(self, x):
        return torch.cat([self.branch3x3(x), chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
                          F.max_pool2d(x, 3, 2)], 1)


class C(nn.Module):
    """17 x 17 with 7 x 7 convolutions in two halves: Mixed_6b to 6e."""

    def __init__(self, channels, c):
        super().__init__()
        wide, high = dict(kernel=(1, 7), padding=(0, 3)), dict(kernel=(7, 1), padding=(3, 0))
        self.branch1x1 = Unit(channels, 192, 1)
        self.branch7x7_1, self.branch7x7_2, self.branch7x7_3 = Unit(channels, c, 1), Unit(c, c, **wide), Unit(c, 192, **high)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Unit(channels, c, 1), Unit(c, c, **high)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Unit(c, c, **wide), Unit(c, c, **high)
        self.branch7x7dbl_5 = Unit(c, 192, **wide)
        self.branch_pool = Unit(channels, 192, 1)

    def forward(self, x):
        return torch.cat([self.branch1x1(x), chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3),
                          chain(x, self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3, self.branch7x7dbl_4,
                                self.branch7x7dbl_5), self.branch_pool(average(x))], 1)


class D(nn.Module):
    """17 x 17 to 8 x 8: Mixed_7a."""

    def __init__(self, channels):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Unit(channels, 192, 1), Unit(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Unit(channels, 192, 1), Unit(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3, self.branch7x7x3_4 = Unit(192, 192, (7, 1), padding=(3, 0)), Unit(192, 192, 3, 2)

    def forward(self, x):
        return torch.cat([chain(x, self.branch3x3_1, self.branch3x3_2),
                          chain(x, self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4),
                          F.max_pool2d(x, 3, 2)], 1)


class E(nn.Module):
    """8 x 8: Mixed_7b, 7c. `pool` is the mean in 7b and, a quirk of the graph, the maximum in 7c."""

    def __init__(self, channels, pool):
        super().__init__()
        wide, high = dict(kernel=(1, 3), padding=(0, 1)), dict(kernel=(3, 1), padding=(1, 0))
        self.pool = pool
        self.branch1x1 = Unit(channels, 320, 1)
        self.branch3x3_1 = Unit(channels, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Unit(384, 384, **wide), Unit(384, 384, **high)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(channels, 448, 1), Unit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Unit(384, 384, **wide), Unit(384, 384, **high)
        self.branch_pool = Unit(channels, 192, 1)

    def forward(self, x):
        y, z = self.branch3x3_1(x), chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(y), self.branch3x3_2b(y), self.branch3x3dbl_3a(z),
                          self.branch3x3dbl_3b(z), self.branch_pool(self.pool(x))], 1)


class InceptionV3(nn.Module):
    """(B,3,299,299) float32, scaled as a resize above leaves it -> (pool, spatial, logits):

    pool (B,2048): the features of FID. spatial (B,2023): those of sFID, the first 7 channels of mixed_6/conv, 17 x 17 each,
    in ADM's order of rows, columns, channels. logits (B,1008): without the bias, as the Inception Score takes them."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Unit(3, 32, 3, 2), Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Unit(64, 80, 1), Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
        self.Mixed_6a = B(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = C(768, 128), C(768, 160), C(768, 160), C(768, 192)
        self.Mixed_7a = D(768)
        self.Mixed_7b, self.Mixed_7c = E(1280, average), E(2048, lambda x: F.max_pool2d(x, 3, 1, 1))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)                                # (B, 3, 299, 299)
        x = chain(x, self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3)           # (B, 64, 147, 147)
        x = chain(F.max_pool2d(x, 3, 2), self.Conv2d_3b_1x1, self.Conv2d_4a_3x3)           # (B, 192, 71, 71)
        x = chain(F.max_pool2d(x, 3, 2), self.Mixed_5b, self.Mixed_5c, self.Mixed_5d)      # (B, 288, 35, 35)
        x = chain(x, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c)                          # (B, 768, 17, 17)
        # TensorFlow's mixed_6/conv is the first branch of Mixed_6d
        spatial = self.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)         # (B, 2023)
        x = chain(x, self.Mixed_6d, self.Mixed_6e)                                         # (B, 768, 17, 17)
        x = chain(x, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c)                          # (B, 2048, 8, 8)
        pool = x.mean((2, 3))                                                              # (B, 2048)
        return pool, spatial, pool @ self.fc.weight.mT                                     # logits (B, 1008)


def load(path):
    """InceptionV3 in evaluation mode on the CPU, with the weights of a file: a plain state dict in the port's names, with or
    without num_batches_tracked. Raises ValueError naming the file and what does not fit."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # a foreign pickle also draws a warning; the one line below says it all
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:     # a broken or foreign file raises whatever its bytes provoke
        raise ValueError(f"{path}: not a file of tensors ({type(e).__name__}); expected {FILE}") from None
    net = InceptionV3().eval()
    own = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    state = state if isinstance(state, dict) else {}
    state = {k: v for k, v in state.items() if not str(k).endswith("num_batches_tracked")}
    wrong = [f"missing {k}" for k in own if k not in state] + [f"unexpected {k}" for k in state if k not in own]
    wrong += [f"{k} is {tuple(getattr(state[k], 'shape', ()))}, expected {tuple(own[k].shape)}"
              for k in own if k in state and getattr(state[k], "shape", None) != own[k].shape]
    if wrong:
        raise ValueError(f"{path}: not the weights of {FILE}: {len(wrong)} entries do not fit: {'; '.join(wrong[:4])}"
                         + ("; ..." if len(wrong) > 4 else ""))
    net.load_state_dict(state, strict=False)       # only the counters that no evaluation reads may be missing
    # channels last: twice as fast on a CPU, and what tensor cores want
    return net.requires_grad_(False).to(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------
# Inception Score

def inception_score(probs, splits=10):
    """exp of the mean KL divergence between each item's class probabilities and their mean (Salimans et al. 2016).

    probs (N,C), rows that sum to 1 -> (mean, standard deviation with ddof 0) over `splits` equal runs of consecutive items, not
    shuffled, as ADM's evaluator; float64. Raises ValueError for fewer items than splits."""
    probs = torch.as_tensor(probs).double()
    if probs.dim() != 2 or not 1 <= splits <= len(probs):
        raise ValueError(f"probabilities {tuple(probs.shape)}: an Inception Score of {splits} splits needs (N,C) with N >= {splits}")
    if not probs.isfinite().all() or probs.min() < 0:
        raise ValueError("probabilities of the Inception Score must be finite and not negative")
    scores = []
    for p in probs.tensor_split(splits):
        kl = torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(0))
        scores.append(kl.sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()
