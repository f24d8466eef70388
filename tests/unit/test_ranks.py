"""Which rank a process is: launcher, then SLURM, then MPI, then alone."""

import subprocess
import sys

import pytest

from megatron_muloco.errors import ConfigError
from megatron_muloco.runtime.ranks import RankInfo, discover_ranks, thread_count

MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "29511"}
LAUNCHER = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS_PER_NODE": "4(x4)",
    "SLURM_STEP_ID": "0",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}
SOURCES = {
    "launcher": (LAUNCHER, RankInfo("launcher", 3, 8, 1, 2, "node1", 29511)),
    "slurm": (SLURM, RankInfo("slurm", 5, 16, 1, 4, "node1", 29511)),
    "mpi": (MPI, RankInfo("mpi", 2, 4, 0, 1, "node1", 29511)),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_is_understood(source: str) -> None:
    variables, expected = SOURCES[source]
    assert discover_ranks(variables | MEETING) == expected


def test_the_more_specific_source_wins() -> None:
    assert discover_ranks(LAUNCHER | SLURM | MPI | MEETING).source == "launcher"
    assert discover_ranks(SLURM | MPI | MEETING).source == "slurm"


def test_inside_an_allocation_but_not_started_by_srun_is_alone() -> None:
    variables = {k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}
    assert discover_ranks(variables) == RankInfo("single", 0, 1, 0, 1, "127.0.0.1", 0)


def test_torchruns_local_world_size_is_understood() -> None:
    variables = {k: v for k, v in LAUNCHER.items() if k != "LOCAL_SIZE"}
    ranks = discover_ranks(variables | MEETING | {"LOCAL_WORLD_SIZE": "4"})
    assert ranks.local_world_size == 4


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_found_can_be_read_again_by_torch_and_deepspeed(source: str) -> None:
    ranks = SOURCES[source][1]
    again = discover_ranks(ranks.environment())
    assert (again.rank, again.world_size, again.local_rank, again.local_world_size) == (
        ranks.rank,
        ranks.world_size,
        ranks.local_rank,
        ranks.local_world_size,
    )


BROKEN = {
    "no-world": ({"RANK": "0"}, "WORLD_SIZE is not"),
    "no-meeting": (LAUNCHER, "MASTER_ADDR is not set"),
    "no-number": (LAUNCHER | MEETING | {"RANK": "zero"}, "RANK is 'zero', which is not a whole"),
    "negative": (LAUNCHER | MEETING | {"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
    "no-port": (LAUNCHER | MEETING | {"MASTER_PORT": ""}, "MASTER_PORT is ''"),
    "outside": (LAUNCHER | MEETING | {"RANK": "8"}, "RANK is 8, but WORLD_SIZE is 8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_environment_is_explained(case: str) -> None:
    variables, expected = BROKEN[case]
    with pytest.raises(ConfigError, match=expected):
        discover_ranks(variables)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LOCAL_SIZE", "two"),
        ("LOCAL_SIZE", "0"),
        ("LOCAL_WORLD_SIZE", ""),
        ("MASTER_PORT", "65536"),
        ("MASTER_PORT", "-1"),
        ("MASTER_PORT", "29500.0"),
        ("MASTER_PORT", "２９５００"),  # digits of another script
        ("RANK", "1e3"),
    ],
)
def test_odd_values_of_a_launcher_are_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"the environment variable {name} is"):
        discover_ranks(LAUNCHER | MEETING | {name: value})


@pytest.mark.parametrize("value", ["", "four", "(x2)", "0"])
def test_odd_values_of_slurm_are_named(value: str) -> None:
    with pytest.raises(ConfigError, match="SLURM_NTASKS_PER_NODE is"):
        discover_ranks(SLURM | MEETING | {"SLURM_NTASKS_PER_NODE": value})


def test_threads_are_a_number_or_a_list_of_them() -> None:
    assert thread_count({}, 3) == 3
    assert thread_count({"OMP_NUM_THREADS": "4"}, 3) == 4
    assert thread_count({"OMP_NUM_THREADS": "4,2"}, 3) == 4
    for value in ("", "many", "0", "-1", ",4"):
        with pytest.raises(ConfigError, match="OMP_NUM_THREADS is"):
            thread_count({"OMP_NUM_THREADS": value}, 3)


def test_limit_of_open_files_is_raised_or_refused() -> None:
    script = """if True:
        import resource, sys
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
        from megatron_muloco.runtime.distributed import raise_file_limit
        raise_file_limit()
        print(resource.getrlimit(resource.RLIMIT_NOFILE))
    """

    def limited(soft: int, most: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, str(soft), str(most)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    assert limited(40, 512).stdout.strip() == "(512, 512)"
    assert "at most 40 files and connections open (ulimit -n)" in limited(40, 40).stderr
