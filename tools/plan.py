"""What a recipe takes: python tools/plan.py --dataset imagenet256 [any flag of train.py]

Prints parameters, FLOPs, memory of a GPU and days. It needs neither data nor a GPU:

    python tools/plan.py                                          the presets: memory of a sample
    python tools/plan.py --dataset imagenet256 --gpus 8           a recipe
    python tools/plan.py --dataset imagenet256 --grad-checkpoint --utilisation 0.3

In order: counting bytes (Alive, activation_bytes); the plan of a recipe; the table of presets.
FLOPs and bytes are counted on tensors without numbers. The utilisation is assumed, and data and communication
are left out. Uncompiled; torch.compile keeps less.
"""
import argparse
import sys
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.weak import WeakIdKeyDictionary  # noqa: E402

import train  # noqa: E402
from model import ASFT, DECODED, PRESETS, cicfm_loss, config, forward_flops  # noqa: E402
from sample import positive, run_main  # noqa: E402

H100_FLOPS, H100_BYTES = 989e12, 80e9          # dense bfloat16 of the SXM card (NVIDIA's data sheet)
STATE = 20                                     # bytes of a parameter: weight, gradient, two of Adam, average


class Alive(TorchDispatchMode):
    """Under this mode `bytes` is what the results of operations occupy together, and `peak` its largest
    value."""

    def __init__(self):
        super().__init__()
        self.known, self.bytes, self.peak = WeakIdKeyDictionary(), 0, 0

    def free(self, size):
        self.bytes -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage not in self.known:
                self.known[storage] = size = storage.nbytes()
                self.bytes += size
                weakref.finalize(storage, self.free, size)
        self.peak = max(self.peak, self.bytes)
        return out


def activation_bytes(cfg, decoded, batch, grad_checkpoint=False):
    """Largest number of bytes that a training step holds besides weights, optimizer and weight gradients,
    under bfloat16 autocast. The backward pass is that of the noise alone: it recomputes and frees what a step
    does."""
    with FakeTensorMode():
        model, N = ASFT(cfg), cfg.res ** 2 if cfg.domain == "image" else cfg.points
        model.grad_checkpoint = grad_checkpoint
        if hasattr(model.encoder, "read"):                     # as many windows at a time as a GPU reads
            model.encoder.read.AT_A_TIME = {"cpu": model.encoder.read.AT_A_TIME["cuda"]}
        coords = torch.empty(N, 2) if cfg.domain == "image" else None
        x0, t = torch.empty(batch, N, 3), torch.empty(batch)
        eps = torch.empty(batch, N, 3, requires_grad=True)
        query = torch.zeros(batch, decoded, dtype=torch.long)
        tokens = torch.empty(batch, 576, cfg.token_dim) if cfg.token_dim else None
        with Alive() as alive:
            with torch.autocast("cpu", torch.bfloat16):
                loss = cicfm_loss(model, coords, x0, eps, t, query, tokens=tokens)
            torch.autograd.grad(loss, eps)
    return alive.peak


def plan(argv, gpus, utilisation):
    """Prints what the recipe of train.py's flags takes."""
    given = train.parser().parse_args(argv)
    model = given.model or train.RECIPES[given.dataset]["model"]     # the paper's, also where there is no GPU
    args, _, _ = train.settings([*argv, "--model", model, "--out", "/dev/null/plan"])
    image = PRESETS[args.model].get("domain", "image") == "image"
    name, size = ("res", args.res) if image else ("points", args.points)
    cfg = train.configure(args, gpus, **{name: size} if size else {})
    flops, parameters = forward_flops(cfg, args.decode)
    passes = 4 if args.grad_checkpoint else 3                          # backward: twice the forward
    step = passes * args.batch_size * flops
    micro = args.batch_size // (gpus * args.accumulate)
    state, activations = STATE * parameters, activation_bytes(cfg, args.decode, micro, args.grad_checkpoint)
    days = args.steps * step / (gpus * H100_FLOPS * utilisation) / 86400
    size, B, exa = size or "of the preset", args.batch_size, args.steps * step / 1e18
    print(f"""{args.dataset}: model {args.model}, {name} {size}, {args.decode} pairs decoded
parameters      {parameters / 1e6:.1f}M, without class embeddings (the data tell how many)
FLOPs           {flops / 1e9:.1f} GFLOP forward a sample, {step / 1e12:,.1f} TFLOP a step of {B} samples
steps           {args.steps:,}, {args.steps * B / 1e6:,.1f}M samples, {exa:,.1f} EFLOP
memory a GPU    {state / 1e9:.1f} GB state, {activations / 1e9:.1f} GB activations of {micro} samples
                {(state + activations) / 1e9:.1f} GB in all
time            {days:,.1f} days on {gpus} H100 at {100 * utilisation:g} % of 989 TFLOP/s""")
    for again in (False, True) if state + activations > H100_BYTES else ():
        for k in (k for k in range(1, micro * args.accumulate + 1) if args.batch_size % (gpus * k) == 0):
            bytes = state + activation_bytes(cfg, args.decode, args.batch_size // (gpus * k), again)
            if bytes < 0.94 * H100_BYTES:
                how = f"--accumulate {k}" + " --grad-checkpoint" * again
                return print(f"80 GB are not enough; {how} takes {bytes / 1e9:.1f} GB")


def presets():
    print(f"{'preset':16}{'parameters':>11}{'state':>10}{'a sample':>12}{'recomputed':>12}    GB, bfloat16")
    for name in PRESETS:
        cfg, decoded = config(name), DECODED.get(name, 8192)
        parameters = forward_flops(cfg, decoded)[1]
        sample = [(activation_bytes(cfg, decoded, 16, again) - activation_bytes(cfg, decoded, 8, again)) / 8e9
                  for again in (False, True)]
        state = STATE * parameters / 1e9
        print(f"{name:16}{parameters / 1e6:>10.1f}M{state:>10.2f}{sample[0]:>12.3f}{sample[1]:>12.3f}")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gpus", type=positive, default=8, help="default: 8")
    p.add_argument("--utilisation", type=float, default=0.4, help="share of an H100's peak (default: 0.4)")
    args, rest = p.parse_known_args(argv)
    if not 0 < args.utilisation <= 1:
        raise ValueError(f"--utilisation {args.utilisation}: expected a share above 0 and up to 1")
    if rest:
        plan(rest, args.gpus, args.utilisation)
    else:
        presets()


if __name__ == "__main__":
    run_main(main)
