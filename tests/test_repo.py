"""The repository as a whole: what its files import, load, print and promise."""
import ast
import os
import re
import shlex
import subprocess
import sys

import pytest

import data
import evaluate
import sample
import train
from conftest import ROOT

SOURCES = sorted(p for p in ROOT.rglob("*.py") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)
                 and p.relative_to(ROOT).parts[0] not in ("shared", "runs", "venv"))
SCRIPTS = [p for p in SOURCES if p.parent == ROOT]
ALLOWED = {"torch", "numpy", "PIL", "scipy", "tqdm", "pytest"}


def tree(path):
    return ast.parse(path.read_text(), str(path))


def imports(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else node.module.split(".")[0]


def statements(body):
    """Statements that run on import: all but those inside functions and `if __name__ == "__main__"`."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        yield node
        for name in ("body", "orelse", "finalbody", "handlers"):
            yield from statements(getattr(node, name, []))


def calls(path, module, name):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name:
            if isinstance(node.func.value, ast.Name) and node.func.value.id in module:
                yield node


def keyword(call, name):
    return [k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)]


def python(code, folder, **env):
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "", **env})


# --- what files load and import

def test_no_pickle_is_ever_loaded():
    """If a checkpoint or an array file could execute what it holds."""
    found = 0
    for path in SOURCES:
        for call in calls(path, ("torch",), "load"):
            found += 1
            assert keyword(call, "weights_only") == [True], f"{path.name}:{call.lineno}"
        for call in calls(path, ("np", "numpy"), "load") if path.parent.name != "tests" else ():
            found += 1
            assert keyword(call, "allow_pickle") == [False], f"{path.name}:{call.lineno}"
        if path.parent.name != "tests":
            text = path.read_text()
            assert not re.search(r"\bpickle\.loads?\(|\bfrom torch import load\b|\bfrom numpy import load\b", text), path.name
    assert found >= 3


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent.name != "tests"], ids=lambda p: p.name)
def test_no_text_from_outside_is_run_or_used_as_a_format(path):
    """If the name of a class or a file could reach a shell, the interpreter, or a format string."""
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert "subprocess" not in [a.name for a in node.names] + [getattr(node, "module", None)], f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "compile", "os.system", "os.popen", "__import__"), f"{path.name}:{node.lineno}"
            assert not name.startswith(("os.exec", "os.spawn", "subprocess.")), f"{path.name}:{node.lineno}"
            assert not name.endswith((".format", ".format_map")), f"{path.name}:{node.lineno}"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
            assert not isinstance(node.left, (ast.Constant, ast.JoinedStr)) or not isinstance(getattr(node.left, "value", ""), str), \
                f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_at_the_top_are_the_six_packages(path):
    """If the project needed a package that requirements.txt does not name."""
    own = {p.stem for p in SOURCES} | {p.name for p in ROOT.iterdir() if p.is_dir()}
    for name in imports(statements(tree(path).body)):
        assert name in sys.stdlib_module_names or name in ALLOWED or name in own, name


def test_model_imports_torch_and_the_standard_library_only():
    """If model.py could not be copied into another project on its own."""
    names = set(imports(ast.walk(tree(ROOT / "model.py"))))
    assert names - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.parametrize("name", ["model", "data", *(f"metrics/{p.stem}" for p in sorted((ROOT / "metrics").glob("*.py")))])
def test_files_stand_alone(tmp_path, name):
    """If a copied file needed a sibling, or printed or probed a GPU on import."""
    text, name = (ROOT / f"{name}.py").read_text(), name.split("/")[-1]
    (tmp_path / f"{name}.py").write_text(text)
    done = python(f"import {name}", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr


def test_model_alone_runs_forward_and_backward(tmp_path):
    """If the copied model.py imported but did not work."""
    (tmp_path / "model.py").write_text((ROOT / "model.py").read_text())
    done = python("import torch, model\n"
                  "net = model.ASFT(model.config('tiny', n_classes=3))\n"
                  "x0, query = torch.rand(2, 1024, 3), torch.arange(32).expand(2, -1)\n"
                  "loss = model.cicfm_loss(net, model.image_coords(32), x0, torch.randn_like(x0), torch.rand(2), query,\n"
                  "                        label=torch.tensor([0, 3]))\n"
                  "loss.backward()\n"
                  "print(bool(loss > 0 and net.head.weight.grad.any()))\n", tmp_path)
    assert done.stdout == "True\n" and done.stderr == "", done.stderr


def test_importing_does_nothing():
    """If importing a script printed, parsed arguments, drew random numbers, wrote files or initialised CUDA."""
    done = python("import sys; sys.argv += ['--nonsense']\n"
                  "import torch; before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()\n"
                  "import train, sample, evaluate, model, data\n"
                  "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()\n"
                  "assert torch.equal(before[0], torch.get_rng_state())\n"
                  "assert before[1:] == (torch.get_num_threads(), torch.get_default_dtype())\n", ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr


# --- facts that are settings

@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_no_class_count_is_a_constant(path):
    """If ImageNet's 1000 classes or its null class 1000 were written into the code (users' row 7)."""
    code = tree(path)
    exempt = set()
    for node in ast.walk(code):
        # model.py's parameter table, times and steps in thousands, and SDE step counts are no class counts
        if path.name == "model.py" and isinstance(node, ast.FunctionDef) and node.name in ("main", "time_features"):
            exempt |= set(ast.walk(node))
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "TABLE4_REFERENCES":      # counts of clouds
            exempt |= set(ast.walk(node))
        if isinstance(node, ast.keyword) and node.arg in ("sampling_steps", "save_every", "sample_every", "steps"):
            exempt |= set(ast.walk(node))
    for node in ast.walk(code):
        if isinstance(node, ast.Constant) and type(node.value) is int and node not in exempt:
            assert node.value not in (1000, 1001), f"{path.name}:{node.lineno}"


def test_every_flag_of_train_is_read():
    """If an option were accepted and ignored."""
    text = (ROOT / "train.py").read_text()
    flags = {a.dest for a in train.parser()._actions} - {"help"}
    defaults = set(train.DEFAULTS).union(*train.RECIPES.values())
    assert flags <= defaults and defaults - flags <= {"loader"}
    read = set(re.findall(r"\bargs\.(\w+)", text)) | set(re.findall(r'given\.get\("(\w+)"', text))
    built = re.search(r"getattr\(args, k\) for k in \(([^)]*)\)", text)
    read |= set(re.findall(r'"(\w+)"', built[1])) if built else set()
    assert defaults <= read, defaults - read


@pytest.mark.parametrize("script", [sample, evaluate])
def test_every_flag_is_read(script):
    """If an option were accepted and ignored."""
    flags, text = {a.dest for a in script.parser()._actions} - {"help"}, (ROOT / f"{script.__name__}.py").read_text()
    by_name = re.search(r"for flag in \(([^)]*)\):\n +if getattr\(args, flag\)", text)
    assert flags <= set(re.findall(r"\bargs\.(\w+)", text)) | set(re.findall(r'"(\w+)"', by_name[1] if by_name else ""))


def test_the_tests_do_not_need_shared_files():
    """If a test passed only on the machine that it was written on."""
    for path in SOURCES:
        assert "/work/" + "shared" not in path.read_text() and "/tmp" + "/venv" not in path.read_text(), path


# --- README

def readme():
    return (ROOT / "README.md").read_text()


def test_readme_example_runs_with_model_py_alone(tmp_path):
    """If the first code that a reader copies did not run."""
    blocks = [b for b in re.findall(r"```python\n(.*?)```", readme(), re.S) if "import model" in b]
    assert blocks
    (tmp_path / "model.py").write_text((ROOT / "model.py").read_text())
    done = python(blocks[0], tmp_path)
    assert done.returncode == 0, done.stderr


def test_readme_line_counts_are_real():
    """If the file table of the README went stale."""
    rows = re.findall(r"^\| *\[?`([\w/.]+)`(?:\]\([^)]*\))? *\| *(\d+) *\|", readme(), re.M)
    assert rows
    for name, count in rows:
        assert len((ROOT / name).read_text().splitlines()) == int(count), name


def test_readme_commands_parse():
    """If a command of the README used a flag that does not exist."""
    scripts = {"train.py": train.parser(), "sample.py": sample.parser(), "evaluate.py": evaluate.parser(), "data.py": data.parser()}
    found = 0
    for block in re.findall(r"```(?:bash|sh|console|)\n(.*?)```", readme(), re.S):
        for line in block.replace("\\\n", " ").replace("&&", "\n").splitlines():
            words = shlex.split(line, comments=True)
            for name, parser in scripts.items():
                if words[1:3] == ["evaluate.py", "upscale"] and name == "evaluate.py":
                    parser, name = evaluate.upscale_parser(), "upscale"
                if name in words and "stats" not in words:
                    parser.parse_args(words[words.index(name) + 1:])
                    found += 1
    assert found
