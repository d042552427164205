"""metrics/inception.py and metrics/clip.py: layout, resizes, scores and files, with random weights of the published layout."""
import functools
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from metrics import clip, inception, weights


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def randomised(net, seed=0):
    """A state dict of the network with weights that keep activations in range."""
    g = torch.Generator().manual_seed(seed)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for k, v in state.items():
        if k.endswith("running_var"):
            v.uniform_(0.5, 1.5, generator=g)
        elif k.endswith("running_mean") or k.endswith("bias"):
            v.normal_(0, 0.1, generator=g)
        elif v.dim() > 1:
            v.normal_(0, math.sqrt(2 / v[0].numel()), generator=g)
        elif v.dtype == torch.float32:
            v.uniform_(0.8, 1.2, generator=g)
    return state


@pytest.fixture(scope="module")
def state():
    return randomised(inception.InceptionV3())


@pytest.fixture(scope="module")
def net(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return inception.load(path)


def pictures(n=2, h=64, w=64, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), dtype=np.uint8))


# --- resizes

def test_tf1_resize_by_hand():
    """If the resize shifted by half a pixel, as every other one does: [0,1] to 4 would be [0,.25,.75,1]."""
    line = lambda values, n: inception.tf1_axis(torch.tensor([values]), 1, n)[0].tolist()
    assert line([0.0, 1.0], 4) == [0, 0.5, 1, 1]
    assert line([0.0, 10.0, 20.0], 5) == pytest.approx([0, 6, 12, 18, 20], abs=1e-5)


@pytest.mark.parametrize("name", inception.RESIZES)
def test_resizes_keep_constants_and_scale(name):
    """If a resize changed a constant picture, or the scaling of grey levels was another than its table row says."""
    level = torch.tensor([0, 128, 255], dtype=torch.uint8)[:, None, None, None].expand(3, 50, 70, 3)
    x = inception.RESIZES[name](level)
    assert x.shape == (3, 3, 299, 299) and x.dtype == torch.float32
    zero, step = (127.5, 127.5) if name == "pytorch-fid" else (128, 128)
    for row, value in zip(x, (0, 128, 255)):
        torch.testing.assert_close(row, torch.full_like(row, (value - zero) / step), rtol=0, atol=1e-6)


@pytest.mark.parametrize("prepare", [*inception.RESIZES.values(), clip.preprocess])
@pytest.mark.parametrize("bad", [torch.zeros(2, 40, 40, 3), pictures().permute(0, 3, 1, 2), pictures()[0]])
def test_other_pictures_are_refused(prepare, bad):
    """If grey levels in 0..1 were scaled as 0..255, or channels taken for rows, and only the score were wrong."""
    with pytest.raises(ValueError, match=r"expected uint8 \(B,H,W,3\)"):
        prepare(bad)


def test_tf1_resize_of_the_network_s_own_size_is_the_identity():
    """If a picture of 299 pixels were resampled."""
    p = pictures(1, 299, 299)
    assert torch.equal(inception.resize_tf1(p), (p.permute(0, 3, 1, 2).float() - 128) / 128)


def test_clean_resize_antialiases_and_does_not_quantise():
    """If the float bicubic were Pillow's 8-bit one, or not the same as Pillow's on a float channel."""
    p = pictures(1, 700, 600)
    x = inception.resize_clean(p)[0] * 128 + 128
    red = Image.fromarray(p[0, :, :, 0].numpy().astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(x[0].numpy(), np.asarray(red).clip(0, 255), atol=1e-4)
    assert x[0].frac().abs().mean() > 0.1 and x.std() < 40                  # noise of sd 74, averaged


# --- Inception

def test_counts_of_the_published_layout(state):
    """If a layer were missing or of another size."""
    parameters = {k for k, _ in inception.InceptionV3().named_parameters()}
    assert sum(state[k].numel() for k in parameters) == 23_850_960
    assert len(state) == 566 and sum(not k.endswith("num_batches_tracked") for k in state) == 472
    assert sum(isinstance(m, inception.Unit) for m in inception.InceptionV3().modules()) == 94
    assert state["fc.weight"].shape == (1008, 2048) and not any(k.startswith("AuxLogits") for k in state)
    assert {m.eps for m in inception.InceptionV3().modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-3}


def test_sizes_and_features(net):
    """If strides or paddings differed, or features were taken at another layer."""
    seen = {}
    hooks = [getattr(net, name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: (i[0], o)}))
             for name in ("Mixed_5c", "Mixed_6d", "Mixed_6e", "Mixed_7c")]
    hooks.append(net.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, o: seen.update(branch=o)))
    pool, spatial, logits = net(inception.resize_tf1(pictures()))
    for hook in hooks:
        hook.remove()
    assert [seen[n][0].shape[1:] for n in ("Mixed_5c", "Mixed_6e", "Mixed_7c")] == [(256, 35, 35), (768, 17, 17), (2048, 8, 8)]
    assert pool.shape == (2, 2048) and spatial.shape == (2, 2023) and logits.shape == (2, 1008)
    assert seen["branch"].shape == (2, 192, 17, 17) and seen["branch"].min() == 0 < seen["branch"].max()      # after the ReLU
    assert torch.equal(spatial.view(2, 17, 17, 7)[1, 3, 5], seen["branch"][1, :7, 3, 5])         # rows, columns, channels
    torch.testing.assert_close(pool, seen["Mixed_7c"][1].mean((2, 3)))
    torch.testing.assert_close(logits, F.linear(pool, net.fc.weight))
    assert net.fc.bias.abs().max() > 0 and pool.std() > 0.01


def test_features_are_reproducible_and_independent_of_the_batch(net):
    """If features of a picture depended on what it is evaluated with, or on a mode of the network."""
    p = pictures(3, 40, 40)
    whole = net(inception.resize_tf1(p))
    for a, b in zip(whole, net(inception.resize_tf1(p))):
        assert torch.equal(a, b)
    for a, b in zip(whole, net(inception.resize_tf1(p[2:]))):
        torch.testing.assert_close(a[2:], b, rtol=1e-4, atol=1e-5)
    assert not net.training


def test_files_with_and_without_counters(state, net, tmp_path):
    """If one of the two published forms of the file were refused, or a key were not consumed."""
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, tmp_path / "w.pth")
    other = inception.load(tmp_path / "w.pth").state_dict()
    for k, v in state.items():
        if not k.endswith("num_batches_tracked"):
            assert torch.equal(other[k], v) and torch.equal(net.state_dict()[k], v)


@pytest.mark.parametrize("load", [inception.load, clip.load])
@pytest.mark.parametrize("name", ["missing", "unexpected", "misshapen", "number", "int key", "foreign", "truncated",
                                  "hostile", "list"])
def test_bad_files_are_named(load, name, state, tmp_path, monkeypatch):
    """If a file that does not fit were used in part, or ended in another error than one line."""
    monkeypatch.chdir(tmp_path)
    path, key = tmp_path / "w.pth", "Mixed_6a.branch3x3.bn.weight"
    if load is clip.load:
        state, key = tower_state(), "ln_post.weight"
    changed = dict(state)
    if name == "missing":
        del changed[key]
    elif name == "unexpected":
        key, changed["AuxLogits.conv"] = "AuxLogits.conv", torch.zeros(1)
    elif name == "misshapen":
        changed[key] = torch.zeros(3)
    elif name == "number":
        changed[key] = 1.5
    elif name == "int key":
        changed[3] = torch.zeros(1)
    torch.save({"foreign": {"a": torch.zeros(2)}, "list": [1, 2], "hostile": {"a": Bomb()}}.get(name, changed), path)
    if name == "truncated":
        path.write_bytes(path.read_bytes()[:100_000])
    if name == "hostile":
        path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError) as e:
        load(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    assert name not in ("missing", "unexpected", "misshapen") or key in str(e.value)
    assert not (tmp_path / "exploded").exists()


# --- Inception Score

def test_inception_score_by_hand():
    """If the score of known predictions were wrong."""
    constant = torch.full((100, 7), 1 / 7)
    assert inception.inception_score(constant) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    assert inception.inception_score(torch.eye(5).repeat(20, 1)) == (pytest.approx(5), pytest.approx(0, abs=1e-12))
    two = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).repeat(50, 1)
    assert inception.inception_score(two)[0] == pytest.approx(2 * math.exp(0.9 * math.log(0.9) + 0.1 * math.log(0.1)), abs=1e-7)


def test_splits_are_consecutive_and_not_shuffled():
    """If items were shuffled: two splits of one class each score 1, one split over both 2."""
    p = torch.eye(2).repeat_interleave(50, 0)
    assert inception.inception_score(p, splits=2)[0] == pytest.approx(1)
    assert inception.inception_score(p, splits=1)[0] == pytest.approx(2)
    mixed = torch.cat([p[:50], torch.eye(2).repeat(25, 1)])
    mean, std = inception.inception_score(mixed, splits=2)
    assert (mean, std) == (pytest.approx(1.5), pytest.approx(0.5))                              # ddof 0
    with pytest.raises(ValueError, match="N >= 10"):
        inception.inception_score(p[:9])
    with pytest.raises(ValueError, match="0 splits"):
        inception.inception_score(p, splits=0)
    with pytest.raises(ValueError, match="finite"):
        inception.inception_score(p * math.nan)


# --- CLIP

@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "clip.pt"
    torch.save({f"visual.{k}": v.half() for k, v in tower_state().items()} | {"text_projection": torch.zeros(3)}, path)
    return clip.load(path)


@functools.lru_cache(1)
def tower_state():
    return randomised(clip.VisionTransformer())


def test_counts_of_both_towers(tower):
    """If the towers were not of the published sizes."""
    assert sum(p.numel() for p in tower.parameters()) == 87_849_216
    assert tower.positional_embedding.shape == (50, 768) and tower.proj.shape == (768, 512)
    with torch.device("meta"):
        big = clip.VisionTransformer(**clip.TOWERS["ViT-bigG/14"])
    # open_clip's visual tower of ViT-bigG-14: 1,844,907,264 parameters
    assert sum(p.numel() for p in big.parameters()) == 1_844_907_264 and big.proj.shape == (1664, 1280)


def test_tower_against_torch_s_own_attention(tower):
    """If attention, residuals or the activation differed from the formula, written here with nn.MultiheadAttention."""
    x = clip.preprocess(pictures(2, 30, 40))
    s = tower.state_dict()
    z = F.conv2d(x, s["conv1.weight"], stride=32).flatten(2).transpose(1, 2)
    z = torch.cat([s["class_embedding"].expand(2, 1, 768), z], 1) + s["positional_embedding"]
    norm = lambda z, name: F.layer_norm(z, (768,), s[name + ".weight"], s[name + ".bias"], 1e-5)
    z = norm(z, "ln_pre")
    attention = torch.nn.MultiheadAttention(768, 12, batch_first=True)
    for i in range(12):
        p = f"transformer.resblocks.{i}."
        attention.load_state_dict({k.removeprefix(p + "attn."): v for k, v in s.items() if k.startswith(p + "attn.")})
        y = norm(z, p + "ln_1")
        z = z + attention(y, y, y, need_weights=False)[0]
        h = F.linear(norm(z, p + "ln_2"), s[p + "mlp.c_fc.weight"], s[p + "mlp.c_fc.bias"])
        z = z + F.linear(h * torch.sigmoid(1.702 * h), s[p + "mlp.c_proj.weight"], s[p + "mlp.c_proj.bias"])
    expected = norm(z[:, 0], "ln_post") @ s["proj"]
    features = tower(x)
    assert features.shape == (2, 512) and features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3 * float(expected.detach().abs().max()))
    assert (features.norm(dim=1) - 1).abs().min() > 1e-2                                         # not normalised


@pytest.mark.parametrize("h, w", [(224, 224), (300, 224), (37, 90), (501, 333)])
def test_preprocess(h, w):
    """If the picture were squeezed instead of cropped, not requantised, or scaled by other constants."""
    p = pictures(1, h, w)
    x = clip.preprocess(p)
    assert x.shape == (1, 3, 224, 224) and x.dtype == torch.float32
    levels = (x[0] * torch.tensor(clip.STD)[:, None, None] + torch.tensor(clip.MEAN)[:, None, None]) * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    if (h, w) == (300, 224):                                                                   # only cropped, from row 38
        torch.testing.assert_close(levels.round().byte().permute(1, 2, 0), p[0, 38:262], rtol=0, atol=0)


class Released(torch.nn.Module):
    """What OpenAI's archive holds beside the visual tower."""

    def __init__(self, state):
        super().__init__()
        self.visual = Nested(state)
        self.text_projection = torch.nn.Parameter(torch.zeros(2, 2))
        for name, value in (("input_resolution", 224), ("context_length", 77), ("vocab_size", 49408)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, x):
        return x


class Nested(torch.nn.Module):
    """A module with the given nested parameter names."""

    def __init__(self, state):
        super().__init__()
        for name in dict.fromkeys(k.split(".")[0] for k in state):
            inner = {k.removeprefix(name + "."): v for k, v in state.items() if k.startswith(name + ".")}
            if inner:
                self.add_module(name, Nested(inner))
            else:
                self.register_parameter(name, torch.nn.Parameter(state[name]))

    def forward(self, x):
        return x


def test_openai_s_torchscript_archive_is_read(tmp_path, recwarn):
    """If the released form of the file, a TorchScript archive in half precision, were not understood."""
    state = tower_state()
    torch.jit.script(Released({k: v.half() for k, v in state.items()})).save(str(tmp_path / "ViT-B-32.pt"))
    recwarn.clear()
    loaded = clip.load(tmp_path / "ViT-B-32.pt")
    assert not recwarn.list
    for k, v in loaded.state_dict().items():
        assert torch.equal(v, state[k].half().float())
    assert weights.identify(tmp_path / "ViT-B-32.pt") == "clip"


def test_wrapped_state_dicts_are_read(tmp_path):
    """If a training checkpoint's wrapper or prefixes hid the tower."""
    state = tower_state()
    torch.save({"state_dict": {f"module.visual.{k}": v for k, v in state.items()}}, tmp_path / "a.pt")
    torch.save(state, tmp_path / "b.pt")
    for name in "ab":
        assert torch.equal(clip.load(tmp_path / f"{name}.pt").proj, state["proj"])
        assert weights.identify(tmp_path / f"{name}.pt") == "clip"
