"""model.py against plain forms, closed forms and symmetries, seeded and small. In this order: encoders, the
network, symmetries, initial weights, features, paths and loss, conditions, memory and compilation, presets,
errors, learning one image."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import model as asft
from conftest import ROOT, python

IMAGE = {"spatial": dict(encoder_heads=8), "linear": dict(encoder="linear", qk_norm=False),
         "perceiver": dict(encoder="perceiver", reread=True), "rope": dict(rope=True, encoder_heads=0),
         "levels": dict(levels=2), "tokens": dict(token_dim=6)}
POINTS = {"points": {}, "hash": dict(encoder="hash"), "point tokens": dict(token_dim=6, self_layers=2)}
every_variant = pytest.mark.parametrize("variant", [*IMAGE, *POINTS])

def tiny(variant, gain=0.2, **changes):
    """A small model. What starts as a constant (gates, biases, norms) is moved by `gain`."""
    torch.manual_seed(0)
    size = dict(width=32, depth=2, heads=2, latents=16, n_classes=5, res=16, points=64)
    preset = "tiny" if variant in IMAGE else "point-tiny"
    model = asft.ASFT(asft.config(preset, **{**size, **{**IMAGE, **POINTS}[variant], **changes}))
    with torch.no_grad():
        for p in model.parameters():
            if p.std() == 0:
                p.add_(gain * torch.randn(p.shape))
    return model.eval()

def inputs(model, B=3, M=10):
    """Arguments of model.forward: dict."""
    g, cfg = torch.Generator().manual_seed(1), model.cfg
    image = cfg.domain == "image"
    values = torch.randn(B, cfg.res ** 2 if image else cfg.points, 3, generator=g)
    return dict(coords=asft.image_coords(cfg.res) if image else None, values=values,
                query_coords=torch.rand(B, M, 2, generator=g) if image else None,
                query_values=torch.randn(B, M, 3, generator=g), t=torch.rand(B, generator=g),
                label=torch.randint(cfg.n_classes, (B,), generator=g),
                tokens=torch.randn(B, 4, cfg.token_dim, generator=g) if cfg.token_dim else None)

def gradients(model, M=8, loss=asft.cicfm_loss):
    """The loss of two samples and M queries each, and the gradients by name."""
    z, g = inputs(model, B=2), torch.Generator().manual_seed(2)
    x0, eps = z["values"].clamp(-1, 1), torch.randn(z["values"].shape, generator=g)
    query = torch.randint(x0.shape[1], (2, M), generator=g)
    model.zero_grad()
    value = loss(model, z["coords"], x0, eps, z["t"], query, label=z["label"], tokens=z["tokens"])
    value.backward()
    return value, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

def close(a, b, tolerance=2e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1, b.abs().max()), (a - b).abs().max()

def close_gradients(a, b):
    assert a.keys() == b.keys() and len(a) > 10
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-5), name

def heads(x, H):
    return x.unflatten(-1, (H, -1)).transpose(-2, -3)                          # (..., H, n, D/H)

def plain_windows(read, latents, x, key_bias=0):
    """Keys and values of every pair, one query a window: what the absorbed form replaces. x (b, L, n, D)."""
    q = heads(read.q(latents)[:, None], read.heads)                            # (L, H, 1, D/H)
    k, v = heads(read.k(x) + key_bias, read.heads), heads(read.v(x), read.heads)
    attn = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return read.mlp(read.norm((attn @ v).transpose(-2, -3).flatten(2)))        # (b, L, D)

def windows_of(values, res, side):
    """Row-major pixels as windows of row-major pixels: (b, N, 3) -> (b, L, n, 3)."""
    p = res // side
    return values.view(-1, side, p, side, p, 3).transpose(2, 3).reshape(-1, side * side, p * p, 3)

def test_absorbed_spatial_encoder_equals_the_plain_form_at_256():
    """If the encoder were not the attention of every latent to its own window, or a key bias mattered."""
    torch.manual_seed(0)
    encoder, values = asft.SpatialEncoder(asft.config("S")), torch.randn(1, 256 ** 2, 3)
    freqs = asft.image_freqs(256, 384)
    with torch.no_grad():
        encoder.latents.normal_()
        got, _ = encoder(asft.image_coords(256), values)                       # (1, 1024, 384)
        centres = asft.fourier(asft.image_coords(32), freqs)
        x = torch.nn.Sequential(*encoder.stem)(windows_of(values, 256, 32))
        x = x + asft.fourier(asft.image_coords(8), freqs)
        for bias in (0, 3 * torch.randn(384)):
            expected = plain_windows(encoder.read, encoder.latents + centres, x, bias) + centres
            assert (got - expected).abs().max() < 1e-5

def test_linear_encoder_equals_its_plain_form():
    """If the linear variant mixed up windows or pixels, or lost its residual, its MLP or the centres."""
    encoder, values = tiny("linear").encoder, torch.randn(2, 256, 3)
    centres = asft.fourier(asft.image_coords(4), asft.image_freqs(16, 32))
    patches = windows_of(values, 16, 4).flatten(2) @ encoder.patch.weight.T + encoder.patch.bias
    close(encoder(asft.image_coords(16), values)[0], encoder.out(encoder.latents + patches) + centres)

def test_hash_encoder_equals_its_plain_form():
    """If a latent read another run than its own in Z-order, or its position were not the run's mean."""
    encoder, clouds = tiny("hash").encoder, torch.randn(3, 64, 3) / 2
    for latents, cloud in zip(encoder(None, clouds)[0], clouds):
        cells = ((cloud.clamp(-1, 1) + 1) / 2 * 1023).int().tolist()
        bits = [(bit, axis) for bit in range(10) for axis in range(3)]
        codes = [sum((c[axis] >> bit & 1) << (3 * bit + axis) for bit, axis in bits) for c in cells]
        assert asft.morton_code(cloud).tolist() == codes
        runs = cloud[sorted(range(64), key=codes.__getitem__)].view(1, 16, 4, 3)
        x = plain_windows(encoder.read, encoder.latents, encoder.embedding(runs))
        close(latents[None], x + encoder.embedding(runs.mean(2)), 1e-4)

@pytest.mark.parametrize("variant", ["spatial", "hash"])
def test_reading_windows_some_at_a_time_changes_nothing(variant, monkeypatch):
    """If some of the windows met other queries or pairs, or were not read again in the backward pass."""
    model, calls = tiny(variant), []
    pool, (_, expected) = model.encoder.read.pool, gradients(model)
    pairs = inputs(model)["values"].shape[1] // 16
    monkeypatch.setattr(asft.WindowAttention, "AT_A_TIME", {"cpu": 5 * 2 * pairs * 32})     # 5 of 16 windows
    monkeypatch.setattr(model.encoder.read, "pool", lambda q, *rest: calls.append(len(q)) or pool(q, *rest))
    close_gradients(gradients(model)[1], expected)
    assert calls[:4] == [5, 5, 5, 1] and sorted(calls[4:]) == [1, 5, 5, 5]

@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_value_stem_equals_its_layers(size):
    """If the closed form were not Linear, LayerNorm, SiLU in a row, or left float32 under autocast."""
    torch.manual_seed(0)
    stem, y, results = asft.Stem(3, 48), size * torch.randn(5, 7, 3), []
    for p in stem.parameters():
        torch.nn.init.normal_(p, std=0.5)
    for out in (stem(y), torch.nn.Sequential(*stem)(y)):
        results.append([out, *torch.autograd.grad(out.square().sum(), list(stem.parameters()))])
    for got, expected in zip(*results):
        assert torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stem(y), results[0][0])

def slow_turn(x):
    """Axial rotary embedding by complex numbers: the first half of a head's channel pairs (i, i + d/2) turns
    with the column, the second with the row. x (B, H, side^2, d)."""
    (_, _, L, d), side = x.shape, math.isqrt(x.shape[2])
    place, pair = torch.arange(L)[:, None], torch.arange(d // 2)
    row_or_column = torch.where(pair < d // 4, place % side, place // side).double()
    angle = row_or_column * 10000 ** (-(pair % (d // 4)) / (d // 4))
    x = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([x.real, x.imag], -1).float()

def plain_norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)

def plain_attention(a, x, context, turned=False):
    q, k, v = (heads(z, a.heads) for z in (a.q(x), *a.kv(context).chunk(2, -1)))
    q, k = a.q_norm(q), a.k_norm(k)
    if turned:
        q, k = slow_turn(q), slow_turn(k)
    attn = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return a.out((attn @ v).transpose(1, 2).flatten(2))

def plain_block(block, x, c, context=None, tokens=None, turned=False):
    modulations = block.modulation(F.silu(c))[:, None].split(x.shape[-1], -1)
    shift, scale, gate, shift2, scale2, gate2, *third = modulations
    h = plain_norm(x) * (1 + scale) + shift
    read = h if context is None else block.context_norm(context)
    x = x + gate * plain_attention(block.attention, h, read, turned)
    if tokens is not None:
        h = plain_norm(x) * (1 + third[1]) + third[0]
        x = x + third[2] * plain_attention(block.token_attention, h, tokens)
    return x + gate2 * block.mlp(plain_norm(x) * (1 + scale2) + shift2)

@every_variant
def test_network_equals_its_plain_form(variant):
    """If a block, modulation, level, token, angle, the folded head or a gradient were not the layer's own."""
    model = tiny(variant)
    z, levels = inputs(model), []
    latents, context = model.encoder(z["coords"], z["values"])
    c = model.time(asft.time_features(z["t"])) + model.classes(z["label"])
    tokens = None if z["tokens"] is None else model.tokens(z["tokens"])
    value = torch.nn.Sequential(*model.query_value)(z["query_values"])
    if variant in IMAGE:
        query = value + asft.fourier(z["query_coords"], asft.image_freqs(16, 32))
    else:
        query = model.query_embedding(z["query_values"])
    for i, block in enumerate(model.trunk, 1):
        reads = block.context_norm is not None
        latents = plain_block(block, latents, c, context if reads else None, tokens, model.cfg.rope)
        levels += [latents] if i in model.level_ends else []
    for block, latents in zip(model.decoder, levels, strict=True):
        query = plain_block(block, query, c, latents)
    shift, scale = model.head_modulation(F.silu(c))[:, None].chunk(2, -1)
    expected = model.head(plain_norm(torch.cat([query, value], -1)) * (1 + scale) + shift)
    got, used = model(**z), [p for p in model.parameters() if p is not model.null_token]
    close(got, expected, 1e-4)
    for a, b in zip(*(torch.autograd.grad(velocity.square().mean(), used) for velocity in (got, expected))):
        close(a, b, 1e-3)

@every_variant
@torch.no_grad()
def test_context_is_a_set_and_queries_do_not_see_each_other(variant):
    """If a pair's place in the list counted, in one order or one a sample, or a query's neighbours."""
    model = tiny(variant)
    z, parts = inputs(model), []
    expected, orders = model(**z), torch.rand(z["values"].shape[:2]).argsort(1)
    for order in (orders[0], orders):
        coords = None if variant in POINTS else z["coords"][order]
        values = z["values"].gather(1, order.expand(3, -1)[..., None].expand(-1, -1, 3))
        close(model(**{**z, "coords": coords, "values": values}), expected)
    assert (model(**{**z, "values": z["values"] + 1}) - expected).abs().max() > 1e-3
    levels = model.encode(z["coords"], z["values"], z["t"], z["label"], z["tokens"])
    prepared, order = model.prepare(levels, z["t"], z["label"]), torch.randperm(10)
    for chunk in (order[:3], order[3:4], order[4:]):
        coords = None if variant in POINTS else z["query_coords"][:, chunk]
        parts.append(model.decode(prepared, coords, z["query_values"][:, chunk]))
    close(torch.cat(parts, 1), expected[:, order])

@every_variant
@torch.no_grad()
def test_values_are_shared_by_the_halves_of_guidance(variant):
    """If values of batch b under conditions of batch 4 gave another result than the values repeated."""
    model = tiny(variant)
    for b in (1, 2):
        z = {**inputs(model, b), "drop": torch.tensor([False, False, True, False])}
        z.update({name: inputs(model, 4)[name] for name in ("t", "label", "tokens")})
        got = model(**z)
        for name in ("values", "query_coords", "query_values"):
            z[name] = None if z[name] is None else z[name].repeat(4 // b, 1, 1)
        close(got, model(**z))
        assert (got[0] - got[2]).abs().max() > 1e-3

@every_variant
def test_gates_modulations_and_output_start_at_zero(variant):
    """If a block did not start as the identity, the output not at zero, or anything else at zero."""
    torch.manual_seed(0)
    model = asft.ASFT(tiny(variant).cfg)
    assert not model(**inputs(model)).any()
    stems = [m[0].bias for m in model.modules() if isinstance(m, asft.Stem)]   # these keep torch's start
    for name, p in model.named_parameters():
        zero = "modulation" in name or name.startswith("head.") or name.endswith("bias")
        assert p.any() == (not zero or any(p is bias for bias in stems)), name

def test_the_decoder_starts_local():
    """If a query did not look at the latents around it before training: keys start as queries, gain 2."""
    torch.manual_seed(0)
    net = asft.ASFT(asft.config("tiny"))
    block, attention = net.decoder[0], net.decoder[0].attention
    assert torch.equal(attention.kv.weight[:128], attention.q.weight) and (attention.q_norm.weight == 2).all()
    centres, coords = asft.image_coords(8), asft.image_coords(32)
    with torch.no_grad():
        place = [asft.fourier(x, net.freqs)[None] for x in (coords, centres)]
        k, _ = block.keys_values(place[1])
        q = attention.q_norm(attention.split(attention.q(torch.nn.functional.layer_norm(place[0], (128,)))))
        weight = (q @ k.mT * 32 ** -0.5).softmax(-1).mean(1)[0]                          # (1024, 64)
    away = torch.cdist(coords, centres)
    assert (weight * away).sum(1).mean() < 0.7 * away.mean()                  # uniform attention: away.mean()

def test_classes_start_louder_than_time():
    """If class embeddings started as small as in DiT, and classes were learnt late."""
    torch.manual_seed(0)
    net = asft.ASFT(asft.config("tiny", n_classes=99))
    assert 0.45 < net.classes.weight.std() < 0.55
    assert net.time(asft.time_features(torch.rand(50))).std() < 0.1

def test_coordinates_and_features_are_their_formulas():
    """If axes were swapped, features scaled or reordered, or the top frequency were not 112 pi at 256."""
    centres = torch.tensor([[((j + 0.5) / 5, (i + 0.5) / 3) for j in range(5)] for i in range(3)])
    assert torch.allclose(asft.image_coords(3, 5), centres.view(-1, 2))
    assert torch.allclose(asft.image_coords(3, 5, box=(1, 2, 3, 3)), centres[2, 1:3])
    freqs, x, t = torch.tensor([1.0, 2.5, 30.0]), torch.rand(20, 2), torch.tensor([0.0, 0.37, 1.0])
    rows = [[f(w * z) for z in p for f in (math.sin, math.cos) for w in freqs.tolist()] for p in x.tolist()]
    assert (asft.fourier(x.view(4, 5, 2), freqs).view(20, 12) - torch.tensor(rows)).abs().max() < 1e-5
    steps = [math.pi * 2 ** (math.log2(112) * i / 95) for i in range(96)]
    assert torch.allclose(asft.image_freqs(256, 384), torch.tensor(steps), rtol=1e-4)
    freqs = asft.PointEmbedding(asft.config("point-tiny")).freqs
    assert freqs.tolist() == [2.0 ** i for i in range(10)]
    angle = 1000 * t.double()[:, None] * 10000 ** (-torch.arange(128).double() / 128)
    assert (asft.time_features(t) - torch.cat([angle.cos(), angle.sin()], 1)).abs().max() < 2e-4

def test_paths_and_times_are_their_closed_forms():
    """If t = 0 were not data, a path or its derivative wrong, or logit-normal not sigmoid(N(0, 1))."""
    t = torch.linspace(0, 1, 1001, dtype=torch.float64, requires_grad=True)
    integral = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(0.1 + 19.9 * t, t)])        # of beta
    closed = {"linear": (1 - t, t), "cosine": ((math.pi / 2 * t).cos(), (math.pi / 2 * t).sin()),
              "vp": ((-integral / 2).exp(), (1 - (-integral).exp()).clamp_min(1e-8).sqrt())}
    assert closed.keys() == asft.PATHS.keys()
    for name, expected in closed.items():
        a, s, da, ds = asft.PATHS[name](t)
        for got, exact, derivative in zip((a, s), expected, (da, ds)):
            assert torch.allclose(got, exact, atol=1e-8) and derivative.isfinite().all(), name
            by_autograd, = torch.autograd.grad(got.sum(), t, retain_graph=True)
            assert torch.allclose(derivative[1:], by_autograd[1:], rtol=1e-9), name
    u = t.detach()[1:-1]
    assert torch.equal(asft.TIMES["uniform"](u), u)
    assert torch.allclose(asft.TIMES["logit-normal"](u), torch.distributions.Normal(0, 1).icdf(u).sigmoid())

@pytest.mark.parametrize("path", asft.PATHS)
def test_loss_is_the_squared_error_of_the_velocity(path):
    """If the target were not a' x0 + s' eps (linear: eps - x0), or queries had noise of their own."""
    torch.manual_seed(0)
    x0, eps, t = torch.randn(2, 64, 3), torch.randn(2, 64, 3), torch.tensor([0.2, 0.7])
    coords, query = asft.image_coords(8), torch.rand(2, 64).argsort(1)[:, :9]
    a, s, da, ds = (z[:, None, None] for z in asft.PATHS[path](t))
    velocity = eps - x0 if path == "linear" else da * x0 + ds * eps
    at_query = torch.arange(2)[:, None], query

    def stub(coords_, xt, query_coords, query_values, t_, label, tokens, drop):
        assert torch.allclose(xt, a * x0 + s * eps, atol=1e-6) and t_ is t and coords_ is coords
        assert torch.equal(query_values, xt[at_query]) and torch.equal(query_coords, coords[query])
        assert (label, tokens, drop) == (4, 5, 6)
        return velocity[at_query] + error
    for error in (0.0, 0.5):
        loss = asft.cicfm_loss(stub, coords, x0, eps, t, query, path, label=4, tokens=5, drop=6)
        assert abs(loss.item() - error ** 2) < 1e-6

@pytest.mark.parametrize("variant", ["spatial", "tokens", "point tokens"])
@torch.no_grad()
def test_dropped_missing_and_null_conditions_are_one(variant):
    """If the null class, a dropped condition and none were different, or labels and tokens had no effect."""
    model = tiny(variant)
    z = inputs(model)
    full, none = model(**z), model(**{**z, "label": None, "tokens": None})
    close(model(**z, drop=torch.tensor([True, False, True])), torch.stack([none[0], full[1], none[2]]))
    close(model(**{**z, "label": torch.full((3,), 5), "tokens": None}), none)
    for name in ("label", "tokens"):
        assert z[name] is None or (model(**{**z, name: None}) - full).abs().max() > 1e-3

@pytest.mark.parametrize("variant", ["spatial", "points", "tokens"])
def test_grad_checkpoint_gives_the_same_gradients(variant):
    """If recomputing blocks, and queries some at a time, changed what is learned, or were not done at all."""
    model, results, runs = tiny(variant, gain=0.05).train(), [], []
    model.trunk[0].mlp.register_forward_hook(lambda *_: runs.append("trunk"))
    model.decoder[0].mlp.register_forward_hook(lambda *_: runs.append("decoder"))
    for model.grad_checkpoint in (False, True):
        results.append(gradients(model, M=2050)[1])
    assert runs.count("trunk") == 1 + 2 and runs.count("decoder") == 1 + 4
    close_gradients(*results)

@every_variant
def test_bfloat16_autocast_stays_close(variant):
    """If a part could not run in bfloat16, the loss left float32, or rounding got out of hand."""
    model = tiny(variant)
    loss, exact = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, got = gradients(model)
    assert rounded.dtype == torch.float32 and abs(rounded / loss - 1) < 0.03
    flat = [torch.cat([g.flatten() for g in z.values()]) for z in (got, exact)]
    assert F.cosine_similarity(*flat, dim=0) > 0.99

@pytest.mark.parametrize("name", asft.PRESETS)
def test_attention_gets_what_the_flash_kernel_takes(name, monkeypatch):
    """If it were not bfloat16, heads of at most 128 that 8 divides, numbers of a head side by side."""
    seen, inner = [], F.scaled_dot_product_attention

    def watched(*qkv):
        seen.extend((x.dtype, x.shape[-1] <= 128 and x.shape[-1] % 8 == 0, x.stride(-1)) for x in qkv)
        return inner(*qkv)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    # without gradients on a CPU, which is the way of a GPU; a build without CUDA has no fake GPU
    with FakeTensorMode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cfg = asft.config(name)
        net, image = asft.ASFT(cfg), cfg.domain == "image"
        x = torch.empty(2, cfg.res ** 2 if image else cfg.points, 3)
        coords = torch.empty(x.shape[1], 2) if image else None
        tokens = torch.empty(2, 9, cfg.token_dim) if cfg.token_dim else None
        asft.cicfm_loss(net, coords, x, x, torch.empty(2), torch.zeros(2, 8, dtype=torch.long), tokens=tokens)
    assert len(seen) >= 3 * (cfg.depth + cfg.levels) and {*seen} == {(torch.bfloat16, True, 1)}

def test_no_graph_break(monkeypatch):
    """If network and loss, windows in parts and recomputed blocks too, did not compile as one graph."""
    model = tiny("spatial", levels=2, rope=True, token_dim=6).train()
    model.grad_checkpoint = True
    monkeypatch.setattr(asft.WindowAttention, "AT_A_TIME", {"cpu": 6 * 2 * 16 * 32})        # 6 of 16 windows
    compiled = torch.compile(asft.cicfm_loss, backend="aot_eager", fullgraph=True)
    close_gradients(gradients(model, loss=compiled)[1], gradients(model)[1])

def test_presets_are_the_papers():
    """If a preset lost a layer or a head, left Tabs. 5 and 6 by 6 %, or levels sat elsewhere."""
    table = {"S": (35, 12, 384, 6, 1), "B": (138, 12, 768, 12, 1), "L": (458, 24, 1024, 16, 1),
             "XL": (733, 28, 1152, 16, 2), "point-B": (108, 9, 512, 4, 1), "point-L": (204, 12, 512, 4, 1)}
    for name, (millions, *shape) in table.items():
        cfg = asft.config(name, n_classes=0 if name.startswith("point") else 1000)
        assert [cfg.depth, cfg.width, cfg.heads, cfg.levels] == shape and cfg.latents == 1024
        with torch.device("meta"):
            count = sum(p.numel() for p in asft.ASFT(cfg).parameters())
        assert abs(count / 1e6 / millions - 1) < 0.06, name
    with torch.device("meta"):
        model = asft.ASFT(asft.config("point-objaverse", levels=3))
    reads = [i for i, block in enumerate(model.trunk) if block.context_norm is not None]
    assert reads == [0, 6, 12, 18] and model.level_ends == [12, 18, 24] and len(model.trunk) == 24
    few, many = (asft.forward_flops(asft.config("S"), M)[0] for M in (4096, 16384))
    block = 20 * 384 ** 2 + 4 * 1024 * 384                                     # q, out, MLP; attention
    assert (many - few) / 12288 == block + 20 * 384 + 32                       # block; head and stem

def test_model_py_alone_prints_the_presets(tmp_path):
    """If the copied file needed a sibling, or a preset were not printed."""
    (tmp_path / "model.py").write_bytes((ROOT / "model.py").read_bytes())
    out, err = python("-I", "model.py", cwd=tmp_path)
    assert {line.split()[0] for line in out.splitlines()} >= set(asft.PRESETS) and err == ""

@pytest.mark.parametrize("name, changes, words", [
    ("tiny", dict(encoder="hash"), "hash.*image"), ("point-tiny", dict(encoder="spatial"), "spatial.*points"),
    ("tiny", dict(res=36), "36"), ("tiny", dict(latents=60), "60"), ("tiny", dict(heads=5), "128.* 5"),
    ("tiny", dict(levels=0), "0"), ("tiny", dict(levels=5), "5"), ("tiny", dict(encoder_heads=12), "12.*128"),
    ("tiny", dict(width=24, rope=True), "rope"), ("tiny", dict(encoder="perceiver", rope=True), "rope"),
    ("point-tiny", dict(encoder="hash", points=500), "500"), ("tiny", dict(width=30, heads=2), "30")])
def test_configurations_that_do_not_fit(name, changes, words):
    """If a wrong configuration failed late, or without saying in one line what does not fit."""
    with pytest.raises(ValueError, match=words) as caught:
        asft.config(name, **changes)
    assert "\n" not in str(caught.value)

@pytest.mark.parametrize("name, shape", [("values", (256, 3)), ("values", (3, 50, 3)), ("t", (3, 1)),
                                         ("query_values", (3, 10, 2))])
def test_wrong_shapes_are_named(name, shape):
    """If a wrong shape were broadcast silently, or the error did not print it."""
    model = tiny("spatial")
    with pytest.raises(ValueError, match=str(shape)[1:-1]):
        model(**{**inputs(model), name: torch.zeros(shape)})

def test_one_image_is_learned():
    """If the network, the loss and an Euler sampler together could not reproduce one image."""
    torch.manual_seed(0)
    coords, B, steps = asft.image_coords(16), 8, 200
    x0 = ((coords - 0.5).norm(dim=1, keepdim=True) < 0.3) * torch.tensor([1.4, -0.6, 0.2]) - coords[:, :1]
    model = asft.ASFT(asft.config("tiny", res=16, width=64, depth=2, latents=16))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        query, eps = torch.rand(B, 256).argsort(1)[:, :128], torch.randn(B, 256, 3)
        optimizer.zero_grad()
        asft.cicfm_loss(model, coords, x0.expand(B, -1, -1), eps, torch.rand(B), query).backward()
        optimizer.step()
    x = torch.randn(4, 256, 3)
    with torch.no_grad():
        for i in range(25, 0, -1):
            x = x - model(coords, x, coords, x, torch.full((4,), i / 25)) / 25
    assert 10 * torch.log10(4 / (x - x0).square().mean((1, 2))).min() > 25     # PSNR
