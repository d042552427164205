"""What several experiments share. It also puts the repository on the path: import it before its modules.

Models and their training steps; samples; pictures, uint8 (n, R, R, 3), and enlargements of them.
"""
import copy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

import model as asft  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from toys import Glyphs  # noqa: E402

def alive(cfg):
    """A model in which no gradient is zero; it starts with zeros in its gates and output."""
    torch.manual_seed(0)
    net = asft.ASFT(cfg)
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return net

def training_steps(net, batches, args, called=None):
    """Trains net, by way of `called` where that is net compiled; yields its average and loss at each step."""
    ema, called = copy.deepcopy(net).requires_grad_(False), net if called is None else called
    coords = asft.image_coords(net.cfg.res, device=net.device) if net.cfg.domain == "image" else None
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, args.beta2), weight_decay=0.0, fused=True)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(args, step)
        places = range(args.batch_size)
        loss = train.micro_loss(called, coords, batch, step, places, args, net.device)
        loss.backward()
        train.update(net, ema, optimizer, step, args)
        yield ema, loss.detach()

def drawn(model, setting, indices):
    """Samples of a setting of `sample.resolve`, pictures or float32 (n, P, 3), and the evaluations of one."""
    height, width = sample.shape_of(model.cfg, setting["size"])
    found, batch = [], max(1, min(100, 2 ** 16 // (height * width)))
    tokens = sample.read_tokens(setting["tokens"], model.cfg) if setting["tokens"] else None
    for some in tqdm(torch.tensor([*indices]).split(batch), desc=f"samples, {height} x {width}"):
        x, evaluations = sample.draw(model, setting, some.tolist(), tokens)
        image = model.cfg.domain == "image"
        found += [sample.to_pixels(values, height, width) if image else values.numpy() for values in x]
    return np.stack(found), evaluations

def renders(res, count, split):
    """Built-in glyphs and their classes, which come in turn."""
    glyphs = Glyphs(res, split)
    pictures = [glyphs.item(i)[0] for i in tqdm(range(count), desc=f"glyphs at {res}")]
    return np.stack(pictures), np.arange(count) % 36

ENLARGE = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}

def enlarged(pictures, res, how):
    return np.stack([np.asarray(Image.fromarray(p).resize((res, res), ENLARGE[how])) for p in pictures])

def reduced(pictures, res):
    """Pictures by means of R/res x R/res pixels."""
    n, R = pictures.shape[:2]
    return pictures.reshape(n, res, R // res, res, R // res, 3).mean((2, 4)).round().astype(np.uint8)
