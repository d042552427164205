"""What only a GPU can show, in about ten minutes: python experiments/gpu.py [--out DIR]

One line a check: what, measured, expected, ok. CPU against CUDA (draws, loss, gradient, samples); compiled
against eager; attention; steps that never wait; speed and memory of training steps against tools/plan.py;
sampling at 2048 pixels; distances and Inception's input; a killed run; two processes where there are two
cards. Writes gpu.json, and gpu.md for docs/speed.md. Status 1 where a check failed, 2 without CUDA.
"""
import argparse
import copy
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import alive, training_steps
import chaos
import model as asft
import sample
import train
from metrics import clouds, inception
from tools import plan

AT_ONCE = {"S": 128, "B": 64, "L": 32, "XL": 16, "point-B": 16}        # samples of a step, on 80 GB

class Task:
    def __init__(self, dry):
        self.dry, self.rows = dry, []
        self.device = sample.start_processes("cpu" if dry else "cuda")

    def line(self, what, measured, expected, ok=True):
        self.rows.append(dict(what=what, measured=measured, expected=expected, ok=bool(ok)))
        print(f"{'ok  ' if ok else 'FAIL'} {what:<58} {measured:<26} {expected}", flush=True)

    def below(self, what, most, *measured):
        self.line(what, ", ".join(f"{x:.1e}" for x in measured), f"at most {most:g}", max(measured) < most)

    def memory(self):
        return 0 if self.dry else torch.cuda.max_memory_allocated()

    def config(self, preset, **changes):
        """The preset, with --dry the smallest of its domain."""
        points = preset.startswith("point")
        if self.dry:
            small = dict(width=32, depth=2, heads=2, latents=16)
            preset, changes = ("point-tiny", small | dict(points=64)) if points else ("tiny", small)
        return asft.config(preset, **changes | ({} if points else dict(n_classes=10)))

def settings(cfg, preset, n, **more):
    """What train.py would train a preset by, with batches of n."""
    args = train.settings(["--model", preset, "--out", os.devnull + "/gpu", "--device", "cpu"])[0]
    decode = cfg.points if cfg.domain == "points" else max(16, cfg.res ** 2 // 8)
    changes = dict(batch_size=n, decode=decode, dtype="bfloat16", times="uniform", lr=1e-5) | more
    return argparse.Namespace(**vars(args) | changes)

def batch_of(cfg, n, device):
    g = torch.Generator().manual_seed(1)
    if cfg.domain == "image":
        values = torch.randint(0, 256, (n, cfg.res, cfg.res, 3), dtype=torch.uint8, generator=g)
    else:
        values = torch.rand(n, cfg.points, 3, generator=g) * 2 - 1
    return values.to(device), torch.arange(n, device=device) % max(1, cfg.n_classes)

def loss_and_gradient(net, args):
    """Of a training step, on the CPU."""
    n, device = args.batch_size, net.device
    coords = asft.image_coords(net.cfg.res, device=device) if net.cfg.domain == "image" else None
    loss = train.micro_loss(net, coords, batch_of(net.cfg, n, device), 0, range(n), args, device)
    loss.backward()
    gradient = torch.cat([p.grad.flatten().float().cpu() for p in net.parameters()])
    net.zero_grad()
    return loss.item(), gradient

def apart(one, two):
    """Relative differences of two losses and of their gradients."""
    (a, g), (b, h) = one, two
    return abs(a / b - 1), ((g - h).norm() / g.norm()).item()

def numbers(task):
    """CPU against CUDA."""
    equal = torch.equal(*(sample.random_words("query", 3, 5, torch.arange(9, device=d), 999).cpu()
                          for d in ("cpu", task.device)))
    task.line("draws, CUDA against CPU: equal bits", str(equal), "True", equal)
    for preset, changes in (("S", dict(res=64, latents=256)), ("point-B", {})):
        net = alive(task.config(preset, **changes))
        far = copy.deepcopy(net).to(task.device)
        for dtype, most in (("float32", 1e-3), ("bfloat16", 5e-2)):
            torch.set_float32_matmul_precision("highest")
            args = settings(net.cfg, preset, 2, dtype=dtype)
            task.below(f"{preset}, {dtype}: loss and gradient, CUDA against CPU", most,
                       *apart(loss_and_gradient(net, args), loss_and_gradient(far, args)))
        x, y = (sample.generate(m.eval(), [0, 1], 0, steps=4)[0].cpu() for m in (net, far))
        task.below(f"{preset}: two samples, CUDA against CPU", 0.008, (x - y).abs().max().item())
    torch.set_float32_matmul_precision("high")

def compiled(task):
    """One graph, the numbers of eager, no recompilation; flash attention; no wait within ten steps."""
    cfg = task.config("S", res=64, latents=256)
    net, args = alive(cfg).to(task.device), settings(cfg, "S", 4)
    torch._dynamo.reset()
    torch._dynamo.config.error_on_recompile = True
    fast = torch.compile(net, backend="eager" if task.dry else "inductor")
    began = time.time()
    first = loss_and_gradient(fast, args)
    took = time.time() - began
    for _ in range(2):
        loss_and_gradient(fast, args)
    torch._dynamo.config.error_on_recompile = False
    breaks = len(torch._dynamo.utils.counters["graph_break"])
    task.below("compiled against eager: loss, gradient", 0.05, *apart(loss_and_gradient(net, args), first))
    task.line("graph breaks; first step", f"{breaks}; {took:.0f} s", "0", breaks == 0)
    kernel = SDPBackend.MATH if task.dry else SDPBackend.FLASH_ATTENTION
    with sdpa_kernel(kernel):                                          # raises where it does not apply
        loss_and_gradient(net, args)
    task.line("attention of a bfloat16 step", kernel.name, "no other kernel")
    seconds_of_a_step(task, net, args, 10, strict=not task.dry)
    task.line("ten steps that never wait for the GPU", "done", "no synchronisation")

def seconds_of_a_step(task, net, args, count, called=None, strict=False):
    """Seconds of a training step, after three more. With strict a step that waits for the GPU raises."""
    batches = itertools.repeat(batch_of(net.cfg, args.batch_size, task.device))
    steps = training_steps(net, batches, args, called)
    wait = (lambda: None) if task.dry else torch.cuda.synchronize
    for _ in range(3):                                                 # these may copy and wait
        next(steps)
    wait()
    began = time.time()
    if strict:
        torch.cuda.set_sync_debug_mode("error")
    for _ in range(count):
        next(steps)
    if strict:
        torch.cuda.set_sync_debug_mode("default")
    wait()
    return (time.time() - began) / count

def speed(task):
    """Training steps: samples a second, share of an H100's 989 TFLOP/s, peak memory against the plan."""
    for preset, n in AT_ONCE.items():
        cfg, n = task.config(preset), 2 if task.dry else n
        args = settings(cfg, preset, n)
        net = asft.ASFT(cfg).to(task.device)
        torch._dynamo.reset()
        called = net if task.dry else torch.compile(net)
        if not task.dry:
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of_a_step(task, net, args, 2 if task.dry else 10, called)
        flops, parameters = asft.forward_flops(cfg, args.decode)
        planned = plan.activation_bytes(cfg, args.decode, n) + plan.STATE * parameters
        share = 3 * flops * n / seconds / plan.H100_FLOPS
        task.line(f"{preset}: step of {n}", f"{n / seconds:.1f} samples/s, {100 * share:.0f} % MFU",
                  "30 % or more", task.dry or share > 0.3)
        task.line(f"{preset}: peak memory", f"{task.memory() / 1e9:.1f} GB",
                  f"plan, uncompiled: {planned / 1e9:.1f} GB", task.memory() < 1.1 * planned)
        del net, called

def sampling(task):
    model, checkpoint = sample.load("glyphs")
    res, began = 64 if task.dry else 2048, time.time()
    setting = sample.resolve(model.cfg, checkpoint, size=(res, res))
    if not task.dry:
        torch.cuda.reset_peak_memory_stats()
    sample.draw(model.to(task.device), setting, [0])
    took = time.time() - began
    task.line(f"glyphs at {res} pixels", f"{took:.1f} s, {task.memory() / 1e9:.1f} GB", "under 60 s",
              took < 60)

def metrics(task):
    r = np.random.default_rng(0)
    x, y = (r.normal(size=(4, 64 if task.dry else 2048, 3)).astype(np.float32) for _ in range(2))
    for name in ("chamfer", "lion"):
        one, two = (clouds.pairwise(x, y, name, device=d, progress=False) for d in ("cpu", task.device))
        task.below(f"{name} distances, CUDA against CPU", 1e-3, np.abs(two / one - 1).max())
    images = torch.from_numpy(r.integers(0, 256, (2, 64, 64, 3), np.uint8))
    one, two = (inception.resize_tf1(images.to(d)).cpu() for d in ("cpu", task.device))
    task.below("Inception's input, CUDA against CPU", 1e-3, (one - two).abs().max().item())

def runs(task):
    """50 steps, killed within and resumed, against 50 at once; two processes where there are two cards."""
    words = ["--model", "tiny", "--steps", "8" if task.dry else "50", "--save-every", "2", "--log-every", "1",
             "--deterministic", "--no-compile", "--device", task.device.type, "--workers", "0"]
    with tempfile.TemporaryDirectory() as work:
        whole, killed, two = (Path(work, name) for name in ("whole", "killed", "two"))
        chaos.train(whole, model=words)
        process = chaos.start(killed, model=words)
        chaos.until((killed / "ckpt.pt").exists, process)
        process.kill()
        process.wait()
        chaos.train(killed, "--resume", "auto", model=words)
        same = chaos.log(whole) == chaos.log(killed)
        task.line("killed and resumed against at once: log.jsonl", str(same), "True", same)
        if task.dry or torch.cuda.device_count() > 1:
            chaos.train(two, model=words, processes=2)
            task.line("two processes", "status 0", "status 0")

CHECKS = {f.__name__: f for f in (numbers, compiled, speed, sampling, metrics, runs)}

def main(argv=None):
    p = sample.flag_parser(__doc__)
    p.add_argument("names", nargs="*", choices=[[], *CHECKS], metavar="CHECK",
                   help=f"of {', '.join(CHECKS)} (default: all)")
    p.add_argument("--dry", action="store_true", help="the same code on the CPU with the smallest models")
    p.add_argument("--out", type=Path, default=Path("."), help="directory to write to (default: .)")
    args = p.parse_args(argv)
    if not args.dry and not torch.cuda.is_available():
        raise ValueError("no CUDA device: this checks a GPU; --dry runs its checks on the CPU")
    task = Task(args.dry)
    card = "CPU, dry run" if args.dry else torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}", flush=True)
    for name in args.names or CHECKS:
        try:
            CHECKS[name](task)
        except Exception as e:                                         # the other checks are still of use
            task.line(name, " ".join(f"{type(e).__name__}: {e}".split())[:200], "no error", False)
    sample.write_json(args.out / "gpu.json", dict(card=card, torch=str(torch.__version__), rows=task.rows))
    table = "".join(f"| {row['what']} | {row['measured']} | {row['expected']} |\n" for row in task.rows)
    text = f"{card}, torch {torch.__version__}\n\n| check | measured | expected |\n|---|---|---|\n{table}"
    sample.write_atomic(args.out / "gpu.md", lambda f: f.write(text.encode()))
    sys.exit(0 if all(row["ok"] for row in task.rows) else 1)

if __name__ == "__main__":
    sample.run_main(main)
