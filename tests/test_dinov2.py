"""metrics/dinov2.py: against a slow form written out, the released files' layout, and what is refused."""
import math

import pytest
import torch
import torch.nn.functional as F

from metrics import dinov2


def random_net(mlp=dinov2.MLP, registers=0, side=5, width=128, depth=2):
    """A small network with the released layout; every weight counts."""
    torch.manual_seed(0)
    net = dinov2.DINOv2(width, depth, 48, mlp, registers, side).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.copy_(0.3 * torch.randn_like(parameter))
    return net


def pictures(height, width, n=2):
    return torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def slow(state, picture, places, registers, swiglu):
    """One picture through the equations, patch by patch and head by head, in float64. places (n, D)."""
    s = {key: value.double() for key, value in state.items()}
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], s[name + ".weight"], s[name + ".bias"], 1e-6)
    linear = lambda x, name: x @ s[name + ".weight"].T + s[name + ".bias"]
    pixels = picture.double() / 255
    pixels = torch.stack([(pixels[..., c] - m) / d for c, (m, d) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))])
    rows = [s["cls_token"][0, 0] + s["pos_embed"][0, 0]] + ([*s["register_tokens"][0]] if registers else [])
    for i in range(picture.shape[0] // 14):
        for j in range(picture.shape[1] // 14):
            patch = pixels[:, 14 * i:14 * i + 14, 14 * j:14 * j + 14]
            rows.append((s["patch_embed.proj.weight"] * patch).sum((1, 2, 3)) + s["patch_embed.proj.bias"] + places[len(rows) - 1 - registers])
    x = torch.stack(rows)
    D = x.shape[1]
    for b in (f"blocks.{i}" for i in range(2)):
        h, heads = linear(norm(x, b + ".norm1"), b + ".attn.qkv"), []
        for k in range(D // 64):
            q, key, v = (h[:, part * D + 64 * k:part * D + 64 * k + 64] for part in range(3))
            heads.append((q @ key.T / 8).softmax(1) @ v)
        x = x + s[b + ".ls1.gamma"] * linear(torch.cat(heads, 1), b + ".attn.proj")
        h = norm(x, b + ".norm2")
        if swiglu:
            h = linear(h, b + ".mlp.w12")
            h = linear(h[:, :48] * h[:, :48].sigmoid() * h[:, 48:], b + ".mlp.w3")
        else:
            h = linear(h, b + ".mlp.fc1")
            h = linear(h * 0.5 * (1 + torch.erf(h / math.sqrt(2))), b + ".mlp.fc2")
        x = x + s[b + ".ls2.gamma"] * h
    return norm(x, "norm")[1 + registers:]


@pytest.mark.parametrize("mlp,registers", [(dinov2.MLP, 0), (dinov2.MLP, 4), (dinov2.SwiGLU, 0), (dinov2.SwiGLU, 4)])
def test_forward_against_the_equations(mlp, registers):
    """If a normalisation, scale, head, activation, position or the order of tokens were wrong."""
    net = random_net(mlp, registers)
    x = pictures(70, 70)
    places = net.pos_embed[0, 1:].double()
    found = net(x)
    assert found.shape == (2, 25, 128) and found.dtype == torch.float32
    for picture, own in zip(x, found):
        assert (slow(net.state_dict(), picture, places, registers, mlp is dinov2.SwiGLU) - own).abs().max() < 1e-4


def test_black_and_white_by_hand():
    """If grey levels were scaled otherwise than by ImageNet's mean and deviation of channels in [0,1]."""
    net, seen = random_net(side=2), []
    net.patch_embed["proj"].register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    for level in (0, 255):
        net(torch.full((1, 28, 28, 3), level, dtype=torch.uint8))
    black, white = torch.tensor([-2.117904, -2.035714, -1.804444]), torch.tensor([2.248908, 2.428571, 2.64])
    for x, expected in zip(seen, (black, white)):
        torch.testing.assert_close(x, expected[None, :, None, None].expand(1, 3, 28, 28), rtol=0, atol=1e-5)


def test_layer_scale_of_zero_leaves_the_residual():
    """If LayerScale were outside a branch, or missing on one of the two."""
    net = random_net()
    for block in net.blocks:
        block.ls1.gamma.zero_(), block.ls2.gamma.zero_()
    x = torch.randn(1, 26, 128)
    assert torch.equal(net.blocks[1](net.blocks[0](x)), x)
    net.blocks[0].ls1.gamma.fill_(0.5)
    torch.testing.assert_close(net.blocks[0](x), x + 0.5 * net.blocks[0].attn(net.blocks[0].norm1(x)))


def test_pictures_do_not_see_each_other():
    """If features of a picture depended on its batch."""
    net, x = random_net(registers=4), pictures(42, 28, 3)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]), rtol=1e-4, atol=1e-5)


def cubic(x, a=-0.75):
    x = abs(x)
    return (a + 2) * x ** 3 - (a + 3) * x ** 2 + 1 if x <= 1 else a * x ** 3 - 5 * a * x ** 2 + 8 * a * x - 4 * a if x < 2 else 0.0


def test_positions_are_resized_as_released():
    """If positions were resized by size instead of by (size + 0.1) / side: at 448 pixels features then differ visibly."""
    net = random_net(side=5)
    assert torch.equal(net.positions(5, 5), net.pos_embed[:, 1:])
    found, stored = net.positions(4, 3)[0].view(4, 3, -1), net.pos_embed[0, 1:].view(5, 5, -1)
    weights = []
    for size in (4, 3):
        rows = torch.zeros(size, 5)
        for i in range(size):
            at = (i + 0.5) * 5 / (size + 0.1) - 0.5                       # half-pixel centres, borders repeated
            for k in range(math.floor(at) - 1, math.floor(at) + 3):
                rows[i, min(max(k, 0), 4)] += cubic(at - k)
        weights.append(rows)
    assert (torch.einsum("ia,jb,abd->ijd", *weights, stored) - found).abs().max() < 1e-5
    with_registers = random_net(registers=4, side=5)
    plain = F.interpolate(with_registers.pos_embed[:, 1:].view(1, 5, 5, -1).permute(0, 3, 1, 2), size=(4, 3), mode="bicubic", antialias=True)
    assert torch.equal(with_registers.positions(4, 3), plain.flatten(2).mT)
    assert random_net(side=37)(pictures(448, 448, 1)).shape == (1, 1024, 128)


def test_parameter_counts():
    """If the layout were not that of the released files."""
    for millions, args in ((22.06, (384, 12, 1536)), (86.58, (768, 12, 3072)), (304.37, (1024, 24, 4096)), (1136.48, (1536, 40, 4096, dinov2.SwiGLU))):
        with torch.device("meta"):
            assert round(sum(p.numel() for p in dinov2.DINOv2(*args).parameters()) / 1e6, 2) == millions


def test_norms_are_meta_s():
    """If norms had torch's default of 1e-5, which random weights of this size do not show."""
    assert {m.eps for m in random_net().modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
