"""The repository as a whole: what its files import and load, what happens on import, and what README.md promises."""
import ast
import importlib
import re
import shlex
import subprocess
import sys

import pytest

from conftest import ROOT
from test_house import SOURCES, imports, statements, tree

CODE = [path for path in SOURCES if "tests" not in path.relative_to(ROOT).parts]
SIX, OPTIONAL = {"torch", "numpy", "PIL", "scipy", "tqdm", "pytest"}, {"trimesh", "lmdb", "h5py"}
README = (ROOT / "README.md").read_text()

# Run in a fresh process: imports every file given, each alone in the path as `python FILE` has it, without optional
# packages, and with a CUDA that must not be asked for.
IMPORT_ALL = """
import importlib.util, os, sys
import torch

def refuse(*args, **kwargs):
    raise AssertionError("CUDA was called")
for name in ("is_available", "device_count", "init", "_lazy_init", "get_device_properties"):
    setattr(torch.cuda, name, refuse)
sys.modules.update(dict.fromkeys(("trimesh", "lmdb", "h5py")))
random, threads = torch.get_rng_state(), torch.get_num_threads()
root, sys.argv, path = sys.argv[1], [sys.argv[0], "--nonsense"], list(sys.path)
for name in os.environ["FILES"].split():
    before, sys.path[:] = set(sys.modules), [os.path.dirname(os.path.join(root, name)), *path]
    spec = importlib.util.spec_from_file_location("imported", os.path.join(root, name))
    module = importlib.util.module_from_spec(spec)
    sys.modules["imported"] = module
    spec.loader.exec_module(module)
    for new in set(sys.modules) - before:
        if (getattr(sys.modules[new], "__file__", None) or "").startswith(root):
            del sys.modules[new]
assert torch.equal(random, torch.get_rng_state()) and threads == torch.get_num_threads()
"""


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def import_all(root, paths, folder):
    return subprocess.run([sys.executable, "-I", "-B", "-c", IMPORT_ALL, str(root)], cwd=folder, text=True,
                          env={"FILES": " ".join(names(paths))}, capture_output=True)


def calls(path, wanted):
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call) and ast.unparse(node.func) in wanted]


def test_importing_does_nothing(tmp_path):
    """If importing a file printed, parsed arguments, drew random numbers, asked for CUDA or an optional package."""
    done = import_all(ROOT, CODE, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


def test_a_copied_file_stands_alone(tmp_path):
    """If model.py, toys.py or a metric needed a sibling when copied elsewhere."""
    alone = [path for path in CODE if path.name in ("model.py", "toys.py") or path.parent.name == "metrics"]
    for path in alone:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
        assert not set(imports(ast.walk(tree(path)))) & {other.stem for other in SOURCES}
    done = import_all(tmp_path, alone, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_are_six_and_the_optional_ones_stay_inside_functions(path):
    """If a file needed a package that requirements.txt does not name, or an optional one on import."""
    own = {source.stem for source in SOURCES} | {source.parent.name for source in SOURCES}
    every, top = ({name.split(".")[0] for name in imports(nodes)}
                  for nodes in (ast.walk(tree(path)), statements(tree(path))))
    assert every - set(sys.stdlib_module_names) - own <= SIX | OPTIONAL
    assert not top & OPTIONAL


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_is_ever_loaded(path):
    """If a checkpoint or an array file could run what it holds."""
    for keyword, value, wanted in (("weights_only", True, ("torch.load", "load")),
                                   ("allow_pickle", False, ("np.load", "numpy.load", "np.lib.format.open_memmap"))):
        for call in calls(path, wanted[:1]):
            assert [k.value.value for k in call.keywords if k.arg == keyword] == [value], call.lineno
    assert not calls(path, ("pickle.load", "pickle.loads"))
    assert not {"torch.load", "numpy.load", "pickle.load"} & set(imports(ast.walk(tree(path))))


@pytest.mark.parametrize("path", [path for path in CODE if path.parent == ROOT], ids=lambda path: path.name)
def test_no_class_count_is_a_constant(path):
    """If ImageNet's 1000 classes were written into the code; intervals, solver steps and clouds are other things."""
    allowed = set()
    for node in ast.walk(tree(path)):
        table = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("FLAGS", "TABLE4_REFERENCES")
        steps = isinstance(node, ast.keyword) and node.arg in ("sampling_steps", "steps", "save_every", "sample_every")
        features = isinstance(node, ast.FunctionDef) and (path.name, node.name) in (
            ("model.py", "main"), ("model.py", "time_features"))
        if table or steps or features:
            allowed |= set(ast.walk(node))
    for node in set(ast.walk(tree(path))) - allowed:
        assert not (isinstance(node, ast.Constant) and node.value in (1000, 1001)), node.lineno


def commands():
    """Every command of the bash blocks of README.md as words."""
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        for line in block.replace("\\\n", " ").replace("&&", "\n").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def test_readme_example_runs_with_model_py_alone(tmp_path):
    """If the first code that a reader copies did not run."""
    example, = re.findall(r"```python\n(.*?)```", README, re.S)
    (tmp_path / "model.py").write_bytes((ROOT / "model.py").read_bytes())
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "import model" in example, done.stderr


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_readme_commands_name_files_and_flags_that_exist(words):
    """If a command of the README named a file, a flag or a choice that does not exist."""
    files = [word for word in words if word.endswith((".py", ".txt"))]
    assert all((ROOT / name).is_file() for name in files)
    for script in [name for name in files if name.endswith(".py")]:
        given, source = words[words.index(script) + 1:], ROOT / script
        flags = {word.split("=")[0] for word in given if word.startswith("--")}
        if source.parent == ROOT:
            importlib.import_module(source.stem).parser().parse_args(given)
        else:
            known = {str(node.value) for node in ast.walk(tree(source)) if isinstance(node, ast.Constant)}
            assert flags <= known


def test_ci_runs_the_test_command_of_the_readme():
    """If the tests of the continuous integration were others than those a reader is told to run."""
    command, = [" ".join(words) for words in commands() if "pytest" in words]
    assert command == "python -m pytest -q"
    script = (ROOT / ".ci/run").read_text()
    assert script.count("pytest") == script.count("grep -m 1 'python -m pytest' README.md") == 1
