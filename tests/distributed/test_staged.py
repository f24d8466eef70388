"""The staged backend of `tools/gpu`: the bits of gloo, and the freedoms that NCCL takes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal
from tools.gpu import staged

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # names that torch 2.13 renames
SIZE, EACH = 4, 6


def _group(name: str, delay: float = 0.0) -> Any:
    staged.register(delay)
    return dist.new_group(list(range(dist.get_world_size())), backend=name)


def _values(numel: int, offset: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * dist.get_rank() + offset)
    return torch.randn(numel, generator=generator)


def _collectives(group: Any) -> dict[str, torch.Tensor]:
    """Call every collective; return what each has written on this rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    found = {name: _values(EACH) for name in ("sum", "max", "broadcast", "reduce", "async")}
    dist.all_reduce(found["sum"], group=group)
    dist.all_reduce(found["max"], op=dist.ReduceOp.MAX, group=group)
    dist.broadcast(found["broadcast"], src=1, group=group)
    dist.reduce(found["reduce"], dst=2, group=group)
    dist.all_reduce(found["async"], group=group, async_op=True).wait()
    found["gathered"] = torch.zeros(EACH * size)
    dist.all_gather_into_tensor(found["gathered"], _values(EACH), group=group)
    listed = [torch.zeros(EACH) for _ in range(size)]
    dist.all_gather(listed, _values(EACH, 1), group=group)
    found["listed"] = torch.stack(listed)
    whole = _values(EACH * size)
    found["own part"] = whole[EACH * rank : EACH * (rank + 1)]  # a view of the source
    dist.reduce_scatter_tensor(found["own part"], whole, group=group)
    found["from list"] = torch.zeros(EACH)
    dist.reduce_scatter(found["from list"], list(_values(EACH * size).split(EACH)), group=group)
    sent = [index + 1 for index in range(size)]
    found["exchanged"] = torch.zeros(size * (rank + 1))
    dist.all_to_all_single(
        found["exchanged"], _values(sum(sent)), [rank + 1] * size, sent, group=group
    )
    parts = [torch.zeros(EACH) for _ in range(size)] if rank == 0 else None
    dist.gather(_values(EACH, 2), parts, dst=0, group=group)
    found["collected"] = torch.stack(parts) if parts else torch.zeros(1)
    found["dealt"] = torch.zeros(EACH)
    dist.scatter(found["dealt"], list(_values(EACH * size).split(EACH)) if rank == 3 else None, 3,
                 group=group)  # fmt: skip
    dist.barrier(group=group)
    return found | _coalesced(group) | _passed_on(group)


def _coalesced(group: Any) -> dict[str, torch.Tensor]:
    size = dist.get_world_size()
    sums = [_values(EACH, each) for each in range(2)]
    with dist._coalescing_manager(group, async_ops=True) as together:
        for each in sums:
            dist.all_reduce(each, group=group)
    together.wait()
    wide = [torch.zeros(EACH * size) for _ in range(2)]
    with dist._coalescing_manager(group):
        for offset, each in enumerate(wide):
            dist.all_gather_into_tensor(each, _values(EACH, offset), group=group)
    narrow = [torch.zeros(EACH) for _ in range(2)]
    with dist._coalescing_manager(group):
        for offset, each in enumerate(narrow):
            dist.reduce_scatter_tensor(each, _values(EACH * size, offset), group=group)
    names = ("coalesced sums", "coalesced gathers", "coalesced parts")
    return {name: torch.stack(each) for name, each in zip(names, (sums, wide, narrow), strict=True)}


def _passed_on(group: Any) -> dict[str, torch.Tensor]:
    """Send around a ring, both ways at once, and more than a socket buffers."""
    rank, size = dist.get_rank(), dist.get_world_size()
    found = {"from left": torch.zeros(1 << 18), "from right": torch.zeros(1 << 18)}
    left, right = (rank - 1) % size, (rank + 1) % size
    for work in dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, _values(1 << 18), right, group),
            dist.P2POp(dist.isend, _values(1 << 18, 1), left, group),
            dist.P2POp(dist.irecv, found["from right"], right, group),
            dist.P2POp(dist.irecv, found["from left"], left, group),
        ]
    ):
        work.wait()
    return found


def _both() -> list[str]:
    expected = _collectives(_group("gloo"))
    found = _collectives(_group(staged.NAME))
    for name, tensor in expected.items():
        assert_equal(found[name], tensor, name)
    return list(found)


def test_every_collective_has_the_bits_of_gloo() -> None:
    names = run_ranks(_both, SIZE)
    assert all(each == names[0] for each in names)
    assert len(names[0]) == 17


def _overwritten_early() -> tuple[bool, bool]:
    group = _group(staged.NAME, delay=0.2)
    waited, overwritten = torch.ones(4), torch.ones(4)
    dist.all_reduce(waited, group=group, async_op=True).wait()
    work = dist.all_reduce(overwritten, group=group, async_op=True)
    overwritten.fill_(5)
    work.wait()
    return bool((waited == 2).all()), bool((overwritten == 2).all())


def test_a_source_that_is_overwritten_before_the_wait_changes_the_result() -> None:
    assert run_ranks(_overwritten_early, 2) == [(True, False)] * 2


def _wrong_length() -> str:
    group = _group(staged.NAME)
    work = dist.all_gather_into_tensor(torch.zeros(3), torch.ones(2), group=group, async_op=True)
    with pytest.raises((RuntimeError, ValueError)) as caught:
        work.wait()
    return str(caught.value)


def test_what_goes_wrong_is_raised_by_the_wait() -> None:
    assert all(run_ranks(_wrong_length, 2))


def _strided() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        dist.all_reduce(torch.ones(4, 4).t(), group=_group(staged.NAME))


def test_strided_tensors_are_refused_as_by_nccl() -> None:
    run_ranks(_strided, 1)


def _objects() -> tuple[list[int], str]:
    group = _group(staged.NAME)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dist.get_rank(), group=group)
    return everyone, dist.get_backend(group)


def test_objects_are_gathered() -> None:
    assert run_ranks(_objects, 2) == [([0, 1], staged.NAME)] * 2
