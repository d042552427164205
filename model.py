"""ASFT, Ambient Space Flow Transformer: the network, its presets, the paths and the loss. Needs torch only.

The model maps coordinates to velocities, point by point: `encode` turns the context (coordinate-value pairs
of a noisy image or point cloud) into latents, `decode` gives the velocity at any query, each query on its own.

Alphabet, used in every file of this project:
    B batch   N context pairs   M queries   L latents   D width   H heads   p window side   n pairs in a window
    K decoder levels   T condition tokens   d_x, d_y channels of a coordinate, of a value

Conventions:
    time      t = 0 is data, t = 1 is noise; t has shape (B,)
    path      xt = a(t) x0 + s(t) eps, velocity v = a'(t) x0 + s'(t) eps; on the linear path v = eps - x0
    images    coords (N, 2) or (B, N, 2): pixel centres (x, y) in [0, 1]; values (B, N, 3): RGB in [-1, 1]
    points    coordinate and value are the same thing: values (B, N, 3) in [-1, 1]; coords is None
    label     (B,) int64 in 0..n_classes-1, or the null class n_classes (also what label=None means)
    tokens    (B, T, token_dim) float condition tokens (image features); None stands for the null token
"""
import math
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


# ---------------------------------------------------------------------------------------------------------
# Configuration and presets

@dataclass
class Config:
    domain: str = "image"          # "image" or "points"
    res: int = 256                 # images: side of the training grid, N = res^2
    points: int = 2048             # points: context size N in training
    width: int = 384               # D
    depth: int = 12                # trunk blocks
    heads: int = 6                 # H
    latents: int = 1024            # L; a square number where the encoder has windows of pixels
    levels: int = 1                # K, decoder blocks
    encoder: str = "spatial"       # one of ENCODERS[domain]
    rope: bool = False             # axial rotary embedding in the trunk (images with windows)
    first_self: int = 0            # perceiver encoders: self-attention layers of the encoder block
    self_layers: int = 1           # self-attention layers of one trunk block
    reread: bool = False           # perceiver encoders: every trunk block reads the context again
    encoder_heads: int = 0         # spatial and hash encoders: heads that read a window, 0: as many as `heads` (ours)
    interpolate: bool = False      # images with windows: a query starts from the latents at its place, too (ours)
    n_classes: int = 0             # 0 = no class conditioning
    token_dim: int = 0             # 0 = no token conditioning


ENCODERS = {"image": ("spatial", "linear", "perceiver"), "points": ("perceiver", "hash")}

POINTS = dict(domain="points", encoder="perceiver", width=512, heads=4, reread=True)
PRESETS = {
    # Tab. 5, Tab. 6 and App. G of the paper
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),
    "XL": dict(width=1152, depth=28, heads=16, levels=2, rope=True),
    "point-B": dict(POINTS, depth=9, first_self=2),
    "point-L": dict(POINTS, depth=12, first_self=2, self_layers=2),
    "point-objaverse": dict(POINTS, points=16384, width=1024, heads=16, depth=3, first_self=5, self_layers=5,
                            token_dim=774),
    # ours, for two CPU cores
    "tiny": dict(res=32, width=128, depth=4, heads=4, latents=64, encoder_heads=16),
    "point-tiny": dict(POINTS, points=512, width=128, depth=3, heads=4, latents=64, first_self=1),
}


def config(preset, **changes):
    """The Config of a preset, with changes. Raises ValueError naming what does not fit."""
    if preset not in PRESETS:
        raise ValueError(f"unknown model {preset!r}: expected one of {', '.join(PRESETS)}")
    cfg = replace(Config(), **{**PRESETS[preset], **changes})
    if "encoder_heads" not in changes and cfg.encoder not in ("spatial", "hash"):
        cfg.encoder_heads = 0                                            # a preset's own, of another encoder
    check(cfg)
    return cfg


def check(cfg):
    """Raises ValueError in one line where the parts of a Config do not fit together."""
    if cfg.domain not in ENCODERS or cfg.encoder not in ENCODERS[cfg.domain]:
        raise ValueError(f"encoder {cfg.encoder!r} does not read {cfg.domain!r}: expected one of {ENCODERS}")
    if cfg.width % cfg.heads or cfg.width % 4:
        raise ValueError(f"width {cfg.width} must be divisible by {cfg.heads} heads and by 4")
    if cfg.domain == "image" and cfg.encoder != "perceiver":
        side = math.isqrt(cfg.latents)
        if side * side != cfg.latents or cfg.res % side:
            raise ValueError(f"resolution {cfg.res} is not divisible by the latent grid: {cfg.latents} latents "
                             f"need a square number whose root divides the resolution")
        if cfg.rope and (cfg.width // cfg.heads) % 4:
            raise ValueError(f"rope needs a head width divisible by 4, not {cfg.width}/{cfg.heads}")
    if cfg.encoder == "hash" and cfg.points % cfg.latents:
        raise ValueError(f"{cfg.points} points are not divisible among {cfg.latents} latents")
    if cfg.rope and (cfg.domain != "image" or cfg.encoder == "perceiver"):
        raise ValueError("rope needs latents on a pixel grid: encoder 'spatial' or 'linear'")
    if cfg.encoder_heads and (cfg.encoder not in ("spatial", "hash") or cfg.encoder_heads < 0 or cfg.width % cfg.encoder_heads):
        raise ValueError(f"encoder_heads {cfg.encoder_heads} with encoder {cfg.encoder!r} and width {cfg.width}: expected a divisor of the "
                         f"width, and encoder 'spatial' or 'hash'")
    if cfg.interpolate and (cfg.domain != "image" or cfg.encoder == "perceiver"):
        raise ValueError("interpolate needs latents on a pixel grid: encoder 'spatial' or 'linear'")
    if not 1 <= cfg.levels <= cfg.depth:
        raise ValueError(f"{cfg.levels} decoder levels need 1 <= levels <= depth = {cfg.depth}")


# ---------------------------------------------------------------------------------------------------------
# Coordinates

def image_coords(height, width=None, device=None, box=None):
    """Pixel centres ((j+.5)/width, (i+.5)/height) in row-major order: (height*width, 2), float32, in [0, 1]; with a box
    (x0, y0, x1, y1) those of its pixels alone.

    Centres, not corners: with corner-aligned coordinates the picture shifts when the resolution changes."""
    width = width or height
    x0, y0, x1, y1 = box or (0, 0, width, height)
    y = (torch.arange(y0, y1, device=device, dtype=torch.float32) + 0.5) / height
    x = (torch.arange(x0, x1, device=device, dtype=torch.float32) + 0.5) / width
    return torch.stack([x.expand(len(y), len(x)), y[:, None].expand(len(y), len(x))], -1).reshape(-1, 2)


def image_freqs(res, width):
    """Angular frequencies pi 2^linspace(0, log2(7 res/16), D/4): the top one stays below the Nyquist limit
    pi res of the training grid, so that nothing is left free between the training pixels."""
    return math.pi * 2 ** torch.linspace(0, math.log2(7 * res / 16), width // 4)


def point_freqs():
    """Ten octaves 2^0..2^9: 60 features of a 3D point."""
    return 2.0 ** torch.arange(10)


def fourier(coords, freqs):
    """Fourier features: per axis, sin and cos at each frequency. (..., d_x) -> (..., 2 d_x len(freqs)), float32."""
    angle = coords.float()[..., None] * freqs                            # (..., d_x, F)
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)         # (..., d_x 2F)


def morton_code(points, bits=10):
    """Z-order code of points in [-1, 1]^3 on a 2^bits grid: (..., 3) -> (...) int64. Neighbours in space are
    likely, not certain, to be neighbours in this order (App. A)."""
    cell = ((points.float().clamp(-1, 1) + 1) * 0.5 * (2 ** bits - 1)).long()
    code = torch.zeros_like(cell[..., 0])
    for bit in range(bits):
        for axis in range(3):
            code |= ((cell[..., axis] >> bit) & 1) << (3 * bit + axis)
    return code


def rope_tables(side, head_width):
    """Cosine and sine of axial rotary angles on a side x side grid: half of the channel pairs turn with the
    column, half with the row. Two tensors (side^2, head_width / 2)."""
    freqs = 10000.0 ** (-torch.arange(head_width // 4) / (head_width // 4))
    angle = torch.arange(side)[:, None] * freqs                          # (side, d/4)
    angle = torch.cat([angle.repeat(side, 1), angle.repeat_interleave(side, 0)], -1)
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """Turn the channel pairs (i, i + d/2) of x (B, H, L, d) by the angles of their position."""
    cos, sin = (r.to(x.dtype) for r in rope)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


# ---------------------------------------------------------------------------------------------------------
# Parts of the network

class Attention(nn.Module):
    """Multi-head attention with QK-norm (RMSNorm per head); keys and values can be had once and used often."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)         # (B, H, N, d)

    def keys_values(self, memory):
        """memory (B, N, D) -> normed keys and values, each (B, H, N, d)."""
        k, v = self.kv(memory).chunk(2, -1)
        return self.k_norm(self.split(k).float()), self.split(v)

    def forward(self, x, k, v, rope=None):
        q = self.q_norm(self.split(self.q(x)).float())                   # (B, H, M, d)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if x.device.type == "cpu" and x.requires_grad and k.shape[2] < 256:
            # a CPU's fused kernel, backward pass included, is up to twice as fast in float32 with so few keys; with
            # 1024 of them bfloat16 is the faster one, by a third
            with torch.autocast("cpu", enabled=False):
                x = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
        else:
            x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.out(x.transpose(1, 2).flatten(2))                    # (B, M, D)


class MLP(nn.Sequential):
    """Two layers with a tanh-GELU between them."""

    def __init__(self, width, hidden):
        super().__init__(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))


def modulate(x, shift, scale):
    """Adaptive layer norm: LayerNorm without affine, then scale and shift from the condition."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class Block(nn.Module):
    """AdaLN-Zero transformer block (DiT): attention, MLP, and attention to condition tokens where there are any.

    It is a self-attention block, or with `reads` a cross-attention block whose keys and values come from a layer-normed
    memory: the context (encoder), or a level of latents (decoder). With tokens the modulation has 9 parts, not 6."""

    def __init__(self, width, heads, reads=False, tokens=False):
        super().__init__()
        self.attention = Attention(width, heads)
        self.memory_norm = nn.LayerNorm(width) if reads else None
        self.token_attention = Attention(width, heads) if tokens else None
        self.mlp = MLP(width, 4 * width)
        self.modulation = nn.Linear(width, (9 if tokens else 6) * width)

    def keys_values(self, memory):
        return self.attention.keys_values(self.memory_norm(memory))

    def modulations(self, c):
        """Shift, scale and gate of every layer from the condition c (B, D): 6 or 9 tensors (B, 1, D)."""
        return self.modulation(F.silu(c))[:, None].chunk(6 if self.token_attention is None else 9, -1)

    def forward(self, x, modulations, memory=None, tokens=None, rope=None):
        """x (B, N, D), memory: keys and values, tokens (B, T, D)."""
        shift, scale, gate, shift2, scale2, gate2, *third = modulations
        h = modulate(x, shift, scale)
        x = torch.addcmul(x, gate, self.attention(h, *(memory or self.attention.keys_values(h)), rope))
        if self.token_attention is not None:
            shift3, scale3, gate3 = third
            h = modulate(x, shift3, scale3)
            x = torch.addcmul(x, gate3, self.token_attention(h, *self.token_attention.keys_values(tokens)))
        return torch.addcmul(x, gate2, self.mlp(modulate(x, shift2, scale2)))


class WindowEncoder(nn.Module):
    """Spatial-aware encoder (Sec. 3.4): latent l reads its own window of n context pairs, nothing else.

    Absorbed form. The query q_l is the same for every image of the batch, so the key and value projections need
    not touch the pixels: score(l, n) = (W_k^T q_l) . x_n, where a key bias would shift all scores of a latent
    alike and cancel, and out_l = W_v (sum_n a_ln x_n) + b_v. Same function as the plain form to rounding; at
    256 x 256 it saves B 150 of 496 forward GFLOP, and no N x 2D key/value tensor is stored.

    Windows are read some at a time and in training once more in the backward pass, so that no N x D tensor is
    stored either: at 256 x 256 one of XL in bfloat16 is 151 MB a picture, while reading costs 2 % of the FLOPs."""

    AT_A_TIME = {"cpu": 2 ** 21, "cuda": 2 ** 28}      # numbers of the embedded pairs; a CPU keeps them in its cache

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = MLP(width, width)

    def pool(self, q, values, embed):
        """Attention of l latents, absorbed queries q (l, D, H), to values (l, B, n, 3) -> (B, l, D)."""
        l, B, n, _ = values.shape
        x = embed(values)                                                                      # (l, B, n, D)
        attn = torch.bmm(x.flatten(1, 2), q).view(l, B, n, -1).softmax(2)                      # (l, B, n, H)
        x = torch.matmul(attn.transpose(2, 3).to(x.dtype), x)                                  # (l, B, H, D)
        return torch.einsum("lbhc,hdc->blhd", x, self.v.weight.view(self.heads, -1, x.shape[-1]).to(x.dtype)).flatten(2)

    def forward(self, latents, values, embed):
        """latents (L, D), values (L, B, n, 3): the pairs of every window, latent first; embed: values (..., 3) of a
        window's pairs in order -> (..., D). Returns (B, L, D)."""
        (L, B, n, _), D, H = values.shape, latents.shape[-1], self.heads
        q = self.q(latents).view(L, H, -1) * (D // H) ** -0.5
        q = torch.einsum("lhd,hdc->lch", q, self.k.weight.view(H, -1, D).to(q.dtype))          # (L, D, H)
        some = max(1, self.AT_A_TIME.get(values.device.type, 2 ** 28) // (B * n * D))
        pool = self.pool
        if some < L and torch.is_grad_enabled():
            pool = lambda *args: checkpoint(self.pool, *args, use_reentrant=False, preserve_rng_state=False)
        x = torch.cat([pool(*part, embed) for part in zip(q.split(some), values.split(some))], 1)
        return self.mlp(self.norm(x + self.v.bias))                                            # (B, L, D)


class Stem(nn.Sequential):
    """Value stem: Linear, LayerNorm, SiLU.

    In closed form: the Linear, less its mean over the channels, is an affine map W (y, 1) of a few numbers, so the
    LayerNorm's variance is their quadratic form (y, 1) W^T W (y, 1)^T / D, and the Linear of y / std is normal at once.
    This spares what is slow and large in a LayerNorm of so many pairs: two passes over (..., D), and its copy for the
    backward pass. In float32 throughout, since the values carry the noise."""

    def __init__(self, channels, width):
        super().__init__(nn.Linear(channels, width), nn.LayerNorm(width), nn.SiLU())

    def forward(self, y):
        linear, norm, activation = self
        with torch.autocast("cpu" if y.is_meta else y.device.type, enabled=False):
            W = torch.cat([linear.weight, linear.bias[:, None]], 1)                            # (D, d_y + 1)
            W = W - W.mean(0)
            y = F.pad(y.float(), (0, 1), value=1.0)                                            # (..., d_y + 1)
            variance = ((y @ (W.T @ W / len(W))) * y).sum(-1, keepdim=True)                    # (..., 1)
            return activation(F.linear(y * (variance + norm.eps).rsqrt(), norm.weight[:, None] * W, norm.bias))


class PointEmbedding(nn.Module):
    """A point as coordinate and value at once: Linear of [proj(fourier(y)), proj(y)]."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("freqs", point_freqs(), persistent=False)
        self.coord = nn.Linear(6 * len(self.freqs), width)
        self.value = nn.Linear(3, width)
        self.out = nn.Linear(2 * width, width)

    def forward(self, y):
        return self.out(torch.cat([self.coord(fourier(y, self.freqs)), self.value(y)], -1))


def time_features(t, width=256):
    """Sinusoidal embedding of 1000 t, periods up to 10,000 (DiT): (B,) -> (B, width), float32."""
    freqs = torch.exp(-math.log(10000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angle = 1000 * t.float()[:, None] * freqs
    return torch.cat([angle.cos(), angle.sin()], -1)


def interpolate(latents, coords):
    """Bilinear interpolation of latents (B, L, D), a square grid, at coords (M, 2) or (b, M, 2), b divides B: (B, M, D), float32.

    As a product with hat functions, since the backward pass of grid_sample gives other bits every time on CUDA."""
    side = math.isqrt(latents.shape[1])
    at = (coords.float() * side - 0.5).clamp(0, side - 1)                                   # (b, M, 2)
    hat = (1 - (at[..., None] - torch.arange(side, device=at.device)).abs()).clamp_min(0)   # (b, M, 2, side)
    weights = (hat[..., 1, :, None] * hat[..., 0, None, :]).flatten(-2)                     # (b, M, L)
    weights = repeat_to(weights.view(-1, *weights.shape[-2:]), len(latents))
    with torch.autocast("cpu" if latents.is_meta else latents.device.type, enabled=False):
        return weights @ latents.float()


def repeat_to(x, B):
    """Repeat what does not see the condition for the halves of guidance: (b, ...) -> (B, ...), b divides B."""
    if x.shape[0] == 1:
        return x.expand(B, *x.shape[1:])                                 # no copy
    return x if x.shape[0] == B else x.repeat(B // x.shape[0], *[1] * (x.dim() - 1))


# ---------------------------------------------------------------------------------------------------------
# The model

class ASFT(nn.Module):
    """Velocity network for images and for point clouds. `forward` = `encode`, `memory`, `decode`.

    A sampler calls `encode` and `memory` once per step and `decode` as often as it has chunks of queries.
    The batch of t, label, tokens and drop may be a multiple of the batch of values: what does not see the
    condition is then computed once and shared (guidance)."""

    def __init__(self, cfg):
        super().__init__()
        check(cfg)
        self.cfg, D, H = cfg, cfg.width, cfg.heads
        self.grad_checkpoint = False      # recompute blocks and queries in the backward pass: less memory, 1/3 more time
        self.latents = nn.Parameter(torch.empty(cfg.latents, D))
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.classes = nn.Embedding(cfg.n_classes + 1, D) if cfg.n_classes else None    # last row: the null class
        self.tokens = nn.Linear(cfg.token_dim, D) if cfg.token_dim else None
        self.null_token = nn.Parameter(torch.empty(cfg.token_dim)) if cfg.token_dim else None

        windows = cfg.encoder in ("spatial", "linear", "hash")
        if cfg.domain == "image":
            self.register_buffer("freqs", image_freqs(cfg.res, D), persistent=False)
            self.stem, self.query_stem = Stem(3, D), Stem(3, D)
        else:
            self.stem, self.query_stem = PointEmbedding(D), PointEmbedding(D)
            self.query_values = Stem(3, D)
        if cfg.encoder == "linear":
            self.patch = nn.Linear(3 * cfg.res ** 2 // cfg.latents, D)
            self.patch_out = nn.Sequential(nn.LayerNorm(D), MLP(D, D))
            self.stem = None
        elif windows:
            self.encoder = WindowEncoder(D, cfg.encoder_heads or H)
        self.rope = cfg.rope
        if cfg.rope:
            for name, table in zip(("rope_cos", "rope_sin"), rope_tables(math.isqrt(cfg.latents), D // H)):
                self.register_buffer(name, table, persistent=False)

        layers = [] if windows else [True] + [False] * cfg.first_self    # True: the layer reads the context
        self.ends = []                                                   # layers after which each block ends
        for _ in range(cfg.depth):
            layers += [True] * (cfg.reread and not windows) + [False] * cfg.self_layers
            self.ends.append(len(layers))
        self.trunk = nn.ModuleList(Block(D, H, reads, bool(cfg.token_dim)) for reads in layers)
        self.decoder = nn.ModuleList(Block(D, H, reads=True) for _ in range(cfg.levels))
        # levels evenly spaced in depth, shallow first; the last block reads the final latents
        self.level_ends = [self.ends[cfg.depth * (k + 1) // cfg.levels - 1] for k in range(cfg.levels)]
        self.head_modulation = nn.Linear(D, 4 * D)
        self.head = nn.Linear(2 * D, 3)
        self.init_weights()

    def init_weights(self):
        """Xavier for every matrix, zero biases; as in DiT every gate, modulation and the output start at zero.

        The value stem keeps torch's own start: with a zero bias its LayerNorm would hide the size of a value
        (loss after 400 steps of the glyphs: 0.188 without, 0.177 with the bias)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.latents, self.null_token, self.classes and self.classes.weight,
                      self.time[0].weight, self.time[2].weight):
            if table is not None:
                nn.init.normal_(table, std=0.02)
        for module in self.modules():
            if isinstance(module, Stem):
                module[0].reset_parameters()
        for block in (*self.trunk, *self.decoder):
            nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(self.head_modulation.weight)
        nn.init.zeros_(self.head.weight)

    def condition(self, t, label, drop):
        """Condition vector c = time + class embedding: (B, D). drop (B,) bool replaces the class by the null class."""
        if t.dim() != 1:
            raise ValueError(f"t must have shape (B,), not {tuple(t.shape)}")
        c = self.time(time_features(t))
        if self.classes is not None:
            null = torch.full_like(t, self.cfg.n_classes, dtype=torch.long)
            label = null if label is None else label if drop is None else torch.where(drop, null, label)
            c = c + self.classes(label)
        return c

    def condition_tokens(self, tokens, B, drop):
        """Condition tokens at model width: (B, T, D), or (B, 1, D) null tokens where there are none."""
        if tokens is None:
            tokens = self.null_token.expand(B, 1, -1)
        elif drop is not None:
            tokens = torch.where(drop[:, None, None], self.null_token.to(tokens.dtype), tokens)
        return self.tokens(tokens)

    def windows(self, coords, values):
        """Give every pair of the training grid, in whatever order, its slot in its latent's window:
        (N, 2) or (B, N, 2), (B, N, 3) -> (L, B, n, 3)."""
        (B, N, _), side = values.shape, math.isqrt(self.cfg.latents)
        p = self.cfg.res // side
        j, i = (coords * self.cfg.res).long().clamp_(0, self.cfg.res - 1).unbind(-1)     # column, row
        slot = ((i // p * side + j // p) * p + i % p) * p + j % p
        grid = torch.zeros_like(values).scatter(1, slot.expand(B, N)[..., None].expand_as(values), values)
        return grid.view(B, side * side, p * p, 3).transpose(0, 1)

    def read(self, coords, values):
        """All of the encoder that sees neither t nor the condition: latents (b, L, D), and the context
        (b, N, D) where the trunk reads it, else None."""
        cfg, b = self.cfg, values.shape[0]
        N = cfg.res ** 2 if cfg.domain == "image" else cfg.points
        if values.dim() != 3 or values.shape[-1] != 3 or cfg.encoder != "perceiver" and values.shape[1] != N:
            raise ValueError(f"context values must have shape (B, {N}, 3), not {tuple(values.shape)}")
        if cfg.encoder == "perceiver":
            context = self.stem(values)                                                  # (b, N, D)
            if cfg.domain == "image":
                context = context + fourier(coords, self.freqs)
            return self.latents.expand(b, -1, -1), context
        if cfg.encoder == "hash":        # latent l has the l-th run in Z-order, and the run's mean as pseudo-coordinate
            order = morton_code(values).argsort(dim=1, stable=True)
            values = values.gather(1, order[..., None].expand_as(values))
            values = values.view(b, cfg.latents, -1, 3).transpose(0, 1)                  # (L, b, n, 3)
            return self.encoder(self.latents, values, self.stem) + self.stem(values.mean(2)).transpose(0, 1), None
        side = math.isqrt(cfg.latents)
        centres = fourier(image_coords(side, device=values.device), self.freqs)          # (L, D)
        values = self.windows(coords, values)                                            # (L, b, n, 3)
        if cfg.encoder == "linear":      # App. B: one Linear over the window's values; the MLP after it stays
            latents = self.patch_out(self.latents + self.patch(values.transpose(0, 1).flatten(2)))
        else:
            inside = fourier(image_coords(cfg.res // side, device=values.device), self.freqs)    # (n, D)
            latents = self.encoder(self.latents + centres, values, lambda y: self.stem(y) + inside)
        return latents + centres, None                                                   # (b, L, D)

    def encode(self, coords, values, t, label=None, tokens=None, drop=None):
        """Latents of every decoder level: a list of K tensors (B, L, D).

        coords (N, 2) or (B, N, 2), None for points; values (B, N, 3); images need the whole training grid, in any
        order. Raises ValueError naming a wrong shape."""
        x, context = self.read(coords, values)
        c = self.condition(t, label, drop)
        x = repeat_to(x, len(c))
        if self.tokens is not None:
            tokens = self.condition_tokens(tokens, len(c), drop)
        rope = (self.rope_cos, self.rope_sin) if self.rope else None
        levels = []
        for depth, block in enumerate(self.trunk, 1):
            memory = None
            if block.memory_norm is not None:
                memory = tuple(repeat_to(z, len(c)) for z in block.keys_values(context))
            again = self.grad_checkpoint and self.training
            x = (partial(checkpoint, block, use_reentrant=False) if again else block)(x, block.modulations(c), memory, tokens, rope)
            if depth in self.level_ends:
                levels.append(x)
        return levels

    def memory(self, levels, t, label=None, drop=None):
        """All that decoding needs besides the queries, had once for all of them: for every decoder block its
        modulations and the latents' keys and values (B, H, L, d), and the head with its modulation folded in, since
        W ((1 + scale) x + shift) + b = (W (1 + scale)) x + (W shift + b): weight (B, 2D, 3) and bias (B, 1, 3)."""
        c = self.condition(t, label, drop)                                               # (B, D)
        blocks = []
        for block, latents in zip(self.decoder, levels):
            k, v = block.keys_values(latents)
            blocks.append((block.modulations(c), (k.to(v.dtype), v)))
        shift, scale = self.head_modulation(F.silu(c))[:, None].chunk(2, -1)             # (B, 1, 2D) each
        grid = levels[-1] if self.cfg.interpolate else None
        return blocks, ((self.head.weight * (1 + scale)).mT, self.head(shift)), grid

    def decode(self, memory, coords, values):
        """Velocity at M queries, each on its own: (B, M, 3), in the units of the values.

        memory from `memory`; coords (M, 2) or (B, M, 2), None for points; values (B, M, 3), of which B may be a part."""
        if values.dim() != 3 or values.shape[-1] != 3:
            raise ValueError(f"query values must have shape (B, M, 3), not {tuple(values.shape)}")
        blocks, (weight, bias), grid = memory
        if self.cfg.domain == "image":
            stem = self.query_stem(values)                                               # (b, M, D)
            x = stem + fourier(coords, self.freqs)                                       # (b, M, D)
        else:
            stem, x = self.query_values(values), self.query_stem(values)
        x, stem = repeat_to(x, len(bias)), repeat_to(stem, len(bias))                    # (B, M, D)
        if grid is not None:
            x = x + interpolate(grid, coords).to(x.dtype)
        for block, (modulations, kv) in zip(self.decoder, blocks):
            x = block(x, modulations, kv)
        x = torch.cat([x, stem.to(x.dtype)], -1)                                         # (B, M, 2D)
        return torch.baddbmm(bias, F.layer_norm(x, x.shape[-1:], eps=1e-6), weight)      # (B, M, 3)

    def forward(self, coords, values, query_coords, query_values, t, label=None, tokens=None, drop=None):
        """Velocities (B, M, 3) at the queries given the context; shapes as in `encode` and `decode`."""
        levels = self.encode(coords, values, t, label, tokens, drop)                     # K x (B, L, D)
        memory = self.memory(levels, t, label, drop)
        if not (self.grad_checkpoint and self.training):
            return self.decode(memory, query_coords, query_values)                       # (B, M, 3)
        # each query on its own: read again some at a time, the decoder keeps nothing but its queries
        parts = [(None if query_coords is None else query_coords[..., i:i + 2048, :], query_values[:, i:i + 2048])
                 for i in range(0, query_values.shape[1], 2048)]
        return torch.cat([checkpoint(self.decode, memory, *part, use_reentrant=False) for part in parts], 1)


# ---------------------------------------------------------------------------------------------------------
# Flow matching

def linear_path(t):
    """Rectified flow: xt = (1-t) x0 + t eps."""
    return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)


def cosine_path(t):
    """Trigonometric path: a = cos(pi t/2), s = sin(pi t/2)."""
    a, s = torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
    return a, s, -math.pi / 2 * s, math.pi / 2 * a


def vp_path(t, low=0.1, high=20.0):
    """Variance preserving diffusion (Song et al. 2021, linear beta from `low` to `high`) as a path; s' is
    unbounded at t = 0, so s is kept above 1e-4 there."""
    a = torch.exp(-0.25 * t ** 2 * (high - low) - 0.5 * t * low)
    s = (1 - a ** 2).clamp_min(1e-8).sqrt()
    da = -0.5 * (t * (high - low) + low) * a
    return a, s, da, -a * da / s


PATHS = {"linear": linear_path, "cosine": cosine_path, "vp": vp_path}      # t -> a, s, a', s'  (Eq. 1)

TIMES = {"uniform": lambda u: u,                                           # Eq. 4
         "logit-normal": lambda u: torch.special.ndtri(u).sigmoid()}       # Esser et al. 2024, location 0, scale 1


def cicfm_loss(model, coords, x0, eps, t, query, path="linear", label=None, tokens=None, drop=None):
    """CICFM loss (Eq. 4): squared error of the velocity, mean over batch, decoded pairs and channels.

    coords (N, 2) or None for points; x0 and eps (B, N, 3); t (B,); query (B, M) int64, the decoded pairs' places
    among the N context pairs. The queries carry the same noise as in the context. Returns a float32 scalar."""
    a, s, da, ds = (z[:, None, None] for z in PATHS[path](t))                            # (B, 1, 1)
    pick = query[..., None].expand(-1, -1, x0.shape[-1])                                 # (B, M, 3)
    xt = a * x0 + s * eps                                                                # (B, N, 3)
    target = (da * x0 + ds * eps).gather(1, pick)                                        # (B, M, 3)
    query_coords = None if coords is None else coords[query]                             # (B, M, 2)
    v = model(coords, xt, query_coords, xt.gather(1, pick), t, label, tokens, drop)      # (B, M, 3)
    return F.mse_loss(v.float(), target)


# ---------------------------------------------------------------------------------------------------------
# python model.py: the presets in numbers

PAPER_MILLIONS = {"S": 35, "B": 138, "L": 458, "XL": 733, "point-B": 108, "point-L": 204}       # Tabs. 5 and 6
DECODED = {"tiny": 256, "point-tiny": 512, "point-B": 2048, "point-L": 2048, "point-objaverse": 16384}


def counting(cfg):
    """A model and the arguments of its loss for one batch, as functions of the batch; for use under a mode that computes no
    numbers."""
    N = cfg.res ** 2 if cfg.domain == "image" else cfg.points
    coords = torch.empty(N, 2) if cfg.domain == "image" else None
    return ASFT(cfg), lambda B, M: dict(
        coords=coords, x0=torch.empty(B, N, 3), eps=torch.empty(B, N, 3), t=torch.empty(B), query=torch.zeros(B, M, dtype=torch.long),
        tokens=torch.empty(B, 576, cfg.token_dim) if cfg.token_dim else None)


def forward_flops(cfg, decoded):
    """Floating-point operations of one training sample's forward pass, counted on the meta device, and the parameters."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model, batch = counting(cfg)
        cicfm_loss(model, **batch(1, decoded))
    return counter.get_total_flops(), sum(p.numel() for p in model.parameters())


def activation_bytes(cfg, decoded, batch, grad_checkpoint=False):
    """Bytes that the forward pass of a training step keeps for the backward pass, uncompiled, under bfloat16 autocast: counted
    on tensors without numbers. What is recomputed counts by its inputs, and once, by its largest part."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    stored, own, largest = [{}], set(), 0

    def keep(x):
        storage = x.untyped_storage()
        if storage._cdata not in own:
            stored[-1][storage._cdata] = storage               # held, so that no other takes its address
        return x

    def tensors(args):
        return [x for arg in args for x in (tensors(arg) if isinstance(arg, (tuple, list)) else [arg]) if isinstance(x, torch.Tensor)]

    def recomputed(function, *args, **_):
        nonlocal largest
        for x in tensors(args):
            keep(x)
        stored.append({})
        out = function(*args)
        largest = max(largest, sum(s.nbytes() for key, s in stored.pop().items() if key not in stored[-1]))
        return out

    global checkpoint
    original, checkpoint = checkpoint, recomputed
    try:
        with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            model, arguments = counting(cfg)
            model.grad_checkpoint = grad_checkpoint
            if hasattr(model, "encoder"):
                model.encoder.AT_A_TIME = {"cpu": WindowEncoder.AT_A_TIME["cuda"]}
            own.update(p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers()))
            loss = cicfm_loss(model, **arguments(batch, decoded))
            total = sum(s.nbytes() for s in stored[0].values())
            del loss
    finally:
        checkpoint = original
    return total + largest


def main():
    imagenet = 1000                      # the paper's image counts are those of class-conditional models
    print(f"{'preset':16}{'context':>9}{'decoded':>9}{'parameters':>12}{'paper':>8}{'forward GFLOP':>15}{'GB a sample':>13}{'recomputed':>12}")
    for name in PRESETS:
        image = PRESETS[name].get("domain", "image") == "image"
        cfg = config(name, n_classes=36 if name == "tiny" else imagenet if image else 0)
        decoded = DECODED.get(name, 8192)
        flops, count = forward_flops(cfg, decoded)
        one, two = ([activation_bytes(cfg, decoded, B, again) for again in (False, True)] for B in (8, 16))
        context = f"{cfg.res}x{cfg.res}" if image else cfg.points
        paper = f"{PAPER_MILLIONS[name]}M" if name in PAPER_MILLIONS else "-"
        print(f"{name:16}{context:>9}{decoded:>9}{count / 1e6:>11.1f}M{paper:>8}{flops / 1e9:>15.2f}"
              f"{(two[0] - one[0]) / 8e9:>13.3f}{(two[1] - one[1]) / 8e9:>12.3f}")
    print("GB a sample: activations kept for the backward pass under bfloat16 autocast, uncompiled; recomputed: with "
          "--grad-checkpoint.\nA batch adds its share of 20 bytes a parameter: weights, gradient, two of Adam, average.")
    cfg = config("XL", n_classes=imagenet)
    for again in (False, True):
        total = activation_bytes(cfg, 8192, 64, again) + 20 * forward_flops(cfg, 8192)[1]
        print(f"XL at 256 x 256, 64 samples a GPU (batch 512 on 8){', recomputed' if again else ''}: {total / 1e9:.0f} GB, estimated")


if __name__ == "__main__":
    main()
