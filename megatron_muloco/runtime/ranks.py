"""Rank discovery from the environment: a launcher, else SLURM, else MPI, else a single process.

No torch here: the rank is needed before anything heavy is imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_muloco.errors import ConfigError

__all__ = ["RankInfo", "discover_ranks", "thread_count"]

# (source, rank, world size, local rank, local world size), in the order of trust. The deepspeed
# launcher and torchrun both set the first; a launcher's answer is more specific than the
# scheduler's.
_SOURCES = (
    ("launcher", "RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    ("slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ("SLURM_NTASKS_PER_NODE",)),
    (
        "mpi",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
)
# A rendezvous port outside the range that Linux hands out for outgoing connections (32768-60999).
_DEFAULT_PORT = 29500
_PORTS = (0, 2**16 - 1)  # 0 lets the operating system choose


@dataclass(frozen=True, slots=True)
class RankInfo:
    """This process's rank and the address of the job's rendezvous.

    Attributes:
        source: Origin of the values: ``launcher``, ``slurm``, ``mpi``, ``single`` or ``torch``.
        rank: Rank in the job.
        world_size: Number of ranks in the job.
        local_rank: Rank on this node.
        local_world_size: Number of ranks on this node.
        master_addr: Host of the rendezvous.
        master_port: Port of the rendezvous; 0 where there is none.
    """

    source: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int

    def environment(self) -> dict[str, str]:
        """Return the variables that torch and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def discover_ranks(environ: Mapping[str, str]) -> RankInfo:
    """Return this process's rank from the environment of the launcher, SLURM or MPI.

    Args:
        environ: Usually ``os.environ``.

    Raises:
        ConfigError: A source gives a rank without a world size or outside of it, several ranks have
            no ``MASTER_ADDR``, or a value is not a number.
    """
    for source, rank_key, world_key, local_key, local_world_keys in _SOURCES:
        if rank_key not in environ:
            continue
        if source == "slurm" and "SLURM_STEP_ID" not in environ:
            continue  # inside an allocation, but not started by srun: this is one process
        if world_key not in environ:
            raise ConfigError(
                f"{rank_key} is set but {world_key} is not, so the size of the job is unknown; "
                "start the program through deepspeed, torchrun, srun or mpirun"
            )
        rank, world_size = _whole(environ, rank_key), _whole(environ, world_key)
        if rank >= world_size:
            raise ConfigError(
                f"{rank_key} is {rank}, but {world_key} is {world_size}; start the "
                "program through deepspeed, torchrun, srun or mpirun"
            )
        if world_size > 1 and "MASTER_ADDR" not in environ:
            raise ConfigError(
                f"{world_size} ranks were started ({source}) but MASTER_ADDR is not set, so they "
                "cannot connect; export MASTER_ADDR and MASTER_PORT of the first node"
            )
        local_key_found = next((key for key in local_world_keys if key in environ), "")
        return RankInfo(
            source=source,
            rank=rank,
            world_size=world_size,
            local_rank=_whole(environ, local_key, 0),
            local_world_size=_whole(environ, local_key_found, 1, least=1),
            master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
            master_port=_port(environ, _DEFAULT_PORT),
        )
    return RankInfo("single", 0, 1, 0, 1, "127.0.0.1", _port(environ, 0))


def thread_count(environ: Mapping[str, str], default: int) -> int:
    """Return the threads that ``OMP_NUM_THREADS`` asks for.

    It may be a list, one number for each level of nested parallelism; the first is that of torch.

    Raises:
        ConfigError: It is something else.
    """
    first = environ.get("OMP_NUM_THREADS", str(default)).split(",")[0].strip()
    return _whole({"OMP_NUM_THREADS": first}, "OMP_NUM_THREADS", least=1)


def _port(environ: Mapping[str, str], default: int) -> int:
    port = _whole(environ, "MASTER_PORT", default)
    if not _PORTS[0] <= port <= _PORTS[1]:
        raise ConfigError(
            f"the environment variable MASTER_PORT is {port}, and ports end at {_PORTS[1]}; set it "
            "to a free port of the first node, such as 29500"
        )
    return port


def _whole(
    environ: Mapping[str, str], name: str, default: int | None = None, *, least: int = 0
) -> int:
    """Return a variable as a number.

    Raises:
        ConfigError: It is set to something else, or missing without a default.
    """
    text = environ.get(name)
    if text is None and default is not None:
        return default
    # SLURM writes "4(x2)" where two nodes have 4 tasks each, and "4(x2),3" where another has 3.
    number = (text or "").split("(")[0] if name.startswith("SLURM_") else text
    if not number or not (number.isascii() and number.isdecimal()) or int(number) < least:
        wanted = "a whole number" if least == 0 else f"a whole number of at least {least}"
        raise ConfigError(
            f"the environment variable {name} is {text!r}, which is not {wanted}; launchers "
            "and schedulers set it, so start the program through one of them or unset it"
        )
    return int(number)
