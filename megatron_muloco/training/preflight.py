"""`preflight` checks the machines of a job before it trains, and names the rank of every fault.

It joins the job as a run does, then goes from the cheap to the costly. What would hang or mislead
after a fault is left out: ranks with different configurations build no groups.

    facts       configuration, versions, source files, data, kernels: equal on all ranks
    host        data files, memory, disk: of each rank
    clocks      of all ranks
    groups      members and sums of every process group
    outer step  two small tensors through the run's reducer and codec, against the reference
    links       bandwidth inside replicas and between them, compared with each other

All ranks have the same verdict. A normal start makes the comparisons of facts and the checks of
data, memory and disk, too; it ends at the first fault.
"""

import os
import platform
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup
from typing_extensions import override

from megatron_muloco.checkpoint import layout
from megatron_muloco.comm.collectives import gather_objects
from megatron_muloco.comm.consistency import odd_facts
from megatron_muloco.comm.groups import Groups
from megatron_muloco.config import RunConfig
from megatron_muloco.config.derived import derive, topology_of
from megatron_muloco.config.outer import NoOuter
from megatron_muloco.config.rules import check
from megatron_muloco.errors import CheckpointError, ConfigError
from megatron_muloco.model.attention_backends import choose_attention
from megatron_muloco.model.flops import flops_per_token
from megatron_muloco.model.fused import choose_fusions
from megatron_muloco.monitor.build import device_name, program_commit
from megatron_muloco.monitor.throughput import peak_tflops
from megatron_muloco.planning.memory import checkpoint_bytes, memory_plan
from megatron_muloco.planning.report import human_bytes
from megatron_muloco.planning.traffic import traffic_plan
from megatron_muloco.runtime.accelerator import training_device
from megatron_muloco.runtime.parallel_state import unmirror_groups
from megatron_muloco.topology import Topology
from megatron_muloco.training.known_answers import (
    Link,
    clock_offset,
    links,
    slow_links,
    wrong_members,
    wrong_outer_step,
    wrong_sums,
)
from megatron_muloco.training.start import data_facts, join_job, make_groups, program_facts
from megatron_muloco.training.watch import Watch

__all__ = ["Finding", "Verdict", "preflight"]

# Chosen: time stamps of logs and of the lease on checkpoint.dir are read by people and other hosts.
_CLOCK_SECONDS = 5.0
_SHOWN_FACTS = 3  # of one kind and rank
_ASSUMED_MFU = 0.4  # of a GPU with a known peak, for the time of a step
_EXPOSED = 0.1  # of a round's computation: what a blocking exchange may take


@dataclass(frozen=True)
class Finding:
    """What is wrong, or may be, on one rank.

    Attributes:
        rank: The rank.
        check: Row of the table.
        text: What and why.
        is_fault: Whether the job is not ready with it; otherwise a warning.
    """

    rank: int
    check: str
    text: str
    is_fault: bool = True


@dataclass
class Verdict:
    """The result of a preflight, the same on all ranks.

    Attributes:
        hosts: Host of every rank.
        rows: Check -> what was found, in the order of the table.
        findings: Faults and warnings.
    """

    hosts: Sequence[str]
    rows: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_ready(self) -> bool:
        """Whether there is no fault."""
        return not any(finding.is_fault for finding in self.findings)

    def add(self, check: str, good: str, findings: Sequence[Finding]) -> None:
        """Add a row: ``good`` without a finding, else the ranks of the findings."""
        self.findings += findings
        ranks = sorted({finding.rank for finding in findings})
        bad = any(finding.is_fault for finding in findings)
        self.rows[check] = f"{'FAULT' if bad else 'warning'} on rank {ranks}" if ranks else good

    @override
    def __str__(self) -> str:
        """Return the table and the verdict."""
        machines = len(set(self.hosts))
        lines = [f"preflight of {len(self.hosts)} ranks on {machines} hosts"]
        lines += [f" > {check + ':':13s}{text}" for check, text in self.rows.items()]
        faults = sum(finding.is_fault for finding in self.findings)
        lines.append(f"verdict: {'ready' if self.is_ready else f'NOT READY, faults: {faults}'}")
        lines += [
            f"  {'' if each.is_fault else 'warning: '}rank {each.rank} ({self.hosts[each.rank]}), "
            f"{each.check}: {each.text}"
            for each in sorted(self.findings, key=lambda each: (not each.is_fault, each.rank))
        ]
        return "\n".join(lines)


def preflight(
    config: RunConfig, problems: Sequence[str] = (), watch: Watch | None = None
) -> Verdict:
    """Check all ranks of the job; see the module.

    Args:
        config: The configuration of the run.
        problems: Problems of this rank's data and tokenizer, found before it joined.
        watch: Watch of this process, which names ranks that do not arrive.

    Raises:
        SyncError: Not all ranks have joined in time, or a collective failed.

    Collectives: of all groups; every rank of the job calls it.
    """
    control = join_job(config, watch)
    verdict = Verdict(gather_objects(control, socket.gethostname()))
    topology = _compare(config, control, problems, verdict)
    _look_at_hosts(config, topology, control, problems, verdict)
    _compare_clocks(control, verdict)
    if topology is None:
        verdict.rows["groups"] = "not checked: ranks differ, see below"
        return verdict
    groups = make_groups(config, topology, control)
    try:
        _try_groups(config, groups, verdict)
    finally:
        unmirror_groups()
    gather_objects(control, 0)  # rank 0 holds the store of the job and may end from here on
    return verdict


# ---- facts -------------------------------------------------------------------------------


def _compare(
    config: RunConfig, control: ProcessGroup, problems: Sequence[str], verdict: Verdict
) -> Topology | None:
    """Compare what all ranks must have in common; return the topology if they can build groups."""
    texts = _flat(config.model_dump(mode="json"))
    program = program_facts()
    packages = {name: value for name, value in program.items() if not name.endswith(".py")}
    sources = {name: value for name, value in program.items() if name.endswith(".py")}
    commit = f"commit {program_commit()}"
    kernels, refused = _kernels(config)
    good = {
        "config": f"equal, digest {config.digest()}",
        "packages": ", ".join(f"{name} {value}" for name, value in packages.items()),
        "program": f"{len(sources)} source files equal, {commit}",
        "kernels": "; ".join(kernels.values()),
    }
    facts: dict[str, Mapping[str, str]] = {
        "config": texts,
        "packages": packages,
        "program": {**sources, "git commit": commit},
        "kernels": kernels,
    }
    world = torch.distributed.get_world_size()
    try:
        topology = topology_of(config, world)
        check(config, topology)
    except ConfigError as error:
        topology, refused = None, [*error.problems, *refused]
    by_rank = gather_objects(control, (facts, {} if problems else data_facts(config.data), refused))
    for kind, text in good.items():
        found = _odd(kind, dict(enumerate(each[0][kind] for each in by_rank)))
        if kind == "config":
            found += [Finding(r, kind, why) for r, each in enumerate(by_rank) for why in each[2]]
        verdict.add(kind, text, found)
    data = {rank: each[1] for rank, each in enumerate(by_rank) if each[1]}
    verdict.add("data", f"{len(next(iter(data.values()), ()))} facts equal", _odd("data", data))
    same = not any(f.check in ("config", "packages", "program") for f in verdict.findings)
    return topology if same else None


def _odd(kind: str, by_rank: Mapping[int, Mapping[str, str]]) -> list[Finding]:
    """Return the differences between ranks, a few for each rank."""
    ranks, shown, found = list(by_rank), dict.fromkeys(by_rank, 0), []
    for odd in odd_facts(list(by_rank.values())):
        rank = ranks[odd.rank]
        shown[rank] += 1
        if shown[rank] <= _SHOWN_FACTS:
            text = f"{odd.name} is {odd.value}, and {odd.usual} on most ranks"
            # A commit is only a name: the source files are compared themselves.
            found.append(Finding(rank, kind, text, is_fault=odd.name != "git commit"))
    more = [(rank, count - _SHOWN_FACTS) for rank, count in shown.items() if count > _SHOWN_FACTS]
    return found + [Finding(rank, kind, f"and {count} more differences") for rank, count in more]


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """Return dotted keys and their values."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: repr(tree)}
    flat: dict[str, str] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _kernels(config: RunConfig) -> tuple[dict[str, str], list[str]]:
    """Return which kernels this rank uses, and why it refuses the configuration."""
    device = training_device()
    kernels = {"device": device_name(device), "processor": platform.machine()}
    try:
        kernels["attention"] = f"attention {choose_attention(config, device).reason}"
    except ConfigError as error:
        return kernels, list(error.problems)
    kernels["fusions"] = choose_fusions(config.training, device).line()
    return kernels, []


# ---- hosts -------------------------------------------------------------------------------


def _look_at_hosts(
    config: RunConfig,
    topology: Topology | None,
    control: ProcessGroup,
    problems: Sequence[str],
    verdict: Verdict,
) -> None:
    """Look at files, memory and disk of every rank."""
    rank = torch.distributed.get_rank()
    mine = [Finding(rank, "data", problem) for problem in problems]
    rows = {"memory": "not checked", "disk": "not checked"}
    if topology is not None:
        rows["memory"], short = _memory(config, topology, verdict.hosts)
        mine += [Finding(rank, "memory", text) for text in short]
        rows["disk"], text, is_fault = _disk(config, topology)
        mine += [Finding(rank, "disk", text, is_fault)] if text else []
    found = [each for part in gather_objects(control, mine) for each in part]
    for kind, text in {"data": verdict.rows["data"], **rows}.items():
        verdict.add(kind, text, [each for each in found if each.check == kind])


def _memory(config: RunConfig, topology: Topology, hosts: Sequence[str]) -> tuple[str, list[str]]:
    """Return what this rank's plan needs, and what its GPU or host lacks."""
    plan = memory_plan(config, topology)
    device, lacks = training_device(), []
    on_host = plan.host
    row = ""
    if device.type == "cuda":  # not run
        free, total = torch.cuda.mem_get_info(device)
        row = f"{human_bytes(plan.needed)} of {human_bytes(total)} on the GPU, "
        if free < plan.needed:
            lacks.append(
                f"the plan needs {human_bytes(plan.needed)}, and the GPU has {human_bytes(free)} "
                f"free of {human_bytes(total)}. Look for other processes (nvidia-smi)."
            )
    else:
        on_host += plan.allocated
    host = hosts[torch.distributed.get_rank()]
    needed, available = on_host * list(hosts).count(host), _available()
    shown = "n/a" if available is None else human_bytes(available)
    if available is not None and available < needed:
        lacks.append(f"the ranks of this host need {human_bytes(needed)}, and it has {shown}")
    return f"{row}{human_bytes(needed)} of {shown} on rank 0's host", lacks


def _available(path: str = "/proc/meminfo") -> int | None:
    """Return the bytes of memory that this host has left; ``None`` where nobody says."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    kib = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return next((int(number) * 1024 for number in kib), None)


def _disk(config: RunConfig, topology: Topology) -> tuple[str, str, bool]:
    """Return the row, and what is wrong with ``checkpoint.dir`` and whether that is a fault."""
    if config.checkpoint.dir is None:
        return "checkpoint.dir is not set", "", False
    directory, needed = Path(config.checkpoint.dir), checkpoint_bytes(config, topology)
    place = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
    if not os.access(place, os.W_OK):
        return "", f"checkpoint.dir {directory}: {place} cannot be written", True
    try:
        warning = layout.room_for(place, needed=needed, keep=config.checkpoint.keep)
    except CheckpointError as error:
        return "", str(error), True
    free = human_bytes(shutil.disk_usage(place).free)
    return f"{free} free, one checkpoint has {human_bytes(needed)}", warning, False


def _compare_clocks(control: ProcessGroup, verdict: Verdict) -> None:
    offsets = clock_offset(control)
    wrong = [
        Finding(rank, "clocks", f"its clock is {offset:+.1f} s off those of most ranks. Set it.")
        for rank, offset in enumerate(offsets)
        if abs(offset) > _CLOCK_SECONDS
    ]
    verdict.add("clocks", f"within {max(offsets) - min(offsets):.2f} s", wrong)


# ---- groups ------------------------------------------------------------------------------


def _try_groups(config: RunConfig, groups: Groups, verdict: Verdict) -> None:
    """Try groups, one outer step and links, each only if the one before it was right."""
    if not _everywhere(groups, "groups", "members as planned", wrong_members(groups), verdict):
        return
    if not _everywhere(groups, "groups", "members and sums", wrong_sums(groups), verdict):
        return
    wrong = wrong_outer_step(config, groups)
    _everywhere(groups, "outer step", "as the reference", [wrong] if wrong else [], verdict)
    found = links(config, groups)
    slow = slow_links(found, verdict.hosts)
    needs = _needs(config, groups.topology)
    for kind in dict.fromkeys(link.kind for link in found):
        mine = [Finding(rank, kind, text) for (rank, of), text in slow.items() if of == kind]
        verdict.add(kind, _link_row([link for link in found if link.kind == kind], needs), mine)
        verdict.findings += _too_slow([link for link in found if link.kind == kind], needs)


def _everywhere(
    groups: Groups, check: str, good: str, wrong: Sequence[str], verdict: Verdict
) -> bool:
    """Add a row about all ranks; return whether nothing is wrong."""
    by_rank = gather_objects(groups.control, list(wrong))
    found = [Finding(rank, check, text) for rank, texts in enumerate(by_rank) for text in texts]
    verdict.add(check, good, found)
    return not found


@dataclass(frozen=True)
class _Needs:
    """What the plan sends over outer links.

    Attributes:
        round_bytes: Bytes that a rank sends in a round.
        seconds: Time that a round's exchange may take; ``None`` where the time of a step is not
            known.
    """

    round_bytes: int
    seconds: float | None


def _needs(config: RunConfig, topology: Topology) -> _Needs:
    """Return the need of the outer links, at an assumed utilisation of a known GPU."""
    sent = traffic_plan(config, topology).outer_per_rank
    peak = peak_tflops(device_name(training_device()), config.training.precision)
    if peak is None or not sent:
        return _Needs(sent, None)
    tokens = config.training.global_batch_size * config.model.seq_length
    step = (
        tokens
        * flops_per_token(config.model).total
        / (topology.world_size * peak * 1e12 * _ASSUMED_MFU)
    )
    derived = derive(config, topology)
    steps = derived.train_iters / max(1, derived.rounds)
    overlap = 0 if isinstance(config.outer, NoOuter) else config.outer.overlap_steps
    return _Needs(sent, step * (overlap or _EXPOSED * steps))


def _link_row(found: Sequence[Link], needs: _Needs) -> str:
    slowest = min(found, key=lambda link: link.rate)
    row = f"at least {human_bytes(slowest.rate)}/s ({slowest.source} to {slowest.target})"
    if slowest.kind != "outer link":
        return row
    seconds = needs.round_bytes / slowest.rate
    row += f"; {human_bytes(needs.round_bytes)} a round take {seconds:.3g} s"
    if needs.seconds is None:
        return f"{row}, need n/a: the time of a step is not known"
    return f"{row}, and may take {needs.seconds:.3g} s at {_ASSUMED_MFU:.0%} MFU"


def _too_slow(found: Sequence[Link], needs: _Needs) -> list[Finding]:
    """Return a warning for each rank whose outer link is slower than the plan needs."""
    if needs.seconds is None or found[0].kind != "outer link":
        return []
    slow = {link.source: link for link in found if needs.round_bytes / link.rate > needs.seconds}
    return [
        Finding(
            rank,
            "outer link",
            f"a round's exchange takes {needs.round_bytes / link.rate:.3g} s, and the plan hides "
            f"{needs.seconds:.3g} s. Use a longer sync_interval, fewer bits or more overlap_steps.",
            is_fault=False,
        )
        for rank, link in sorted(slow.items())
    ]
