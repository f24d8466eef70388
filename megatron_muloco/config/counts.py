"""How many parameters a model has, by kind: closed forms.

Letters: h width, n query heads, g query groups, d head width, f MLP width, V padded vocabulary.
"""

from dataclasses import dataclass

from megatron_muloco.config.schema import ModelConfig

__all__ = [
    "ParameterCounts",
    "attention_parameters_per_layer",
    "mlp_parameters_per_layer",
    "norm_parameters_per_layer",
    "padded_vocab_size",
    "parameter_counts",
]


def padded_vocab_size(model: ModelConfig) -> int:
    """Return V, the vocabulary rounded up to a multiple that no layout changes."""
    multiple = model.make_vocab_size_divisible_by
    return -(-model.vocab_size // multiple) * multiple


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Parameters of a whole model by kind.

    Attributes:
        embedding: V*h.
        output: V*h, or 0 when tied to the embedding.
        attention: Query, key, value and projection matrices of all layers.
        mlp: Gate, up and down matrices of all layers.
        norms: All RMSNorm weights.
    """

    embedding: int
    output: int
    attention: int
    mlp: int
    norms: int

    @property
    def matrices(self) -> int:
        """Parameters that Muon orthogonalises."""
        return self.attention + self.mlp

    @property
    def vectors(self) -> int:
        """Parameters that AdamW updates under Muon: embedding, output head and norms."""
        return self.embedding + self.output + self.norms

    @property
    def total(self) -> int:
        """All parameters, padding of the vocabulary included."""
        return self.matrices + self.vectors


def norm_parameters_per_layer(model: ModelConfig) -> int:
    """Return the RMSNorm weights of one layer: pre and post on both branches, and q and k."""
    branch_norms = 4 if model.post_layernorm else 2
    head_norms = 2 if model.qk_layernorm else 0
    return branch_norms * model.hidden_size + head_norms * model.kv_channels


def attention_parameters_per_layer(model: ModelConfig) -> int:
    """Return h*(n + 2g)*d + n*d*h."""
    query = model.num_attention_heads * model.kv_channels
    key = model.query_groups * model.kv_channels
    return model.hidden_size * (2 * query + 2 * key)


def mlp_parameters_per_layer(model: ModelConfig) -> int:
    """Return 3*h*f: gate, up and down."""
    return 3 * model.hidden_size * model.ffn_hidden_size


def parameter_counts(model: ModelConfig) -> ParameterCounts:
    """Return the exact number of parameters of a model."""
    table = padded_vocab_size(model) * model.hidden_size
    layers = model.num_layers
    return ParameterCounts(
        embedding=table,
        output=table if model.untie_embeddings_and_output_weights else 0,
        attention=layers * attention_parameters_per_layer(model),
        mlp=layers * mlp_parameters_per_layer(model),
        norms=layers * norm_parameters_per_layer(model) + model.hidden_size,
    )
