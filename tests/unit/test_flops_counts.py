"""Parameters match the paper's table; FLOPs match matmuls counted while they run."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from megatron_muloco.config import load_config
from megatron_muloco.config.derived import padded_vocab_size, parameter_counts
from megatron_muloco.config.schema import ModelConfig
from megatron_muloco.model.flops import flops_per_token

CONFIGS = Path(__file__).parents[2] / "configs"


def model_of(size: str, tmp_path: Path) -> ModelConfig:
    run = tmp_path / "run.yaml"
    run.write_text(
        f"extends: [{CONFIGS}/models/{size}.yaml, {CONFIGS}/methods/dp_muon.yaml]\n"
        "checkpoint: {dir: x}\n"
    )
    return load_config(run).model


@pytest.mark.parametrize(
    ("size", "total", "tables"),
    [
        ("150m", "150.6M", "131.3M"),
        ("416m", "416.9M", "262.7M"),
        ("914m", "914.3M", "394.0M"),
        ("1.76b", "1.759B", "525.3M"),
        ("3.1b", "3.065B", "656.7M"),
        ("15b", "15.23B", "1.182B"),
    ],
)
def test_sizes_of_the_paper(size: str, total: str, tables: str, tmp_path: Path) -> None:
    counts = parameter_counts(model_of(size, tmp_path))
    assert rounded_like(total, counts.total) == total
    assert rounded_like(tables, counts.embedding + counts.output) == tables


def rounded_like(pattern: str, number: int) -> str:
    """Return a number in the unit and with the decimals of a pattern such as ``1.759B``."""
    scale = {"M": 1e6, "B": 1e9}[pattern[-1]]
    decimals = len(pattern[:-1].partition(".")[2])
    return f"{number / scale:.{decimals}f}{pattern[-1]}"


def test_15b_counts_exactly(tmp_path: Path) -> None:
    counts = parameter_counts(model_of("15b", tmp_path))
    h, layers, ffn, vocab, head = 4608, 54, 12672, 128256, 128
    assert counts.embedding == counts.output == vocab * h
    assert counts.attention == layers * 4 * h * h
    assert counts.mlp == layers * 3 * h * ffn
    assert counts.norms == layers * (4 * h + 2 * head) + h
    assert counts.total == 15_229_089_792
    assert counts.matrices + counts.vectors == counts.total


class Decoder(torch.nn.Module):
    """A decoder in plain torch, with every weight that `ModelConfig` describes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        h, d = config.hidden_size, config.kv_channels
        n, g, f = config.num_attention_heads, config.query_groups, config.ffn_hidden_size
        vocab = padded_vocab_size(config)
        self.embedding = torch.nn.Embedding(vocab, h)
        self.layers = torch.nn.ModuleList()
        for _ in range(config.num_layers):
            layer = torch.nn.ModuleDict(
                {
                    "q": torch.nn.Linear(h, n * d, bias=False),
                    "k": torch.nn.Linear(h, g * d, bias=False),
                    "v": torch.nn.Linear(h, g * d, bias=False),
                    "o": torch.nn.Linear(n * d, h, bias=False),
                    "gate": torch.nn.Linear(h, f, bias=False),
                    "up": torch.nn.Linear(h, f, bias=False),
                    "down": torch.nn.Linear(f, h, bias=False),
                    "norm1": torch.nn.RMSNorm(h),
                    "norm2": torch.nn.RMSNorm(h),
                }
            )
            if config.post_layernorm:
                layer["post1"], layer["post2"] = torch.nn.RMSNorm(h), torch.nn.RMSNorm(h)
            if config.qk_layernorm:
                layer["qnorm"], layer["knorm"] = torch.nn.RMSNorm(d), torch.nn.RMSNorm(d)
            self.layers.append(layer)
        self.final = torch.nn.RMSNorm(h)
        if config.untie_embeddings_and_output_weights:
            self.head = torch.nn.Linear(h, vocab, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + self.attention(layer, x)
            x = x + layer["down"](F.silu(layer["gate"](x)) * layer["up"](x))
        head = self.embedding.weight if not hasattr(self, "head") else self.head.weight
        return F.linear(self.final(x), head)

    def attention(self, layer: torch.nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
        config, (b, s, _) = self.config, x.shape
        repeat = config.num_attention_heads // config.query_groups
        q, k, v = (
            layer[name](x).view(b, s, -1, config.kv_channels).transpose(1, 2) for name in "qkv"
        )
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        weights = (q @ k.transpose(2, 3)).softmax(-1)
        return layer["o"]((weights @ v).transpose(1, 2).reshape(b, s, -1))


MODELS = {
    "all of it": {},
    "grouped": {"num_query_groups": 2},
    "tied": {"untie_embeddings_and_output_weights": False},
    "plain norms": {"post_layernorm": False, "qk_layernorm": False},
    "padded vocabulary": {"vocab_size": 90, "make_vocab_size_divisible_by": 64},
}


def small_model(**changes: object) -> ModelConfig:
    values = {
        "num_layers": 3,
        "hidden_size": 24,
        "ffn_hidden_size": 40,
        "num_attention_heads": 4,
        "kv_channels": 8,
        "seq_length": 16,
        "vocab_size": 64,
        "make_vocab_size_divisible_by": 16,
    }
    return ModelConfig.model_validate(values | changes)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_parameters_are_those_of_a_real_model(changes: dict[str, object]) -> None:
    config = small_model(**changes)
    real = sum(parameter.numel() for parameter in Decoder(config).parameters())
    assert parameter_counts(config).total == real


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_flops_are_those_of_counted_matmuls(changes: dict[str, object]) -> None:
    config = small_model(**changes)
    model = Decoder(config)
    sequences, length = 2, config.seq_length
    tokens = torch.zeros(sequences, length, dtype=torch.long)
    with FlopCounterMode(display=False) as forward:
        logits = model(tokens)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    flops = flops_per_token(config)
    # The dense model scores all s positions, a causal one (s + 1) / 2 of them on average.
    dense_scores = flops.scores * length / ((length + 1) / 2)
    dense = flops.projections + dense_scores + flops.mlp + flops.logits
    assert forward.get_total_flops() == sequences * length * dense
    assert backward.get_total_flops() == 2 * forward.get_total_flops()
    assert flops.total == 3 * flops.forward


def test_large_models_cost_six_flops_per_parameter(tmp_path: Path) -> None:
    model = model_of("15b", tmp_path)
    counts, flops = parameter_counts(model), flops_per_token(model)
    used = counts.matrices + counts.output
    assert flops.total - 3 * flops.scores == 6 * used
    assert 0 < flops.scores / flops.forward < 0.05
