"""`initialize_replicas`: joins the job, builds process groups, checks and seeds all ranks."""

import hashlib
import os
import platform
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed import ProcessGroup

import megatron_muloco
from megatron_muloco.comm.collectives import gather_objects, job_store
from megatron_muloco.comm.consistency import check_same_facts
from megatron_muloco.comm.groups import Groups, build_control, build_groups, groups_made
from megatron_muloco.config import RunConfig
from megatron_muloco.config.derived import topology_of
from megatron_muloco.config.outer import NoOuter
from megatron_muloco.config.rules import RULES, check
from megatron_muloco.config.schema import DataConfig
from megatron_muloco.data.indexed import bin_path, idx_path, manifest_path
from megatron_muloco.data.tokenizer import tokenizer_digest
from megatron_muloco.errors import ConfigError, RuntimeMismatch
from megatron_muloco.monitor.writers import wandb_is_installed
from megatron_muloco.runtime.distributed import start_distributed, use_one_hardware_queue
from megatron_muloco.runtime.parallel_state import mirror_groups, require_unset
from megatron_muloco.topology import Topology
from megatron_muloco.training.known_answers import wrong_members, wrong_sums
from megatron_muloco.training.watch import Watch

__all__ = [
    "data_facts",
    "initialize_replicas",
    "join_job",
    "make_groups",
    "program_facts",
    "seed_ranks",
]

_PACKAGES = ("torch", "megatron-core", "deepspeed")


def initialize_replicas(config: RunConfig, watch: Watch | None = None) -> Groups:
    """Join the job and return this rank's groups; Megatron's ``parallel_state`` mirrors them.

    It starts ``deepspeed.comm`` unless torch.distributed is already initialised, installs the CPU
    seam where there is no accelerator, builds all process groups, checks that all ranks have the
    same configuration, and seeds Megatron's random number trackers.

    Args:
        config: The configuration of the run; its parallel sizes must fit the number of ranks.
        watch: Watch that begins to post as soon as the job has a store; none by default.

    Raises:
        TopologyError: The parallel sizes do not divide the number of ranks.
        ConfigError: The configuration does not fit the number of ranks, or ranks have different
            configurations, programs or data.
        RuntimeMismatch: ``parallel_state`` is already initialised, or the program has made other
            numbers of process groups on different ranks.

    Collectives: creation of all groups and one object gather over the job; every rank of the job
    calls it at the same point.
    """
    control = join_job(config, watch)
    topology = topology_of(config, torch.distributed.get_world_size())
    check(config, topology, rules=(*RULES, wandb_is_installed))
    _require_one_config(config, control)
    check_same_facts(control, program_facts() | data_facts(config.data))
    _require_equal_groups(control)
    groups = make_groups(config, topology, control)
    _require_right_groups(groups)
    if watch is not None:
        watch.follow(_counted_groups(groups))
    seed_ranks(config.training.seed, groups)
    return groups


def join_job(config: RunConfig, watch: Watch | None = None) -> ProcessGroup:
    """Join the job and return `Groups.control`; see `initialize_replicas`.

    Collectives: a rendezvous and the creation of one group; every rank of the job calls it.
    """
    require_unset()
    if config.parallel.tensor_model_parallel_size > 1:
        use_one_hardware_queue(os.environ)
    timeout = timedelta(minutes=config.training.distributed_timeout_minutes)
    control_timeout = timedelta(minutes=config.training.control_timeout_minutes)
    ranks = start_distributed(
        timeout=timeout,
        deterministic=config.training.deterministic,
        join_timeout=max(timeout, control_timeout),
    )
    if watch is not None:
        watch.join(
            job_store(),
            ranks.rank,
            ranks.world_size,
            limit=timeout.total_seconds(),
            control=control_timeout.total_seconds(),
        )
    control: ProcessGroup = build_control(control_timeout)
    return control


def make_groups(config: RunConfig, topology: Topology, control: ProcessGroup) -> Groups:
    """Create all process groups of this rank, for Megatron as well.

    Collectives: creation of all groups; every rank of the job calls it.
    """
    outer = config.outer
    by_host = not isinstance(outer, NoOuter) and outer.sends_from_host
    groups = build_groups(
        topology,
        control=control,
        timeout=timedelta(minutes=config.training.distributed_timeout_minutes),
        exchange_backend="gloo" if by_host else None,
        separate_exchange=not isinstance(outer, NoOuter) and outer.overlap_steps > 0,
    )
    mirror_groups(groups)
    return groups


def _counted_groups(groups: Groups) -> dict[str, tuple[list[int], ProcessGroup]]:
    """Return the groups in which all ranks start the same collectives: name -> ranks and group.

    The pipeline's is left out: its stages send and receive different numbers of messages.
    """
    counted: dict[str, tuple[list[int], ProcessGroup]] = {}
    seen = {id(groups.pg.pp)}
    for name, group in (groups.by_name() | {"job": groups.control}).items():
        ranks = torch.distributed.get_process_group_ranks(group)
        if len(ranks) > 1 and id(group) not in seen:
            seen.add(id(group))
            counted[name] = (ranks, group)
    return counted


def _require_one_config(config: RunConfig, control: ProcessGroup) -> None:
    """Raise ConfigError on every rank if a rank's configuration differs from rank 0's.

    Collectives: one object gather over the job.
    """
    dumps = gather_objects(control, config.model_dump(mode="json"))
    for rank, dump in enumerate(dumps):
        if dump != dumps[0]:
            sections = [name for name in dump if dump[name] != dumps[0].get(name)]
            raise ConfigError(
                f"rank {rank} has a different configuration from rank 0 in {', '.join(sections)}. "
                "Every rank must read the same file with the same --set values."
            )


def program_facts() -> dict[str, str]:
    """Return the versions of packages and a digest of each source file of this package.

    The digests say more than a version or a commit: they also see changes that are not committed.
    """
    facts = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:  # a build without metadata
            facts[package] = "unknown"
    root = Path(megatron_muloco.__file__).parent
    for path in sorted(root.rglob("*.py")):
        facts[str(path.relative_to(root.parent))] = _digest(path.read_bytes())
    return facts


def data_facts(data: DataConfig) -> dict[str, str]:
    """Return sizes of the datasets, and digests of their manifests and of the tokenizer.

    The corpora are not read. Another tool's dataset has no manifest, so only its sizes are known.
    """
    facts = {"tokenizer": tokenizer_digest(data.tokenizer_type, data.tokenizer_model)}
    for source in (*data.train, *data.valid, *data.test):
        for path in (bin_path(source.path), idx_path(source.path)):
            facts[str(path)] = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
        manifest = manifest_path(source.path)
        if manifest.is_file():
            facts[str(manifest)] = _digest(manifest.read_bytes())
    return facts


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _require_equal_groups(control: ProcessGroup) -> None:
    """Raise RuntimeMismatch on every rank if ranks are in different numbers of process groups.

    Collectives: one object gather over the job.
    """
    made = gather_objects(control, groups_made())
    for rank, number in enumerate(made):
        if number != made[0]:
            raise RuntimeMismatch(
                f"rank {rank} is in {number} process groups where rank 0 is in {made[0]}. torch "
                "names new groups by that number, so ranks would wait for each other without end. "
                "Call initialize_replicas before the program makes groups of its own."
            )


def _require_right_groups(groups: Groups) -> None:
    """Raise RuntimeMismatch on every rank if a group has wrong members or a wrong sum.

    Collectives: two gathers of objects over the job, and 16 bytes over the replica and the outer
    group, which every run uses.
    """
    for find in (wrong_members, _wrong_common_sums):
        by_rank = gather_objects(groups.control, find(groups))
        for rank, wrong in enumerate(by_rank):
            if wrong:
                raise RuntimeMismatch(
                    f"rank {rank}: {wrong[0]}. It would exchange gradients or pseudogradients "
                    "with the wrong ranks. Start with --preflight, which tries every group."
                )


def _wrong_common_sums(groups: Groups) -> list[str]:
    return wrong_sums(groups, ("replica", "outer group"))


def seed_ranks(seed: int, groups: Groups) -> None:
    """Seed torch and Megatron's trackers.

    All replicas get the same seeds, because their initial weights must be equal. Nothing in the
    model draws random numbers after that (there is no dropout).
    """
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(
        seed, tp_rank=groups.coords.tp, ep_rank=0, etp_rank=groups.coords.tp
    )
