"""Loss of the anchor on held-out text, and a sample of what it writes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_muloco.comm.groups import Groups
from megatron_muloco.data.batches import BatchSource
from megatron_muloco.training.forward import ForwardBackward
from megatron_muloco.training.replica_optimizer import ReplicaOptimizer

__all__ = ["anchor_in_place", "evaluate", "generate"]


@contextmanager
def anchor_in_place(optimizer: ReplicaOptimizer) -> Iterator[None]:
    """Let the model hold the anchor; local parameters come back bit for bit.

    Without an outer step the anchor is the model itself.

    Collectives: parameter gathers inside the replica; every rank of it enters and leaves together.
    """
    with ExitStack() as stack:
        stack.enter_context(optimizer.view.gathered())
        if optimizer.synchronizer is not None:
            stack.enter_context(optimizer.synchronizer.anchor_loaded())
        yield


@torch.no_grad()
def evaluate(
    forward: ForwardBackward,
    optimizer: ReplicaOptimizer,
    source: BatchSource,
    groups: Groups,
    *,
    steps: int,
) -> float:
    """Return the anchor's mean loss in nats per token over the first ``steps`` held-out batches.

    Every replica reads the same samples and gets the same number: replicas wait for each other at
    the next outer step anyway, and a difference would show at once that their anchors differ.

    Collectives: those of forward passes inside the replica, and one all-reduce over it.
    """
    count = source.layout.num_microbatches
    with anchor_in_place(optimizer):
        total = sum(
            (
                forward(
                    (source.microbatch(step, index) for index in range(count)),
                    count,
                    forward_only=True,
                )
                for step in range(1, steps + 1)
            ),
            start=torch.zeros((), device=forward.device),
        )
    speaks = groups.on_last_stage and groups.coords.tp == 0 and groups.coords.cp == 0
    sums = (total if speaks else torch.zeros_like(total)).double()
    torch.distributed.all_reduce(sums, group=groups.replica)
    return float(sums) / (groups.topology.data * count * steps)


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    prompt: list[int],
    *,
    length: int,
    window: int,
    vocab_size: int,
    temperature: float,
    seed: int,
) -> list[int]:
    """Return ``length`` tokens drawn from the model after ``prompt``, one forward pass each.

    For one pipeline stage. All tensor-parallel ranks draw the same tokens.

    Args:
        model: The stage, holding the weights to sample from.
        prompt: At least one token.
        length: Tokens to draw.
        window: Longest input, in tokens.
        vocab_size: Tokens of the tokenizer; padding beyond them is never drawn.
        temperature: Divides the logits.
        seed: Of the draws.

    Collectives: tensor-parallel ones of each forward pass.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(length):
        context = torch.tensor([_padded(tokens[-window:], window)], device=device)
        positions = torch.arange(window, device=device).unsqueeze(0)
        logits = gather_from_tensor_model_parallel_region(model(context, positions, None))
        last: Tensor = logits[0, min(len(tokens), window) - 1, :vocab_size].float().cpu()
        draw = torch.multinomial(torch.softmax(last / temperature, 0), 1, generator=generator)
        tokens.append(int(draw))
    return tokens[len(prompt) :]


def _padded(tokens: list[int], window: int) -> list[int]:
    """Fill up to ``window``; causal attention hides what follows the last real position."""
    return tokens + [0] * (window - len(tokens))
