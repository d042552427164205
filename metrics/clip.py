"""CLIP's visual tower: the features of FID_CLIP (ViT-B/32), and the image side of ULIP-2 (ViT-bigG/14).

Reads OpenAI's released file (Radford et al. 2021) and open_clip's of the same layout. FID_CLIP follows
clean-fid: features after the projection, not normalised, in float32. In order: preprocess; VisionTransformer,
its sizes in TOWERS; load; features. Alphabet: B images, T tokens (class, patches), D width. Needs Pillow.
"""
import textwrap
import warnings
import zipfile

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

SIDE = 224
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

def preprocess(images):
    """CLIP's transform: the shorter side to 224 by antialiased bicubic, uint8, the centre, (x - MEAN) / STD.

    uint8 (B,H,W,3) -> float32 (B,3,224,224) on the CPU. Source: torchvision, of Pillow images."""
    rows, images = [], np.asarray(images.cpu() if isinstance(images, torch.Tensor) else images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(f"images are {images.dtype} {images.shape}: expected uint8 (B,H,W,3)")
    h, w = images.shape[1:3]
    size = (SIDE, int(SIDE * h / w)) if w <= h else (int(SIDE * w / h), SIDE)            # (width, height)
    left, top = round((size[0] - SIDE) / 2), round((size[1] - SIDE) / 2)
    for image in images:
        image = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        rows.append(np.asarray(image.crop((left, top, left + SIDE, top + SIDE))))
    x = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]

def quick_gelu(x):
    """What OpenAI's towers were trained with."""
    return x * torch.sigmoid(1.702 * x)

class Block(nn.Module):
    def __init__(self, width, heads, hidden, activation):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(width, hidden), c_proj=nn.Linear(hidden, width)))
        self.activation = activation

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp.c_proj(self.activation(self.mlp.c_fc(self.ln_2(x))))

class VisionTransformer(nn.Module):
    """(B,3,224,224) as preprocess leaves it -> (B,out), not normalised."""

    def __init__(self, patch=32, width=768, depth=12, heads=12, hidden=3072, out=512, activation=quick_gelu):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((SIDE // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        blocks = (Block(width, heads, hidden, activation) for _ in range(depth))
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*blocks)})
        self.proj = nn.Parameter(torch.zeros(width, out))

    def forward(self, x):
        x = self.conv1(x).flatten(2).mT                                                  # (B, T-1, D)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)                # (B, T, D)
        x = self.ln_pre(x + self.positional_embedding)                                   # (B, T, D)
        x = self.transformer["resblocks"](x)                                             # (B, T, D)
        return self.ln_post(x[:, 0]) @ self.proj                                         # (B, out)

# shape of conv1.weight -> ViT-B/32, and open_clip's ViT-bigG/14 (laion2b_s39b_b160k) with an exact GELU
TOWERS = {
    (768, 3, 32, 32): {},
    (1664, 3, 14, 14): dict(patch=14, width=1664, depth=48, heads=16, hidden=8192, out=1280,
                            activation=F.gelu),
}

def load(path):
    """The tower of a file, one of TOWERS, in evaluation mode on the CPU, in float32.

    Takes OpenAI's TorchScript archive, or a state dict with keys visual.*, or the tower's own keys alone.
    ValueError names the file and what does not fit."""
    try:
        names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        if any(name.endswith("constants.pkl") for name in names):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")                # torch deprecates the format
                state = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = {k.removeprefix("module."): v for k, v in state.get("state_dict", state).items()}
        state = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")} or state
        with torch.device("meta"):                            # no second copy of 1.8 billion parameters
            tower = VisionTransformer(**TOWERS[tuple(state["conv1.weight"].shape)])
        tower.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    except Exception as e:     # a broken or foreign file raises whatever its bytes provoke
        found = textwrap.shorten(str(e).split("Unpickler error:")[-1], 300)
        raise ValueError(f"{path}: expected CLIP's visual tower; {type(e).__name__}: {found}") from None
    return tower.eval().requires_grad_(False)

def features(tower, images):
    """{"clip": (B,out)}, of FID_CLIP, of images uint8 (B,H,W,3)."""
    return {"clip": tower(preprocess(images).to(tower.proj.device))}
