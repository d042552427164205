"""What a recipe takes, before a GPU is rented: python tools/plan.py --dataset imagenet256 --gpus 8

Takes the flags of train.py and needs neither data nor a GPU. FLOPs and bytes are counted on tensors without
numbers, uncompiled; the utilisation is assumed, data and communication are left out.
"""
import itertools
import sys
import weakref
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from model import ASFT, cicfm_loss, config, forward_flops  # noqa: E402
from sample import flag_parser, positive, run_main  # noqa: E402

H100_FLOPS = 989e12       # dense bfloat16 of the SXM card (NVIDIA's data sheet)
STATE = 20                # bytes of a parameter: weight, gradient, two of Adam, average

class Alive(TorchDispatchMode):
    """Counts what the results of operations occupy together while they live; `peak` is the most of it."""
    bytes = peak = 0

    def add(self, size):
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage not in self.known:
                self.known[storage] = storage.nbytes()
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

def activation_bytes(cfg, decoded, batch, grad_checkpoint=False, dtype=torch.bfloat16):
    """Most bytes that a training step holds at once besides STATE. Its backward pass goes to the
    noise: it recomputes and frees what that to the weights does, but leaves no gradient of a weight."""
    with FakeTensorMode():
        model, N = ASFT(cfg), cfg.pairs
        model.grad_checkpoint = grad_checkpoint
        if hasattr(model.encoder, "read"):                             # a GPU reads more windows at a time
            model.encoder.read.AT_A_TIME = {"cpu": model.encoder.read.AT_A_TIME["cuda"]}
        coords = torch.empty(N, 2) if cfg.domain == "image" else None
        x0, eps = torch.empty(batch, N, 3), torch.empty(batch, N, 3, requires_grad=True)
        query = torch.zeros(batch, decoded, dtype=torch.long)
        tokens = torch.empty(batch, 576, cfg.token_dim) if cfg.token_dim else None
        with Alive() as alive:
            alive.known = WeakIdKeyDictionary()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = cicfm_loss(model, coords, x0, eps, torch.empty(batch), query, tokens=tokens)
            torch.autograd.grad(loss, eps)
    return alive.peak

def main(argv=None):
    p = flag_parser(__doc__)
    p.add_argument("--gpus", type=positive, default=8, help="default: 8")
    p.add_argument("--memory", type=float, default=80, help="of a GPU, in GB (default: 80)")
    p.add_argument("--utilisation", type=float, default=0.4, help="share of an H100's peak (default: 0.4)")
    own, rest = p.parse_known_args(argv)
    if not 0 < own.utilisation <= 1:
        raise ValueError(f"--utilisation {own.utilisation}: expected a share above 0 and up to 1")
    given = train.parser().parse_args(rest)
    model = given.model or train.RECIPES[given.dataset or "glyphs"]["model"]     # the paper's, GPU or not
    args = train.settings([*rest, "--model", model, "--out", "/dev/null/plan"])[0]
    name = "res" if config(model).domain == "image" else "points"
    size = getattr(args, name) or getattr(config(model), name)
    cfg, share = train.configure(args, own.gpus, **{name: size}), args.batch_size // own.gpus
    flops, parameters = forward_flops(cfg, args.decode)
    rate, state = own.gpus * H100_FLOPS * own.utilisation, STATE * parameters
    counts = [n for n in range(args.accumulate or 1, share + 1) if share % n == 0]
    for again, pieces in itertools.product(sorted({args.grad_checkpoint, True}), counts):
        micro = share // pieces
        activations = activation_bytes(cfg, args.decode, micro, again)
        if args.accumulate or state + activations < 0.9e9 * own.memory:              # as train.py chooses
            break
    else:
        raise ValueError(f"--memory {own.memory:g}: one sample takes {(state + activations) / 1e9:.1f} GB; "
                         "expected more memory, or a smaller --model or --decode")
    total = (4 if again else 3) * args.batch_size * args.steps * flops           # backward: twice the forward
    blocks = "recomputed in the backward pass" if again else "not recomputed"
    print(f"""{args.dataset}: {name} {size}, {args.decode} pairs decoded
model {model:8} {parameters / 1e6:.1f}M parameters without class embeddings
FLOPs          {flops / 1e9:.1f} GFLOP forward a sample, {total / 1e18:.4g} EFLOP in all
steps          {args.steps:,} of {args.batch_size} samples, {args.steps * args.batch_size / 1e6:,.1f}M samples
memory a GPU   {state / 1e9:.1f} GB state + {activations / 1e9:.1f} GB activations of {micro} samples
micro-batches  {pieces} a step, blocks {blocks}
time           {total / rate / 86400:,.1f} days on {own.gpus} H100 at {own.utilisation:g} of 989 TFLOP/s""")

if __name__ == "__main__":
    run_main(main)
