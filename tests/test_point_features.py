"""metrics/pointnet.py and metrics/ulip.py: against slow forms in NumPy, torch's own modules, and known answers."""
import argparse
import inspect
import pickle
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from conftest import ROOT
from metrics import pointnet, ulip


def clouds(S=2, K=600, seed=0):
    return torch.randn(S, K, 3, generator=torch.Generator().manual_seed(seed))


def randomise(net, seed=0):
    """Weights and running statistics under which every part of a network contributes."""
    g = torch.Generator().manual_seed(seed)
    for name, x in net.state_dict().items():
        if name.endswith("running_var"):
            x.uniform_(0.5, 1.5, generator=g)
        elif name.endswith(("running_mean", "bias", "cls_token")):
            x.normal_(0, 0.2, generator=g)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return randomise(pointnet.PointNet2())


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    return randomise(ulip.PointBERT(depth=2))


# ---------------------------------------------------------------------------------------------------------
# Slow forms

def slow_farthest(xyz, count, start=0, skip=-1.0):
    """One cloud (K,3), point by point; points of squared norm <= skip are passed over."""
    nearest, chosen = np.full(len(xyz), 1e10), [start]
    while len(chosen) < count:
        best, best_at = -1.0, 0
        for k, p in enumerate(xyz):
            if (p ** 2).sum() <= skip:
                continue
            nearest[k] = min(nearest[k], ((p - xyz[chosen[-1]]) ** 2).sum())
            if nearest[k] > best:
                best, best_at = nearest[k], k
        chosen.append(best_at)
    return chosen


def slow_ball(xyz, centre, radius, count):
    found = [k for k, p in enumerate(xyz) if ((p - centre) ** 2).sum() <= radius ** 2][:count]
    return found + found[:1] * (count - len(found))


def slow_unit(state, name, x, act=True):
    """Linear map of the last axis, batch normalisation if any, ReLU, in float64. name: (map, normalisation or None)."""
    weight, bias = (state[f"{name[0]}.{k}"].double().numpy() for k in ("weight", "bias"))
    y = x @ weight.reshape(weight.shape[:2]).T + bias
    if name[1]:
        gain, shift, mean, var = (state[f"{name[1]}.{k}"].double().numpy()
                                  for k in ("weight", "bias", "running_mean", "running_var"))
        y = (y - mean) / np.sqrt(var + 1e-5) * gain + shift
    return np.maximum(y, 0) if act else y


def slow_pointnet(state, cloud, position):
    """One cloud (K,3), group by group: features of the three stages' groups, features, log-probabilities."""
    xyz = cloud - cloud.mean(0)
    xyz, x, stages = xyz / np.sqrt((xyz ** 2).sum(1)).max(), None, []
    for stage, count, radius, neighbours in (("sa1", 512, 0.2, 32), ("sa2", 128, 0.4, 64), ("sa3", 1, None, None)):
        if radius is None:
            groups = [np.concatenate([xyz, x], 1)]
        else:
            centres, groups = xyz[slow_farthest(xyz, count, position)], []
            for c in centres:
                ball = slow_ball(xyz, c, radius, neighbours)
                groups.append(xyz[ball] - c if x is None else np.concatenate([xyz[ball] - c, x[ball]], 1))
            xyz = centres
        y = np.stack(groups)
        for i in range(3):
            y = slow_unit(state, (f"{stage}.mlp_convs.{i}", f"{stage}.mlp_bns.{i}"), y)
        x = y.max(1)
        stages.append(x)
    features = slow_unit(state, ("fc2", "bn2"), slow_unit(state, ("fc1", "bn1"), x[0]), act=False)
    logits = slow_unit(state, ("fc3", None), np.maximum(features, 0), act=False)
    return *stages, features, logits - np.log(np.exp(logits).sum())


def torch_block(block, width=384, heads=6):
    """torch's own transformer layer with the weights of a Block."""
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0, F.gelu, batch_first=True, norm_first=True)
    layer.self_attn.in_proj_weight.data.copy_(block.attn.qkv.weight)
    layer.self_attn.in_proj_bias.data.zero_()
    pairs = ((layer.self_attn.out_proj, block.attn.proj), (layer.linear1, block.mlp.fc1),
             (layer.linear2, block.mlp.fc2), (layer.norm1, block.norm1), (layer.norm2, block.norm2))
    for to, of in pairs:
        to.load_state_dict(of.state_dict())
    return layer.eval().requires_grad_(False)


def slow_pointbert(net, points):
    """One prepared cloud (K,C): groups in NumPy, blocks by torch's layers."""
    state = {k.removeprefix("point_encoder."): v for k, v in net.state_dict().items()}
    xyz = points[:, :3]
    centres, tokens = xyz[slow_farthest(xyz, 512, skip=1e-3)], []
    for c in centres:
        near = np.argsort(((xyz - c) ** 2).sum(1))[:32]
        x = np.concatenate([xyz[near] - c, points[near, 3:]], 1)
        x = slow_unit(state, ("encoder.first_conv.0", "encoder.first_conv.1"), x)
        x = slow_unit(state, ("encoder.first_conv.3", None), x, act=False)
        x = np.concatenate([np.repeat(x.max(0, keepdims=True), 32, 0), x], 1)
        x = slow_unit(state, ("encoder.second_conv.0", "encoder.second_conv.1"), x)
        tokens.append(slow_unit(state, ("encoder.second_conv.3", None), x, act=False).max(0))
    tokens = torch.from_numpy(slow_unit(state, ("reduce_dim", None), np.stack(tokens), act=False))
    where = torch.from_numpy(slow_unit(state, ("pos_embed.0", None), centres, act=False))
    where = torch.from_numpy(slow_unit(state, ("pos_embed.2", None), F.gelu(where).numpy(), act=False))
    x = torch.cat([state["cls_token"][0].double(), tokens])[None]
    where = torch.cat([state["cls_pos"][0].double(), where])[None]
    for block in net.point_encoder.blocks["blocks"]:
        x = torch_block(block).double()(x + where)
    x = F.layer_norm(x, (384,), state["norm.weight"].double(), state["norm.bias"].double())[0]
    return torch.cat([x[0], x[1:].max(0).values]) @ net.pc_projection.double()


def close(a, b, tolerance):
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max(), (a - b).abs().max() / b.abs().max()


# ---------------------------------------------------------------------------------------------------------
# Sampling and grouping

def test_farthest_points_on_a_line():
    """If the first of equals is not chosen, or a batch's clouds do not start at their position."""
    line = torch.zeros(3, 9, 3)
    line[:, :, 0] = torch.arange(9.0)
    first, second = [0, 8, 4, 2, 6, 1, 3, 5, 7], [1, 8, 4, 6, 0, 2, 3, 5, 7]
    assert pointnet.farthest_points(line, 9).tolist()[:2] == [first, second]
    assert pointnet.farthest_points(line, 9, 0).tolist() == [first] * 3
    assert pointnet.farthest_points(line, 9, torch.tensor([1, 0, 1])).tolist() == [second, first, second]
    assert pointnet.farthest_points(line, 2).dtype == torch.int64


@pytest.mark.parametrize("start", [0, 5])
def test_farthest_points_are_those_of_the_loop(start):
    """If vectorising farthest point sampling changed a choice, also once every point is taken."""
    x = clouds(2, 40)
    expected = [slow_farthest(c.double().numpy(), 45, start) for c in x]
    assert pointnet.farthest_points(x, 45, start).tolist() == expected


def test_ulip_passes_over_points_near_the_origin():
    """If points that pointnet2_ops takes for padding become centres, or point 0 does not."""
    x = clouds(2, 60)
    x[0, :30] *= 0.001
    x[1] *= 0.001                                                          # nothing left but point 0
    expected = [slow_farthest(c.double().numpy(), 40, 0, skip=1e-3) for c in x]
    chosen = ulip.farthest_points(x, 40)
    assert chosen.tolist() == expected
    assert chosen[0].unique().tolist()[:2] == [0, 30] and chosen[1].tolist() == [0] * 40
    assert chosen[0].tolist() != pointnet.farthest_points(x, 40, 0)[0].tolist()


def test_ball_query_keeps_the_edge():
    """If a point exactly at the radius is left out."""
    x = torch.tensor([[[0.0, 0, 0], [0.5, 0, 0], [0.75, 0, 0], [0, 0.5, 0]]])
    assert pointnet.ball_query(x, x[:, :1], 0.5, 4).tolist() == [[[0, 1, 3, 0]]]


# ---------------------------------------------------------------------------------------------------------
# PointNet++

def test_pointnet_has_the_published_keys(net):
    """If the checkpoint's entries could not be loaded."""
    state = net.state_dict()
    assert sum(p.numel() for p in net.parameters()) == 5_859_496 and len(state) == 79
    assert state["sa2.mlp_convs.0.weight"].shape == (256, 259, 1, 1) and "sa3.mlp_bns.2.num_batches_tracked" in state


def test_pointnet_is_the_slow_form(net):
    """If sampling, grouping, their order, or a layer differs from Point-E's: the second cloud starts at its point 1.

    Stage by stage, because the features of a whole cloud hardly tell how many points a ball keeps."""
    x, seen = clouds(2, 520), []
    hooks = [s.register_forward_hook(lambda *args: seen.append(args[2][1])) for s in (net.sa1, net.sa2, net.sa3)]
    features, logs = net(pointnet.normalise(x))
    for hook in hooks:
        hook.remove()
    assert features.shape == (2, 512) and logs.shape == (2, 40) and features.min() < 0
    for i in (0, 1):
        expected = slow_pointnet(net.state_dict(), x[i].double().numpy(), i)
        for part, slow in zip((*seen, features, logs), expected, strict=True):
            close(part[i], slow, 2e-5)


def test_pointnet_features_know_no_shift_and_scale(net):
    """If clouds are not normalised before the network."""
    x = clouds(1, 512)
    close(pointnet.features(net, 37 * x + 5), pointnet.features(net, x), 1e-3)


def test_pointnet_features_start_anew_every_64_clouds(net, monkeypatch):
    """If a cloud's features depend on more than its place in a batch, or a set could not be shared among processes."""
    assert pointnet.BATCH == 64
    monkeypatch.setattr(pointnet, "BATCH", 2)
    x = clouds(3, 512)
    x[2] = x[1]
    whole = pointnet.features(net, x.numpy())
    assert whole.dtype == torch.float32 and whole.shape == (3, 512)
    assert torch.equal(whole[2:], pointnet.features(net, x[2:]))
    assert not torch.equal(whole[1], whole[2])                          # the same cloud from another starting point
    assert pointnet.features(net, x[:0]).shape == (0, 512)


@pytest.mark.parametrize("module", [pointnet, ulip])
def test_features_leave_precision_as_it_was(module, net, tower):
    """If the caller's choice of TF32 reaches the features, or does not survive them."""
    seen, model = [], net if module is pointnet else tower
    hook = model.register_forward_pre_hook(lambda *_: seen.append((torch.get_float32_matmul_precision(),
                                                                   torch.backends.cudnn.allow_tf32)))
    before = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        module.features(model, clouds(1, 512))
        assert seen == [("highest", False)]
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = before
        hook.remove()


@pytest.mark.parametrize("module", [pointnet, ulip])
def test_features_refuse_what_is_no_cloud(module, net, tower):
    """If a wrong shape, a cloud without extent or a number that is none ends in features."""
    model = net if module is pointnet else tower
    for shape in ((2, 600), (2, 600, 2), (2, 511, 3)):
        with pytest.raises(ValueError, match=r"^clouds \(2,.*expect[^\n]*$"):
            module.features(model, torch.rand(shape))
    for change in (float("nan"), float("inf"), 0, 1e-25, 1e20):
        x = clouds(2, 512)
        x[1] *= change
        with pytest.raises(ValueError, match="^cloud 1: its extent is [^\n]*; expected 1e-15..1e15$"):
            module.features(model, x)
    x[1] = 0.1
    with pytest.raises(ValueError, match="^cloud 1: its extent is 0; expected 1e-15..1e15$"):
        module.features(model, x)


# ---------------------------------------------------------------------------------------------------------
# PointBERT

def test_pointbert_has_the_published_sizes():
    """If the network is not ULIP-2's of either kind."""
    with torch.device("meta"):
        colour, plain = ulip.PointBERT(), ulip.PointBERT(3, 12, 512)
    size = lambda module: sum(p.numel() for p in module.parameters())
    assert size(colour.point_encoder) == 32_499_072 and size(plain.point_encoder) == 21_858_816
    assert size(colour) - size(colour.point_encoder) == 983_040 and plain.pc_projection.shape == (768, 512)
    assert {"point_encoder.blocks.blocks.17.attn.qkv.weight", "point_encoder.encoder.second_conv.3.bias",
            "point_encoder.pos_embed.2.weight", "point_encoder.cls_pos", "pc_projection"} <= set(colour.state_dict())
    assert "point_encoder.blocks.blocks.0.attn.qkv.bias" not in colour.state_dict()


def test_pointbert_is_the_slow_form(tower):
    """If groups, colours, positions in front of each block, attention or the pooling differ from ULIP's."""
    points = torch.cat([clouds(2, 520), torch.rand(2, 520, 3, generator=torch.Generator().manual_seed(1))], -1)
    x = ulip.prepare(points)
    embeddings = tower(x)
    assert embeddings.shape == (2, 1280)
    close(embeddings[1], slow_pointbert(tower, x[1].double().numpy()), 5e-5)
    close(ulip.features(tower, points.numpy()), embeddings, 1e-5)


def test_colourless_clouds_are_grey():
    """If clouds without colours get other colours than 0.4, or the network of 3 channels gets 6."""
    x = clouds(2, 50)
    grey = torch.cat([x, torch.full_like(x, 0.4)], -1)
    assert torch.equal(ulip.prepare(x), ulip.prepare(grey)) and torch.equal(ulip.prepare(x)[..., 3:], grey[..., 3:])
    assert torch.equal(ulip.prepare(grey, 3), ulip.normalise(x))
    close(ulip.normalise(x).norm(dim=-1).amax(1), torch.ones(2), 1e-6)
    close(ulip.normalise(x).mean(1) + 1, torch.ones(2, 3), 1e-6)


def test_colours_are_between_0_and_1():
    """If colours in 0..255 pass for colours in 0..1."""
    with pytest.raises(ValueError, match=r"^colours 0..255: expected rgb in 0..1$"):
        ulip.prepare(torch.cat([clouds(1, 50), torch.tensor([0.0, 255, 9]).expand(1, 50, 3)], -1))


def test_ulip_score_known_answers():
    """If the score is not the mean cosine: it is no product of lengths, and pairs item by item."""
    a = torch.eye(4)
    assert ulip.ulip_score(a, 7 * a) == 1 and ulip.ulip_score(a, a.roll(1, 0)) == 0 and ulip.ulip_score(a, -a) == -1
    assert ulip.ulip_score(a[:2], torch.stack([a[0], a[0]])) == 0.5
    assert ulip.ulip_score([[3.0, 4.0]], np.array([[4, 3]], np.float16)) == pytest.approx(0.96, abs=1e-15)
    assert ulip.ulip_score(1e-30 * a, a) == pytest.approx(1, abs=1e-12)


# ---------------------------------------------------------------------------------------------------------
# Weight files

def test_pointnet_loads_what_point_e_published(net, tmp_path):
    """If the wrapper of the checkpoint, with NumPy scalars in it, is not read, or its values are not."""
    state = net.state_dict()
    wrapped = {"epoch": 3, "instance_acc": np.float64(0.9), "class_acc": np.mean([0.5]), "model_state_dict": state}
    for name, content in (("a.pt", wrapped), ("b.pt", state)):
        torch.save(content, tmp_path / name)
        loaded = pointnet.load(tmp_path / name)
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        assert all(torch.equal(x, loaded.state_dict()[k]) for k, x in state.items())


def test_numpy_scalars_of_both_names_are_read(net, tmp_path):
    """If a checkpoint written with NumPy 1 is refused with NumPy 2."""
    torch.save({"class_acc": np.float64(0.9), "model_state_dict": net.state_dict()}, tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as old, zipfile.ZipFile(tmp_path / "old.pt", "w") as new:
        for item in old.namelist():
            new.writestr(item, old.read(item).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert torch.equal(pointnet.load(tmp_path / "old.pt").fc3.bias, net.fc3.bias)


def published(net, **changes):
    """A checkpoint as ULIP's trainer writes it."""
    state = {f"module.{k}": v for k, v in net.state_dict().items()} | {"module.logit_scale": torch.tensor(2.0)}
    state |= {f"module.open_clip_model.{k}": torch.ones(2) for k in ("visual.proj", "blocks.blocks.99.attn")}
    return {"epoch": "last", "state_dict": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "scaler": {},
            "best_acc1": np.float64(50.6), "args": argparse.Namespace(lr=3e-3, betas=(0.9, 0.98), gpu=0)} | changes


@pytest.mark.parametrize("channels, depth, dim", [(6, 2, 1280), (3, 1, 512)])
def test_ulip_loads_what_its_trainer_writes(channels, depth, dim, tmp_path):
    """If the trainer's arguments, `module.` or other entries are in the way, or the weights do not tell the network."""
    net = randomise(ulip.PointBERT(channels, depth, dim))
    for name, content in (("a.pt", published(net)), ("b.pt", net.state_dict())):
        torch.save(content, tmp_path / name)
        loaded = ulip.load(tmp_path / name)
        assert loaded.channels == channels and not loaded.training
        assert loaded.state_dict().keys() == net.state_dict().keys()
        assert all(torch.equal(x, loaded.state_dict()[k]) for k, x in net.state_dict().items())


class Hostile:
    def __reduce__(self):
        return print, ("this must not run",)
