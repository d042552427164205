"""What a training survives, tried: python experiments/chaos.py kill (or another command of these, or all)

| command       | what is done to it                                        | what must hold               |
|---------------|-----------------------------------------------------------|------------------------------|
| kill          | SIGKILL at random moments, half of them within a save     | the uninterrupted weights    |
| ranks         | SIGKILL of one of two processes under torchrun            | an error in 60 s, then that  |
| disk          | saves that fail: no space once; files cut short for a run | told, retried, nothing lost  |
| sampling      | checkpoints are read while training replaces them         | each is one of those written |
| elastic       | continued with 2, 3 and 1 processes                       | the losses of one process    |
| deterministic | nothing, twice                                            | the same bytes of log.jsonl  |
| long          | 3,000 steps of the tiny preset with data processes        | no growth, nothing left      |

Each command prints its figures and ends with status 1 if anything did not hold. It needs Linux's /proc.
"""
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import sample  # noqa: E402

SMALL = ("--width 32 --depth 2 --heads 2 --latents 16 --batch-size 12 --decode 64 --device cpu "
         "--dtype float32 --sampling-steps 2 --sample-every 1000000").split()
OFTEN = "--save-every", 5, "--log-every", 5

def start(out, *flags, processes=None, model=SMALL, **options):
    """Starts train.py in a session of its own, what it says into out.txt beside the run directory."""
    words = [ROOT / "train.py", *model, "--out", out, *flags]
    if processes:
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *words]
    with open(f"{out}.txt", "ab") as said:
        return subprocess.Popen([sys.executable, *map(str, words)], stdout=said, stderr=said,
                                start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1",
                                "CHAOS": str(out)}, **options)

def train(out, *flags, status=0, **options):
    """Trains to the end; returns what was said."""
    process = start(out, *flags, **options)
    if process.wait(600) != status:
        raise RuntimeError(f"{out}: status {process.returncode} instead of {status}:\n{said(out)}")
    return said(out)

def said(out):
    return pathlib.Path(f"{out}.txt").read_text(errors="replace")

def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

def same(a, b):
    """Whether two trees of tensors and plain values are equal bit by bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

def same_run(a, b):
    """Whether two runs' checkpoints are equal, and what they logged but for the timings."""
    one, two = (sample.read_checkpoint(path) for path in (a, b))
    rows = [[[r[k] for k in ("step", "loss", "grad_norm", "lr")] for r in log(path)] for path in (a, b)]
    return all(same(one[k], two[k]) for k in ("model", "ema", "optimizer", "step")) and rows[0] == rows[1]

def family(out):
    """The environments of the living processes of a run, by their id."""
    found = {}
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "environ").read_bytes().split(b"\0")
        except OSError:                                 # it has ended, or is another user's
            continue
        if f"CHAOS={out}".encode() in words:
            found[int(entry.name)] = words
    return found

def until(true, process, seconds=120):
    """Waits for a condition, at most so many seconds and until the process ends."""
    end = time.time() + seconds
    while time.time() < end and not true() and process.poll() is None:
        time.sleep(0.0005)

def kill(work, runs, rng, steps=300):
    began = time.time()
    train(work / "straight", *OFTEN, "--steps", steps)
    length, equal, in_write = time.time() - began, 0, 0
    for i in tqdm(range(runs), unit="run"):
        out, status = work / f"run{i}", 0
        while status == 0:                              # again, where it was at its end before that moment
            shutil.rmtree(out, ignore_errors=True)
            process = start(out, *OFTEN, "--steps", steps, "--workers", i // 2 % 2, "--keep", i % 3)
            until(lambda: False, process, rng.uniform(0, 0.9 * length))
            if i % 2 == 0:
                until((out / "next.pt.tmp").exists, process)
            process.kill()
            status = process.wait()
        in_write += (out / "next.pt.tmp").exists()
        train(out, *OFTEN, "--steps", steps, "--resume", "auto")
        equal += same_run(out, work / "straight") and not list(out.glob("*.tmp"))
    print(f"kill: {equal} of {runs} runs equal the uninterrupted one bit for bit; {in_write} were killed "
          "within a save")
    return equal == runs and in_write > 0

def ranks(work, runs, rng, steps=300):
    train(work / "straight", *OFTEN, "--steps", steps, processes=2)
    equal, ended, left, times = 0, 0, 0, [0]
    for i in tqdm(range(runs), unit="run"):
        out, victim = work / f"run{i}", None
        while victim is None:                           # again, where it was at its end before that moment
            shutil.rmtree(out, ignore_errors=True)
            process = start(out, *OFTEN, "--steps", steps, processes=2)
            until((out / "log.jsonl").exists, process)
            until(lambda: False, process, rng.uniform(0, steps / 75))
            there = family(out)
            victim = next((pid for pid in there if f"RANK={i % 2}".encode() in there[pid]), None)
        os.kill(victim, signal.SIGKILL)
        began = time.time()
        try:
            ended += process.wait(60) != 0
            times.append(time.time() - began)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        time.sleep(0.5)
        left += sum(os.path.exists(f"/proc/{pid}") for pid in there)
        train(out, *OFTEN, "--steps", steps, "--resume", "auto", processes=2)
        equal += same_run(out, work / "straight")
    print(f"ranks: {ended} of {runs} launches ended with an error, the slowest {max(times):.1f} s after the "
          f"kill, {left} processes left; {equal} of {runs} reruns equal the uninterrupted one bit for bit")
    return equal == ended == runs and not left

def disk(work, runs, rng):
    flags = ["--save-every", 20, "--log-every", 5]
    train(work / "straight", *flags, "--steps", 100)
    out, full = work / "run", work / "full"
    train(out, *flags, "--steps", 40, "--schedule", "cosine")
    before = (out / "ckpt.pt").read_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, resource.RLIM_INFINITY))
    text = train(out, *flags, "--steps", 100, "--resume", "auto", status=2, preexec_fn=limit)
    kept = (out / "ckpt.pt").read_bytes() == before and not list(out.glob("*.tmp"))
    told = text.count("next interval tries again") == 2 and "last step is not saved" in text
    told &= "Traceback" not in text
    print(f"disk: with files cut short, checkpoint of step 40 kept: {kept}, three failed saves told: {told}")

    process = start(full, *flags, "--steps", 100)
    until((full / "log.jsonl").exists, process)
    (full / "next.pt.tmp").symlink_to("/dev/full")
    ended = process.wait() == 0 and said(full).count("next interval tries again") == 1
    retried = ended and same_run(full, work / "straight")
    print(f"disk: without space once, told, and saved at the next interval: {retried}")
    return kept and told and retried

def sampling(work, runs, rng):
    flags = ["--steps", 150, "--save-every", 1, "--log-every", 50]
    train(work / "straight", *flags, "--keep", 1000)
    known = {int(p.stem[5:]): p for p in (work / "straight").glob("ckpt-*.pt")}
    known[150] = work / "straight" / "ckpt.pt"
    process, read, whole = start(work / "run", *flags), [], 0
    until((work / "run" / "ckpt.pt").exists, process)
    while process.poll() is None or len(read) < runs:
        ckpt = sample.read_checkpoint(work / "run", mmap=True)
        there = sample.read_checkpoint(known[ckpt["step"]])
        whole += all(same(ckpt[k], there[k]) for k in ("model", "ema", "optimizer"))
        read.append(ckpt["step"])
    steps = len(set(read))
    print(f"sampling: {whole} of {len(read)} checkpoints read in training are whole, of {steps} steps")
    return whole == len(read) and steps > 5

def elastic(work, runs, rng):
    flags = ["--log-every", 1, "--schedule", "constant", "--save-every", 1000]
    train(work / "straight", *flags, "--steps", 80)
    out = work / "run"
    train(out, *flags, "--steps", 20)
    for steps, processes in ((40, 2), (60, 3), (80, 1)):
        train(out, *flags, "--steps", steps, "--resume", "auto", processes=processes)
    losses = [[r["loss"] for r in log(path)] for path in (out, work / "straight")]
    apart = max(abs(a / b - 1) for a, b in zip(*losses))
    steps = [r["step"] for r in log(out)] == [*range(1, 81)]
    print(f"elastic: losses of 80 steps on 1, 2, 3 and 1 processes against 1: at most {apart:.1e} apart, "
          f"no step twice or missing: {steps}")
    return apart < 1e-4 and steps

def deterministic(work, runs, rng):
    for name in ("one", "two"):
        train(work / name, "--steps", 60, "--log-every", 5, "--deterministic", "--workers", 2)
    one, two = ((work / name / "log.jsonl").read_bytes() for name in ("one", "two"))
    print(f"deterministic: the {len(one.splitlines())} lines of log.jsonl are the same bytes: {one == two}")
    return one == two and len(one.splitlines()) == 12

def long(work, runs, rng, steps=3000):
    """Resident memory, open files and processes of a long run of the default recipe, at a fifth of its steps,
    by when all that it does (a save, a sampling) has been done twice, and at its end."""
    out, often = work / "run", steps // 12
    process = start(out, "--steps", steps, "--workers", 2, "--sample-every", often, "--save-every", often,
                    model=["--device", "cpu"])

    def seen(step):
        until((out / "log.jsonl").exists, process)
        while process.poll() is None and [0, *(row["step"] for row in log(out))][-1] < step:
            time.sleep(0.5)
        there = family(out)
        pages = [int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in there]
        memory = sum(pages) * resource.getpagesize() / 2 ** 20
        files = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in there)
        print(f"long: step {step}: {memory:.1f} MiB resident, {files} open files, {len(there)} processes")
        return memory, files, len(there)
    (memory, *others), (later, *others_later) = seen(steps // 5), seen(steps - 50)
    return process.wait() == 0 and later / memory < 1.01 and others == others_later

COMMANDS = {f.__name__: f for f in (kill, ranks, disk, sampling, elastic, deterministic, long)}

def main(argv=None):
    p = sample.flag_parser(__doc__)
    p.add_argument("command", choices=[*COMMANDS, "all"])
    p.add_argument("--runs", type=int, default=20, help="of kill, ranks and sampling (default: 20)")
    args = p.parse_args(argv)
    held = {}
    for name in COMMANDS if args.command == "all" else [args.command]:
        work = pathlib.Path(tempfile.mkdtemp(prefix="chaos-"))
        try:
            held[name] = COMMANDS[name](work, args.runs, random.Random(0))
        finally:
            if held.get(name):
                shutil.rmtree(work)
            else:
                print(f"{name}: what was written is kept in {work}")
        print(f"{name}: {'held' if held[name] else 'DID NOT HOLD'}", flush=True)
    return 0 if all(held.values()) else 1

if __name__ == "__main__":
    sys.exit(main())
