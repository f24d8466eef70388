"""FLOPs of one token in closed form, without torch.

A multiply and an add are two FLOPs. Norms, rotary embeddings, SiLU, softmax and the loss are not
counted, as is usual for model FLOPs utilisation. Letters are those of `config.derived`.
"""

from dataclasses import dataclass

from megatron_muloco.config.derived import (
    attention_parameters_per_layer,
    mlp_parameters_per_layer,
    padded_vocab_size,
)
from megatron_muloco.config.schema import ModelConfig

__all__ = ["ModelFlops", "flops_per_token"]


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """FLOPs of one token's forward pass by part, averaged over the positions of a sequence.

    Attributes:
        projections: Query, key, value and output projections.
        scores: q·k and probabilities·v over the positions that a token may look at.
        mlp: Gate, up and down.
        logits: Output head over the padded vocabulary.
    """

    projections: float
    scores: float
    mlp: float
    logits: float

    @property
    def forward(self) -> float:
        """FLOPs of the forward pass."""
        return self.projections + self.scores + self.mlp + self.logits

    @property
    def total(self) -> float:
        """FLOPs of forward and backward, where each product has two; recompute is not counted."""
        return 3 * self.forward


def flops_per_token(model: ModelConfig) -> ModelFlops:
    """Return the model FLOPs of one token.

    Causal attention sees (s + 1) / 2 positions on average. Document boundaries would lower that;
    they are ignored, so that the number does not depend on the data.
    """
    positions = (model.seq_length + 1) / 2
    query_width = model.num_attention_heads * model.kv_channels
    return ModelFlops(
        projections=2.0 * model.num_layers * attention_parameters_per_layer(model),
        scores=model.num_layers * 2 * 2.0 * query_width * positions,
        mlp=2.0 * model.num_layers * mlp_parameters_per_layer(model),
        logits=2.0 * model.hidden_size * padded_vocab_size(model),
    )
