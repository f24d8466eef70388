"""`model_card`: the README.md of an exported model, with the facts of its run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_muloco.config.derived import parameter_counts
from megatron_muloco.config.schema import ModelConfig
from tools.bench.provenance import commit
from tools.exporting.family import Family
from tools.exporting.source import TrainedModel

__all__ = ["held_out_loss", "model_card"]

_UNKNOWN = "n/a"


def model_card(source: TrainedModel, family: Family | None, notes: list[str]) -> str:
    """Return the text of README.md.

    Args:
        source: The model.
        family: The class of a Hugging Face export; ``None`` for Megatron's.
        notes: What the export left out.
    """
    facts = _facts(source)
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    front = "" if family is None else "---\nlibrary_name: transformers\n---\n\n"
    use = _MEGATRON if family is None else _TRANSFORMERS.format(name=family.model_class)
    listed = "".join(f"\n- {note}" for note in notes)
    left = f"\n## Left out\n{listed}\n" if notes else ""
    return f"{front}# Model card\n\n| | |\n|---|---|\n{table}\n\n## Use\n\n{use}{left}"


def held_out_loss(settings: Mapping[str, Any], step: int) -> float | None:
    """Return the run's last held-out loss up to a step, from its event files.

    ``None`` where they are not here or hold none.
    """
    directory = settings.get("monitor", {}).get("dir")
    if not directory or not Path(directory).is_dir():
        return None
    from tools.run_points import read_points

    points = [value for at, value in read_points(directory).get(_TAG, []) if at <= step]
    return points[-1] if points else None


_TAG = "lm loss validation"


def _facts(source: TrainedModel) -> dict[str, str]:
    described, settings, model = source.description, source.settings, source.model
    samples = described.scalars.get("consumed_samples")
    tokens = _UNKNOWN if samples is None else f"{samples * model.seq_length:,}"
    loss = held_out_loss(settings, described.step)
    versions = ", ".join(f"{name} {text}" for name, text in described.versions.items())
    return {
        "parameters": f"{parameter_counts(model).total:,}",
        "architecture": _architecture(model),
        "method": _method(settings),
        "inner steps": f"{described.step:,}",
        "tokens": tokens,
        "context": f"{model.seq_length:,} tokens",
        "held-out loss": _UNKNOWN if loss is None else f"{loss:.4f} nats per token",
        "training data": _data(settings),
        "digest of the weights": described.anchor_digest,
        "trained with": versions or _UNKNOWN,
        "exported at commit": commit() or _UNKNOWN,
    }


def _architecture(model: ModelConfig) -> str:
    norms = ["before each branch"]
    norms += ["after each branch"] if model.post_layernorm else []
    norms += ["of queries and keys"] if model.qk_layernorm else []
    tied = "separate" if model.untie_embeddings_and_output_weights else "tied"
    return (
        f"decoder, {model.num_layers} layers of width {model.hidden_size}, "
        f"{model.num_attention_heads} heads and {model.query_groups} key/value heads of "
        f"{model.kv_channels}, SwiGLU of {model.ffn_hidden_size}, RMSNorm {', '.join(norms)}, "
        f"rotary base {model.rotary_base:g}, {tied} output head"
    )


def _method(settings: Mapping[str, Any]) -> str:
    outer, inner = settings.get("outer"), settings.get("inner")
    if not outer or not inner or inner["kind"] == "none":  # imported weights
        return _UNKNOWN
    replicas = settings.get("parallel", {}).get("num_replicas", 1)
    kind = inner["kind"]
    if outer["kind"] == "none":
        return f"data parallelism with {kind}"
    name = {"muon": "MuLoCo", "adamw": "DiLoCo"}.get(kind, kind)
    interval = json.dumps(outer["sync_interval"])
    return f"{name}: K = {replicas} replicas, H = {interval} inner steps of {kind} a round"


def _data(settings: Mapping[str, Any]) -> str:
    sources = settings.get("data", {}).get("train") or []
    return ", ".join(str(source["path"]) for source in sources) or _UNKNOWN


_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

The class is `{name}` of transformers, without code from elsewhere. Training had no token
that begins a text; a document ends with `eos_token_id`.
"""

_MEGATRON = """`release/` is a checkpoint in Megatron's torch_dist format, with the keys
of Megatron's own GPT layer specifications.
"""
