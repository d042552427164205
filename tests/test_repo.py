"""The repository as a whole: what its files import and load, what importing does, what README.md promises."""
import ast
import importlib
import re
import shlex
import sys

import pytest

from conftest import ROOT, python
from test_house import SOURCES, imports, statements, tree

CODE = [path for path in SOURCES if "tests" not in path.relative_to(ROOT).parts]
SIX, OPTIONAL = {"torch", "numpy", "PIL", "scipy", "tqdm", "pytest"}, {"trimesh", "lmdb", "h5py", "wandb"}
README = (ROOT / "README.md").read_text()

# Run in a fresh process: imports every file, without optional packages; CUDA must not be asked for.
IMPORT_ALL = """
import importlib.util, os, sys, torch

def refuse(*args, **kwargs):
    raise AssertionError("CUDA was called")
for name in ("is_available", "device_count", "init", "_lazy_init", "get_device_properties"):
    setattr(torch.cuda, name, refuse)
sys.modules.update(dict.fromkeys(("trimesh", "lmdb", "h5py")))
before, files = (torch.get_rng_state(), torch.get_num_threads()), sys.argv[1:]
sys.argv = ["python", "--nonsense"]
for i, file in enumerate(files):
    sys.path.insert(0, os.path.dirname(file))
    spec = importlib.util.spec_from_file_location(f"imported_{i}", file)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
assert torch.equal(before[0], torch.get_rng_state()) and before[1] == torch.get_num_threads()
"""

def calls(path, *wanted):
    nodes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    return [node for node in nodes if ast.unparse(node.func) in wanted]

def test_importing_does_nothing(tmp_path):
    """If importing a file printed, parsed arguments, drew numbers, asked for CUDA or an optional package."""
    assert python("-I", "-B", "-c", IMPORT_ALL, *CODE, cwd=tmp_path) == ("", "")
    assert not list(tmp_path.iterdir())

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
    for function, keyword, value in ("torch.load", "weights_only", True), ("np.load", "allow_pickle", False):
        for call in calls(path, function):
            assert [k.value.value for k in call.keywords if k.arg == keyword] == [value], call.lineno
    assert not calls(path, "pickle.load", "pickle.loads", "numpy.load")
    assert not {"torch.load", "numpy.load", "pickle.load"} & set(imports(ast.walk(tree(path))))

BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ").replace("&&", "\n")
COMMANDS = [shlex.split(line, comments=True) for line in BLOCKS.splitlines()]

def test_readme_example_runs_with_model_py_alone(tmp_path):
    """If the first code that a reader copies did not run."""
    example, = re.findall(r"```python\n(import torch\nimport model.*?)```", README, re.S)
    (tmp_path / "model.py").write_bytes((ROOT / "model.py").read_bytes())
    python("-c", example, cwd=tmp_path)

@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_readme_commands_name_files_and_flags_that_exist(words):
    """If a command of the README named a file, a flag or a choice that does not exist."""
    for name in [word for word in words if word.endswith((".py", ".txt"))]:
        given, source = words[words.index(name) + 1:], ROOT / name
        assert source.is_file()
        if source.parent == ROOT and source.suffix == ".py":
            importlib.import_module(source.stem).parser().parse_args(given)
        elif source.suffix == ".py":
            known = {str(node.value) for node in ast.walk(tree(source)) if isinstance(node, ast.Constant)}
            for call, name in (("p.parse_known_args", "train"), ("sample.add_flags", "sample")):
                if calls(source, call):                                  # the others are flags of that file
                    known |= set(importlib.import_module(name).parser()._option_string_actions)
            assert {word.split("=")[0] for word in given if word.startswith("--")} <= known
