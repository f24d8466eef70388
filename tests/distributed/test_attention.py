"""Attention backends inside the real model, on real ranks: losses, gradients, and memory."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from megatron_muloco.config import RunConfig
from megatron_muloco.training.forward import ForwardBackward
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal
from tests.support.tiny_models import finish_tiny, start_tiny, tiny_config

LENGTH = 96
END = 7  # an ordinary token of the made-up samples: about every 60th ends a document
NO_OUTER = {"kind": "none"}


def config(
    impl: str, *, batch: int = 2, heads: int = 4, groups: int = 2, length: int = LENGTH, **more: Any
) -> RunConfig:
    """Return a run of one microbatch per step, in fp32."""
    model = {
        "attention_impl": impl,
        "seq_length": length,
        "num_attention_heads": heads,
        "num_query_groups": groups,
    }
    training = {"micro_batch_size": batch, "global_batch_size": 2 * batch, **more.pop("train", {})}
    return tiny_config(model=model, training=training, outer=NO_OUTER, **more)


class LargestTensor(TorchDispatchMode):
    """Keeps the largest number of elements of a tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    @override
    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and look at its results."""
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return result


def _pass(config: RunConfig) -> dict[str, Any]:
    """Return loss, gradients and the largest tensor of forward and backward of one step."""
    run = start_tiny(config)
    forward = ForwardBackward(
        run.model,
        run.groups,
        micro_batch_size=config.training.micro_batch_size,
        seq_length=config.model.seq_length,
        end_of_document=END,
    )
    given: list[tuple[bool, ...]] = []

    def note(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        tokens, positions, _documents = arguments
        given.append(tuple(each is not None for each in (tokens, positions, named["labels"])))

    run.model.register_forward_pre_hook(note, with_kwargs=True)
    run.model.zero_grad_buffer()
    samples = run.assignment(1, run.groups, config)
    batches = list(run.batches(samples))
    with LargestTensor() as largest:
        loss = forward(iter(batches), len(batches))
    gradients = {name: p.main_grad.clone() for name, p in run.model.module.named_parameters()}
    finish_tiny()
    return {"loss": loss, "gradients": gradients, "largest": largest.numel, "given": given}


def _passes(*configs: RunConfig) -> list[dict[str, Any]]:
    return [_pass(each) for each in configs]


SEQUENCE = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
# Attention differs by less than this (tests/unit/test_attention.py). Each gradient is a sum over
# up to 384 tokens, in which such differences do not add up.
RELATIVE = 1e-6


@pytest.mark.parametrize(
    ("parallel", "groups", "batch"),
    [
        ({}, 4, 1),
        ({}, 2, 4),
        ({"tensor_model_parallel_size": 2}, 4, 4),
        ({"tensor_model_parallel_size": 2}, 2, 1),
        (SEQUENCE, 2, 2),
        ({"pipeline_model_parallel_size": 2}, 2, 2),
    ],
    ids=["tp1 mha", "tp1 gqa", "tp2 mha", "tp2 gqa", "tp2 sequence", "pp2"],
)
def test_a_step_with_packed_documents_is_one_with_the_mask(
    parallel: dict[str, Any], groups: int, batch: int
) -> None:
    dense, packed = (
        config(impl, groups=groups, batch=batch, parallel=parallel) for impl in ("dense", "varlen")
    )
    for one, two in run_ranks(_passes, 2 if parallel else 1, dense, packed):
        torch.testing.assert_close(two["loss"], one["loss"], rtol=RELATIVE, atol=0)
        assert two["gradients"].keys() == one["gradients"].keys()
        for name, gradient in one["gradients"].items():
            assert (two["gradients"][name] - gradient).norm() <= RELATIVE * gradient.norm(), name


@pytest.mark.parametrize("batch", [1, 4])
def test_no_tensor_has_an_element_for_each_pair_of_positions(batch: int) -> None:
    """Every result of forward and backward is looked at; with the mask there is such a tensor."""
    length = 512  # so that b * s * 96, the MLP's gate and up, has fewer elements than s * s
    configs = [config(impl, batch=batch, length=length) for impl in ("dense", "varlen")]
    ((dense, packed),) = run_ranks(_passes, 1, *configs)
    assert dense["largest"] >= batch * length**2
    assert packed["largest"] < length**2


def test_recomputed_attention_gets_the_same_documents() -> None:
    selective = {"recompute_granularity": "selective"}
    full = {"recompute_granularity": "full", "recompute_num_layers": 1}
    configs = [config("varlen", train=again) for again in ({}, selective, full)]
    ((kept, *recomputed),) = run_ranks(_passes, 1, *configs)
    for other in recomputed:
        assert_equal(other["loss"], kept["loss"])
        for name, gradient in kept["gradients"].items():
            assert_equal(other["gradients"][name], gradient, name)


def test_a_stage_gets_only_the_tensors_that_it_needs() -> None:
    """Tokens go to the first stage, labels to the last, positions to none."""
    stages = run_ranks(_pass, 2, config("dense", parallel={"pipeline_model_parallel_size": 2}))
    assert [each["given"] for each in stages] == [
        [(True, False, False)] * 2,
        [(False, False, True)] * 2,
    ]
