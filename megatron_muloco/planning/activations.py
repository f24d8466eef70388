"""Bytes of activations: what one pipeline stage keeps between forward and backward.

Autograd keeps the inputs of norms and products, and what attention and SwiGLU need for their own
gradients. A layer without recompute, fused norms, b sequences of s tokens, e bytes a value::

    x ->  norm  -> qkv -> q/k norm -> rope -> attention -> proj -> norm -> + x
          x        x'     r           q, k     v, o, lse    (o)     y
      ->  norm  -> fc1 -> SwiGLU -> fc2 -> norm -> + x
          x        x'     4 f       f      y

``x``, ``x'`` and ``y`` have s b h values, divided by tp where `parallel.sequence_parallel` is on.
Attention and SwiGLU have values of this rank's heads and columns, over the whole sequence. ``v`` is
a view, so the whole output of ``qkv`` stays. SwiGLU keeps gate and up, silu(gate), and a copy of
up, because Megatron adds its offset to it (0 here). Fused, it keeps gate and up only, ``2 f``. A
plan takes it as fused on accelerators with `training.fusions: auto`; where nothing can be compiled,
the run needs more than that.

With context parallelism s is s/c, but attention keeps the keys and values of whole sequences, in
one tensor, and in the place of ``k`` and ``v``; its mask has b s^2/c values.

With dense document masks (`attention_has_a_mask`), every layer also keeps the mask in the dtype of
the queries, as torch's attention wants it: b s^2 values. Full recompute keeps the input of each
recomputed layer or chunk; selective recompute drops what attention itself kept.

Under 1F1B, stage p of P holds the activations of P - p microbatches, or of all microbatches where
there are fewer. The last stage holds one: there the logits exist once.

Source: read in megatron-core 0.16.1 and torch 2.13. Tests count the storages that autograd saves.
"""

import math
from dataclasses import dataclass, fields, replace

from megatron_muloco.config.derived import (
    attention_has_a_mask,
    derive,
    padded_vocab_size,
    stage_layers,
)
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.planning.layout import BYTES
from megatron_muloco.topology import Topology

__all__ = ["Activations", "LayerBytes", "stage_activations"]

_FP32 = 4
_INDEX = 8  # torch's int64


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Bytes of one microbatch, for a layer or the layers of a stage.

    Attributes:
        inputs: Inputs of recomputed layers or chunks.
        norms: What norms keep: their inputs, with the residual stream, and a scale per row.
        attention: Inputs and results of the projections and of attention.
        mask: Document masks, dense.
        mlp: Input of the MLP, gate, up, and what SwiGLU keeps.
    """

    inputs: int = 0
    norms: int = 0
    attention: int = 0
    mask: int = 0
    mlp: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(getattr(self, field.name) for field in fields(self))

    def times(self, count: int) -> "LayerBytes":
        """Return the bytes of ``count`` such layers."""
        return LayerBytes(*(count * getattr(self, field.name) for field in fields(self)))

    def plus(self, other: "LayerBytes") -> "LayerBytes":
        """Return the bytes of both."""
        return LayerBytes(
            *(getattr(self, field.name) + getattr(other, field.name) for field in fields(self))
        )


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of one stage's forward and backward passes.

    Attributes:
        in_flight: Microbatches whose activations exist at the same time, at most.
        layers: Kept by the layers of the stage for one microbatch.
        embedding: Token indices kept by the embedding for one microbatch. First stage only.
        received: Input of another microbatch, which the schedule still holds while the next one
            runs. Not on the first stage.
        head: Kept by final norm, output layer and loss; the logits are fp32. Last stage only.
        head_gradient: Allocated by the backward of loss and output layer. Last stage only.
        working: At most needed while one layer, or one recomputed chunk, runs backward.
    """

    in_flight: int
    layers: LayerBytes
    embedding: int
    received: int
    head: int
    head_gradient: int
    working: int

    @property
    def kept(self) -> int:
        """Bytes that exist between forward and backward, with the head."""
        each = self.layers.total + self.embedding
        return self.in_flight * each + self.received + self.head

    @property
    def peak(self) -> int:
        """Bytes at the peak of backward.

        The logits are gone before the first layer runs backward, so its working memory and the
        head do not add up.
        """
        return self.kept - self.head + max(self.head + self.head_gradient, self.working)


def stage_activations(
    config: RunConfig, topology: Topology, stage: int, *, accelerator: bool
) -> Activations:
    """Return the activations of a stage's ranks.

    Args:
        config: The run.
        topology: Topology of the world.
        stage: Pipeline stage.
        accelerator: Whether norms are fused, as on an accelerator. On CPUs torch composes them and
            keeps two fp32 copies of their input.
    """
    parts = _Parts(config, topology, accelerator)
    training = config.training
    count = len(stage_layers(config, topology)[stage])
    chunk = training.recompute_num_layers or 1
    plain, small = parts.layer(), LayerBytes(inputs=parts.stream)
    shared = parts.boolean_mask()
    if training.recompute_granularity == "full":
        shared = shared.plus(parts.rotary_angles())
    working = parts.layer_gradient()
    if training.recompute_granularity == "none":
        layers = plain.times(count)
    elif training.recompute_granularity == "selective":
        layers = parts.without_attention(plain).times(count).plus(shared)
        working += plain.total - parts.without_attention(plain).total
    elif training.recompute_method == "uniform":
        layers = small.times(math.ceil(count / chunk)).plus(shared)
        working += min(chunk, count) * plain.total
    else:
        again = min(chunk, count)
        layers = small.times(again).plus(plain.times(count - again)).plus(shared)
        # The layers after them have run backward by then, and their activations are gone.
        working += max(0, plain.total - (count - again) * plain.total)
    last = stage == topology.pipeline - 1
    microbatches = derive(config, topology).num_microbatches
    return Activations(
        in_flight=min(topology.pipeline - stage, microbatches),
        layers=layers,
        embedding=parts.embedding() if stage == 0 else 0,
        received=parts.stream if stage and microbatches > 1 else 0,
        head=parts.head() if last else 0,
        head_gradient=parts.head_gradient() if last else 0,
        working=working,
    )


class _Parts:
    """Sizes of one rank's parts of a layer, in bytes."""

    def __init__(self, config: RunConfig, topology: Topology, accelerator: bool) -> None:
        model, training = config.model, config.training
        self._fused, tensor = accelerator, topology.tensor
        self._value = BYTES[training.precision]
        self._model, self._sequence = model, model.seq_length
        self._batch = training.micro_batch_size
        self._context = topology.context
        self._tokens = self._batch * self._sequence // topology.context
        self._sharded = self._tokens // (tensor if config.parallel.sequence_parallel else 1)
        self._tensor = tensor
        self._queries = model.num_attention_heads // tensor
        self._groups = model.query_groups // tensor
        self._ffn = model.ffn_hidden_size // tensor
        self._vocab = padded_vocab_size(model) // tensor
        # Gate, up and what `fc2` keeps; not fused also silu(gate) and a copy of up.
        self._swiglu = 3 if accelerator and training.fusions == "auto" else 5
        self._masked = attention_has_a_mask(config, accelerator=accelerator)
        # Without documents one mask serves all sequences of a microbatch.
        self._masks = self._batch if config.data.mask_document_boundaries else 1
        self.stream = self._value * self._sharded * model.hidden_size

    def layer(self) -> LayerBytes:
        """Return what a layer keeps that is not recomputed."""
        model, width = self._model, self._model.hidden_size
        norms = (4 if model.post_layernorm else 2) * self._norm(self._sharded, width)
        if model.qk_layernorm:
            # A key head is a view of the projection's output. With grouped heads queries are not.
            norms += self._norm(self._tokens * self._queries, model.kv_channels, view=not self._gqa)
            norms += self._norm(self._tokens * self._groups, model.kv_channels, view=True)
            # The projection's output, which attention keeps where it has the values in it.
            if self._context > 1 and (self._fused or self._value == _FP32):
                norms += self._value * self._projected
        return LayerBytes(
            norms=norms,
            attention=self._attention(),
            mask=self._mask(self._value),
            mlp=self.stream + self._swiglu * self._value * self._tokens * self._ffn,
        )

    @property
    def _length(self) -> int:
        """Tokens of a sequence on one rank."""
        return self._sequence // self._context

    @property
    def _gqa(self) -> bool:
        return self._queries != self._groups

    def _norm(self, rows: int, width: int, *, view: bool = False) -> int:
        """Return what an RMSNorm of these rows keeps: its input, and a scale per row in fp32.

        Args:
            rows: Number of rows.
            width: Values of a row.
            view: Whether the input is a view of a tensor that is kept for another reason.
        """
        own = rows * width
        if self._fused:
            return _FP32 * rows + (0 if view else self._value * own)
        # Composed: the input in fp32, which for fp32 is the input itself, and the normalised input.
        copies = 1 if view and self._value == _FP32 else 2
        return _FP32 * rows + copies * _FP32 * own

    @property
    def _projected(self) -> int:
        """Values of the output of the query, key and value projection."""
        return self._tokens * (self._queries + 2 * self._groups) * self._model.kv_channels

    def _attention(self) -> int:
        head, projected = self._model.kv_channels, self._projected
        rotated = self._tokens * (self._queries + self._groups) * head
        if self._context > 1:
            gathered = 2 * self._batch * self._sequence * self._groups * head
            projected, rotated = 0, self._tokens * self._queries * head + gathered
        output = self._tokens * self._queries * head
        tables = 4 * self._length * head  # cos and sin, for queries and for keys
        values = self._value * (projected + rotated + output + tables)
        return self.stream + values + self._log_sums()

    def _log_sums(self) -> int:
        """Return the bytes of attention's log-sum-exp of each row."""
        return _FP32 * self._tokens * self._queries

    def _mask(self, value_bytes: int) -> int:
        return value_bytes * self._masks * self._length * self._sequence * self._masked

    def boolean_mask(self) -> LayerBytes:
        """Return the mask as recompute keeps it: boolean, one for all layers of a microbatch."""
        return LayerBytes(mask=self._mask(1))

    def rotary_angles(self) -> LayerBytes:
        """Return the angles of the rotary embedding, an argument of recomputed layers."""
        return LayerBytes(inputs=_FP32 * self._length * self._model.kv_channels)

    def without_attention(self, layer: LayerBytes) -> LayerBytes:
        """Return what selective recompute keeps of a layer: all but the sums and the mask."""
        return replace(layer, attention=layer.attention - self._log_sums(), mask=0)

    def layer_gradient(self) -> int:
        """Return the most that a layer's backward allocates, in its MLP.

        Gradients of gate and up, then of both together, and of their matrix before it is added to
        the gradient buffer.
        """
        columns = 2 * self._ffn
        return self._value * columns * (2 * self._tokens + self._model.hidden_size)

    def embedding(self) -> int:
        """Return what the embedding keeps: token indices, and with tp which are another rank's."""
        return (_INDEX + (self._tensor > 1)) * self._tokens

    def head(self) -> int:
        """Return what final norm, output layer and loss keep; the softmax is in fp32."""
        norm = self._norm(self._sharded, self._model.hidden_size)
        target = (_INDEX + 1) * self._tokens  # index and whether it is another rank's
        return norm + self.stream + target + _FP32 * self._tokens * self._vocab

    def head_gradient(self) -> int:
        """Return what the head's backward allocates beside the logits in fp32.

        In bf16 the logits' gradient, and after that, without the fp32 logits, the gradients of the
        output layer's matrix and input. In fp32 the logits' memory becomes their gradient.
        """
        logits = self._tokens * self._vocab
        products = self._value * self._vocab * self._model.hidden_size + self.stream
        if self._value == _FP32:
            return products
        return self._value * logits + max(0, products - _FP32 * logits)
