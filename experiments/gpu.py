"""What only a GPU can show, in about ten minutes: python experiments/gpu.py [--out DIR]

One line a check: what, measured, expected, ok. CPU against CUDA (draws, velocity, loss, gradient, samples);
compiled against eager; attention; steps that never wait; speed and memory of training steps against
tools/plan.py; sampling at 2048 pixels; distances and Inception; a killed run; two processes where there are
two cards. Writes gpu.json, and gpu.md for docs/speed.md. Status 1 where a check failed, 2 without CUDA.
--dry runs the same code on the CPU with the smallest models, to know that this file works.
"""
import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model as asft  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from metrics import clouds, inception  # noqa: E402
from tools import plan  # noqa: E402

STEPS = {"S": 128, "B": 64, "L": 32, "XL": 16, "point-B": 16}          # samples of a step at once, on 80 GB

class Task:
    def __init__(self, dry):
        self.dry, self.rows = dry, []
        self.device = sample.start_processes("cpu" if dry else "cuda")

    def line(self, what, measured, expected, ok=True):
        self.rows.append(dict(what=what, measured=measured, expected=expected, ok=bool(ok)))
        print(f"{'ok  ' if ok else 'FAIL'} {what:<58} {measured:<26} {expected}", flush=True)

    def memory(self):
        return 0 if self.dry else torch.cuda.max_memory_allocated()

    def wait(self):
        if not self.dry:
            torch.cuda.synchronize()

    def config(self, preset, **changes):
        """The preset, with --dry the smallest of its domain."""
        points = preset.startswith("point")
        if self.dry:
            small = dict(width=32, depth=2, heads=2, latents=16)
            preset, changes = ("point-tiny", small | dict(points=64)) if points else ("tiny", small)
        return asft.config(preset, **changes | ({} if points else dict(n_classes=10)))

def alive(cfg):
    """A model in which no gradient is zero; it starts with zeros in its gates and output."""
    torch.manual_seed(0)
    net = asft.ASFT(cfg)
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return net

def batch_of(cfg, n, device):
    N = cfg.res ** 2 if cfg.domain == "image" else cfg.points
    g = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, cfg.res, cfg.res, 3), dtype=torch.uint8, generator=g)
    values = images if cfg.domain == "image" else torch.rand(n, N, 3, generator=g) * 2 - 1
    coords = asft.image_coords(cfg.res, device=device) if cfg.domain == "image" else None
    return coords, (values.to(device), torch.arange(n, device=device) % max(1, cfg.n_classes))

def flags(cfg, preset, **more):
    args = train.settings(["--model", preset, "--out", os.devnull + "/gpu", "--device", "cpu"])[0]
    N = cfg.res ** 2 if cfg.domain == "image" else cfg.points
    decode = N if cfg.domain == "points" else max(16, N // 8)
    return argparse.Namespace(**vars(args) | dict(decode=decode, dtype="bfloat16", times="uniform") | more)

def loss_and_gradient(net, args, n, device):
    coords, batch = batch_of(net.cfg, n, device)
    loss = train.micro_loss(net, coords, batch, 0, range(n), args, device)
    loss.backward()
    gradient = torch.cat([p.grad.flatten().float().cpu() for p in net.parameters()])
    net.zero_grad()
    return loss.item(), gradient

def numbers(task):
    """CPU against CUDA."""
    equal = torch.equal(*(sample.random_words("query", 3, 5, torch.arange(9, device=d), 999).cpu()
                          for d in ("cpu", task.device)))
    task.line("draws, CUDA against CPU: equal bits", str(equal), "True", equal)
    for preset in ("S", "point-B"):
        cfg = task.config(preset, **({} if preset != "S" else dict(res=64, latents=256)))
        net = alive(cfg)
        far = copy.deepcopy(net).to(task.device)
        for dtype, most in (("float32", 1e-3), ("bfloat16", 5e-2)):
            torch.set_float32_matmul_precision("highest")
            (a, one), (b, two) = (loss_and_gradient(x, flags(cfg, preset, dtype=dtype), 2, x.device)
                                  for x in (net, far))
            apart = ((one - two).norm() / one.norm()).item()
            task.line(f"{preset}, {dtype}: loss and gradient, CUDA against CPU",
                      f"{abs(a / b - 1):.1e}, {apart:.1e}", f"at most {most:g}",
                      max(abs(a / b - 1), apart) < most)
        x, y = (sample.generate(m.eval(), [0, 1], 0, steps=4)[0].cpu() for m in (net, far))
        apart = (x - y).abs().max().item()
        task.line(f"{preset}: two samples, CUDA against CPU", f"{apart:.1e}", "at most 1/255", apart < 0.008)
    torch.set_float32_matmul_precision("high")

def compiled(task):
    """One graph, the numbers of eager, no recompilation; flash attention; no wait within ten steps."""
    cfg = task.config("S", res=64, latents=256)
    net, args = alive(cfg).to(task.device), flags(cfg, "S")
    torch._dynamo.reset()
    torch._dynamo.config.error_on_recompile = True
    fast = torch.compile(net, backend="eager" if task.dry else "inductor")
    began = time.time()
    b, two = loss_and_gradient(fast, args, 4, task.device)
    took = time.time() - began
    for _ in range(2):
        loss_and_gradient(fast, args, 4, task.device)
    torch._dynamo.config.error_on_recompile = False
    a, one = loss_and_gradient(net, args, 4, task.device)
    breaks, apart = len(torch._dynamo.utils.counters["graph_break"]), ((one - two).norm() / one.norm()).item()
    task.line("compiled against eager: loss, gradient", f"{abs(a / b - 1):.1e}, {apart:.1e}", "at most 0.05",
              abs(a / b - 1) < 0.05 and apart < 0.05)
    task.line("graph breaks; first step", f"{breaks}; {took:.0f} s", "0", breaks == 0)
    kernel = torch.nn.attention.SDPBackend.MATH if task.dry else torch.nn.attention.SDPBackend.FLASH_ATTENTION
    with torch.nn.attention.sdpa_kernel(kernel):                       # raises where it does not apply
        loss_and_gradient(net, args, 4, task.device)
    task.line("attention of a bfloat16 step", kernel.name, "no other kernel")
    seconds_of_steps(task, net, args, 4, 10, strict=not task.dry)
    task.line("ten steps that never wait for the GPU", "done", "no synchronisation")

def seconds_of_steps(task, net, args, n, count, called=None, strict=False):
    """Seconds of a training step, after three more. With strict a step that waits for the GPU raises."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    ema = copy.deepcopy(net).requires_grad_(False)
    coords, batch = batch_of(net.cfg, n, task.device)
    for step in range(count + 3):
        if step == 3:
            task.wait()
            began = time.time()
            if strict:                                                 # what comes before may copy and wait
                torch.cuda.set_sync_debug_mode("error")
        train.micro_loss(called or net, coords, batch, step, range(n), args, task.device).backward()
        train.update(net, ema, optimizer, step, args)
    if strict:
        torch.cuda.set_sync_debug_mode("default")
    task.wait()
    return (time.time() - began) / count

def speed(task):
    """Training steps: samples a second, share of an H100's 989 TFLOP/s, peak memory against the plan."""
    for preset, n in STEPS.items():
        cfg, n = task.config(preset), 2 if task.dry else n
        args = flags(cfg, preset)
        net = asft.ASFT(cfg).to(task.device)
        torch._dynamo.reset()
        called = net if task.dry else torch.compile(net)
        if not task.dry:
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of_steps(task, net, args, n, 2 if task.dry else 10, called)
        flops, parameters = asft.forward_flops(cfg, args.decode)
        planned = plan.activation_bytes(cfg, args.decode, n) + plan.STATE * parameters
        share = 3 * flops * n / seconds / plan.H100_FLOPS
        task.line(f"{preset}: step of {n}", f"{n / seconds:.1f} samples/s, {100 * share:.0f} % MFU",
                  "30 % or more", task.dry or share > 0.3)
        task.line(f"{preset}: peak memory", f"{task.memory() / 1e9:.1f} GB",
                  f"plan, uncompiled: {planned / 1e9:.1f} GB", task.memory() < 1.1 * planned)
        del net, called

def sampling(task):
    model, checkpoint = sample.load(ROOT / "weights" / "glyphs.pt")
    res, began = 64 if task.dry else 2048, time.time()
    setting = sample.resolve(model.cfg, checkpoint, size=(res, res))
    sample.draw(model.to(task.device), setting, [0])
    took = time.time() - began
    task.line(f"glyphs at {res} pixels", f"{took:.1f} s, {task.memory() / 1e9:.1f} GB", "under 60 s",
              took < 60)

def metrics(task):
    r = np.random.default_rng(0)
    x, y = (r.normal(size=(4, 64 if task.dry else 2048, 3)).astype(np.float32) for _ in range(2))
    for name in ("chamfer", "lion"):
        one, two = (clouds.pairwise(x, y, name, device=d, progress=False) for d in ("cpu", task.device))
        apart = np.abs(two / one - 1).max()
        task.line(f"{name} distances, CUDA against CPU", f"{apart:.1e}", "at most 1e-3", apart < 1e-3)
    images = torch.from_numpy(r.integers(0, 256, (2, 64, 64, 3), np.uint8))
    one, two = (inception.resize_tf1(images.to(d)).cpu() for d in ("cpu", task.device))
    apart = (one - two).abs().max().item()
    task.line("Inception's input, CUDA against CPU", f"{apart:.1e}", "at most 1e-3", apart < 1e-3)

def runs(task):
    """50 steps, killed within and resumed, against 50 at once; two processes where there are two cards."""
    small = ["--model", "tiny", "--steps", "8" if task.dry else "50", "--save-every", "2", "--log-every", "1",
             "--deterministic", "--no-compile", "--device", task.device.type, "--workers", "0"]
    with tempfile.TemporaryDirectory() as work:
        def start(name, *more, launch=()):
            words = [sys.executable, *launch, ROOT / "train.py", *small, "--out", f"{work}/{name}", *more]
            return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        whole = start("whole")
        whole.wait()
        killed = start("killed")
        while killed.poll() is None and not Path(work, "killed", "ckpt.pt").exists():
            time.sleep(0.02)
        killed.kill()
        killed.wait()
        start("killed", "--resume", "auto").wait()
        logs = [Path(work, name, "log.jsonl").read_text() for name in ("whole", "killed")]
        same = logs[0] == logs[1]
        task.line("killed and resumed against at once: log.jsonl", str(same), "True", same)
        if task.dry or torch.cuda.device_count() > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            status = start("two", launch=launch).wait()
            task.line("two processes", f"status {status}", "status 0", status == 0)

CHECKS = {"numbers": numbers, "compiled": compiled, "speed": speed, "sampling": sampling, "metrics": metrics,
          "runs": runs}

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", metavar="CHECK", help=f"of {', '.join(CHECKS)} (default: all)")
    p.add_argument("--dry", action="store_true", help="on the CPU, smallest models")
    p.add_argument("--out", type=Path, default=Path("."), help="directory to write to (default: .)")
    args = p.parse_args(argv)
    if not {*args.names} <= {*CHECKS}:
        raise ValueError(f"{' '.join(args.names)}: expected some of {', '.join(CHECKS)}")
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
