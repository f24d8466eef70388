"""The harness itself: ranks meet, leave nothing behind, and fail with a readable message."""

import os
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist

from tests.support.spawn import RankFailure, run_ranks


def sum_of_ranks(scale: int) -> float:
    import deepspeed.comm

    total = torch.tensor(float(dist.get_rank() * scale))
    deepspeed.comm.all_reduce(total)
    return total.item()


def rank_environment() -> tuple[str, ...]:
    return tuple(os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"no luck on {rank}")
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(600)


def set_variable() -> None:
    os.environ["LEFT_BEHIND"] = "1"
    torch.set_default_dtype(torch.bfloat16)


def left_behind() -> tuple[str | None, torch.dtype]:
    return os.environ.get("LEFT_BEHIND"), torch.get_default_dtype()


def test_results_come_in_rank_order() -> None:
    assert run_ranks(rank_environment, 2) == [("0", "0", "2"), ("1", "1", "2")]


def test_workers_serve_many_calls_of_several_sizes() -> None:
    for call in range(20):
        world_size = 1 + call % 3
        ranks_sum = world_size * (world_size - 1) / 2
        assert run_ranks(partial(sum_of_ranks, call), world_size) == [ranks_sum * call] * world_size


def test_a_call_leaves_nothing_behind() -> None:
    run_ranks(set_variable, 1)
    assert run_ranks(left_behind, 1) == [(None, torch.float32)]


def test_the_failing_rank_is_named_with_its_traceback() -> None:
    with pytest.raises(
        RankFailure, match=r"rank 1 of 2 failed[\s\S]*in fail_on[\s\S]*no luck on 1"
    ):
        run_ranks(fail_on, 2, 1)
    assert run_ranks(sum_of_ranks, 2, 3) == [3.0, 3.0]


def test_a_dead_rank_is_named_with_its_exit_code() -> None:
    with pytest.raises(RankFailure, match=r"rank 1 of 2 failed[\s\S]*exit code 7"):
        run_ranks(die_on, 2, 1)


def test_a_hung_rank_shows_its_stack() -> None:
    with pytest.raises(RankFailure, match=r"ranks \[0\] of 1 did not finish[\s\S]*in hang_on"):
        run_ranks(hang_on, 1, 0, timeout_s=2)


def test_a_nested_function_is_refused_with_the_reason() -> None:
    with pytest.raises(TypeError, match="top level of a test module"):
        run_ranks(lambda: None, 1)
