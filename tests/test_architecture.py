"""The rules of the house: imports point down, budgets hold, names stay, and nothing opens a door for code."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import optkit
import optkit.transforms

ROOT = Path(__file__).parents[1] / "optkit"
SOURCES = sorted(ROOT.rglob("*.py"))
LAYERS = {
    "cli": 10,
    "harness": 9,  # it ends in a report, and a report knows nothing of how it was measured
    "report": 8,
    "recipe": 7,
    "transforms": 6,
    "measure": 6,
    "tasks": 6,
    "models": 6,
    "engines": 5,
    "kernels": 4,
    "data": 4,
    "core": 3,
}
EXEMPT = {"__init__.py", "__main__.py"}
FILE_LINES, FUNCTION_LINES = 350, 60
CODE_CARRIERS = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
WRITE_ELSEWHERE = {
    "cli/__init__.py": "the null device, where the caller has closed our output",
    "core/files.py": "the door itself",
    "harness/members.py": "the log of a child, which is no result",
    "harness/worker.py": "where it hangs, for its parent to read; no result",
    "kernels/build.py": "a cache that can be built again",
    "measure/memory.py": "a switch of the kernel under /proc",
    "models/reference/corpus.py": "training data, made again by one command",
    "models/reference/train.py": "checkpoints, made again by one command",
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def own_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the dotted name of every import of optkit, those within functions included."""
    package = ["optkit", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found = [f"{module}.{alias.name}" for alias in node.names] if module == "optkit" else [module]
        else:
            continue
        yield from ((node.lineno, one) for one in found if one.split(".")[0] == "optkit")


def test_every_package_has_its_layer() -> None:
    packages = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert packages == set(LAYERS)
    assert {path.name for path in ROOT.glob("*.py")} == EXEMPT


@pytest.mark.parametrize("path", [path for path in SOURCES if name(path) not in EXEMPT], ids=name)
def test_imports_point_down_only(path: Path) -> None:
    home = path.relative_to(ROOT).parts[0]
    wrong = []
    for line, imported in own_imports(path):
        other = imported.split(".")[1] if "." in imported else "optkit itself"
        if other != home and LAYERS.get(other, 99) >= LAYERS[home]:
            wrong.append(f"{name(path)}:{line} imports {imported}")
    assert wrong == []


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_and_functions_keep_their_budget(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {one: lines for one, lines in lengths.items() if lines > FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_nothing_opens_a_door_for_code(path: Path) -> None:
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [module for module in modules if module.split(".")[0] in CODE_CARRIERS]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in {"eval", "exec", "torch.load", "yaml.load", "os.system", "compile"}:
                found.append(called)
            found += [
                f"{called}(trust_remote_code=True)"
                for word in node.keywords
                if word.arg in {"trust_remote_code", "shell"} and isinstance(word.value, ast.Constant) and word.value.value is True
            ]
    assert found == []


@pytest.mark.parametrize("path", [path for path in SOURCES if name(path) not in WRITE_ELSEWHERE], ids=name)
def test_durable_writes_go_through_the_one_door(path: Path) -> None:
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    writes = [f"{name(path)}:{call.lineno} {ast.unparse(call.func)}" for call in calls if _writes(call)]
    assert writes == []


def _writes(call: ast.Call) -> bool:
    assert isinstance(call.func, ast.Attribute)
    if call.func.attr in {"write_text", "write_bytes"}:
        return ast.unparse(call.func.value) != "files"
    modes = [value.value for value in [*call.args, *(word.value for word in call.keywords)] if isinstance(value, ast.Constant)]
    return call.func.attr == "open" and any(isinstance(mode, str) and set(mode) <= set("wxab+t") and mode[:1] in "wxa" for mode in modes)


def test_the_command_line_opens_without_torch() -> None:
    code = (
        "import sys, optkit.cli\n"
        "heavy = {'torch', 'transformers', 'pandas', 'numpy', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.returncode == 0, done.stderr


def test_help_is_printed_by_the_module() -> None:
    done = subprocess.run([sys.executable, "-m", "optkit", "--help"], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("run", "check", "compare", "list", "schema", "verify"))


def test_the_public_names_of_optkit_stay() -> None:
    assert sorted(optkit.__all__) == ["OptkitError", "Report", "__version__", "load", "load_reports", "run", "save"]
    assert all(getattr(optkit, one) is not None for one in optkit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'torch'"):
        _ = optkit.torch


def test_the_public_names_of_the_transforms_stay() -> None:
    classes = [
        "Adaptive",
        "Bucketing",
        "ChunkedPrefill",
        "Compile",
        "DataParallel",
        "Distill",
        "Draft",
        "DropLayers",
        "Dtype",
        "Ensemble",
        "Int4",
        "Int8",
        "KvCache",
        "LlmInt8",
        "LowRank",
        "Magnitude",
        "Merge",
        "Mixed",
        "Nf4",
        "Offload",
        "PipelineParallel",
        "PrefixCache",
        "PromptLookup",
        "PruneChannels",
        "PruneFfn",
        "PruneHeads",
        "PruneHidden",
        "Qat",
        "SlidingWindow",
        "Smoothquant",
        "Sparse",
        "Sparsegpt",
        "StaticCache",
        "TensorParallel",
        "Wanda",
    ]
    assert sorted(optkit.transforms.__all__) == sorted(["TRANSFORMS", "Calibration", "Plan", "Stage", "Transform", *classes])
    assert [getattr(optkit.transforms, one).__name__ for one in classes] == classes
    with pytest.raises(AttributeError, match="no attribute 'Int3'"):
        _ = optkit.transforms.Int3
