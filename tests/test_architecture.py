"""The rooms of the house: who may import whom, what an import may do, how large a file may get."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "reelflow"

# Imports go down, or sideways within a layer where no cycle comes of it. A new room needs a place here.
LAYERS = (
    {"config", "clip", "media", "version", "weights"},
    {"flow", "adapters", "data"},
    {"sampling", "likelihood", "denoise"},
    {"pipelines", "training", "evaluation"},
    {"serving"},
    {"studio", "cli"},
)
RANK = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}
FACADE = {"", "__main__"}
"""`reelflow` itself and `python -m reelflow`: above everything, they may import any room."""
MAY_USE_FACADE = {"serving", "studio", "cli"}

FILE_LINES, CORE_LINES, SAMPLING_LINES = 400, 1500, 700


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def name(path: Path) -> str:
    """`flow.block` of src/reelflow/flow/block.py, `flow` of its `__init__.py`, `` of the package's own."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def room(module: str) -> str:
    return module.split(".")[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that a file imports, functions and TYPE_CHECKING included."""
    package = ("reelflow", *path.relative_to(SOURCE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            for alias in node.names:
                yield node.lineno, ".".join([*base, *([node.module] if node.module else []), alias.name])


def inner_imports() -> Iterator[tuple[str, int, str, str]]:
    """Importing module, line, imported room (`` for the package itself), imported name."""
    for path in files():
        for line, target in imports(path):
            if room(target) == "reelflow":
                inside = target.removeprefix("reelflow").removeprefix(".")
                yield name(path), line, room(inside) if room(inside) in RANK else "", inside


def test_every_room_has_a_place() -> None:
    rooms = {room(name(path)) for path in files()} - FACADE
    assert rooms <= RANK.keys(), f"not in LAYERS: {sorted(rooms - RANK.keys())}"


def test_imports_go_one_way() -> None:
    wrong = []
    for module, line, target, imported in inner_imports():
        here = room(module)
        if here in FACADE or target == here:
            continue
        if target == "":
            allowed = here in MAY_USE_FACADE or (imported == "__version__" and here != "flow")
        else:
            allowed = RANK[target] <= RANK[here]
        if not allowed:
            wrong.append(f"{module}:{line} imports {imported or 'reelflow'}")
    assert not wrong, "\n".join(wrong)


def test_no_cycle_among_rooms() -> None:
    needs: dict[str, set[str]] = {}
    for module, _, target, _ in inner_imports():
        if room(module) not in FACADE and target not in ("", room(module)):
            needs.setdefault(room(module), set()).add(target)
    TopologicalSorter(needs).prepare()  # raises CycleError, which names the cycle


def test_the_flow_needs_torch_only() -> None:
    wrong = []
    for path in files():
        if room(name(path)) != "flow":
            continue
        for line, target in imports(path):
            inside = target.startswith(("reelflow.config", "reelflow.flow"))
            if not inside and room(target) != "torch" and room(target) not in sys.stdlib_module_names:
                wrong.append(f"{name(path)}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def lines(*paths: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def test_files_stay_small() -> None:
    large = {name(path): lines(path) for path in files() if lines(path) > FILE_LINES}
    assert not large, f"above {FILE_LINES} lines: {large}"


def test_the_core_stays_small() -> None:
    flow, sampling = (lines(*(path for path in files() if room(name(path)) == core)) for core in ("flow", "sampling"))
    assert sampling < SAMPLING_LINES
    assert flow + sampling < CORE_LINES


def python(code: str, cwd: Path) -> str:
    """Run in a new interpreter whose home and working directory are `cwd`; its output."""
    environment = {**os.environ, "HOME": str(cwd), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_package_and_command_line_import_light(tmp_path: Path) -> None:
    loaded = python("import sys, reelflow, reelflow.cli; print(*sys.modules)", tmp_path).split()
    assert not {"torch", "diffusers", "transformers", "numpy", "av"} & set(loaded)


EVERY_MODULE = """
import importlib, pkgutil, sys, torch
asked = []
real = torch.cuda.is_available
def is_available():
    caller = sys._getframe(1).f_globals.get("__name__", "")
    if caller.startswith("reelflow"): asked.append(caller)
    return real()
torch.cuda.is_available = is_available
import reelflow
for module in pkgutil.walk_packages(reelflow.__path__, "reelflow."):
    if not module.name.endswith("__main__"): importlib.import_module(module.name)
assert not asked, f"asks for CUDA on import: {asked}"
assert not torch.cuda.is_initialized(), "CUDA was initialised on import"
"""


@pytest.mark.slow
def test_no_module_does_anything_on_import(tmp_path: Path) -> None:
    python(EVERY_MODULE, tmp_path)
    assert not list(tmp_path.iterdir()), "a file or folder was made on import"
