"""Imports go downward, collectives are called in one package, planning does not load torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_muloco

PACKAGE = Path(megatron_muloco.__file__).parent

# From the bottom up. A package imports from lines above its own here and from itself; packages on
# one line do not import each other.
LEVELS = (
    ("errors",),
    ("params", "topology"),
    ("config",),
    ("compress", "optim", "outer"),
    ("comm",),
    ("model",),
    ("data", "runtime"),
    ("checkpoint", "planning", "scaling"),
    ("monitor",),
    ("training",),
)
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}

# Names of torch.distributed that do not communicate. `checkpoint` reads and writes files, and its
# planner makes collectives of its own.
LOCAL_NAMES = frozenset(
    {"ProcessGroup", "checkpoint", "get_process_group_ranks", "get_rank", "get_world_size"}
    | {"is_initialized"}
)
# Who may create and destroy the default group, and with what.
INITIALISERS = {
    "runtime/distributed.py": {"TCPStore", "destroy_process_group", "init_process_group"},
    "data/datasets.py": {"HashStore", "destroy_process_group", "init_process_group"},
    "training/one_process.py": {"HashStore"},
}

TORCH_FREE = (
    "megatron_muloco.config",
    "megatron_muloco.topology",
    "megatron_muloco.params",
    "megatron_muloco.errors",
    "megatron_muloco.planning",
    "megatron_muloco.scaling",
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


def distributed_names(path: Path) -> set[str]:
    """Return the names of ``torch.distributed`` and ``deepspeed.comm`` that a file uses."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                aliases[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    used = {dotted(node, aliases) for node in ast.walk(tree)} | set(aliases.values())
    packages = ("torch.distributed.", "deepspeed.comm.")
    return {
        name.removeprefix(package).split(".")[0]
        for name in used
        for package in packages
        if name.startswith(package)
    }


def dotted(node: ast.AST, aliases: dict[str, str]) -> str:
    """Return the full name that an expression such as ``dist.barrier`` refers to, or ``""``."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, "")
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, aliases)
        return f"{base}.{node.attr}" if base else ""
    return ""


def test_every_package_has_one_level_and_every_level_has_packages() -> None:
    parts = [part_of(path) for path in MODULES]
    named = [part for parts in LEVELS for part in parts]
    assert sorted(named) == sorted({part for part in parts if not part.startswith("__")})


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path: Path) -> None:
    part = part_of(path)
    if part.startswith("__"):
        return
    for name in imported(path):
        pieces = name.split(".")
        if pieces[0] != "megatron_muloco" or len(pieces) < 2 or pieces[1] == part:
            continue
        assert pieces[1] in LEVEL_OF, f"{path} imports {name} from the package's top level"
        assert LEVEL_OF[pieces[1]] < LEVEL_OF[part], f"{path} imports {name}, which is not below it"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_comm_calls_collectives(path: Path) -> None:
    if part_of(path) == "comm":
        return
    allowed = LOCAL_NAMES | INITIALISERS.get(path.relative_to(PACKAGE).as_posix(), set())
    used = distributed_names(path) - allowed
    assert not used, f"{path} uses {sorted(used)}; call a function of megatron_muloco.comm instead"


@pytest.mark.parametrize(
    "line",
    [
        "torch.distributed.barrier()",
        "dist.all_reduce(x)",
        "import torch.distributed as td; td.broadcast(x)",
        "from torch.distributed import all_gather as gather",
        "partial(deepspeed.comm.all_gather, x)",
    ],
)
def test_a_collective_is_recognised(line: str, tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(f"import torch, deepspeed\nimport deepspeed.comm as dist\n{line}\n")
    assert len(distributed_names(module) - LOCAL_NAMES) == 1


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
