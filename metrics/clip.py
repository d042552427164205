"""CLIP's visual tower: the features of FID_CLIP (ViT-B/32), and the pictures' side of ULIP-2 (ViT-bigG/14).

Reads OpenAI's released file (Radford et al. 2021) and open_clip's of the same layout. B pictures, T tokens (one and the
patches), D width. FID_CLIP follows clean-fid: features after the projection, not normalised, in float32.

    tower = load(path)
    features = tower(preprocess(pictures))                 # pictures uint8 (B,H,W,3) -> (B,512)
"""
import warnings
import zipfile

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

FILE = "ViT-B-32.pt"
SHA256 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
URL = f"https://openaipublic.azureedge.net/clip/models/{SHA256}/{FILE}"

SIDE = 224
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def preprocess(pictures):
    """uint8 (B,H,W,3) -> float32 (B,3,224,224) on the CPU, as CLIP's own transform (torchvision's Resize and CenterCrop of Pillow
    images): the shorter side to 224 by antialiased bicubic, back to uint8, the centre, then mean and deviation."""
    rows, pictures = [], np.asarray(pictures.cpu() if isinstance(pictures, torch.Tensor) else pictures)
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3 or not len(pictures):
        raise ValueError(f"pictures are {pictures.dtype} {pictures.shape}: expected uint8 (B,H,W,3)")
    for picture in pictures:
        h, w = picture.shape[:2]
        size = (SIDE, int(SIDE * h / w)) if w <= h else (int(SIDE * w / h), SIDE)         # (width, height)
        image = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
        left, top = round((size[0] - SIDE) / 2), round((size[1] - SIDE) / 2)
        rows.append(np.asarray(image.crop((left, top, left + SIDE, top + SIDE))))
    x = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), which OpenAI's towers were trained with."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of nn.MultiheadAttention."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight, self.in_proj_bias = nn.Parameter(torch.zeros(3 * width, width)), nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    def __init__(self, width, heads, hidden, activation):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(width, hidden), gelu=activation(), c_proj=nn.Linear(hidden, width)))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp.c_proj(self.mlp.gelu(self.mlp.c_fc(self.ln_2(x))))


class Transformer(nn.Module):
    def __init__(self, depth, *block):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(*block) for _ in range(depth))

    def forward(self, x):
        for block in self.resblocks:
            x = block(x)
        return x


class VisionTransformer(nn.Module):
    """(B,3,224,224) as preprocess leaves it -> (B,out), not normalised."""

    def __init__(self, patch=32, width=768, depth=12, heads=12, hidden=3072, out=512, activation=QuickGELU):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((SIDE // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(depth, width, heads, hidden, activation)
        self.proj = nn.Parameter(torch.zeros(width, out))

    def forward(self, x):
        x = self.conv1(x).flatten(2).mT                                                   # (B, T-1, D)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)                 # (B, T, D)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))                  # (B, T, D)
        return self.ln_post(x[:, 0]) @ self.proj                                          # (B, out)


TOWERS = {
    "ViT-B/32": dict(patch=32, width=768, depth=12, heads=12, hidden=3072, out=512, activation=QuickGELU),
    # open_clip, pretrained laion2b_s39b_b160k: heads of 104 channels, exact GELU
    "ViT-bigG/14": dict(patch=14, width=1664, depth=48, heads=16, hidden=8192, out=1280, activation=nn.GELU),
}


def read_state(path):
    """The state dict of a TorchScript archive, as OpenAI releases it, or of a file of tensors."""
    archive = zipfile.is_zipfile(path) and any(n.endswith("constants.pkl") for n in zipfile.ZipFile(path).namelist())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                # torch's deprecation of the format is not the user's affair
        state = torch.jit.load(path, map_location="cpu").state_dict() if archive else \
            torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    return {k.removeprefix("module."): v for k, v in state.items()}


def load(path):
    """The tower of a file in evaluation mode on the CPU, in float32: one of TOWERS, by the shape of its weights.

    Takes OpenAI's TorchScript archive, or a state dict with keys visual.*, or the tower's own keys alone; the text tower's are not
    read. Raises ValueError naming the file and what does not fit."""
    try:
        state = read_state(path)
    except Exception as e:     # a broken or foreign file raises whatever its bytes provoke
        raise ValueError(f"{path}: not a file of tensors ({type(e).__name__}); expected {FILE}") from None
    state = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")} or state
    shape = tuple(getattr(state.get("conv1.weight"), "shape", ()))
    name = next((n for n, t in TOWERS.items() if shape == (t["width"], 3, t["patch"], t["patch"])), None)
    if name is None:
        raise ValueError(f"{path}: conv1.weight is {shape or 'missing'}; expected CLIP's visual tower, {' or '.join(TOWERS)}")
    with torch.device("meta"):                                         # no second copy of up to 1.8 billion parameters
        tower = VisionTransformer(**TOWERS[name])
    own = tower.state_dict()
    wrong = [f"missing {k}" for k in own if k not in state] + [f"unexpected {k}" for k in state if k not in own]
    wrong += [f"{k} is {tuple(getattr(state[k], 'shape', ()))}, expected {tuple(own[k].shape)}"
              for k in own if k in state and getattr(state[k], "shape", None) != own[k].shape]
    if wrong:
        raise ValueError(f"{path}: not the weights of {name}: {len(wrong)} entries do not fit: {'; '.join(wrong[:4])}"
                         + ("; ..." if len(wrong) > 4 else ""))
    tower.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    return tower.eval().requires_grad_(False)
