"""`Layout` and `batch_script`: which ranks are on which nodes, and the SLURM script of a run.

The script is ``launch/slurm/pretrain.sbatch`` under other ``#SBATCH`` lines: the numbers come from
the config and the layout, everything else from the template. Ranks are numbered replica by replica,
and nodes in SLURM's order, so a layout is a question of divisibility::

    8 GPUs a node    replicas of  4 ranks    2 replicas on each node
                     replicas of  8 ranks    1 replica on each node
                     replicas of 16 ranks    1 replica on 2 nodes
                     replicas of 12 ranks    refused: a node would hold parts of two replicas
"""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_muloco.config import RunConfig
from megatron_muloco.config.derived import smallest_topology, topology_of
from megatron_muloco.config.rules import check
from megatron_muloco.errors import ConfigError
from megatron_muloco.topology import Topology

__all__ = ["ROOT", "TEMPLATE", "ArrayTask", "Layout", "Request", "batch_script", "layout_for"]

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "launch/slurm/pretrain.sbatch"
_USUAL_RANKS = 8  # GPUs of a node
_DIRECTIVE = re.compile(r"^#SBATCH --([a-z-]+)(?:=(\S+))?", re.MULTILINE)
_BODY_STARTS = "set -euo pipefail\n"


@dataclass(frozen=True, slots=True)
class Layout:
    """Replicas on nodes: a node has whole replicas, or a replica has whole nodes.

    Attributes:
        topology: The grid of all ranks.
        nodes: Number of nodes, in all components.
        ranks_per_node: Number of ranks on each node.
        components: Parts of equal size that SLURM may place on partitions or switches of their own;
            a replica is inside one of them. 1 for an ordinary job.
    """

    topology: Topology
    nodes: int
    ranks_per_node: int
    components: int

    def __str__(self) -> str:
        """Return the layout in words, such as ``2 replicas on each of 8 nodes``."""
        size, count = self.topology.replica_size, self.topology.num_replicas
        if size < self.ranks_per_node:
            words = f"{self.ranks_per_node // size} replicas on each of {_many(self.nodes, 'node')}"
        elif size == self.ranks_per_node:
            words = f"1 replica on each of {_many(self.nodes, 'node')}"
        else:
            words = f"{_many(count, 'replica')} on {size // self.ranks_per_node} nodes each"
        if self.components > 1:
            part, share = self.nodes // self.components, count // self.components
            words += (
                f"; {self.components} parts of {_many(part, 'node')} and {_many(share, 'replica')}"
            )
        return words


def layout_for(
    config: RunConfig,
    *,
    nodes: int | None,
    ranks_per_node: int | None = None,
    components: int = 1,
) -> Layout:
    """Return the layout of a config on ``nodes`` nodes, or on the fewest that are possible.

    Args:
        config: The configuration of the run.
        nodes: Number of nodes in all components; None for the fewest.
        ranks_per_node: Number of ranks on each node, at least 1; None for 8, or for the smallest
            world if that is less.
        components: Number of parts that SLURM places separately, at least 1.

    Raises:
        ConfigError: The ranks do not fit the config, or nodes or components would divide a replica.
    """
    smallest = smallest_topology(config).world_size
    replicas = config.parallel.num_replicas
    if ranks_per_node is None:
        ranks_per_node = min(_USUAL_RANKS, smallest)
    if nodes is None:
        nodes = _fewest_nodes(smallest, replicas, ranks_per_node, components)
    world = nodes * ranks_per_node
    topology = topology_of(config, world)
    check(config, topology)
    size = topology.replica_size
    if size % ranks_per_node and ranks_per_node % size:
        raise ConfigError(
            f"{_many(nodes, 'node')} of {ranks_per_node} ranks: {replicas} replicas of {size} "
            "ranks would share nodes, because neither number divides the other. The slowest links "
            "would then be inside replicas, which exchange in every step. Use "
            f"{_fewest_nodes(smallest, replicas, ranks_per_node, components)} nodes (--nodes) or a "
            "multiple, another --ranks-per-node, or another parallel.num_replicas."
        )
    if nodes % components or (world // components) % size:
        raise ConfigError(
            f"{components} partitions or components on {_many(nodes, 'node')}: they do not hold "
            f"the same number of whole replicas ({replicas} replicas of {size} ranks). Exchanges "
            "inside a replica happen in every step and belong into one network. Use a number that "
            f"divides both {nodes} nodes and {replicas} replicas."
        )
    return Layout(topology, nodes, ranks_per_node, components)


def _fewest_nodes(smallest: int, replicas: int, ranks_per_node: int, components: int) -> int:
    """Return the fewest nodes whose ranks a world can have, without parts of replicas on a node.

    Args:
        smallest: Ranks of the smallest world; every world is a multiple of it.
        replicas: Number of replicas.
        ranks_per_node: Ranks on each node.
        components: Parts with equal numbers of nodes.
    """
    step = math.lcm(smallest // math.gcd(smallest, ranks_per_node), components)
    whole = math.lcm(step, replicas)  # every replica has whole nodes: always possible
    for nodes in range(step, whole, step):
        size = nodes * ranks_per_node // replicas
        if size % ranks_per_node == 0 or ranks_per_node % size == 0:
            return nodes
    return whole


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@dataclass(frozen=True, slots=True)
class ArrayTask:
    """One run of a job array: what it changes in the config, and where it saves."""

    overrides: tuple[str, ...]
    checkpoints: str


@dataclass(frozen=True, slots=True)
class Request:
    """What a batch script asks of SLURM, and the settings of the template.

    Attributes:
        config: Absolute path of the config file.
        overrides: Words for ``--set``.
        layout: Nodes and ranks.
        gpus: Whether ranks are GPUs that SLURM counts.
        logs: Absolute directory of logs, which exists when the job starts.
        name: Name of the job.
        partitions: One for the whole job, or one for each component; empty for SLURM's default.
        directives: Further options of sbatch by name without dashes; None for one without a value.
            They apply to every component.
        settings: Variables that the template reads.
        tasks: The runs of an array; empty for a single run.
        at_once: Most runs of an array at the same time; 0 for no limit.
    """

    config: Path
    overrides: tuple[str, ...]
    layout: Layout
    gpus: bool
    logs: Path
    name: str
    partitions: tuple[str, ...] = ()
    directives: Mapping[str, str | None] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    tasks: tuple[ArrayTask, ...] = ()
    at_once: int = 0


def batch_script(request: Request) -> str:
    """Return the text of a batch script: ``#SBATCH`` lines, settings, and the template's body."""
    template = TEMPLATE.read_text(encoding="utf-8")
    body = template[template.index(_BODY_STARTS) :]
    lines = [
        "#!/bin/bash",
        "# Written by launch/submit.py from launch/slurm/pretrain.sbatch: "
        f"{request.layout}, {request.layout.topology.world_size} ranks.",
    ]
    for component in range(request.layout.components):
        if component:
            lines.append("#SBATCH hetjob")
        directives = _directives(request, component, dict(_DIRECTIVE.findall(template)))
        lines += [
            f"#SBATCH --{name}" + ("" if value is None else f"={value}")
            for name, value in directives.items()
        ]
    lines.append("")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in request.settings.items()]
    lines.append(f"set -- {shlex.join([str(request.config), *_set(request.overrides)])}")
    if request.tasks:
        lines.append("case $SLURM_ARRAY_TASK_ID in")
        for index, task in enumerate(request.tasks):
            lines.append(
                f'    {index}) set -- "$@" {shlex.join(_set(task.overrides))}'
                f"; export MULOCO_CHECKPOINTS={shlex.quote(task.checkpoints)} ;;"
            )
        lines.append("esac")
    return "\n".join(lines) + "\n\n" + body


def _set(overrides: Sequence[str]) -> list[str]:
    return ["--set", *overrides] if overrides else []


def _directives(
    request: Request, component: int, template: Mapping[str, str]
) -> dict[str, str | None]:
    """Return sbatch's options of one component, in the template's order, then the further ones."""
    layout = request.layout
    srun = request.settings.get("MULOCO_LAUNCHER") == "srun"
    found: dict[str, str | None] = {name: value or None for name, value in template.items()}
    found["job-name"] = request.name
    found["nodes"] = str(layout.nodes // layout.components)
    found["ntasks-per-node"] = str(layout.ranks_per_node if srun else 1)
    found["gpus-per-node"] = str(layout.ranks_per_node)
    found["output"] = f"{request.logs}/%x-{'%A_%a' if request.tasks else '%j'}.out"
    if not request.gpus:
        del found["gpus-per-node"]
    if request.partitions:
        found["partition"] = request.partitions[component % len(request.partitions)]
    if request.tasks:
        limit = f"%{request.at_once}" if request.at_once else ""
        found["array"] = f"0-{len(request.tasks) - 1}{limit}"
    found.update(request.directives)
    if component:  # of the job as a whole, and taken from its first component
        for name in ("output", "open-mode"):
            del found[name]
    return found
