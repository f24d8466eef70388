"""Imports go downward, and what plans a run does not load torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_muloco

PACKAGE = Path(megatron_muloco.__file__).parent

LEVELS = {
    "errors": 0,
    "params": 0,
    "topology": 0,
    "config": 0,
    "scaling": 1,
    "compress": 1,
    "outer": 1,
    "optim": 1,
    "comm": 1,
    "checkpoint": 2,
    "data": 2,
    "model": 2,
    "monitor": 2,
    "planning": 2,
    "runtime": 2,
    "training": 3,
    "api": 3,
    "cli": 3,
}

TORCH_FREE = (
    "megatron_muloco.config",
    "megatron_muloco.topology",
    "megatron_muloco.params",
    "megatron_muloco.errors",
    "megatron_muloco.planning",
    "megatron_muloco.data.sampler",
    "megatron_muloco.model.flops",
)

MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """Return the top-level module or package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[str]:
    """Return the dotted names that a file imports, wherever in the file."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def test_every_part_has_a_level() -> None:
    parts = {part_of(path) for path in MODULES} - {"__init__", "__main__"}
    assert parts <= LEVELS.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path: Path) -> None:
    part = part_of(path)
    if part.startswith("__"):
        return
    for name in imported(path):
        pieces = name.split(".")
        if pieces[0] != "megatron_muloco" or len(pieces) < 2 or pieces[1] not in LEVELS:
            continue
        assert LEVELS[pieces[1]] <= LEVELS[part], f"{path} imports {name}, which is above it"


@pytest.mark.parametrize("part", ["outer", "compress"])
def test_tensors_and_time_know_no_process_groups(part: str) -> None:
    for path in (PACKAGE / part).rglob("*.py"):
        groups = [name for name in imported(path) if name.startswith(("torch.distributed", "deep"))]
        assert not groups, f"{path} imports {groups}"


@pytest.mark.parametrize("name", TORCH_FREE)
def test_planning_does_not_load_torch(name: str) -> None:
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"{name} loads torch"
