"""Model passes: `ForwardBackward` for training, `evaluate` and `generate` for the anchor.

`ForwardBackward` runs the microbatches of one inner step through Megatron's pipeline schedules. The
loss on held-out data and the generated sample come from the anchor, which `anchor_in_place` loads
into the model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_muloco.comm.collectives import sum_over
from megatron_muloco.comm.groups import Groups
from megatron_muloco.comm.reducers import OuterGroup
from megatron_muloco.data.batches import BatchSource, document_ids, read_ahead
from megatron_muloco.data.sampler import share
from megatron_muloco.model.attention import SequenceSlice, attention_of
from megatron_muloco.training.replica_optimizer import ReplicaOptimizer

__all__ = ["ForwardBackward", "anchor_in_place", "evaluate", "generate"]

Batch = Mapping[str, Tensor]


def _mean_loss(losses: Tensor, *, context: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean loss per token of a microbatch, to differentiate and to report.

    All microbatches have the same number of tokens, so Megatron's mean over microbatches is also
    the mean over tokens. Each of the context-parallel ranks adds its share of the sequence's mean:
    the schedule multiplies the loss by their number, and gradients are averaged over dp x cp.
    """
    loss = losses.float().mean() / context
    # Report a copy, because the schedule divides `loss` in place by the number of microbatches.
    return loss, {"lm loss": loss.detach().clone()}


class ForwardBackward:
    """Runs the microbatches of one step through this rank's pipeline stage.

    Args:
        model: This rank's pipeline stage, wrapped for data parallelism, or bare where no gradient
            is asked for.
        groups: This rank's process groups.
        micro_batch_size: Sequences per microbatch.
        seq_length: Tokens per sequence.
        end_of_document: Token that ends a document; attention does not cross it. With ``None``
            attention covers the whole sequence.
    """

    def __init__(
        self,
        model: DistributedDataParallel | GPTModel,
        groups: Groups,
        *,
        micro_batch_size: int,
        seq_length: int,
        end_of_document: int | None,
    ) -> None:
        self._model = model
        self._groups = groups
        self._micro_batch_size = micro_batch_size
        self._seq_length = seq_length
        self._end_of_document = end_of_document
        self._attention = attention_of(model)
        self._schedule = get_forward_backward_func_for(groups)
        self.device = next(model.parameters()).device
        self._loss = partial(_mean_loss, context=groups.topology.context)
        self._slice = None
        if groups.topology.context > 1:
            self._slice = SequenceSlice(
                seq_length, rank=groups.coords.cp, size=groups.topology.context
            )

    def __call__(
        self, batches: Iterator[Batch], num_microbatches: int, *, forward_only: bool = False
    ) -> Tensor:
        """Return the sum of this rank's microbatch losses; otherwise as `losses`."""
        return self.losses(batches, num_microbatches, forward_only=forward_only).sum()

    def losses(
        self, batches: Iterator[Batch], num_microbatches: int, *, forward_only: bool = False
    ) -> Tensor:
        """Return this rank's microbatch losses, fp32 on the training device.

        They are zeros on all pipeline stages but the last; those of context-parallel ranks add up
        to the loss of the sequences. Unless ``forward_only``, gradients have been accumulated and
        reduced over the replica's data-parallel group when it returns.

        Shapes: [num_microbatches].
        Collectives: tensor, pipeline and data parallel ones of this replica. Every rank of the
        replica must call it with the same ``num_microbatches``.
        """
        if self.device.type == "cuda":
            batches = read_ahead(batches, ("tokens", "labels"))
        losses = self._schedule(
            forward_step_func=self._forward_step,
            data_iterator=batches,
            model=[self._model],
            num_microbatches=num_microbatches,
            seq_length=self._seq_length,
            micro_batch_size=self._micro_batch_size,
            forward_only=forward_only,
        )
        if not losses:
            return torch.zeros(num_microbatches, device=self.device)
        return torch.stack([entry["lm loss"] for entry in losses])

    def _forward_step(
        self, batches: Iterator[Batch], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]]:
        """Take one microbatch; return the output and the loss function, as Megatron expects."""
        batch = next(batches)
        ids = documents = None
        if self._end_of_document is not None:
            ids = document_ids(batch["tokens"], self._end_of_document)
        # The attention mask of Megatron: it goes to every layer, also when that is recomputed.
        if self._slice is not None:
            documents = self._slice.mask(ids).to(self.device, non_blocking=True)
            batch = self._slice.take(batch)
        elif ids is not None:
            documents = self._attention.documents(ids, self.device)
        tokens = labels = None
        if self._groups.on_first_stage:
            tokens = batch["tokens"].to(self.device, non_blocking=True)
        if self._groups.on_last_stage:
            labels = batch["labels"].to(self.device, non_blocking=True)
        # Positions are rotary, which Megatron computes from the length alone.
        output = model(tokens, None, documents, labels=labels)
        return output, self._loss


def get_forward_backward_func_for(groups: Groups) -> Callable[..., list[dict[str, Any]]]:
    """Return Megatron's schedule for this pipeline, bound to this replica's groups."""
    pipeline = groups.topology.pipeline
    schedule = get_forward_backward_func(vp_size=None, pp_size=pipeline)
    if pipeline == 1:
        return partial(schedule, pg_collection=groups.pg)

    def pipelined(*, model: list[Any], **kwargs: Any) -> list[dict[str, Any]]:
        communicator = P2PCommunicator(pp_group=groups.pg.pp, config=model[0].config)
        return schedule(  # type: ignore[no-any-return]
            model=model, p2p_communicator=communicator, pg_collection=groups.pg, **kwargs
        )

    return pipelined


# ---- evaluation of the anchor ------------------------------------------------------------


@contextmanager
def anchor_in_place(optimizer: ReplicaOptimizer) -> Iterator[None]:
    """Load the anchor into the model; restore the local parameters bit for bit on exit.

    Without an outer step the local parameters are the anchor.

    Collectives: parameter gathers inside the replica; all its ranks enter and leave together.
    """
    with ExitStack() as stack:
        stack.enter_context(optimizer.view.gathered())
        if optimizer.synchronizer is not None:
            stack.enter_context(optimizer.synchronizer.anchor_loaded())
        yield


@torch.no_grad()
def evaluate(
    forward: ForwardBackward,
    optimizer: ReplicaOptimizer | None,
    source: BatchSource,
    groups: Groups,
    *,
    steps: int,
) -> float:
    """Return the anchor's mean loss in nats per token over the first ``steps`` held-out batches.

    Without an optimizer the model has to hold the anchor already.

    All replicas hold the same anchor (the digest checks it), so each makes a share of the forward
    passes, and all get the same loss. It has the same bits for any number of replicas.

    Collectives: those of forward passes inside the replica, one all-reduce of 4 bytes per forward
    pass of a rank over the outer group, and one of 8 bytes over the replica. Every rank of the job
    calls it.
    """
    count = source.layout.at(1).num_microbatches
    mine = share(steps * count, groups.coords.replica, groups.topology.num_replicas)
    losses = torch.zeros(steps * count, device=forward.device)
    if mine:
        batches = (source.microbatch(1 + each // count, each % count) for each in mine)
        with nullcontext() if optimizer is None else anchor_in_place(optimizer):
            losses[mine.start : mine.stop] = forward.losses(batches, len(mine), forward_only=True)
    # Every loss is added to zeros of the other replicas, which is exact. Then they are added in
    # fp32, within each batch and over batches: an order that does not depend on the replicas.
    OuterGroup(groups.outer, forward.device).wire.all_reduce(losses).wait()
    by_batch = (batch.sum() for batch in losses.view(steps, count))
    total = sum(by_batch, start=torch.zeros((), device=forward.device))
    is_primary = groups.on_last_stage and groups.coords.tp == 0
    sums = (total if is_primary else torch.zeros_like(total)).double()
    return float(sum_over(groups.replica, sums)) / (groups.topology.data * count * steps)


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
    top_p: float = 1.0,
    end: int | None = None,
) -> list[int]:
    """Return ``length`` tokens sampled from the model after ``prompt``, one forward pass per token.

    The model must be one pipeline stage. All tensor-parallel ranks draw the same tokens.

    Args:
        model: The model with the weights to sample from.
        prompt: At least one token.
        length: Number of tokens to sample.
        window: Maximum input length, in tokens.
        vocab_size: Number of tokens of the tokenizer; the padding of the vocabulary is never drawn.
        temperature: Divisor of the logits; 0 takes the most probable token (greedy).
        seed: Seed of the random draws.
        top_p: Draw from the most probable tokens that together have at least this probability.
        end: Token after which no more are sampled; ``None`` for none.

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
        tokens.append(_draw(last, temperature, top_p, generator))
        if tokens[-1] == end:
            break
    return tokens[len(prompt) :]


def _draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Return a token drawn from the logits [vocab_size] of one position."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / temperature, 0)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        # A token stays if those before it do not yet have the probability; the first always does.
        left_out = ordered.cumsum(0) - ordered >= top_p
        probabilities[order[left_out]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _padded(tokens: list[int], window: int) -> list[int]:
    """Pad to ``window``; causal attention masks the padding for the last real position."""
    return tokens + [0] * (window - len(tokens))
