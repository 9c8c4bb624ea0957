"""The shape of the package: floors, file sizes, weight of an import."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest

import mirage_vlm

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "mirage_vlm"
MAX_LINES = 400

# Imports run downward or sideways, never upward. `mirage_vlm` itself only re-exports, lazily.
FLOORS = {
    "errors": 0,
    "values": 0,
    "settings": 0,
    "strict_yaml": 0,
    "differences": 0,
    "dotted": 0,
    "pictures": 0,
    "trajectory": 0,
    "formats": 0,
    "tasks": 1,
    "sources": 1,
    "modeling": 2,
    "training": 3,
    "decoding": 3,
    "rl": 4,
    "evaluation": 4,
    "benchmarks": 4,
    "serving": 4,
    "reasoning": 4,
    "adapters": 4,
    "cli": 5,
    "__main__": 5,
}

# The one exception: `vlm.generate(…)` and `vlm.stream(…)` are the model's own verbs, and call the engine when used.
VERBS = {
    ("mirage_vlm.modeling.latent_vlm", f"mirage_vlm.decoding.{name}") for name in ("generate", "config", "response")
}


@dataclass(frozen=True)
class Import:
    """One imported module, seen in the source."""

    importer: str
    target: str
    name: str  # the name taken out of `target`, or "" for a plain import
    line: int
    at_import_time: bool  # runs as the importer is imported: not in a function, not for type checkers only

    def __str__(self) -> str:
        taken = f" ({self.name})" if self.name else ""
        return f"{self.importer}:{self.line} imports {self.target}{taken}"


@cache
def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


@cache
def imports() -> tuple[Import, ...]:
    known = modules()
    return tuple(
        found
        for name, path in known.items()
        for found in _imports_of(ast.parse(path.read_text("utf-8"), str(path)), name, path, set(known))
    )


def _imports_of(tree: ast.Module, importer: str, path: Path, known: set[str]) -> Iterator[Import]:
    package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]

    def visit(node: ast.AST, at_import_time: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, alias.name, "", node.lineno, at_import_time)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                target, taken = (submodule, "") if submodule in known else (base, alias.name)
                yield Import(importer, target, taken, node.lineno, at_import_time)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, False)
            for child in node.orelse:
                yield from visit(child, at_import_time)
        else:
            lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, at_import_time and not lazy)

    yield from visit(tree, True)


def _is_ours(module: str) -> bool:
    return module == "mirage_vlm" or module.startswith("mirage_vlm.")


def _part(module: str) -> str:
    """The part of the package a module belongs to: `cli` of `mirage_vlm.cli.main`; "" for the root."""
    return module.split(".")[1] if "." in module else ""


def test_every_part_has_a_floor():
    unknown = {_part(name) for name in modules()} - FLOORS.keys() - {""}
    assert not unknown, f"give these a floor in {Path(__file__).name}: {sorted(unknown)}"


def test_imports_never_go_upward():
    upward = []
    for found in imports():
        if not _part(found.importer) or not _is_ours(found.target):
            continue
        if (found.importer, found.target) in VERBS and not found.at_import_time:
            continue
        if target := _part(found.target):
            allowed = FLOORS[target] <= FLOORS[_part(found.importer)]
        else:
            allowed = found.name == "__version__"  # everything else of the root lives on some floor
        if not allowed:
            upward.append(str(found))
    assert not upward, "\n".join(upward)


def test_no_import_cycles():
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for found in imports():
        if found.at_import_time and found.target in graph:
            graph[found.importer].add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as fault:
        pytest.fail("import cycle: " + " <- ".join(fault.args[1]))


def test_imports_of_our_own_modules_exist():
    lost = [str(found) for found in imports() if _is_ours(found.target) and found.target not in modules()]
    assert not lost, "\n".join(lost)


def test_no_source_file_is_too_long():
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in modules().values()}
    long = [f"{path.relative_to(ROOT)}: {n} lines" for path, n in lengths.items() if n > MAX_LINES]
    assert not long, f"over {MAX_LINES} lines: {long}"


def test_torchvision_is_not_needed():
    users = [str(found) for found in imports() if found.target.split(".")[0] == "torchvision"]
    assert not users, "\n".join(users)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert not [asked for asked in project["dependencies"] if asked.startswith("torchvision")]


@pytest.mark.parametrize("statement", ["import mirage_vlm", "from mirage_vlm import MirageError, Trajectory"])
def test_importing_is_light(statement):
    heavy = "{'torch', 'transformers', 'datasets', 'gymnasium', 'pygame', 'pandas'}"
    script = f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_names_at_the_root():
    """What examples import; `formats` is a part of the package and no name of a class."""
    from mirage_vlm import EngineConfig, GenerationConfig, formats, user_turn

    assert formats.read_data and user_turn and EngineConfig and GenerationConfig
    assert {"formats", "user_turn", "GenerationConfig"} <= set(dir(mirage_vlm))
    code = "import sys, mirage_vlm; assert mirage_vlm.formats.read_data; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_exports():
    for name in mirage_vlm.__all__:
        assert getattr(mirage_vlm, name).__name__ == name
    assert set(mirage_vlm.__all__) <= set(dir(mirage_vlm))
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = mirage_vlm.Nonsense


def test_version_is_that_of_the_distribution():
    assert mirage_vlm.__version__ == version("mirage-vlm")
