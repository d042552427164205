"""model.py: the network against plain forms and symmetries, the paths against their closed forms."""
import math
import shutil

import pytest
import torch
import torch.nn.functional as F

import data
import model as asft
import sample

IMAGE = {"spatial": {}, "linear": dict(encoder="linear"), "perceiver": dict(encoder="perceiver"),
         "rope": dict(rope=True), "levels": dict(levels=2), "tokens": dict(token_dim=6),
         "interpolate": dict(interpolate=True, encoder_heads=8)}
POINTS = {"points": {}, "hash": dict(encoder="hash"), "point tokens": dict(token_dim=6)}
VARIANTS = [*IMAGE, *POINTS]


def randomise(model, std=0.2):
    """Gives what starts at zero (gates, modulations, head, biases) random values, so that nothing is switched off."""
    for p in model.parameters():
        if not p.detach().any():
            torch.nn.init.normal_(p, std=std)
    return model


def tiny(variant, gain=0.2, **changes):
    """A small model in which every part contributes; seeded."""
    torch.manual_seed(0)
    small = dict(width=32, depth=2, heads=2, latents=16, n_classes=5)
    size = dict(res=16) if variant in IMAGE else dict(points=64)
    cfg = asft.config("tiny" if variant in IMAGE else "point-tiny",
                      **{**small, **size, **{**IMAGE, **POINTS}[variant], **changes})
    return randomise(asft.ASFT(cfg), gain).eval()


def inputs(model, B=3, M=10, seed=1):
    """Arguments of model.forward, seeded: dict."""
    g, cfg = torch.Generator().manual_seed(seed), model.cfg
    image = cfg.domain == "image"
    N = cfg.res ** 2 if image else cfg.points
    return dict(coords=asft.image_coords(cfg.res) if image else None, values=torch.randn(B, N, 3, generator=g),
                query_coords=torch.rand(B, M, 2, generator=g) if image else None,
                query_values=torch.randn(B, M, 3, generator=g), t=torch.rand(B, generator=g),
                label=torch.randint(cfg.n_classes, (B,), generator=g) if cfg.n_classes else None,
                tokens=torch.randn(B, 4, cfg.token_dim, generator=g) if cfg.token_dim else None)


def loss_inputs(model, B=2, M=8):
    """Arguments of cicfm_loss after the model."""
    z = inputs(model, B)
    query = torch.stack([torch.randperm(z["values"].shape[1])[:M] for _ in range(B)])
    return dict(coords=z["coords"], x0=z["values"].clamp(-1, 1), eps=torch.randn_like(z["values"]), t=z["t"], query=query,
                label=z["label"], tokens=z["tokens"])


def close(a, b, tolerance=2e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1, b.abs().max()), (a - b).abs().max()


# --- the window encoder

def plain_window_encoder(encoder, latents, x, key_bias):
    """Keys and values of every pixel, one query per window, torch's attention: what the absorbed form replaces."""
    B, H = x.shape[1], encoder.heads
    x = x.transpose(0, 1)                                                      # (B, L, n, D)
    split = lambda z: z.unflatten(-1, (H, -1)).transpose(-2, -3)               # (B, L, H, ., d)
    q = split(encoder.q(latents)[None, :, None]).expand(B, -1, -1, -1, -1)
    x = F.scaled_dot_product_attention(q, split(encoder.k(x) + key_bias), split(encoder.v(x)))
    return encoder.mlp(encoder.norm(x.flatten(2)))                             # (B, L, D)


def test_absorbed_window_encoder_equals_the_plain_form_at_256():
    """If the absorbed encoder computed another function than attention over its window, or a key bias mattered."""
    torch.manual_seed(0)
    cfg = asft.config("S", depth=1)
    with torch.no_grad():
        model = randomise(asft.ASFT(cfg))
        coords, values = asft.image_coords(256), torch.randn(1, 256 ** 2, 3)
        got, _ = model.read(coords, values)                                    # (1, 1024, 384)

        pixels = values.view(32, 8, 32, 8, 3).transpose(1, 2).reshape(1024, 1, 64, 3)
        centres = asft.fourier(asft.image_coords(32), model.freqs)
        x = model.stem(pixels) + asft.fourier(asft.image_coords(8), model.freqs)
        for bias in (torch.zeros(384), 3 * torch.randn(384)):
            expected = plain_window_encoder(model.encoder, model.latents + centres, x, bias) + centres
            assert (got - expected).abs().max() < 1e-5


def test_attention_weights_of_the_window_encoder_matter():
    """If the softmax were flat (a lost query or scale), the plain form would agree with a mean: it must not."""
    torch.manual_seed(0)
    encoder = asft.WindowEncoder(32, 4)
    assert tiny("interpolate").encoder.heads == 8 and tiny("spatial", encoder_heads=0).encoder.heads == 2
    latents, x = 3 * torch.randn(5, 32), 3 * torch.randn(5, 2, 16, 32)
    got = encoder(latents, x, lambda x: x)                                    # pairs that are embedded already
    close(got, plain_window_encoder(encoder, latents, x, 0))
    flat = encoder.mlp(encoder.norm(encoder.v(x.mean(2)).transpose(0, 1)))
    assert (got - flat).abs().max() > 0.1


def gradients(model, **z):
    model.zero_grad()
    asft.cicfm_loss(model, **z).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", ["spatial", "hash", "tokens"])
def test_reading_windows_some_at_a_time_changes_nothing(variant, monkeypatch):
    """If a part of the windows, or its second reading in the backward pass, met other queries or pairs; and if the
    first reading kept its pairs, it would not be read again."""
    model = tiny(variant)
    z, calls = loss_inputs(model), []
    with torch.no_grad():
        whole = model.read(z["coords"], z["x0"])[0]
    expected = gradients(model, **z)
    monkeypatch.setattr(asft.WindowEncoder, "AT_A_TIME", {"cpu": 5 * z["x0"][0, :, 0].numel() // 16 * 2 * 32})  # 5 of 16
    pool = model.encoder.pool
    monkeypatch.setattr(model.encoder, "pool", lambda q, *rest: calls.append(len(q)) or pool(q, *rest))
    with torch.no_grad():
        close(model.read(z["coords"], z["x0"])[0], whole)
    assert calls == [5, 5, 5, 1]
    got = gradients(model, **z)
    assert len(calls) == 12 and sorted(calls[8:]) == [1, 5, 5, 5]
    assert got.keys() == expected.keys()
    for name in got:
        assert torch.allclose(got[name], expected[name], rtol=1e-4, atol=1e-6), name


def test_value_stem_in_closed_form_equals_its_layers():
    """If the affine map, its mean, variance or eps were not those of Linear, LayerNorm, SiLU in a row; gradients too."""
    torch.manual_seed(0)
    for size in (1e-3, 1.0, 30.0):
        stem, y = asft.Stem(3, 48), size * torch.randn(5, 7, 3)
        for p in stem.parameters():
            torch.nn.init.normal_(p, std=0.5)
        results = []
        for out in (stem(y), torch.nn.Sequential(*stem)(y)):
            stem.zero_grad()
            out.square().sum().backward()
            results.append([out.detach(), *(p.grad.clone() for p in stem.parameters())])
        for got, expected in zip(*results):
            assert torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max()), size


def plain_decode(model, levels, coords, values, t, label):
    """decode with nothing had once, shared or folded: every modulation, and LayerNorm, scale and shift in the head."""
    c = model.condition(t, label, None)
    stem = torch.nn.Sequential(*model.query_stem)(values)
    x = stem + asft.fourier(coords, model.freqs)
    if model.cfg.interpolate:                              # the four latents around a query, the nearest ones at the border
        side = math.isqrt(model.cfg.latents)
        at = (coords * side - 0.5).clamp(0, side - 1)
        low = at.floor().clamp_max(side - 2).long()
        for dx, dy in ((0, 0), (0, 1), (1, 0), (1, 1)):
            corner = low + torch.tensor([dx, dy])
            weight = (1 - (at - corner).abs()).prod(-1, keepdim=True)                  # (B, M, 1)
            place = (corner[..., 1] * side + corner[..., 0])[..., None].expand(-1, -1, x.shape[-1])
            x = x + weight * levels[-1].gather(1, place)
    for block, latents in zip(model.decoder, levels):
        a = block.attention
        shift, scale, gate, shift2, scale2, gate2 = block.modulation(F.silu(c))[:, None].chunk(6, -1)
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        k, v = a.kv(block.memory_norm(latents)).chunk(2, -1)
        scores = a.q_norm(a.split(a.q(h))) @ a.k_norm(a.split(k)).mT / math.sqrt(x.shape[-1] / a.heads)
        x = x + gate * a.out((scores.softmax(-1) @ a.split(v)).transpose(1, 2).flatten(2))
        x = x + gate2 * block.mlp(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2)
    x = torch.cat([x, stem], -1)
    shift, scale = model.head_modulation(F.silu(c))[:, None].chunk(2, -1)
    return model.head(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


@pytest.mark.parametrize("variant", ["spatial", "levels", "interpolate"])
def test_decoder_equals_its_plain_form(variant):
    """If a modulation had once per step, or the one folded into the head, were another than the layer's own, or a query did not
    start from the latents around it."""
    model = tiny(variant)
    z = inputs(model)
    with torch.no_grad():
        levels = model.encode(z["coords"], z["values"], z["t"], z["label"])
        close(model(**z), plain_decode(model, levels, z["query_coords"], z["query_values"], z["t"], z["label"]))


# --- presets

@pytest.mark.parametrize("name", asft.PAPER_MILLIONS)
def test_parameter_counts_are_the_papers(name):
    """If a preset drifted from Tabs. 5 and 6 (the literal table here is the paper's)."""
    assert asft.PAPER_MILLIONS == {"S": 35, "B": 138, "L": 458, "XL": 733, "point-B": 108, "point-L": 204}
    image = not name.startswith("point")
    with torch.device("meta"):
        model = asft.ASFT(asft.config(name, n_classes=1000 if image else 0))
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 / asft.PAPER_MILLIONS[name] - 1) < 0.06


def test_preset_dimensions_are_the_papers():
    """If a preset lost a layer or a head."""
    table = {"S": (12, 384, 6, 1), "B": (12, 768, 12, 1), "L": (24, 1024, 16, 1), "XL": (28, 1152, 16, 2),
             "point-B": (9, 512, 4, 1), "point-L": (12, 512, 4, 1)}
    for name, row in table.items():
        cfg = asft.config(name)
        assert (cfg.depth, cfg.width, cfg.heads, cfg.levels) == row and cfg.latents == 1024
    cfg = asft.config("point-objaverse")
    assert (cfg.first_self + cfg.depth * cfg.self_layers, cfg.width, cfg.heads, cfg.points) == (20, 1024, 16, 16384)
    with torch.device("meta"):
        assert sum(b.memory_norm is not None for b in asft.ASFT(cfg).trunk) == 4


FLOPS_SAVED = {"S": 0.2, "B": 0.2, "L": 0.2, "XL": 0.2}


@pytest.mark.parametrize("name", FLOPS_SAVED)
def test_decoding_fewer_pixels_saves_flops(name):
    """If decoding a quarter of the pixels stopped paying (Fig. 3b), or depended on a full-size decoder."""
    few, many = (asft.forward_flops(asft.config(name, n_classes=1000), M)[0] for M in (4096, 16384))
    assert 1 - few / many > FLOPS_SAVED[name]


# --- coordinates and features

def test_fourier_features_are_the_formula():
    """If features were scaled, reordered between axes, or computed in less than float32."""
    freqs, x = torch.tensor([1.0, 2.5, 30.0]), torch.rand(4, 5, 2).double()
    rows = []
    for p in x.reshape(-1, 2).tolist():
        rows.append([f(float(w) * z) for z in p for f in (math.sin, math.cos) for w in freqs])
    got = asft.fourier(x, freqs)
    assert got.shape == (4, 5, 12) and got.dtype == torch.float32
    assert (got.reshape(-1, 12).double() - torch.tensor(rows, dtype=torch.float64)).abs().max() < 1e-5
    assert asft.fourier(x.bfloat16(), freqs).dtype == torch.float32


@pytest.mark.parametrize("res", [16, 32, 128, 256])
def test_image_frequencies_stay_below_nyquist(res):
    """If the top frequency left the model free between training pixels, or left 112 pi at R = 256."""
    freqs = asft.image_freqs(res, 384)
    assert freqs.shape == (96,)
    steps = [math.pi * 2 ** (math.log2(7 * res / 16) * i / 95) for i in range(96)]
    assert torch.allclose(freqs, torch.tensor(steps), rtol=1e-4)
    assert freqs.max() < math.pi * res
    assert res != 256 or abs(freqs[-1].item() / (112 * math.pi) - 1) < 1e-5


def test_point_frequencies_are_ten_octaves():
    """If the features of points were not 60 numbers at frequencies 1, 2, ... 512."""
    assert asft.point_freqs().tolist() == [2.0 ** i for i in range(10)]
    assert asft.fourier(torch.zeros(1, 3), asft.point_freqs()).shape == (1, 60)


@pytest.mark.parametrize("height, width", [(4, 4), (3, 5), (5, 2)])
def test_image_coords_are_pixel_centres(height, width):
    """If the grid were corner-aligned or its axes swapped, pictures would shift when the resolution changes."""
    expected = [[(j + 0.5) / width, (i + 0.5) / height] for i in range(height) for j in range(width)]
    assert torch.allclose(asft.image_coords(height, width), torch.tensor(expected))
    assert torch.equal(asft.image_coords(4), asft.image_coords(4, 4))


def test_time_features_are_the_formula():
    """If the time embedding lost its factor 1000, its periods or its precision."""
    t = torch.tensor([0.0, 0.37, 1.0])
    got = asft.time_features(t)
    for row, time in zip(got, t.tolist()):
        for i in (0, 1, 64, 127):
            angle = 1000 * time * 10000 ** (-i / 128)
            assert abs(row[i] - math.cos(angle)) < 2e-4 and abs(row[128 + i] - math.sin(angle)) < 2e-4


def test_rotary_scores_depend_on_the_offset_alone():
    """If the rotary embedding were absolute, or turned both axes by the same angle."""
    rope = asft.rope_tables(6, 16)
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 1, 36, 16)
    scores = (asft.rotate(q, rope) @ asft.rotate(k, rope).transpose(-1, -2))[0, 0].view(6, 6, 6, 6)
    for di, dj in ((0, 0), (1, 0), (0, 1), (2, 3), (-1, 2)):
        same = [scores[i, j, i + di, j + dj] for i in range(1, 4) for j in range(3)]
        assert max(same) - min(same) < 1e-4
    assert abs(scores[1, 1, 3, 1] - scores[1, 1, 1, 3]) > 1e-3
    close(asft.rotate(q, rope).norm(dim=-1), q.norm(dim=-1))


def test_morton_codes_interleave_bits_and_keep_neighbours_close():
    """If the hash order were not a Z-order, the runs of points given to a latent would be scattered in space."""
    cells = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [2, 0, 0], [1023, 1023, 1023], [5, 3, 6]])
    points = (cells + 0.5) / 1023 * 2 - 1
    expected = [sum((c[a] >> b & 1) << (3 * b + a) for b in range(10) for a in range(3)) for c in cells.tolist()]
    assert asft.morton_code(points).tolist() == expected
    points = torch.rand(4096, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    runs = points[asft.morton_code(points).argsort()].view(64, 64, 3)
    spread = lambda z: (z - z.mean(1, keepdim=True)).norm(dim=-1).mean()
    assert spread(runs) < 0.4 * spread(points.view(64, 64, 3))


# --- symmetries

@pytest.mark.parametrize("variant", VARIANTS)
def test_context_order_does_not_matter(variant):
    """If the encoder read the place of a pair in the list instead of its coordinate."""
    model = tiny(variant)
    z = inputs(model)
    with torch.no_grad():
        expected = model(**z)
        order = torch.randperm(z["values"].shape[1])
        z["values"] = z["values"][:, order]
        if z["coords"] is not None:
            z["coords"] = z["coords"][order]
        close(model(**z), expected)
        z["values"] = z["values"] + 1
        assert (model(**z) - expected).abs().max() > 1e-3                      # the context is read at all


@pytest.mark.parametrize("variant", VARIANTS)
def test_query_order_permutes_the_output(variant):
    """If one query saw another one, or a query's coordinate and value were mixed up."""
    model = tiny(variant)
    z = inputs(model)
    order = torch.randperm(10)
    with torch.no_grad():
        expected = model(**z)
        assert expected.std(1).max() > 1e-2                                    # queries differ at all
        z["query_values"] = z["query_values"][:, order]
        if z["query_coords"] is not None:
            z["query_coords"] = z["query_coords"][:, order]
        close(model(**z), expected[:, order])


def test_context_coords_may_differ_by_sample():
    """If coords (B, N, 2) were read otherwise than (N, 2)."""
    for variant in ("spatial", "perceiver"):
        model = tiny(variant)
        z = inputs(model)
        orders = torch.stack([torch.randperm(256) for _ in range(3)])
        with torch.no_grad():
            expected = model(**z)
            z["coords"] = z["coords"][orders]
            z["values"] = z["values"].gather(1, orders[..., None].expand(-1, -1, 3))
            close(model(**z), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_encode_and_chunked_decode_equal_forward(variant):
    """If sampling in chunks, with keys and values had once, computed another function than training."""
    model = tiny(variant)
    z = inputs(model)
    with torch.no_grad():
        levels = model.encode(z["coords"], z["values"], z["t"], z["label"], z["tokens"])
        memory = model.memory(levels, z["t"], z["label"])
        assert len(levels) == len(memory[0]) == model.cfg.levels
        parts = []
        for cut in (slice(0, 3), slice(3, 4), slice(4, 10)):
            coords = None if z["query_coords"] is None else z["query_coords"][:, cut]
            parts.append(model.decode(memory, coords, z["query_values"][:, cut]))
        close(torch.cat(parts, 1), model(**z))


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_are_shared_by_the_halves_of_guidance(variant):
    """If values of batch b under conditions of batch 2b gave another result than the values repeated."""
    model = tiny(variant)
    z = inputs(model, B=2)
    z["t"], z["label"] = torch.tensor([0.1, 0.3, 0.5, 0.9]), torch.tensor([0, 1, 2, 3])
    if z["tokens"] is not None:
        z["tokens"] = torch.randn(4, 4, 6)
    z["drop"] = torch.tensor([False, False, True, False])
    with torch.no_grad():
        got = model(**z)
        for name in ("values", "query_coords", "query_values"):
            z[name] = None if z[name] is None else z[name].repeat(2, 1, 1)
        close(got, model(**z))
        assert (got[0] - got[2]).abs().max() > 1e-3


# --- initialisation

@pytest.mark.parametrize("variant", VARIANTS)
def test_initial_output_and_gates_are_zero(variant):
    """If a block did not start as the identity or the head not at zero, deep models would start badly."""
    torch.manual_seed(0)
    model = asft.ASFT(tiny(variant).cfg)
    assert not model(**inputs(model)).any()
    stems = [m[0].bias for m in model.modules() if isinstance(m, asft.Stem)]   # these keep torch's start
    for name, p in model.named_parameters():
        if any(p is bias for bias in stems):
            assert p.any(), name
        elif "modulation" in name or name.startswith("head.") or name.endswith("bias") and "norm" not in name:
            assert not p.any(), name
        elif name.endswith("weight"):
            assert p.any(), name
    c, x = torch.randn(2, 32), torch.randn(2, 7, 32)
    block = model.trunk[-1]
    if block.memory_norm is None and block.token_attention is None:
        assert torch.equal(block(x, block.modulations(c)), x)


# --- paths and loss

@pytest.mark.parametrize("name", asft.PATHS)
def test_paths_end_at_data_and_noise(name):
    """If t = 0 were not data or t = 1 not noise."""
    a, s, _, _ = asft.PATHS[name](torch.tensor([0.0, 1.0], dtype=torch.float64))
    slack = 1e-2 if name == "vp" else 1e-15          # vp keeps a(1) = 0.0066 and s(0) = 1e-4 by definition
    assert abs(a[0] - 1) < 1e-15 and abs(s[0]) <= max(1e-4 * (name == "vp") * 1.01, 1e-15)
    assert abs(a[1]) < slack and abs(s[1] - 1) < slack
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64)
    a, s, _, _ = asft.PATHS[name](t)
    assert torch.allclose(a + s if name == "linear" else a ** 2 + s ** 2, torch.ones_like(t), atol=1e-14)


@pytest.mark.parametrize("name", asft.PATHS)
def test_path_derivatives_equal_central_differences(name):
    """If a' or s' were not the derivative of a or s, the target would not be the velocity."""
    t, h = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), 1e-5
    _, _, da, ds = asft.PATHS[name](t)
    (a0, s0, _, _), (a1, s1, _, _) = asft.PATHS[name](t - h), asft.PATHS[name](t + h)
    assert torch.allclose(da, (a1 - a0) / (2 * h), atol=1e-7)
    assert torch.allclose(ds, (s1 - s0) / (2 * h), atol=1e-7)


def test_times_map_uniforms():
    """If logit-normal times were not sigmoid(N(0, 1)), or uniform ones not uniform."""
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    assert torch.equal(asft.TIMES["uniform"](u), u)
    normal = torch.distributions.Normal(0, 1).icdf(u)
    assert torch.allclose(asft.TIMES["logit-normal"](u), 1 / (1 + (-normal).exp()))


@pytest.mark.parametrize("path", asft.PATHS)
def test_loss_of_the_exact_velocity_is_zero_and_queries_share_the_noise(path):
    """If the target were not a' x0 + s' eps (eps - x0 on the linear path), or queries had noise of their own."""
    g = torch.Generator().manual_seed(0)
    x0, eps, t = torch.randn(2, 64, 3, generator=g), torch.randn(2, 64, 3, generator=g), torch.tensor([0.2, 0.7])
    query, coords = torch.stack([torch.randperm(64, generator=g)[:9] for _ in range(2)]), asft.image_coords(8)
    a, s, da, ds = (z[:, None, None] for z in asft.PATHS[path](t))
    at = lambda z: torch.stack([row[q] for row, q in zip(z, query)])
    seen = []

    def stub(coords_, xt, query_coords, query_values, t_, label, tokens, drop):
        assert torch.allclose(xt, a * x0 + s * eps, atol=1e-6) and torch.equal(t_, t) and label == 4
        assert torch.equal(query_values, at(xt)) and torch.equal(query_coords, coords[query])
        seen.append(1)
        return at(eps - x0) if path == "linear" else at(da * x0 + ds * eps)

    assert asft.cicfm_loss(stub, coords, x0, eps, t, query, path, label=4).item() < 1e-12
    off = lambda *args: stub(*args) + 0.5
    assert abs(asft.cicfm_loss(off, coords, x0, eps, t, query, path, label=4).item() - 0.25) < 1e-6 and len(seen) == 2


# --- conditions

@pytest.mark.parametrize("variant", ["tokens", "point tokens"])
def test_token_conditioning(variant):
    """If dropped tokens were not the null token, or tokens had no effect."""
    model = tiny(variant)
    z = inputs(model)
    everything = torch.ones(3, dtype=torch.bool)
    with torch.no_grad():
        none = model(**{**z, "tokens": None, "label": None})
        close(model(**z, drop=everything), none)
        assert (model(**{**z, "label": None}) - none).abs().max() > 1e-3
        some = model(**z, drop=torch.tensor([True, False, False]))
        close(some[:1], none[:1])
        close(some[1:], model(**z)[1:])


def test_null_class():
    """If the null class, a dropped class and no class were three different conditions."""
    model = tiny("spatial")
    z = inputs(model)
    with torch.no_grad():
        none = model(**{**z, "label": None})
        close(model(**{**z, "label": torch.full((3,), 5)}), none, 0)
        close(model(**z, drop=torch.ones(3, dtype=torch.bool)), none, 0)
        assert (model(**z) - none).abs().max() > 1e-3


# --- levels, checkpointing, compilation

def test_decoder_levels_are_evenly_spaced():
    """If the levels were not the trunk's blocks 14 and 28 in XL, shallow first, the last block reading the end."""
    with torch.device("meta"):
        assert asft.ASFT(asft.config("XL")).level_ends == [14, 28]
        assert asft.ASFT(asft.config("tiny", depth=4, levels=4)).level_ends == [1, 2, 3, 4]
        point = asft.ASFT(asft.config("point-tiny", depth=4, levels=2))
        assert point.level_ends == [point.ends[1], point.ends[3]] and point.ends[3] == len(point.trunk)
    model = tiny("levels")
    z, seen = inputs(model), []
    model.trunk[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model.trunk[1].register_forward_hook(lambda module, args, output: seen.append(output))
    levels = model.encode(z["coords"], z["values"], z["t"], z["label"])
    assert len(levels) == 2 and levels[0] is seen[0] and levels[1] is seen[1]


@pytest.mark.parametrize("variant", ["spatial", "points", "tokens"])
def test_grad_checkpoint_gives_the_same_gradients(variant, monkeypatch):
    """If recomputing blocks, and queries some at a time, changed what is learned, or were not done at all."""
    model, results, runs = tiny(variant, gain=0.05).train(), [], []
    g, N = torch.Generator().manual_seed(3), model.cfg.res ** 2 if model.cfg.domain == "image" else model.cfg.points
    z = loss_inputs(model)
    z["query"] = torch.randint(N, (2, 2050), generator=g)
    model.trunk[0].mlp.register_forward_hook(lambda *_: runs.append("trunk"))
    model.decoder[0].mlp.register_forward_hook(lambda *_: runs.append("decoder"))
    for model.grad_checkpoint in (False, True):
        results.append(gradients(model, **z))
    assert runs.count("trunk") == 1 + 2 and runs.count("decoder") == 1 + 4
    assert results[0].keys() == results[1].keys() and len(results[0]) > 10
    for name, plain in results[0].items():
        assert torch.allclose(plain, results[1][name], rtol=1e-4, atol=1e-6), name


def test_activation_bytes_are_those_that_autograd_keeps():
    """If the count of python model.py were not what a step keeps (float32 here, where nothing is cast), or recomputing saved
    nothing. The windows are read in one part, so that no region is recomputed."""
    cfg, kept = asft.config("tiny", width=64, depth=2), {}
    torch.manual_seed(0)
    model, N = asft.ASFT(cfg), 32 ** 2
    own = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}

    def keep(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        loss = asft.cicfm_loss(model, asft.image_coords(32), torch.rand(4, N, 3), torch.randn(4, N, 3), torch.rand(4),
                               torch.stack([torch.randperm(N)[:256] for _ in range(4)]))
    assert loss.isfinite()
    counted = asft.activation_bytes(cfg, 256, 4)
    assert abs(counted / sum(s.nbytes() for s in kept.values()) - 1) < 0.02
    S = asft.config("S", depth=4)
    assert asft.activation_bytes(S, 8192, 2, True) < 0.6 * asft.activation_bytes(S, 8192, 2)
    assert 1.8 < asft.activation_bytes(S, 8192, 4) / asft.activation_bytes(S, 8192, 2) < 2.05


def whole(variant):
    """Small models in which several features meet, for the slow compiler."""
    return {"spatial": lambda: tiny("interpolate", levels=2, rope=True, token_dim=6), "linear": lambda: tiny("linear", depth=1),
            "perceiver": lambda: tiny("perceiver", depth=1, reread=True), "hash": lambda: tiny("hash", depth=1),
            "points": lambda: tiny("point tokens", depth=1)}[variant]()


@pytest.mark.parametrize("variant", ["spatial", "linear", "perceiver", "points", "hash"])
def test_no_graph_break(variant):
    """If anything in the network or the loss could not be compiled, backward pass included, as one graph."""
    torch._dynamo.reset()
    model = whole(variant)
    z = loss_inputs(model)
    loss = asft.cicfm_loss(model, **z)
    loss.backward()
    expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    got = torch.compile(asft.cicfm_loss, backend="aot_eager", fullgraph=True)(model, **z)
    got.backward()
    close(got, loss, 1e-5)
    for p, e in zip(model.parameters(), expected):
        assert e is None or torch.allclose(p.grad, e, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("again", [False, True])
def test_no_graph_break_where_parts_are_recomputed(again, monkeypatch):
    """If windows read some at a time, or recomputed blocks and queries, broke the graph, or gave other gradients in it."""
    torch._dynamo.reset()
    model = whole("spatial").train()
    model.grad_checkpoint = again
    z = loss_inputs(model)
    expected = gradients(model, **z)
    monkeypatch.setattr(asft.WindowEncoder, "AT_A_TIME", {"cpu": 6 * 2 * 16 * 32})          # 6 of 16 windows
    model.zero_grad()
    torch.compile(asft.cicfm_loss, backend="aot_eager", fullgraph=True)(model, **z).backward()
    for name, p in model.named_parameters():
        assert name not in expected or torch.allclose(p.grad, expected[name], rtol=1e-3, atol=1e-5), name


def test_inductor_gives_the_same_numbers():
    """If torch.compile with code generation broke or changed the result."""
    torch._dynamo.reset()
    model, compiler = tiny("spatial", depth=1), shutil.which("gcc") or shutil.which("c++")
    z = inputs(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="inductor" if compiler else "aot_eager", fullgraph=True)
        close(compiled(**z), model(**z), 1e-4)


# --- errors

@pytest.mark.parametrize("name, changes, words", [
    ("M", {}, ["'M'", "XL"]),
    ("tiny", dict(encoder="hash"), ["hash", "image"]),
    ("point-tiny", dict(encoder="spatial"), ["spatial", "points"]),
    ("tiny", dict(encoder="magic"), ["magic"]),
    ("tiny", dict(res=36), ["36", "latent"]),
    ("tiny", dict(latents=60), ["60", "latents"]),
    ("tiny", dict(heads=5), ["128", "5 heads"]),
    ("tiny", dict(width=30, heads=2), ["30"]),
    ("tiny", dict(width=24, heads=4, rope=True), ["rope", "24"]),
    ("point-tiny", dict(rope=True), ["rope"]),
    ("tiny", dict(encoder="perceiver", rope=True), ["rope"]),
    ("point-tiny", dict(encoder="hash", points=500), ["500", "64"]),
    ("tiny", dict(levels=5), ["5", "levels"]),
    ("tiny", dict(levels=0), ["0", "levels"]),
    ("tiny", dict(encoder_heads=12), ["12", "width", "128"]),
    ("tiny", dict(encoder_heads=-16), ["-16", "width"]),
    ("tiny", dict(encoder="perceiver", encoder_heads=16), ["16", "spatial"]),
    ("tiny", dict(encoder="perceiver", interpolate=True), ["interpolate"]),
])
def test_configurations_that_do_not_fit(name, changes, words):
    """If a wrong configuration failed late, or without saying in one line what does not fit."""
    with pytest.raises(ValueError) as caught:
        asft.config(name, **changes)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


WRONG = [("values", (3, 64, 4)), ("values", (256, 3)), ("t", (3, 1)), ("t", ()), ("query_values", (3, 10, 2)),
         ("query_values", (10, 3))]
COUNTED = ("spatial", "linear", "hash")        # encoders that need a certain number of pairs


@pytest.mark.parametrize("variant, name, shape", [(v, *w) for v in (*COUNTED, "perceiver", "points") for w in WRONG]
                         + [(v, "values", (3, 50, 3)) for v in COUNTED])
def test_wrong_shapes_are_named(variant, name, shape):
    """If a wrong shape were broadcast silently, or the error did not print it."""
    model = tiny(variant)
    with pytest.raises(ValueError) as caught:
        model(**{**inputs(model), name: torch.zeros(shape)})
    assert str(shape) in str(caught.value)


# --- overfitting

def overfit(seed, steps=400, B=8, M=256, lr=6e-3, res=32, samples=4):
    """One glyph learned by heart: its values (res, res, 3), and samples of the model, (samples, res, res, 3)."""
    torch.manual_seed(seed)
    pixels, _ = data.Glyphs(res=res).item(7 + seed)
    x0 = data.decode_values(torch.from_numpy(pixels)[None], "cpu")
    model, coords = asft.ASFT(asft.config("tiny", res=res, width=64, depth=2, heads=4, latents=16)), asft.image_coords(res)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0, betas=(0.9, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        query = torch.stack([torch.randperm(res * res)[:M] for _ in range(B)])
        asft.cicfm_loss(model, coords, x0.expand(B, -1, -1), torch.randn(B, res * res, 3), torch.rand(B), query).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad()
    x, _ = sample.generate(model.eval(), range(samples), seed=seed, steps=50)
    return x0.view(res, res, 3), x.view(samples, res, res, 3)


def window_peak(residual, p):
    """Spectral energy at the window frequency and its harmonics over that of their neighbours: mean over the harmonics,
    and over those on the two axes alone. residual (S, R, R, 3)."""
    energy = torch.fft.fft2(residual.permute(0, 3, 1, 2)).abs().square().mean((0, 1))          # (R, R)
    R = energy.shape[0]
    beat, ratios, axes = R // p, [], []
    for i in range(0, R, beat):
        for j in range(0, R, beat):
            near = [energy[(i + di) % R, (j + dj) % R] for di in (-1, 0, 1) for dj in (-1, 0, 1) if di or dj]
            if i or j:
                ratios.append((energy[i, j] / torch.stack(near).median()).item())
                axes += ratios[-1:] * (not (i and j))
    return sum(ratios) / len(ratios), sum(axes) / len(axes)


def test_one_picture_is_learned_without_window_artefacts(seed=0):
    """If the network could not represent a picture, or showed its windows as a grid in it (wrong Fourier features)."""
    x0, x = overfit(seed)
    psnr = 10 * torch.log10(4 / (x - x0).square().mean((1, 2, 3)))
    assert psnr.min() > 30, psnr
    peaks = window_peak(x - x0, 8)
    assert max(peaks) < 3, peaks
    # the measure does see a grid: a pattern repeated in every window, at a third of the error's size
    grid = torch.randn(8, 8, 3).repeat(4, 4, 1) * (x - x0).std() / 3
    assert window_peak(x - x0 + grid, 8)[0] > 3
