"""DINOv2's ViT: patch features of pictures, the condition of image -> point cloud (App. G of the paper).

Reads Meta's released state dicts (Oquab et al. 2023; Darcet et al. 2023 for those with registers), as torch.hub keeps them.
Layout and resizing of positions: facebookresearch/dinov2, dinov2/models/vision_transformer.py and hub/backbones.py. B pictures,
n patches of 14 x 14 pixels, T tokens (class, registers, patches), D width.

    net = load(path)                                       # a .pth file, or torch.hub's directory
    features = net(pictures)                               # uint8 (B,H,W,3) -> float32 (B,n,D), row by row, after the last norm

| file                                    | D    | depth | heads | MLP    | parameters |
|-----------------------------------------|------|-------|-------|--------|------------|
| dinov2_vits14[_reg4]_pretrain.pth       | 384  | 12    | 6     | GELU   | 22.1M      |
| dinov2_vitb14[_reg4]_pretrain.pth       | 768  | 12    | 12    | GELU   | 86.6M      |
| dinov2_vitl14[_reg4]_pretrain.pth       | 1024 | 24    | 16    | GELU   | 304.4M     |
| dinov2_vitg14[_reg4]_pretrain.pth       | 1536 | 40    | 24    | SwiGLU | 1,136.5M   |
"""
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

FILE = "dinov2_vitb14_pretrain.pth"     # the one whose width the paper's tokens have
PATCH, HEAD = 14, 64                    # pixels of a patch, channels of a head
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)       # of ImageNet, in [0,1]


class LayerScale(nn.Module):
    """A learned factor for every channel (Touvron et al. 2021)."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention, queries, keys and values from one projection."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)          # (B, H, T, 64) each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with an exact GELU between them."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """Two halves of one projection, the first through SiLU, multiplied (Shazeer 2020)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, width, hidden, mlp):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(width, eps=1e-6), Attention(width), LayerScale(width)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(width, eps=1e-6), mlp(width, hidden), LayerScale(width)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DINOv2(nn.Module):
    """uint8 (B,H,W,3), H and W multiples of 14 -> float32 (B, H/14 W/14, D), row by row.

    side: of the square of stored positions; registers: extra tokens, 0 or 4. Raises ValueError naming a wrong shape."""

    def __init__(self, width=768, depth=12, hidden=3072, mlp=MLP, registers=0, side=37):
        super().__init__()
        self.side, self.registers = side, registers
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side ** 2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))                              # of pretraining, not used
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, width, PATCH, PATCH)))
        self.blocks = nn.ModuleList(Block(width, hidden, mlp) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def positions(self, height, width):
        """The stored positions of the patches, resized to height x width patches by bicubic interpolation: (1, n, D).

        As released: without registers by the factor (size + 0.1) / side, which places the samples a little off; with
        registers to the size itself, antialiased."""
        stored = self.pos_embed[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        if (height, width) != (self.side, self.side):
            how = dict(size=(height, width), antialias=True) if self.registers else \
                dict(scale_factor=((height + 0.1) / self.side, (width + 0.1) / self.side))
            stored = F.interpolate(stored, mode="bicubic", **how)
        return stored.flatten(2).mT

    def forward(self, pictures):
        if pictures.dtype != torch.uint8 or pictures.dim() != 4 or pictures.shape[3] != 3 or \
                any(n % PATCH or not n for n in pictures.shape[1:3]):
            raise ValueError(f"pictures are {pictures.dtype} {tuple(pictures.shape)}: expected uint8 (B,H,W,3), H and W multiples of {PATCH}")
        mean, std = (torch.tensor(z, device=pictures.device) for z in (MEAN, STD))
        x = self.patch_embed["proj"](((pictures.float() / 255 - mean) / std).permute(0, 3, 1, 2))          # (B, D, H/14, W/14)
        x = x.flatten(2).mT + self.positions(*x.shape[2:])                                                 # (B, n, D)
        first = [self.cls_token + self.pos_embed[:, :1]] + ([self.register_tokens] if self.registers else [])
        x = torch.cat([z.expand(len(x), -1, -1) for z in first] + [x], 1)                                  # (B, T, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1 + self.registers:]                                                        # (B, n, D)


def find(path):
    """The weight file meant by a path: itself, or the one dinov2_*_pretrain.pth in torch.hub's directory or its checkpoints/,
    of several the one named FILE. Raises ValueError naming the path."""
    path = Path(path)
    if path.is_file():
        return path
    found = sorted(file for folder in (path, path / "checkpoints") for file in folder.glob("dinov2_*_pretrain.pth"))
    chosen = [file for file in found if file.name == FILE] or found
    if len(chosen) != 1:
        listed = f"holds {', '.join(str(file.relative_to(path)) for file in chosen)}; expected one file, give its path" if chosen else \
            f"no file, nor a directory that holds dinov2_*_pretrain.pth; expected {FILE} of Meta's DINOv2"
        raise ValueError(f"{path}: {listed}")
    return chosen[0]


def load(path):
    """The network of a released file (or of torch.hub's directory, see `find`) in evaluation mode, on the CPU, in float32; width,
    depth, MLP and registers are read off its tensors. Raises ValueError naming the file and what does not fit."""
    path = find(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {str(key): value.float() for key, value in state.items()}
    except Exception as e:     # a broken or foreign file raises whatever its bytes provoke
        raise ValueError(f"{path}: not a file of tensors ({type(e).__name__}); expected {FILE} or one of its siblings") from None
    shape = lambda key: tuple(state[key].shape) if key in state else ()
    places, proj = shape("pos_embed"), shape("patch_embed.proj.weight")
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    mlp, out = (SwiGLU, "blocks.0.mlp.w3.weight") if any(".mlp.w" in key for key in state) else (MLP, "blocks.0.mlp.fc2.weight")
    side = math.isqrt(places[1] - 1) if len(places) == 3 and places[1] > 1 and places[2] else 0
    if not side or places[1] != 1 + side ** 2 or proj != (places[2], 3, PATCH, PATCH) or places[2] % HEAD or not depth:
        raise ValueError(f"{path}: pos_embed {places or 'missing'}, patch_embed.proj.weight {proj or 'missing'}, {depth} blocks; expected "
                         f"a DINOv2 ViT of patch {PATCH}, such as {FILE}")
    hidden = shape(out)[1] if len(shape(out)) == 2 else 4 * places[2]  # a guess: the missing key is named below
    registers = shape("register_tokens")[1] if len(shape("register_tokens")) == 3 else 0
    with torch.device("meta"):                                         # no second copy of up to 1.1 billion parameters
        net = DINOv2(places[2], depth, hidden, mlp, registers, side)
    own = net.state_dict()
    state.setdefault("mask_token", torch.zeros(1, places[2]))
    wrong = [f"missing {k}" for k in own if k not in state] + [f"unexpected {k}" for k in state if k not in own]
    wrong += [f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
              for k in own if k in state and state[k].shape != own[k].shape]
    if wrong:
        raise ValueError(f"{path}: not the weights of a DINOv2 ViT: {len(wrong)} entries do not fit: {'; '.join(wrong[:4])}"
                         + ("; ..." if len(wrong) > 4 else ""))
    net.load_state_dict(state, assign=True)
    return net.eval().requires_grad_(False)
