"""ASFT, Ambient Space Flow Transformer: presets, flow matching, the network. Needs torch only.

`ASFT.encode` turns the context, the coordinate-value pairs of a noisy image or point cloud, into latents;
`ASFT.decode` gives the velocity at any query, each query on its own. In this order: configuration, paths and
loss, ASFT, encoders, blocks and embeddings, coordinates. `python model.py` prints the presets.

    B batch   N context pairs   M queries   L latents   D width   H heads   p window side
    K decoder levels   n pairs of a window   T condition tokens
    b batch of the values: B, or B/2 under guidance, whose two halves share a context

    time      t (B,): 0 is data, 1 is noise
    path      xt = a(t) x0 + s(t) eps, velocity v = a'(t) x0 + s'(t) eps; on the linear path v = eps - x0
    images    coords (N, 2) or (B, N, 2): pixel centres (x, y) in [0, 1]; values (B, N, 3): RGB in [-1, 1]
    points    values (B, N, 3) in [-1, 1] are coordinate and value at once; coords is None
    label     (B,) int64 in 0..n_classes-1, or the null class n_classes, for which None stands
    tokens    (B, T, token_dim) float condition tokens (image features); None stands for the null token
"""
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---- Configuration and presets --------------------------------------------------------------------------
@dataclass
class Config:
    domain: str = "image"          # "image" or "points"
    res: int = 256                 # images: side of the training grid, N = res^2
    points: int = 2048             # points: context size N in training
    width: int = 384               # D
    depth: int = 12                # trunk blocks
    heads: int = 6                 # H
    latents: int = 1024            # L; a square number where the latents lie on a grid
    levels: int = 1                # K, decoder blocks
    encoder: str = "spatial"       # one of ENCODERS[domain]
    encoder_heads: int = 0         # spatial and hash encoder: heads that read a window, 0 = `heads` (ours)
    rope: bool = False             # axial rotary embedding in the trunk (latents on a grid)
    qk_norm: bool = True           # RMSNorm of queries and keys per head
    first_self: int = 0            # perceiver encoder: self-attention blocks right after the first reading
    self_layers: int = 1           # self-attention blocks of one trunk block
    reread: bool = False           # perceiver encoder: every trunk block reads the context again
    n_classes: int = 0             # 0 = no class conditioning
    token_dim: int = 0             # 0 = no token conditioning

    @property
    def pairs(self):
        """N, the coordinate-value pairs of a training sample."""
        return self.res ** 2 if self.domain == "image" else self.points

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
    "tiny-linear": dict(res=32, width=128, depth=4, heads=4, latents=64, encoder="linear"),
    "point-tiny": dict(POINTS, points=512, width=128, depth=3, heads=4, latents=64, first_self=1),
}

def config(preset, **changes):
    """The Config of a preset with changes. Raises ValueError in one line where they do not fit together."""
    cfg = Config(**PRESETS[preset] | changes)
    L, side, names = cfg.latents, math.isqrt(cfg.latents), ENCODERS[cfg.domain]
    grid, windows = cfg.encoder in ("spatial", "linear"), cfg.encoder in ("spatial", "hash")
    divides = cfg.width % (cfg.encoder_heads or cfg.heads) == 0

    def need(fits, text):
        if not fits:
            raise ValueError(text)
    need(cfg.encoder in names, f"encoder {cfg.encoder!r}: expected one of {', '.join(names)} ({cfg.domain})")
    need(cfg.width % cfg.heads == 0, f"width {cfg.width}: expected a multiple of {cfg.heads} heads")
    need(cfg.width % 4 == 0, f"width {cfg.width}: expected a multiple of 4")
    need(1 <= cfg.levels <= cfg.depth, f"{cfg.levels} levels: expected 1 to {cfg.depth}, the depth")
    need(not grid or side ** 2 == L, f"{L} latents: expected a square number")
    need(not grid or cfg.res % side == 0, f"res {cfg.res}: expected a multiple of {side} ({L} latents)")
    need(cfg.encoder != "hash" or cfg.points % L == 0, f"{cfg.points} points: expected a multiple of {L}")
    need(not cfg.rope or grid, f"rope: expected encoder 'spatial' or 'linear', not {cfg.encoder!r}")
    need(not cfg.rope or cfg.width // cfg.heads % 4 == 0, "rope: expected a head width divisible by 4")
    need(windows or not changes.get("encoder_heads"), f"encoder_heads: {cfg.encoder!r} has no such heads")
    need(not windows or divides, f"encoder_heads {cfg.encoder_heads}: expected a divisor of {cfg.width}")
    return cfg

# ---- Flow matching: the path between data and noise, and the loss ---------------------------------------
def linear_path(t):
    """Rectified flow: xt = (1-t) x0 + t eps."""
    return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)

def cosine_path(t):
    """Trigonometric path: a = cos(pi t/2), s = sin(pi t/2)."""
    a, s = torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
    return a, s, -math.pi / 2 * s, math.pi / 2 * a

def vp_path(t, low=0.1, high=20.0):
    """Variance preserving diffusion (Song et al. 2021), beta linear from `low` to `high`."""
    a = torch.exp(-0.25 * t ** 2 * (high - low) - 0.5 * t * low)
    s = (1 - a ** 2).clamp_min(1e-8).sqrt()              # at least 1e-4, since s' is unbounded at t = 0
    da = -0.5 * (t * (high - low) + low) * a
    return a, s, da, -a * da / s

PATHS = {"linear": linear_path, "cosine": cosine_path, "vp": vp_path}      # t -> a, s, a', s'  (Eq. 1)
TIMES = {"uniform": lambda u: u,                                           # uniform u -> t  (Eq. 4)
         "logit-normal": lambda u: torch.special.ndtri(u).sigmoid()}       # Esser et al. 2024

def cicfm_loss(model, coords, x0, eps, t, query, path="linear", label=None, tokens=None, drop=None):
    """CICFM loss (Eq. 4): squared error of the velocity at the queries, mean over all, float32.
    x0, eps (B, N, 3); query (B, M) int64 picks the decoded pairs, with their noise, out of the context."""
    a, s, da, ds = (z[:, None, None] for z in PATHS[path](t))                            # (B, 1, 1)
    pick = query[..., None].expand(-1, -1, x0.shape[-1])                                 # (B, M, 3)
    xt = a * x0 + s * eps                                                                # (B, N, 3)
    target = (da * x0 + ds * eps).gather(1, pick)                                        # (B, M, 3)
    query_coords = None if coords is None else coords[query]                             # (B, M, 2)
    v = model(coords, xt, query_coords, xt.gather(1, pick), t, label, tokens, drop)      # (B, M, 3)
    return F.mse_loss(v.float(), target)

# ---- The model ------------------------------------------------------------------------------------------
class ASFT(nn.Module):
    """Velocity network. A sampler calls `encode` and `prepare` once a step, `decode` once a chunk of queries.
    The batch B of t, label, tokens and drop may be a multiple of that of values, b (guidance)."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, D, K = cfg, cfg.width, cfg.levels
        self.grad_checkpoint = False      # recompute blocks and queries in the backward pass: saves memory
        self.encoder = ENCODERS[cfg.domain][cfg.encoder](cfg)
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.classes = nn.Embedding(cfg.n_classes + 1, D) if cfg.n_classes else None   # last row: null
        self.tokens = nn.Linear(cfg.token_dim, D) if cfg.token_dim else None
        self.null_token = nn.Parameter(torch.empty(cfg.token_dim)) if cfg.token_dim else None
        self.reads = getattr(self.encoder, "gives_context", False)   # the trunk reads a context of any size
        first = [True] + [False] * cfg.first_self if self.reads else []  # True: the block reads it
        group = ([True] if self.reads and cfg.reread else []) + [False] * cfg.self_layers
        self.level_ends = [len(first) + len(group) * (cfg.depth * k // K) for k in range(1, K + 1)]
        self.trunk = nn.ModuleList(Block(cfg, r, tokens=cfg.token_dim > 0) for r in first + group * cfg.depth)
        self.register_buffer("rope", rope_table(cfg) if cfg.rope else None, persistent=False)
        self.query_value = Stem(3, D)
        if cfg.domain == "image":
            self.register_buffer("freqs", image_freqs(cfg.res, D), persistent=False)
        else:
            self.query_embedding = PointEmbedding(cfg)
        self.decoder = nn.ModuleList(Block(cfg, reads=True) for _ in range(cfg.levels))
        self.head_modulation = nn.Linear(D, 4 * D)
        self.head = nn.Linear(2 * D, 3)
        self.init_weights()

    def init_weights(self):
        """Xavier for every matrix, zero biases; as in DiT gates, modulations and output start at zero. The
        value stem keeps torch's default: without a bias its LayerNorm would hide the size of a value. Class
        embeddings start 25 times larger than DiT's: small ones are learnt late (ours; docs/results.md)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table, std in ((self.encoder.latents, 0.02), (self.null_token, 0.02), (self.time[0].weight, 0.02),
                           (self.time[2].weight, 0.02), (self.classes and self.classes.weight, 0.5)):
            if table is not None:
                nn.init.normal_(table, std=std)
        for stem in (module for module in self.modules() if isinstance(module, Stem)):
            stem[0].reset_parameters()
        for attention in (block.attention for block in self.decoder):
            # queries and latents carry the same features of the place: with equal weights for keys and
            # queries, and twice the gain, attention starts local, not uniform (ours; docs/results.md)
            attention.kv.weight.data[:self.cfg.width] = attention.q.weight.data
            if self.cfg.qk_norm:
                nn.init.constant_(attention.q_norm.weight, 2.0)
        modulations = [block.modulation for block in (*self.trunk, *self.decoder)]
        for layer in (*modulations, self.head_modulation, self.head):
            nn.init.zeros_(layer.weight)

    @property
    def device(self):
        return self.head.weight.device

    def forward(self, coords, values, query_coords, query_values, t, label=None, tokens=None, drop=None):
        """Velocities (B, M, 3) at the queries given the context; shapes as in `encode` and `decode`."""
        levels = self.encode(coords, values, t, label, tokens, drop)                     # K x (B, L, D)
        prepared = self.prepare(levels, t, label, drop)
        if not (self.grad_checkpoint and self.training):
            return self.decode(prepared, query_coords, query_values)                     # (B, M, 3)
        values = query_values.split(2048, 1)
        places = [None for _ in values] if query_coords is None else query_coords.split(2048, -2)
        chunks = [recomputed(self.decode, prepared, *some) for some in zip(places, values)]
        return torch.cat(chunks, 1)                                                      # (B, M, 3)

    def encode(self, coords, values, t, label=None, tokens=None, drop=None):
        """Latents of every decoder level, K x (B, L, D). coords (N, 2), (B, N, 2) or None; values (b, N, 3),
        an image's whole training grid, in any order; drop (B,) bool puts in the null class and token."""
        if values.shape[2:] != (3,) or not self.reads and values.shape[1] != self.cfg.pairs:
            raise ValueError(f"context values must be (B, {self.cfg.pairs}, 3), not {tuple(values.shape)}")
        latents, context = self.encoder(coords, values)                                  # (b, L, D) (b, N, D)
        c = self.condition(t, label, drop)                                               # (B, D)
        x = repeat_to(latents, len(c))                                                   # (B, L, D)
        if self.tokens is not None:
            null = self.null_token.expand(len(c), 1, -1)                                 # (B, 1, token_dim)
            tokens = null if tokens is None else tokens                                  # (B, T, token_dim)
            tokens = tokens if drop is None else torch.where(drop[:, None, None], null, tokens)
            tokens = self.tokens(tokens)                                                 # (B, T, D)
        levels = []
        for i, block in enumerate(self.trunk, 1):
            kv = None
            if block.context_norm is not None:
                kv = tuple(repeat_to(z, len(c)) for z in block.keys_values(context))     # (B, H, N, D/H) each
            call = partial(recomputed, block) if self.grad_checkpoint and self.training else block
            x = call(x, block.modulations(c), kv, tokens, self.rope)                     # (B, L, D)
            if i in self.level_ends:
                levels.append(x)
        return levels

    def prepare(self, levels, t, label=None, drop=None):
        """What all queries share: modulations, keys and values of every decoder block, and the head with its
        modulation folded in: W ((1 + scale) x + shift) + b = (W (1 + scale)) x + (W shift + b)."""
        c = self.condition(t, label, drop)                                               # (B, D)
        blocks = []
        for block, latents in zip(self.decoder, levels):
            k, v = block.keys_values(latents)                                            # (B, H, L, D/H) each
            blocks.append((block.modulations(c), (k.to(v.dtype), v)))
        shift, scale = self.head_modulation(F.silu(c))[:, None].chunk(2, -1)             # (B, 1, 2D) each
        weight = (self.head.weight * (1 + scale)).mT                                     # (B, 2D, 3)
        return blocks, weight, self.head(shift)                                          # bias (B, 1, 3)

    def decode(self, prepared, coords, values):
        """Velocities (B, M, 3) at coords (M, 2), (B, M, 2) or None, values (b, M, 3); each on its own."""
        if values.shape[2:] != (3,):
            raise ValueError(f"query values must have shape (B, M, 3), not {tuple(values.shape)}")
        blocks, weight, bias = prepared
        value = self.query_value(values)                                                 # (b, M, D)
        if self.cfg.domain == "image":
            x = value + fourier(coords, self.freqs)                                      # (b, M, D)
        else:
            x = self.query_embedding(values)                                             # (b, M, D)
        x, value = repeat_to(x, len(bias)), repeat_to(value, len(bias))                  # (B, M, D)
        for block, (modulations, kv) in zip(self.decoder, blocks):
            x = block(x, modulations, kv)                                                # (B, M, D)
        x = torch.cat([x, value.to(x.dtype)], -1)                                        # (B, M, 2D)
        return torch.baddbmm(bias, F.layer_norm(x, x.shape[-1:], eps=1e-6), weight)      # (B, M, 3)

    def condition(self, t, label, drop):
        """Condition vector, time plus class embedding: (B, D)."""
        if t.dim() != 1:
            raise ValueError(f"t must have shape (B,), not {tuple(t.shape)}")
        c = self.time(time_features(t))                                                  # (B, D)
        if self.classes is not None:
            null = torch.full_like(t, self.cfg.n_classes, dtype=torch.long)
            label = null if label is None else label
            c = c + self.classes(label if drop is None else torch.where(drop, null, label))    # (B, D)
        return c

# ---- Encoders: forward(coords, values) -> latents (b, L, D), context (b, N, D) or None ------------------
class SpatialEncoder(nn.Module):
    """Spatial-aware encoder (Sec. 3.4): latent l, on a sqrt(L) x sqrt(L) grid, reads its own p x p window."""
    def __init__(self, cfg):
        super().__init__()
        self.res, self.side, freqs = cfg.res, math.isqrt(cfg.latents), image_freqs(cfg.res, cfg.width)
        self.register_buffer("centres", fourier(image_coords(self.side), freqs), persistent=False)
        self.register_buffer("inside", fourier(image_coords(self.res // self.side), freqs), persistent=False)
        self.latents = nn.Parameter(torch.empty(cfg.latents, cfg.width))
        self.stem = Stem(3, cfg.width)
        self.read = WindowAttention(cfg)

    def forward(self, coords, values):
        values = to_windows(coords, values, self.res, self.side)                         # (L, b, n, 3)
        x = self.latents + self.centres                                                  # (L, D)
        x = self.read(x, values, lambda y: self.stem(y) + self.inside)                   # (b, L, D)
        return x + self.centres, None

class LinearEncoder(nn.Module):
    """ASFT-linear (App. B): one Linear over the values of a window in place of the attention."""
    def __init__(self, cfg):
        super().__init__()
        self.res, self.side, D = cfg.res, math.isqrt(cfg.latents), cfg.width
        centres = fourier(image_coords(self.side), image_freqs(cfg.res, D))              # (L, D)
        self.register_buffer("centres", centres, persistent=False)
        self.latents = nn.Parameter(torch.empty(cfg.latents, D))
        self.patch = nn.Linear(3 * cfg.res ** 2 // cfg.latents, D)
        self.out = nn.Sequential(nn.LayerNorm(D), MLP(D, D))

    def forward(self, coords, values):
        values = to_windows(coords, values, self.res, self.side)                         # (L, b, n, 3)
        x = self.latents + self.patch(values.transpose(0, 1).flatten(2))                 # (b, L, D)
        return self.out(x) + self.centres, None

class PerceiverEncoder(nn.Module):
    """PerceiverIO (points; on images Tab. 8): learned latents, and a context of embedded pairs."""
    gives_context = True

    def __init__(self, cfg):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(cfg.latents, cfg.width))
        self.embedding = Stem(3, cfg.width) if cfg.domain == "image" else PointEmbedding(cfg)
        self.register_buffer("freqs", image_freqs(cfg.res, cfg.width), persistent=False)

    def forward(self, coords, values):
        context = self.embedding(values)                                                 # (b, N, D)
        if coords is not None:
            context = context + fourier(coords, self.freqs)                              # (b, N, D)
        return self.latents.expand(len(values), -1, -1), context                         # (b, L, D) (b, N, D)

class HashEncoder(nn.Module):
    """Spatial variant for points (App. A): latents read equal runs of points in Z-order."""
    def __init__(self, cfg):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(cfg.latents, cfg.width))
        self.embedding = PointEmbedding(cfg)
        self.read = WindowAttention(cfg)

    def forward(self, coords, values):
        order = morton_code(values).argsort(dim=1, stable=True)                          # (b, N)
        values = values.gather(1, order[..., None].expand_as(values))                    # (b, N, 3)
        runs = values.view(len(values), len(self.latents), -1, 3).transpose(0, 1)        # (L, b, n, 3)
        latents = self.read(self.latents, runs, self.embedding)                          # (b, L, D)
        return latents + self.embedding(runs.mean(2)).transpose(0, 1), None

ENCODERS = {"image": {"spatial": SpatialEncoder, "linear": LinearEncoder, "perceiver": PerceiverEncoder},
            "points": {"perceiver": PerceiverEncoder, "hash": HashEncoder}}

def to_windows(coords, values, res, side):
    """Sorts the pairs of a res x res grid, in any order, into its windows: (b, N, 3) -> (L, b, n, 3)."""
    (b, N, _), p = values.shape, res // side
    j, i = (coords * res).long().clamp_(0, res - 1).unbind(-1)                           # column, row
    slot = ((i // p * side + j // p) * p + i % p) * p + j % p
    grid = torch.zeros_like(values).scatter(1, slot.expand(b, N)[..., None].expand_as(values), values)
    return grid.view(b, side * side, p * p, 3).transpose(0, 1)

class WindowAttention(nn.Module):
    """Cross-attention of every latent to the n pairs of its own window, then LayerNorm and an MLP.
    Absorbed form: the batch shares q_l, so score(l, n) = (W_k^T q_l) . x_n (a key bias cancels) and
    out_l = W_v (sum_n a_ln x_n) + b_v. At 256 x 256 it saves B 150 of 496 forward GFLOP, and keys and values.
    Windows are read in chunks, recomputed in the backward pass: XL's whole x (N, D) would be 151 MB a
    sample in bfloat16, converted once for both products, while reading costs 2 % of the FLOPs."""
    AT_A_TIME = {"cpu": 2 ** 21, "cuda": 2 ** 28}      # elements of x in a chunk; on a CPU they fit its cache

    def __init__(self, cfg):
        super().__init__()
        D, self.heads = cfg.width, cfg.encoder_heads or cfg.heads
        self.q = nn.Linear(D, D)
        self.k = nn.Linear(D, D, bias=False)
        self.v = nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)
        self.mlp = MLP(D, D)

    def pool(self, q, values, embed):
        """Attention of l latents, absorbed queries q (l, D, H), to values (l, b, n, 3) -> (b, l, D)."""
        l, b, n, _ = values.shape
        x = embed(values).to(q.dtype)                                                    # (l, b, n, D)
        attn = torch.bmm(x.flatten(1, 2), q).view(l, b, n, -1).softmax(2)                # (l, b, n, H)
        x = torch.matmul(attn.transpose(2, 3).to(x.dtype), x)                            # (l, b, H, D)
        weight = self.v.weight.view(self.heads, -1, x.shape[-1]).to(x.dtype)             # (H, D/H, D)
        return torch.einsum("lbhc,hdc->blhd", x, weight).flatten(2)                      # (b, l, D)

    def forward(self, latents, values, embed):
        """latents (L, D), values (L, b, n, 3), embed: (..., n, 3) -> (..., n, D). Returns (b, L, D)."""
        (L, b, n, _), D, H = values.shape, latents.shape[-1], self.heads
        q = self.q(latents).view(L, H, -1) * (D // H) ** -0.5                            # (L, H, D/H)
        q = torch.einsum("lhd,hdc->lch", q, self.k.weight.view(H, -1, D).to(q.dtype))    # (L, D, H)
        some = max(1, self.AT_A_TIME.get(values.device.type, 2 ** 28) // (b * n * D))
        pool = self.pool
        if some < L and torch.is_grad_enabled():
            pool = partial(recomputed, self.pool)
        x = torch.cat([pool(*part, embed) for part in zip(q.split(some), values.split(some))], 1)
        return self.mlp(self.norm(x + self.v.bias))                                      # (b, L, D)

# ---- Blocks and embeddings ------------------------------------------------------------------------------
class Attention(nn.Module):
    """Multi-head attention with QK-norm (RMSNorm per head), to keys and values that are computed once."""
    def __init__(self, cfg):
        super().__init__()
        D, self.heads = cfg.width, cfg.heads
        self.q = nn.Linear(D, D)
        self.kv = nn.Linear(D, 2 * D)
        self.out = nn.Linear(D, D)
        self.q_norm = nn.RMSNorm(D // cfg.heads, eps=1e-6) if cfg.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(D // cfg.heads, eps=1e-6) if cfg.qk_norm else nn.Identity()

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)                         # (B, H, N, D/H)

    def keys_values(self, context):
        """context (B, N, D) -> normed keys and values, each (B, H, N, D/H)."""
        k, v = self.kv(context).chunk(2, -1)                                             # (B, N, D) each
        return self.k_norm(self.split(k).float()), self.split(v)

    def forward(self, x, k, v, rope=None):
        q = self.q_norm(self.split(self.q(x)).float())                                   # (B, H, M, D/H)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        # a CPU trains with few keys up to 2 x as fast in float32; with 1024 bfloat16 is faster by a third
        few = x.device.type == "cpu" and x.requires_grad and k.shape[2] < 256
        dtype = torch.float32 if few else v.dtype
        with torch.autocast("cpu", enabled=False):
            x = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype))    # (B, H, M, D/H)
        return self.out(x.transpose(1, 2).flatten(2))                                    # (B, M, D)

class MLP(nn.Sequential):
    def __init__(self, width, hidden):
        super().__init__(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))

class Block(nn.Module):
    """AdaLN-Zero block (DiT): attention, attention to condition tokens if any, MLP. With `reads` keys and
    values come from a layer-normed context: embedded pairs (perceiver encoder) or latents (decoder)."""
    def __init__(self, cfg, reads=False, tokens=False):
        super().__init__()
        self.attention = Attention(cfg)
        self.context_norm = nn.LayerNorm(cfg.width) if reads else None
        self.token_attention = Attention(cfg) if tokens else None
        self.mlp = MLP(cfg.width, 4 * cfg.width)
        self.modulation = nn.Linear(cfg.width, (9 if tokens else 6) * cfg.width)

    def keys_values(self, context):
        return self.attention.keys_values(self.context_norm(context))

    def modulations(self, c):
        """Shift, scale and gate of every layer from the condition c (B, D): 6 or 9 tensors (B, 1, D)."""
        return self.modulation(F.silu(c))[:, None].split(c.shape[-1], -1)

    def forward(self, x, modulations, kv=None, tokens=None, rope=None):
        """x (B, N, D); kv: keys and values to read, None for those of x; tokens (B, T, D)."""
        shift, scale, gate, shift2, scale2, gate2, *third = modulations
        h = modulate(x, shift, scale)
        x = torch.addcmul(x, gate, self.attention(h, *(kv or self.attention.keys_values(h)), rope))
        if self.token_attention is not None:
            shift3, scale3, gate3 = third
            h = modulate(x, shift3, scale3)
            x = torch.addcmul(x, gate3, self.token_attention(h, *self.token_attention.keys_values(tokens)))
        return torch.addcmul(x, gate2, self.mlp(modulate(x, shift2, scale2)))            # (B, N, D)

def modulate(x, shift, scale):
    """Adaptive layer norm: LayerNorm without affine, then scale and shift from the condition."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)

class Stem(nn.Sequential):
    """Value stem: Linear, LayerNorm, SiLU, in float32 since the values carry the noise.
    In closed form: the centred Linear is W (y, 1), its variance (y, 1) W^T W (y, 1)^T / D, so y / std is
    mapped at once. This spares two passes over (..., D) and its copy for the backward pass."""
    def __init__(self, channels, width):
        super().__init__(nn.Linear(channels, width), nn.LayerNorm(width), nn.SiLU())

    def forward(self, y):
        linear, norm, activation = self
        with torch.autocast("cpu" if y.is_meta else y.device.type, enabled=False):
            W = torch.cat([linear.weight, linear.bias[:, None]], 1)                      # (D, 4)
            W = W - W.mean(0)
            y = F.pad(y.float(), (0, 1), value=1.0)                                      # (..., 4)
            variance = ((y @ (W.T @ W / len(W))) * y).sum(-1, keepdim=True)              # (..., 1)
            y = y * (variance + norm.eps).rsqrt()                                        # (..., 4)
            return activation(F.linear(y, norm.weight[:, None] * W, norm.bias))          # (..., D)

class PointEmbedding(nn.Module):
    """A point as coordinate and value at once: Linear of [proj(fourier(y)), proj(y)]."""
    def __init__(self, cfg):
        super().__init__()
        self.register_buffer("freqs", 2.0 ** torch.arange(10), persistent=False)         # ten octaves
        self.coord = nn.Linear(6 * len(self.freqs), cfg.width)
        self.value = nn.Linear(3, cfg.width)
        self.out = nn.Linear(2 * cfg.width, cfg.width)

    def forward(self, values):
        x = torch.cat([self.coord(fourier(values, self.freqs)), self.value(values)], -1)     # (..., 2D)
        return self.out(x)                                                               # (..., D)

def time_features(t, width=256):
    """Sinusoidal embedding of 1000 t, periods up to 10,000 (DiT): (B,) -> (B, width), float32."""
    freqs = torch.exp(-math.log(10000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angle = 1000 * t.float()[:, None] * freqs
    return torch.cat([angle.cos(), angle.sin()], -1)

# A function whose activations are computed again in the backward pass; nothing here draws random numbers.
recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)

def repeat_to(x, B):
    """Repeats, for both halves of guidance, what does not rest on the condition: (b, ...) -> (B, ...)."""
    return x if len(x) == B else x.expand(B // len(x), *x.shape).flatten(0, 1)           # no copy of b = 1

# ---- Coordinates ----------------------------------------------------------------------------------------
def image_coords(height, width=None, device=None, box=None):
    """Pixel centres in row-major order: (height*width, 2) float32, or those in a box (x0, y0, x1, y1).
    With corners in their place the image would shift with the resolution."""
    width = width or height
    x0, y0, x1, y1 = box or (0, 0, width, height)
    x = (torch.arange(x0, x1, device=device) + 0.5) / width
    y = (torch.arange(y0, y1, device=device) + 0.5) / height
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)

def image_freqs(res, width):
    """Angular frequencies (D/4,). The top one is below the Nyquist limit pi res of the training grid, so that
    the training pixels determine every one of them."""
    return math.pi * 2 ** torch.linspace(0, math.log2(7 * res / 16), width // 4)

def fourier(coords, freqs):
    """sin and cos of every axis at each frequency: (..., axes) -> (..., 2 axes len(freqs))."""
    angle = coords.float()[..., None] * freqs                                            # (..., axes, freqs)
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)

def morton_code(points, bits=10):
    """Z-order code of points in [-1, 1]^3 on a 2^bits grid (App. A): (..., 3) -> (...) int64."""
    cell = ((points.float().clamp(-1, 1) + 1) * 0.5 * (2 ** bits - 1)).long()
    code = torch.zeros_like(cell[..., 0])
    for i in range(3 * bits):
        code |= ((cell[..., i % 3] >> i // 3) & 1) << i
    return code

def rope_table(cfg):
    """Cosine and sine of axial rotary angles, half of the pairs by column, half by row: (2, L, D/H/2)."""
    side, quarter = math.isqrt(cfg.latents), cfg.width // cfg.heads // 4
    freqs = 10000.0 ** (-torch.arange(quarter) / quarter)
    angle = torch.arange(side)[:, None] * freqs                                          # (side, D/H/4)
    angle = torch.cat([angle.repeat(side, 1), angle.repeat_interleave(side, 0)], -1)     # (L, D/H/2)
    return torch.stack([angle.cos(), angle.sin()])

def rotate(x, rope):
    """Turns the channel pairs (i, i + d/2) of x (B, H, L, d) by the angles of their position."""
    cos, sin = rope.to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

# ---- python model.py: the presets in numbers ------------------------------------------------------------
PAPER_MILLIONS = {"S": 35, "B": 138, "L": 458, "XL": 733, "point-B": 108, "point-L": 204}    # Tabs. 5, 6

def forward_flops(cfg, decoded):
    """Floating-point operations of a training sample's forward pass, on the meta device, and parameters."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model, x0 = ASFT(cfg), torch.empty(1, cfg.pairs, 3)
        coords = torch.empty(cfg.pairs, 2) if cfg.domain == "image" else None
        query = torch.zeros(1, decoded, dtype=torch.long)
        tokens = torch.empty(1, 576, cfg.token_dim) if cfg.token_dim else None
        cicfm_loss(model, coords, x0, x0, torch.empty(1), query, tokens=tokens)
    return counter.get_total_flops(), sum(p.numel() for p in model.parameters())

def main():
    print(f"{'preset':16}{'decoded':>9}{'parameters':>12}{'paper, M':>10}{'forward GFLOP':>15}")
    for name in PRESETS:
        cfg, paper = config(name), PAPER_MILLIONS.get(name, "-")
        decoded, classes = (min(8192, cfg.pairs // 4), 1000) if cfg.domain == "image" else (cfg.pairs, 0)
        flops, parameters = forward_flops(config(name, n_classes=classes), decoded)      # as the paper counts
        print(f"{name:16}{decoded:>9}{parameters / 1e6:>11.1f}M{paper:>10}{flops / 1e9:>15.2f}")

if __name__ == "__main__":
    main()
