"""DINOv2's ViT: patch features, the condition of image -> point cloud (App. G of the paper), and FDD's class.

Reads Meta's released state dicts, dinov2_{vits14,vitb14,vitl14}[_reg4]_pretrain.pth, as torch.hub
keeps them (Oquab et al. 2023; with registers Darcet et al. 2023). Source: facebookresearch/dinov2. Alphabet:
B images, n patches of 14 x 14 pixels, T tokens (class, registers, patches), D width, H heads.

    net = load(path)                  # a .pth file, or torch.hub's directory
    patches = net(images)             # uint8 (B,H,W,3) -> float32 (B,n,D), row by row, after the last norm

In order: preprocess; Attention, Block, DINOv2; find and load; features. Needs torch, numpy and Pillow.
"""
import math
import textwrap
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

FILE = "dinov2_vitb14_pretrain.pth"     # the one whose width the paper's tokens have
PATCH, HEAD = 14, 64                    # pixels of a patch, channels of a head
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)       # of ImageNet, in [0,1]

def preprocess(images, side=224):
    """FDD's resize: uint8 (B,H,W,3) -> uint8 (B,side,side,3), antialiased bicubic, both sides, no crop."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}: expected uint8 (B,H,W,3)")
    rows = (Image.fromarray(image) for image in images.cpu().numpy())
    rows = [np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for image in rows]
    return torch.from_numpy(np.stack(rows)).to(images.device)

class Attention(nn.Module):
    """Multi-head self-attention, queries, keys and values from one projection."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)            # (B, H, T, 64)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

class Block(nn.Module):
    """Norms in front, and LayerScale: a learned factor for every channel (Touvron et al. 2021)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        layers = dict(fc1=nn.Linear(width, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, width))
        self.attn, self.mlp = Attention(width), nn.Sequential(OrderedDict(layers))
        self.ls1, self.ls2 = (nn.ParameterDict(dict(gamma=torch.ones(width))) for _ in range(2))

    def forward(self, x):
        x = x + self.ls1["gamma"] * self.attn(self.norm1(x))
        return x + self.ls2["gamma"] * self.mlp(self.norm2(x))

class DINOv2(nn.Module):
    """uint8 (B,H,W,3), H and W multiples of 14 -> float32 (B, H/14 W/14, D), row by row, or "class" (B,D).

    side: of the square of stored positions. registers: extra tokens, 0 or 4. ValueError for other shapes."""

    def __init__(self, width=768, depth=12, hidden=3072, registers=0, side=37):
        super().__init__()
        self.side, self.registers = side, registers
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side ** 2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))                                # of pretraining
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, width, PATCH, PATCH)))
        self.blocks = nn.Sequential(*(Block(width, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def positions(self, height, width):
        """The stored positions of patches, resized to height x width by bicubic interpolation: (1, n, D).

        As released: by the factor (size + 0.1) / side, which places the samples a little off; in networks
        with registers to the size itself, antialiased."""
        stored = self.pos_embed[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        if (height, width) != (self.side, self.side):
            how = dict(scale_factor=((height + 0.1) / self.side, (width + 0.1) / self.side))
            if self.registers:
                how = dict(size=(height, width), antialias=True)
            stored = F.interpolate(stored, mode="bicubic", **how)
        return stored.flatten(2).mT

    def forward(self, images, which="patches"):
        B, H, W, C = images.shape if images.dim() == 4 else (0, 0, 0, 0)
        if images.dtype != torch.uint8 or C != 3 or H % PATCH or W % PATCH or not H * W:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}: expected uint8 (B,H,W,3), "
                             f"H and W multiples of {PATCH}")
        mean, std = torch.tensor([MEAN, STD], device=images.device)
        x = ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)                        # (B, 3, H, W)
        x = self.patch_embed["proj"](x)                                                      # (B, D, h, w)
        x = x.flatten(2).mT + self.positions(*x.shape[2:])                                   # (B, n, D)
        tokens = [(self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1), x]
        if self.registers:
            tokens.insert(1, self.register_tokens.expand(B, -1, -1))
        x = torch.cat(tokens, 1)                                                             # (B, T, D)
        x = self.norm(self.blocks(x))                                                        # (B, T, D)
        return x[:, 0] if which == "class" else x[:, 1 + self.registers:]                    # (B, n, D)

def find(path):
    """The weight file meant by a path: itself, or the one, or FILE, that it or its checkpoints/ holds."""
    path = Path(path)
    found = [path] if path.is_file() else [*path.glob("dinov2_*.pth"), *path.glob("checkpoints/dinov2_*.pth")]
    found = [file for file in found if file.name == FILE] or sorted(found)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "no such file"
        raise ValueError(f"{path}: found {names}; expected one dinov2_*_pretrain.pth, such as {FILE}")
    return found[0]

def load(path):
    """The network of a released file, or of a directory (see find), for evaluation on the CPU in float32.

    The tensors tell its width, depth and registers. ValueError names the file and what does not fit."""
    path = find(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {key: value.float() for key, value in state.items()}
        _, places, width = state["pos_embed"].shape
        depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
        registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
        hidden = state["blocks.0.mlp.fc2.weight"].shape[1]
        with torch.device("meta"):                         # no second copy of the parameters
            net = DINOv2(width, depth, hidden, registers, math.isqrt(places - 1))
        net.load_state_dict({"mask_token": torch.zeros(1, width)} | state, assign=True)
    except Exception as e:     # a broken or foreign file raises whatever its bytes provoke
        found = textwrap.shorten(str(e).split("Unpickler error:")[-1], 300)
        raise ValueError(f"{path}: expected {FILE} or a sibling; {type(e).__name__}: {found}") from None
    return net.eval().requires_grad_(False)

def features(net, images):
    """{"dinov2": (B,D)}, of FDD (Stein et al. 2023, with vitl14), of images uint8 (B,H,W,3)."""
    return {"dinov2": net(preprocess(images), "class")}
