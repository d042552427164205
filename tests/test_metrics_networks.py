"""The metrics' networks, with random weights of the published layouts: slow forms, torch's modules, files."""
import argparse
import inspect
import math
import pickle
import zipfile

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from conftest import Bomb, refused
from metrics import clip, dinov2, inception, pointnet, ulip, weights

def randomised(net):
    """The network with weights and running statistics under which every part of it contributes."""
    g = torch.Generator().manual_seed(0)
    for name, x in net.state_dict().items():
        if name.endswith("running_var"):
            x.uniform_(0.5, 1.5, generator=g)
        elif name.endswith(("running_mean", "bias")):
            x.normal_(0, 0.1, generator=g)
        elif name.endswith(("token", "tokens", "pos", "pos_embed", "embedding")):
            x.normal_(generator=g)
        elif x.dim() > 1:
            x.normal_(0, math.sqrt(2 / x[0].numel()), generator=g)
        elif x.dim() == 1:
            x.uniform_(0.8, 1.2, generator=g)
    return net.eval().requires_grad_(False)

def images(n=2, h=64, w=64):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, h, w, 3), dtype=np.uint8))

def clouds(S=2, P=520):
    return torch.randn(S, P, 3, generator=torch.Generator().manual_seed(0))

def count(net):
    return sum(p.numel() for p in net.parameters())

def close(a, b, tolerance):
    assert a.shape == b.shape
    assert (a.double() - b.double()).abs().max() <= tolerance * b.abs().max()

# --- Files

SMALL = dict(width=64, depth=1, heads=2, hidden=48, out=16)            # a tower of CLIP

@pytest.fixture(autouse=True)
def small_tower(monkeypatch):
    monkeypatch.setitem(clip.TOWERS, (64, 3, 32, 32), SMALL)

def of_ulip(state):
    """A checkpoint as ULIP's trainer writes it."""
    state = {f"module.{k}": v for k, v in state.items()} | {"module.logit_scale": torch.tensor(2.0)}
    state["module.open_clip_model.blocks.blocks.99.attn"] = torch.ones(2)
    return dict(state_dict=state, optimizer={"state": {0: {"exp_avg": torch.ones(3)}}}, scaler={},
                best_acc1=np.float64(50.6), args=argparse.Namespace(lr=3e-3))

# name -> module, network, a key, functions that wrap its state dict as files do
NETWORKS = {
    "inception": (inception, inception.InceptionV3, "Mixed_6a.branch3x3.bn.weight", [
        lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")}]),
    "clip": (clip, lambda: clip.VisionTransformer(**SMALL), "ln_post.weight", [
        lambda s: {f"visual.{k}": v for k, v in s.items()} | {"text_projection": torch.zeros(3)},
        lambda s: {"state_dict": {f"module.visual.{k}": v for k, v in s.items()}}]),
    "dinov2": (dinov2, lambda: dinov2.DINOv2(128, 2, 48, side=5), "norm.weight", [
        lambda s: {k: v for k, v in s.items() if k != "mask_token"}]),
    "pointnet": (pointnet, pointnet.PointNet2, "fc3.bias", [
        lambda s: dict(epoch=3, instance_acc=np.float64(0.9), model_state_dict=s)]),
    "ulip": (ulip, lambda: ulip.PointBERT(3, 2, 8), "point_encoder.norm.bias", [of_ulip])}

@pytest.mark.parametrize("name", NETWORKS)
def test_files_are_read(name, tmp_path):
    """If weights, bare or as trainers wrap them, were not read, in evaluation mode, or not told apart."""
    module, network, _, wrappers = NETWORKS[name]
    state = randomised(network()).state_dict()
    for wrap in (dict, *wrappers):
        torch.save(wrap(state), tmp_path / "w.pt")
        loaded = module.load(tmp_path / "w.pt")
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        assert loaded.state_dict().keys() == state.keys()
        assert all(torch.equal(x, state[k]) for k, x in loaded.state_dict().items() if k != "mask_token")
        assert weights.identify(tmp_path / "w.pt") == name

@pytest.mark.usefixtures("nothing_goes_off")
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", NETWORKS)
def test_files_that_do_not_fit_are_named(name, tmp_path):
    """If a wrong file were used in part, its code run, or it ended in anything but one line that names it."""
    module, network, key, _ = NETWORKS[name]
    state, path = network().state_dict(), tmp_path / "w.pt"
    torch.save(state, path)
    named = [{k: v for k, v in state.items() if k != key}, {**state, f"{key}_more": torch.zeros(1)},
             {**state, key: torch.zeros(3)}]
    for content in (*named, {**state, key: 1.5}, {3: torch.zeros(1)}, {"a": torch.zeros(2)}, {}, [1, 2],
                    torch.ones(2), {"state_dict": [2]}, {"model_state_dict": 3}, {"a": Bomb()}, Bomb(), None,
                    b"", b"no weights", path.read_bytes()[:9999], pickle.dumps(Bomb())):
        path.unlink(missing_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(ValueError) as error:
            module.load(path)
        text = str(error.value)
        assert str(path) in text and "\n" not in text and len(text) < 700 and "arbitrary" not in text
        assert key in text or not any(content is one for one in named)

def test_files_in_other_formats_are_read(tmp_path, recwarn):
    """If OpenAI's archive of code in half precision, or scalars as NumPy 1 names them, were not read."""
    tower, released = randomised(clip.VisionTransformer(**SMALL)), nn.Module()
    released.visual, released.text_projection = tower, nn.Parameter(torch.zeros(2, 2))
    released.forward = tower.forward
    torch.jit.trace(released, torch.zeros(1, 3, 224, 224)).half().save(str(tmp_path / "ViT-B-32.pt"))
    recwarn.clear()
    loaded = clip.load(tmp_path / "ViT-B-32.pt")
    assert not recwarn.list and weights.identify(tmp_path / "ViT-B-32.pt") == "clip"
    assert all(torch.equal(x, tower.state_dict()[k].half().float()) for k, x in loaded.state_dict().items())
    net = pointnet.PointNet2()
    torch.save({"class_acc": np.float64(0.9), "model_state_dict": net.state_dict()}, tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for item in new.namelist():
            old.writestr(item, new.read(item).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert torch.equal(pointnet.load(tmp_path / "old.pt").fc3.bias, net.fc3.bias)

def test_published_layouts():
    """If a layer, a key or a size were another than the released files have."""
    with torch.device("meta"):
        net, points, colour, plain = (inception.InceptionV3(), pointnet.PointNet2(), ulip.PointBERT(),
                                      ulip.PointBERT(3, 12, 512))
        small, big, _ = (clip.VisionTransformer(**sizes) for sizes in clip.TOWERS.values())
        sizes = ((384, 12, 1536), (768, 12, 3072), (1024, 24, 4096))
        millions = [round(count(dinov2.DINOv2(*size)) / 1e6, 2) for size in sizes]
        assert millions == [22.06, 86.58, 304.37]
        assert {m.eps for m in dinov2.DINOv2(128, 1).modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert count(net) == 23_850_960 and len(net.state_dict()) == 566 and net.fc.weight.shape == (1008, 2048)
    assert sum(isinstance(m, inception.Unit) for m in net.modules()) == 94
    assert {m.eps for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    kernels = {f"Mixed_{block}": [] for block in ("5d", "6a", "6e", "7a", "7c")}
    for name, m in net.named_modules():
        if isinstance(m, inception.Unit) and name.split(".")[0] in kernels:
            kernels[name.split(".")[0]].append("x".join(map(str, m.conv.kernel_size)))
    assert [" ".join(sizes) for sizes in kernels.values()] == [
        "1x1 1x1 5x5 1x1 3x3 3x3 1x1", "3x3 1x1 3x3 3x3", "1x1 1x1 1x7 7x1 1x1 7x1 1x7 7x1 1x7 1x1",
        "1x1 3x3 1x1 1x7 7x1 3x3", "1x1 1x1 1x3 3x1 1x1 3x3 1x3 3x1 1x1"]
    assert count(small) == 87_849_216 and small.positional_embedding.shape == (50, 768)
    assert count(big) == 1_844_907_264 and big.proj.shape == (1664, 1280)
    assert count(points) == 5_859_496 and len(points.state_dict()) == 79
    assert {"sa2.mlp_convs.0.weight", "sa3.mlp_bns.2.num_batches_tracked"} <= points.state_dict().keys()
    assert count(colour.point_encoder) == 32_499_072 and count(plain.point_encoder) == 21_858_816
    assert count(colour) - count(colour.point_encoder) == 983_040 and plain.pc_projection.shape == (768, 512)
    keys = colour.point_encoder.state_dict().keys()
    assert {"blocks.blocks.17.attn.qkv.weight", "encoder.second_conv.3.bias", "pos_embed.2.weight",
            "cls_pos"} <= keys and "blocks.blocks.0.attn.qkv.bias" not in keys

# --- Images to inputs

@pytest.mark.parametrize("prepare", [*inception.RESIZES.values(), clip.preprocess, dinov2.preprocess,
                                     dinov2.DINOv2(64, 1, 8)])
def test_other_images_are_refused(prepare):
    """If grey levels in 0..1 were scaled as 0..255, or channels taken for rows."""
    for bad in (torch.zeros(2, 42, 42, 3), images().permute(0, 3, 1, 2), images()[0], images()[..., :1]):
        with pytest.raises(ValueError, match=r"^images are .*expected uint8 \(B,H,W,3\)"):
            prepare(bad)

def test_tf1_resize_by_hand():
    """If the resize shifted by half a pixel, as every other one does: [0,1] to 4 would be [0,.25,.75,1]."""
    assert inception.tf1_axis(torch.tensor([[0.0, 1.0]]), 1, 4)[0].tolist() == [0, 0.5, 1, 1]
    five = inception.tf1_axis(torch.tensor([[0.0], [10.0], [20.0]]), 0, 5)[:, 0]
    assert five.tolist() == pytest.approx([0, 6, 12, 18, 20], abs=1e-5)
    p = images(1, 299, 299)                # of the network's own size
    assert torch.equal(inception.resize_tf1(p), (p.permute(0, 3, 1, 2).float() - 128) / 128)

def test_other_resizes_against_pillow_and_formula():
    """If the bicubic were Pillow's 8-bit one, or pytorch-fid's bilinear antialiased or not half-pixel."""
    p = images(1, 700, 600)
    x = inception.resize_clean(p)[0] * 128 + 128
    red = Image.fromarray(p[0, :, :, 0].numpy().astype(np.float32)).resize((299, 299), Image.BICUBIC)
    np.testing.assert_allclose(x[0].numpy(), np.asarray(red).clip(0, 255), atol=1e-4)
    assert x[0].frac().abs().mean() > 0.1 and x.std() < 40             # noise of sd 74, averaged
    at = 0.5 / 299 * 700 - 0.5                                         # of output row 0: rows 0 and 1
    row = (1 - at) * p[0, 0, :, 0].float() + at * p[0, 1, :, 0].float()
    at = 0.5 / 299 * 600 - 0.5
    expected = ((1 - at) * row[0] + at * row[1] - 127.5) / 127.5
    assert float(inception.resize_pytorch_fid(p)[0, 0, 0, 0]) == pytest.approx(float(expected), abs=1e-4)

@pytest.mark.parametrize("h, w, size, left, top", [
    (224, 224, (224, 224), 0, 0), (300, 224, (224, 300), 0, 38), (37, 90, (544, 224), 160, 0),
    (501, 333, (224, 337), 0, 56)])
def test_preprocess(h, w, size, left, top):
    """If the image were squeezed instead of cropped, not requantised, or scaled by other constants."""
    x = clip.preprocess(images(1, h, w))
    mean, std = torch.tensor([[.48145466, .4578275, .40821073], [.26862954, .26130258, .27577711]])
    resized = Image.fromarray(images(1, h, w)[0].numpy()).resize(size, Image.BICUBIC)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224)))
    levels = (x[0].permute(1, 2, 0) * std + mean) * 255
    np.testing.assert_allclose(levels.numpy(), expected, rtol=0, atol=1e-3)
    assert x.shape == (1, 3, 224, 224) and x.dtype == torch.float32
    whole = Image.fromarray(images(1, h, w)[0].numpy()).resize((224, 224), Image.BICUBIC)         # of FDD
    assert np.array_equal(dinov2.preprocess(images(1, h, w))[0], whole)

# --- Slow forms: one item at a time in float64. s: a state dict

def linear(s, name, x):
    return x @ s[name + ".weight"].flatten(1).T + s.get(name + ".bias", 0)

def norm(s, name, x, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], s[name + ".weight"], s[name + ".bias"], eps)

def unit(s, name, bn, x):
    """Linear map of the last axis, batch normalisation, ReLU."""
    mean, var, gain, bias = (s[f"{bn}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
    return ((linear(s, name, x) - mean) / (var + 1e-5).sqrt() * gain + bias).relu()

def block(s, x, heads, names, mlp, eps=1e-5, scales=(1, 1)):
    """A transformer block (T,D) by torch's attention. names: of the norms, qkv's weight and bias, output."""
    norm1, norm2, weight, bias, out = names
    layer, D = nn.MultiheadAttention(x.shape[1], heads, dtype=torch.float64), x.shape[1]
    layer.load_state_dict({"in_proj_weight": s[weight], "in_proj_bias": s.get(bias, torch.zeros(3 * D)),
                           **{f"out_proj.{k}": s[f"{out}.{k}"] for k in ("weight", "bias")}})
    y = norm(s, norm1, x, eps)
    x = x + scales[0] * layer(y, y, y, need_weights=False)[0].detach()
    return x + scales[1] * mlp(norm(s, norm2, x, eps))

def timm_block(s, p, x, heads, eps=1e-5, scales=(1, 1)):
    """A block with timm's names, as DINOv2 and PointBERT have them."""
    def mlp(y):
        return linear(s, p + "mlp.fc2", nn.GELU()(linear(s, p + "mlp.fc1", y)))
    names = [p + n for n in ("norm1", "norm2", "attn.qkv.weight", "attn.qkv.bias", "attn.proj")]
    return block(s, x, heads, names, mlp, eps, scales)

def doubled(net):
    return {k.removeprefix("point_encoder."): v.double() for k, v in net.state_dict().items()}

def slow_clip(net, x):
    s, patches = doubled(net), F.unfold(x[None].double(), 32, stride=32)[0].T
    z = torch.cat([s["class_embedding"][None], linear(s, "conv1", patches)]) + s["positional_embedding"]
    z = norm(s, "ln_pre", z)
    for i in range(3):
        p = f"transformer.resblocks.{i}."

        def mlp(y):
            h = linear(s, p + "mlp.c_fc", y)
            return linear(s, p + "mlp.c_proj", h * torch.sigmoid(1.702 * h))
        names = [p + n for n in ("ln_1", "ln_2", "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj")]
        z = block(s, z, 2, names, mlp)
    return norm(s, "ln_post", z[0]) @ s["proj"]

def slow_dinov2(net, image):
    s = doubled(net)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64)
    pixels = ((image.double() / 255 - mean) / std).permute(2, 0, 1)[None]
    patches = linear(s, "patch_embed.proj", F.unfold(pixels, 14, stride=14)[0].T)
    patches = patches + net.positions(image.shape[0] // 14, image.shape[1] // 14)[0].double()
    registers = s.get("register_tokens", torch.zeros(1, 0, 128))[0]
    x = torch.cat([s["cls_token"][0] + s["pos_embed"][0, :1], registers, patches])
    for p in ("blocks.0.", "blocks.1."):
        x = timm_block(s, p, x, 2, 1e-6, (s[p + "ls1.gamma"], s[p + "ls2.gamma"]))
    x = norm(s, "norm", x, 1e-6)
    return x[1 + len(registers):], x[0]

def slow_farthest(xyz, count, start=0, skip=-1.0):
    """Points of squared norm <= skip are passed over."""
    nearest, chosen = torch.where(xyz.square().sum(1) <= skip, -1.0, 1e10).tolist(), [start]
    while len(chosen) < count:
        found = (xyz - xyz[chosen[-1]]).square().sum(1).tolist()
        nearest = [min(pair) for pair in zip(nearest, found)]
        chosen.append(nearest.index(max(nearest)))
    return chosen

def slow_ball(xyz, centre, radius, count):
    found = ((xyz - centre).square().sum(1) <= radius ** 2).nonzero()[:count, 0].tolist()
    return found + found[:1] * (count - len(found))

def slow_pointnet(net, xyz, start):
    """Of a normalised cloud: features of the three stages, features, log-probabilities."""
    s, x, stages = doubled(net), torch.zeros(len(xyz), 0), []
    for stage, centres, radius, n in (("sa1", 512, 0.2, 32), ("sa2", 128, 0.4, 64), ("sa3", 1, None, None)):
        groups = torch.cat([xyz, x], 1)[None]
        if radius:
            centres = xyz[slow_farthest(xyz, centres, start)]
            balls = [slow_ball(xyz, c, radius, n) for c in centres]
            groups = torch.stack([torch.cat([xyz[b] - c, x[b]], 1) for b, c in zip(balls, centres)])
            xyz = centres
        for i in range(3):
            groups = unit(s, f"{stage}.mlp_convs.{i}", f"{stage}.mlp_bns.{i}", groups)
        x = groups.amax(1)
        stages.append(x)
    mean, var, gain, bias = (s[f"bn2.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
    features = (linear(s, "fc2", unit(s, "fc1", "bn1", x[0])) - mean) / (var + 1e-5).sqrt() * gain + bias
    return *stages, features, linear(s, "fc3", features.relu()).log_softmax(0)

def slow_pointbert(net, points):
    """Of a prepared cloud (P,C)."""
    s, xyz, gelu = doubled(net), points[:, :3], nn.GELU()
    centres = xyz[slow_farthest(xyz, 512, skip=1e-3)]
    near = torch.cdist(centres, xyz).argsort(1)[:, :32]
    x = torch.cat([xyz[near] - centres[:, None], points[near, 3:]], -1)
    x = linear(s, "encoder.first_conv.3", unit(s, "encoder.first_conv.0", "encoder.first_conv.1", x))
    x = torch.cat([x.amax(1, keepdim=True).expand_as(x), x], -1)
    x = linear(s, "encoder.second_conv.3", unit(s, "encoder.second_conv.0", "encoder.second_conv.1", x))
    where = linear(s, "pos_embed.2", gelu(linear(s, "pos_embed.0", centres)))
    x = torch.cat([s["cls_token"][0], linear(s, "reduce_dim", x.amax(1))])
    where = torch.cat([s["cls_pos"][0], where])
    for p in ("blocks.blocks.0.", "blocks.blocks.1."):
        x = timm_block(s, p, x + where, 6)
    x = norm(s, "norm", x)
    return torch.cat([x[0], x[1:].amax(0)]) @ s["pc_projection"]

# --- Networks of images

def test_inception_sizes_and_features():
    """If strides, paddings or pools differed, or features were of another layer or of the whole batch."""
    net, seen = randomised(inception.InceptionV3()), {}
    parts = "1x1", "3x3_2a", "3x3_2b", "3x3dbl_3a", "3x3dbl_3b", "_pool"
    parts = [f"Mixed_7c.branch{part}" for part in parts]
    for name in ("Mixed_5c", "Mixed_6d", "Mixed_6e", "Mixed_7c", "Mixed_6d.branch1x1", *parts):
        module = net.get_submodule(name)
        module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: (i[0], o)}))
    x = inception.resize_tf1(images(3))
    pool, spatial, logits = whole = net(x)
    inputs = [seen[name][0].shape[1:] for name in ("Mixed_5c", "Mixed_6e", "Mixed_7c")]
    assert inputs == [(256, 35, 35), (768, 17, 17), (2048, 8, 8)]
    assert pool.shape == (3, 2048) and spatial.shape == (3, 2023) and logits.shape == (3, 1008)
    branch = seen["Mixed_6d.branch1x1"][1]
    assert branch.shape == (3, 192, 17, 17) and branch.min() == 0 < branch.max()           # after the ReLU
    assert torch.equal(spatial.view(3, 17, 17, 7)[1, 3, 5], branch[1, :7, 3, 5])       # rows, then columns
    assert torch.equal(torch.cat([seen[part][1] for part in parts], 1), seen["Mixed_7c"][1])
    torch.testing.assert_close(pool, seen["Mixed_7c"][1].mean((2, 3)))
    torch.testing.assert_close(logits, F.linear(pool, net.fc.weight))
    for a, b in zip(whole, net(x[2:])):
        torch.testing.assert_close(a[2:], b, rtol=1e-4, atol=1e-5)
    x, ones = torch.randn(1, 3, 8, 8), torch.ones(1, 2, 5, 5)
    assert torch.equal(net.Mixed_5b.pool(ones), ones)                  # padding does not enter the mean
    assert torch.equal(net.Mixed_7b.pool(x), F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
    assert torch.equal(net.Mixed_7c.pool(x), F.max_pool2d(x, 3, 1, 1))

def test_clip_is_the_slow_form():
    """If attention, residuals or the activation differed from the formula."""
    tower = randomised(clip.VisionTransformer(width=128, depth=3, heads=2, hidden=80, out=32))
    x = clip.preprocess(images(2, 30, 40))
    features = tower(x)
    close(features[1], slow_clip(tower, x[1]), 1e-5)
    assert (features.norm(dim=1) - 1).abs().min() > 1e-2               # not normalised
    assert clip.TOWERS[1664, 3, 14, 14]["activation"] is F.gelu        # exact in open_clip's

@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_is_the_slow_form(registers):
    """If a normalisation, scale, head, activation, position or the order of tokens were wrong."""
    net = randomised(dinov2.DINOv2(128, 2, 48, registers, side=5))
    for shape in ((70, 70), (28, 42)):
        x = images(2, *shape)
        patches, token = slow_dinov2(net, x[1])
        close(net(x)[1], patches, 1e-5)
        close(net(x, "class")[1], token, 1e-5)

def cubic(x, a=-0.75):
    x = abs(x)
    inner, outer = (a + 2) * x ** 3 - (a + 3) * x ** 2 + 1, a * x ** 3 - 5 * a * x ** 2 + 8 * a * x - 4 * a
    return inner if x <= 1 else outer if x < 2 else 0.0

def test_dinov2_resizes_positions_as_released():
    """If positions were resized by size instead of by (size + 0.1) / side: at 448 pixels features differ."""
    net = randomised(dinov2.DINOv2(64, 1, 8, side=5))
    assert torch.equal(net.positions(5, 5), net.pos_embed[:, 1:])
    found, stored, shares = net.positions(4, 3)[0].view(4, 3, -1), net.pos_embed[0, 1:].view(5, 5, -1), []
    for size in (4, 3):
        shares.append(torch.zeros(size, 5))
        for i in range(size):
            at = (i + 0.5) * 5 / (size + 0.1) - 0.5                    # half-pixel centres, borders repeated
            for k in range(math.floor(at) - 1, math.floor(at) + 3):
                shares[-1][i, min(max(k, 0), 4)] += cubic(at - k)
    close(found, torch.einsum("ia,jb,abd->ijd", *shares, stored), 1e-5)
    net = randomised(dinov2.DINOv2(64, 1, 8, 4, side=5))
    stored = net.pos_embed[:, 1:].view(1, 5, 5, -1).permute(0, 3, 1, 2)
    plain = F.interpolate(stored, size=(4, 3), mode="bicubic", antialias=True)
    assert torch.equal(net.positions(4, 3), plain.flatten(2).mT)
    assert dinov2.DINOv2(64, 1, 8)(images(1, 448, 448)).shape == (1, 1024, 64)
    for h, w in ((28, 30), (28, 0)):
        refused("H and W multiples of 14", call=lambda: net(images(1, h, w)))

def test_dinov2_is_found(tmp_path):
    """If torch.hub's directory were not searched, or one of several files taken at random."""
    hub = tmp_path / "checkpoints"
    hub.mkdir()
    for held, words in ((None, "no such file"), ("vits14", None), ("vitl14", "dinov2_vitl14_.*_vits14_"),
                        ("vitb14", None)):
        file = hub / f"dinov2_{held}_pretrain.pth"
        file.write_bytes(b"") if held else None
        if words:
            with pytest.raises(ValueError, match=f"found {words}.*; expected one dinov2_"):
                dinov2.find(tmp_path)
        else:
            assert dinov2.find(tmp_path) == dinov2.find(hub) == dinov2.find(file) == file

# --- Networks of points

def test_farthest_points():
    """If the first of equals were not chosen, a start were another, or ULIP took points it should skip."""
    x = clouds(2, 40)
    expected = [slow_farthest(c.double(), 45, i) for i, c in enumerate(x)]     # beyond the last point, too
    assert pointnet.farthest_points(x, 45).tolist() == expected
    x[0, :20] *= 0.001
    x[1] *= 0.001                          # nothing left but point 0
    chosen = ulip.farthest_points(x, 25)
    assert chosen.tolist() == [slow_farthest(c.double(), 25, 0, skip=1e-3) for c in x]
    assert chosen[0].unique().tolist() == [0, *range(20, 40)] and chosen[1].tolist() == [0] * 25

def test_ball_query_by_hand():
    """If a ball kept the nearest instead of the first, left places empty, or left out its edge."""
    x = torch.tensor([[[0.0, 0, 0], [0.5, 0, 0], [0.75, 0, 0], [0, 0.5, 0], [0.1, 0, 0]]])
    for count, expected in ((3, [0, 1, 3]), (5, [0, 1, 3, 4, 0])):
        assert pointnet.ball_query(x, x[:, :1], 0.5, count).tolist() == [[expected]]

@pytest.fixture(scope="module")
def net():
    return randomised(pointnet.PointNet2())

@pytest.fixture(scope="module")
def tower():
    return randomised(ulip.PointBERT(depth=2))

def test_pointnet_is_the_slow_form(net):
    """If sampling, grouping, their order, or a layer differed: the second cloud starts at its point 1."""
    x, seen = clouds(), []
    stages = net.sa1, net.sa2, net.sa3
    hooks = [s.register_forward_hook(lambda *args: seen.append(args[2][1])) for s in stages]
    found = net(pointnet.normalise(x))
    for hook in hooks:
        hook.remove()
    assert found[0].shape == (2, 512) and found[1].shape == (2, 40) and found[0].min() < 0
    cloud = x[1].double() - x[1].double().mean(0)
    expected = slow_pointnet(net, cloud / cloud.norm(dim=1).max(), 1)
    for part, slow in zip((*seen, *found), expected, strict=True):
        close(part[1], slow, 2e-5)

def test_pointbert_is_the_slow_form(tower):
    """If groups, colours, positions in front of each block, attention or the pooling differed."""
    points = torch.cat([clouds(), torch.rand(2, 520, 3, generator=torch.Generator().manual_seed(1))], -1)
    x = ulip.prepare(points)
    embeddings = tower(x)
    close(embeddings[1], slow_pointbert(tower, x[1].double()), 5e-5)
    close(ulip.features(tower, points.numpy()), embeddings, 1e-5)

def test_pointnet_features_start_anew_every_64_clouds(net, monkeypatch):
    """If features depended on more than the place in a batch, or on where a cloud lies and its size."""
    assert pointnet.BATCH == 64
    monkeypatch.setattr(pointnet, "BATCH", 2)
    x = clouds(3, 512)
    x[2] = x[1]
    whole = pointnet.features(net, x.numpy())
    assert whole.dtype == torch.float32 and whole.shape == (3, 512)
    assert torch.equal(whole[2:], pointnet.features(net, x[2:]))
    assert not torch.equal(whole[1], whole[2])                         # the same from another starting point
    assert pointnet.features(net, x[:0]).shape == (0, 512)
    close(pointnet.features(net, 37 * x[:1] + 5), whole[:1], 1e-3)

def test_prepare():
    """If clouds without colours were not grey, the network of 3 channels got 6, or colours were 0..255."""
    x = clouds(2, 50)
    grey, unitary = torch.cat([x, torch.full_like(x, 0.4)], -1), ulip.normalise(x)
    assert torch.equal(ulip.prepare(x), torch.cat([unitary, grey[..., 3:]], -1))
    assert torch.equal(ulip.prepare(grey), ulip.prepare(x)) and torch.equal(ulip.prepare(grey, 3), unitary)
    close(unitary.norm(dim=-1).amax(1), torch.ones(2), 1e-6)
    close(unitary.mean(1) + 1, torch.ones(2, 3), 1e-6)
    with pytest.raises(ValueError, match=r"^colours 0..255: expected rgb in 0..1$"):
        ulip.prepare(torch.cat([x[:1], torch.tensor([0.0, 255, 9]).expand(1, 50, 3)], -1))

@pytest.mark.parametrize("module", [pointnet, ulip])
def test_features_refuse_what_is_no_cloud(module, net, tower):
    """If a wrong shape or a cloud without extent gave features."""
    model, seen = {pointnet: net, ulip: tower}[module], []
    for shape in ((2, 600), (2, 600, 2), (2, 511, 3)):
        with pytest.raises(ValueError, match=r"^clouds \(2,.*expect[^\n]*$"):
            module.features(model, torch.rand(shape))
    for change in (float("nan"), float("inf"), 0, 1e-25, 1e20):
        x = clouds(2, 512)
        x[1] *= change
        with pytest.raises(ValueError, match="^cloud 1: its extent is [^\n]*; expected 1e-15..1e15$"):
            module.features(model, x)
    hook = model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    module.features(model, clouds(1, 512))
    hook.remove()
    assert seen == [False]

@pytest.mark.parametrize("name", ["normalise", "gather"])
def test_copies_agree(name):
    """If what pointnet.py and ulip.py each carry, to work alone, drifted apart."""
    assert inspect.getsource(getattr(pointnet, name)) == inspect.getsource(getattr(ulip, name))
    assert set(pointnet.EXTRAS) < set(ulip.EXTRAS)
