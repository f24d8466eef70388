"""Process start-up and shutdown: `start_distributed` initialises ``deepspeed.comm``.

It also selects the accelerator, installs the CPU seam without one, and silences known warnings of
other packages.
"""

import ipaddress
import logging
import os
import resource
import socket
import warnings
from collections.abc import MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from megatron_muloco.errors import ConfigError, RuntimeMismatch, SyncError
from megatron_muloco.runtime.ranks import RankInfo, discover_ranks, thread_count

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "hide_unwanted_gpus",
    "listening_address",
    "raise_file_limit",
    "require_determinism",
    "shutdown",
    "silence_known_warnings",
    "start_distributed",
    "use_one_hardware_queue",
]

# Chosen; systems allow at least 1,024 by default. Some libraries look at every number up to the
# limit when they start a process, which bounds what is asked for.
_LEAST_FILES, _MOST_FILES = 256, 65_536

# Environment variables that are read when CUDA and NCCL start, and their deterministic values.
_DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")

# Warnings of other packages that do not concern the user of this one, each with the reason. Every
# rank would print them before the first line of a run. They are matched by text, so that a new
# warning is still shown.
_KNOWN: tuple[tuple[type[Warning], str], ...] = (
    # Both packages are optional (see the README). Megatron warns in five modules.
    (UserWarning, r"Transformer Engine and Apex are not installed\. Falling back to "),
    (UserWarning, r"Apex is not installed\. Falling back to Torch Norm"),
    # Megatron's default for a feature that is off here; its own later versions drop the value.
    (UserWarning, r"full scope is deprecated\. Use empty cuda_graph_"),
    # The optimizer's shards are views of parameters, which have no gradient when Megatron reads it.
    (UserWarning, r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed"),
    # Names that torch 2.13 deprecates, called by DeepSpeed and Megatron; versions are pinned.
    (
        FutureWarning,
        r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
    ),
    # An import in Megatron for its own older callers.
    (DeprecationWarning, r"The following imports from `dynamic_context\.py` will be removed"),
)

# Logger and first words of the message.
_KNOWN_LOGS: tuple[tuple[str, str], ...] = (
    # Megatron 0.19 recommends other classes; the ones used here exist in both supported versions.
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("megatron.core.transformer.transformer_layer", "Rewrapping ModuleSpec"),
    ("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel: full_param_"),
    # Nothing is compiled on a CPU.
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
)


@dataclass(frozen=True)
class _Drop(logging.Filter):
    """Drops messages that begin with ``beginning``."""

    beginning: str

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginning)


def silence_known_warnings() -> None:
    """Ignore known warnings for the rest of the process; call it before importing Megatron."""
    for category, message in _KNOWN:
        warnings.filterwarnings("ignore", message=message, category=category)
    for name, beginning in _KNOWN_LOGS:
        logging.getLogger(name).addFilter(_Drop(beginning))  # an equal one is not added again


def hide_unwanted_gpus(environ: MutableMapping[str, str]) -> None:
    """Hide all GPUs where ``DS_ACCELERATOR`` is ``cpu``; call it before anything uses CUDA.

    DeepSpeed alone obeys that variable. torch and Megatron would still take the GPU.

    Args:
        environ: Usually ``os.environ``.
    """
    if environ.get("DS_ACCELERATOR") == "cpu":
        environ["CUDA_VISIBLE_DEVICES"] = ""


def raise_file_limit() -> None:
    """Let this process open as many files and connections as it may; call it at start.

    Every rank has connections to all others in each of its groups, and maps the files of its data.

    Raises:
        ConfigError: It may open too few for any run.
    """
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < _LEAST_FILES:
        raise ConfigError(
            f"this process may have at most {most} files and connections open (ulimit -n), and a "
            f"run needs {_LEAST_FILES} or more. Raise the limit of the shell or the job."
        )
    wanted = _MOST_FILES if most == resource.RLIM_INFINITY else min(most, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def use_one_hardware_queue(environ: MutableMapping[str, str]) -> None:
    """Ask CUDA for one hardware queue unless the user chose; call it before anything uses CUDA.

    Megatron overlaps tensor-parallel communication with products by the order in which kernels are
    launched, and only one queue keeps that order.

    Args:
        environ: Usually ``os.environ``.
    """
    environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def require_determinism(environ: MutableMapping[str, str], *, started: bool) -> None:
    """Allow only kernels and collectives with the same result in every run, on a GPU.

    torch's deterministic mode has a deterministic backward pass for flash and memory-efficient
    attention; cuDNN's attention has none and is turned off. Values of the user's stay.

    Args:
        environ: Usually ``os.environ``.
        started: Whether CUDA or NCCL may have read the environment already.

    Raises:
        RuntimeMismatch: A variable is missing, and it is too late to set it.
    """
    import torch

    missing = {name: value for name, value in _DETERMINISTIC.items() if name not in environ}
    if started and missing:
        settings = " ".join(f"{name}={value}" for name, value in missing.items())
        raise RuntimeMismatch(
            "training.deterministic is true, but this process has started CUDA or NCCL already, "
            f"which read their settings only then. Start it with {settings}."
        )
    environ.update(missing)
    # The fills would cost a kernel for every new tensor. Nothing here reads memory it has not
    # written.
    filling: Any = torch.utils.deterministic
    filling.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_cudnn_sdp(False)


def start_distributed(
    *,
    timeout: timedelta,
    deterministic: bool = False,
    join_timeout: timedelta | None = None,
) -> RankInfo:
    """Join the job: find the rank, select the accelerator, initialise ``deepspeed.comm``.

    If torch.distributed is already initialised, its world is the job, and the current device stays
    as it is. Without an accelerator, or with ``DS_ACCELERATOR=cpu``, this also installs the CPU
    seam.

    Args:
        timeout: Time limit of collectives of the default group.
        deterministic: Call `require_determinism` where there is a GPU.
        join_timeout: Time within which all ranks must call it; by default ``timeout``. Ranks start
            at different speeds, where many read the same packages.

    Returns:
        This process's rank and the size of the job.

    Raises:
        RuntimeMismatch: ``DS_ACCELERATOR`` is ``cpu``, but this process already uses CUDA; or see
            `require_determinism`.
        SyncError: Not all ranks have joined in time. The message names them.

    Collectives: a rendezvous at MASTER_ADDR:MASTER_PORT; every rank of the job must call it.
    """
    import torch

    joined = torch.distributed.is_initialized()
    if joined:
        ranks = _ranks_of_default_group()
    else:
        ranks = discover_ranks(os.environ)
        os.environ.update(ranks.environment())
    hide_unwanted_gpus(os.environ)
    on_gpu = torch.cuda.is_available()
    if on_gpu and os.environ.get("DS_ACCELERATOR") == "cpu":
        raise RuntimeMismatch(
            "DS_ACCELERATOR is cpu, but this process has used CUDA already, so its GPU cannot be "
            "hidden any more. Start it with CUDA_VISIBLE_DEVICES='' as well, or unset "
            "DS_ACCELERATOR."
        )
    if on_gpu and deterministic:
        require_determinism(os.environ, started=joined or torch.cuda.is_initialized())
    if on_gpu and not joined:
        # A scheduler that binds one device to each task leaves only ordinal 0 visible.
        torch.cuda.set_device(ranks.local_rank if torch.cuda.device_count() > 1 else 0)
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        threads = max(1, (os.cpu_count() or 1) // ranks.local_world_size)
        torch.set_num_threads(thread_count(os.environ, threads))
    silence_known_warnings()

    import deepspeed
    import deepspeed.ops

    # DeepSpeed would compile a shared-memory operator on its first start on a CPU: a minute or
    # more, and a crash without a compiler, for something that only inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not on_gpu:
        from megatron_muloco.runtime.accelerator import enable_cpu_backend

        enable_cpu_backend()
    backend = "nccl" if on_gpu else "gloo"
    if not joined:
        _meet(ranks, backend, timeout, join_timeout or timeout)
    deepspeed.init_distributed(
        dist_backend=backend,
        auto_mpi_discovery=False,
        timeout=timeout,
        verbose=False,
    )
    return ranks


def _ranks_of_default_group() -> RankInfo:
    """Return this process's rank in the default group that the caller has initialised."""
    import torch

    return RankInfo(
        source="torch",
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        master_addr=os.environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=int(os.environ.get("MASTER_PORT", "0")),
    )


def _meet(ranks: RankInfo, backend: str, timeout: timedelta, join_timeout: timedelta) -> None:
    """Initialise torch.distributed, which ``deepspeed.comm`` then adopts.

    DeepSpeed would bind the default group to the device of ``LOCAL_RANK``. That device does not
    exist where a scheduler shows each task one GPU, and every later ``new_group`` of a bound group
    splits the communicator of the whole job.
    """
    import torch

    torch.distributed.init_process_group(
        backend,
        store=_rendezvous(ranks, join_timeout),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timeout,
    )


def _rendezvous(ranks: RankInfo, timeout: timedelta) -> Any:
    """Return the job's store; ``None`` where a torchrun agent holds it, which torch then finds.

    torch would listen on all interfaces of rank 0's machine. Whoever reaches the store can stop the
    job through it, so it listens on the interface of MASTER_ADDR alone where that is known.

    Raises:
        SyncError: Not all ranks have joined within the limit. The message names them.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__

    if ranks.source == "single":
        # A port that the operating system picks: a fixed one would collide with another
        # single-process run on the same machine.
        listener = _listener("127.0.0.1", 0)
        port = listener.getsockname()[1]
        return TCPStore(
            "127.0.0.1",
            port,
            1,
            is_master=True,
            timeout=timeout,
            master_listen_fd=listener.detach(),
        )
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    options: dict[str, Any] = {"wait_for_workers": False, "timeout": timeout}
    if ranks.rank == 0:
        address = listening_address(ranks)
        if address:
            options["master_listen_fd"] = _listener(address, ranks.master_port).detach()
    store = TCPStore(
        ranks.master_addr, ranks.master_port, ranks.world_size, ranks.rank == 0, **options
    )
    _await_all(store, ranks, timeout)
    return store


def listening_address(ranks: RankInfo) -> str:
    """Return the address on which rank 0's store listens; empty for all interfaces.

    It is the one that MASTER_ADDR resolves to. On several machines that must not be a loopback
    address: a host name in /etc/hosts often is one on its own machine, while other machines resolve
    it to the address of the network.
    """
    try:
        found = socket.getaddrinfo(ranks.master_addr, None, type=socket.SOCK_STREAM)
    except OSError:
        return ""
    address = str(found[0][4][0])
    local = ranks.local_world_size == ranks.world_size or ranks.master_addr in _LOOPBACK_NAMES
    if not local and ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return ""
    try:  # the address may be that of a router in front of this machine
        _listener(address, 0).close()
    except OSError:
        return ""
    return address


def _listener(address: str, port: int) -> socket.socket:
    """Return a socket that is bound to one address, for torch to listen on."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((address, port))
    except OSError:
        bound.close()
        raise
    return bound


def _await_all(store: Any, ranks: RankInfo, timeout: timedelta) -> None:
    """Return when all ranks have called it.

    Raises:
        SyncError: Some have not within the limit. The message names them.
    """
    keys = [f"muloco-joined/{rank}" for rank in range(ranks.world_size)]
    store.set(keys[ranks.rank], "1")
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:
        late = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise SyncError(
            f"ranks {late} of {ranks.world_size} have not joined the job at {ranks.master_addr}:"
            f"{ranks.master_port} within {timeout.total_seconds() / 60:g} minutes "
            "(training.control_timeout_minutes). They were not started, have ended or are "
            "frozen. Look for their first messages, and start all ranks again."
        ) from error


def shutdown(control: "ProcessGroup") -> None:
    """Leave the job after a clean end.

    Args:
        control: `Groups.control`.

    Never call it while an error propagates: the barrier would wait for ranks that have failed.

    Collectives: a barrier over the job; every rank calls it.
    """
    import torch

    from megatron_muloco.comm.collectives import barrier

    if torch.distributed.is_initialized():
        barrier(control)
        torch.distributed.destroy_process_group()
