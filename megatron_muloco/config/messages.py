"""Error messages for configs that do not validate.

A message says what is wrong, where, why, and what to do. The parts, in order:

- `schema_fields`: the schema as data, from which the messages and the reference page are made.
- Tables of keys and values that are known but not supported, and of other programs' key names.
- `validation_problems`: pydantic's errors turned into `Problem` messages.
"""

import difflib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megatron_muloco.config.schema import RunConfig
from megatron_muloco.config.section import Section

__all__ = [
    "OTHER_NAMES",
    "REFUSED_KEYS",
    "REFUSED_VALUES",
    "Location",
    "Problem",
    "SchemaField",
    "is_tagged",
    "locate",
    "schema_fields",
    "section_types",
    "validation_problems",
]


# ---- the schema as data ------------------------------------------------------------------


@dataclass(frozen=True)
class SchemaField:
    """One key of the schema, with its type, default and description.

    Attributes:
        key: Dotted name; list entries are written ``[]``.
        variant: ``section.kind: value`` where only some kinds of the section have the key, else "".
        definitions: Pydantic's description of the key, by variant; several where the kinds define
            the key differently.
    """

    key: str
    variant: str
    definitions: Mapping[str, FieldInfo]

    @property
    def info(self) -> FieldInfo:
        """Pydantic's description of the key, from the first kind that has it."""
        return next(iter(self.definitions.values()))


@dataclass(frozen=True)
class Location:
    """The key that a pydantic error location points at.

    Attributes:
        key: Dotted name without the union tags that pydantic adds.
        owner: The section in which the last name was looked up.
        info: Pydantic's description of the key; None for a name that is not in the schema.
    """

    key: str
    owner: type[Section]
    info: FieldInfo | None


def section_types(annotation: Any) -> tuple[type[Section], ...]:
    """Return the section classes in an annotation; several for a discriminated union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return (annotation,)
    origin = get_origin(annotation)
    if origin in (Annotated, tuple):
        return section_types(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return tuple(kind for arg in get_args(annotation) for kind in section_types(arg))
    return ()


def is_tagged(annotation: Any) -> bool:
    """Return whether pydantic inserts the ``kind`` of a union member into error locations."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return False
    members = [arg for arg in get_args(annotation) if arg is not types.NoneType]
    return len(members) > 1 and bool(section_types(annotation))


def _tag(section: type[Section]) -> str:
    """Return the value of ``kind`` that selects a section in a union."""
    annotation = section.model_fields["kind"].annotation
    if get_origin(annotation) is not Literal:
        raise TypeError(f"{section.__name__}.kind must be a Literal")
    return str(get_args(annotation)[0])


def schema_fields(
    sections: Sequence[type[Section]] = (RunConfig,), prefix: str = "", variant: str = ""
) -> Iterator[SchemaField]:
    """Yield every key, depth first; a key that several kinds of a section share comes once."""

    def variant_of(owners: Sequence[type[Section]]) -> str:
        if len(owners) == len(sections):
            return variant
        return f"{prefix}kind: {' or '.join(map(_tag, owners))}"

    seen: set[str] = set()
    for section in sections:
        kind_first = sorted(section.model_fields.items(), key=lambda item: item[0] != "kind")
        for name, info in kind_first:
            if name in seen:
                continue
            seen.add(name)
            owners = [other for other in sections if name in other.model_fields]
            own_variant = variant_of(owners)
            definitions = {
                variant_of(alike): alike[0].model_fields[name] for alike in _alike(owners, name)
            }
            yield SchemaField(f"{prefix}{name}", own_variant, definitions)
            inner = section_types(info.annotation)
            brackets = "[]" if get_origin(info.annotation) is tuple else ""
            if inner:
                yield from schema_fields(inner, f"{prefix}{name}{brackets}.", own_variant)


def _alike(owners: Sequence[type[Section]], name: str) -> list[list[type[Section]]]:
    """Group the sections that define a key identically; ``kind`` counts as identical in all."""
    groups: list[list[type[Section]]] = []
    for owner in owners:
        for group in groups:
            if name == "kind" or _meaning(group[0], name) == _meaning(owner, name):
                group.append(owner)
                break
        else:
            groups.append([owner])
    return groups


def _meaning(section: type[Section], name: str) -> tuple[object, ...]:
    info = section.model_fields[name]
    return (info.annotation, info.get_default(), info.metadata, info.description)


def locate(loc: Sequence[str | int]) -> Location:
    """Return the config key of a pydantic error location."""
    owner: type[Section] = RunConfig
    names: list[str] = []
    info: FieldInfo | None = None
    choices: tuple[type[Section], ...] = (RunConfig,)
    tagged = False
    for item in loc:
        if isinstance(item, int):
            names.append(str(item))
        elif tagged:
            choices = tuple(choice for choice in choices if _tag(choice) == item)
            tagged = False
        else:
            owner = choices[0] if choices else owner
            names.append(item)
            info = owner.model_fields.get(item)
            choices = section_types(info.annotation) if info else ()
            tagged = info is not None and is_tagged(info.annotation)
    return Location(".".join(names), owner, info)


# ---- keys and values that are known but not supported ------------------------------------
# Users know these names from Megatron and other programs. They get a reason instead of "unknown
# key", or the name that this schema uses.

_MOE = "mixture-of-experts models are not supported. Remove the key; the MLP is dense."
_FP8 = "fp8 training is not supported. Use training.precision bf16."
_FP4 = "fp4 training is not supported. Use training.precision bf16."
_FP16 = "fp16 needs loss scaling, which is not supported. Use training.precision bf16 or fp32."
_VIRTUAL = (
    "virtual pipeline stages are not supported yet; a rank holds one run of layers. Remove the "
    "key; more microbatches per step shrink the pipeline's bubble too."
)
_DROPOUT = "models train without dropout, as in the papers. Remove the key."
_FSDP = "only Megatron's distributed optimizer shards the state. Remove the key."
_DP = "it follows from the number of ranks: world / (replicas x tp x pp x cp). Remove the key."
_TRANSPORT = (
    "a rank cannot tell whether the other replicas are on another network. Use device (the "
    "default), or host if replicas are connected by a low-bandwidth link."
)
_OFFLOAD = "the inner optimizer keeps its state in fp32 on the device. Remove the key."

REFUSED_KEYS = {
    "num_moe_experts": _MOE,
    "num_experts": _MOE,
    "moe_router_topk": _MOE,
    "expert_model_parallel_size": _MOE,
    "fp8": _FP8,
    "fp8_format": _FP8,
    "fp8_recipe": _FP8,
    "fp4": _FP4,
    "fp16": _FP16,
    "loss_scale": _FP16,
    "bf16": "the precision is set by one key. Use training.precision: bf16.",
    "virtual_pipeline_model_parallel_size": _VIRTUAL,
    "num_layers_per_virtual_pipeline_stage": _VIRTUAL,
    "hidden_dropout": _DROPOUT,
    "attention_dropout": _DROPOUT,
    "use_megatron_fsdp": _FSDP,
    "use_torch_fsdp2": _FSDP,
    "use_distributed_optimizer": "it is always on. Remove the key.",
    "use_precision_aware_optimizer": _OFFLOAD,
    "optimizer_cpu_offload": _OFFLOAD,
    "data_parallel_size": _DP,
}

# Names of keys of the schema in Hugging Face, nanoGPT, DeepSpeed and Megatron's command line.
OTHER_NAMES = {
    "adam_beta1": "inner.adam.beta1",
    "adam_beta2": "inner.adam.beta2",
    "adam_eps": "inner.adam.eps",
    "batch_size": "training.global_batch_size",
    "d_ff": "model.ffn_hidden_size",
    "d_model": "model.hidden_size",
    "deterministic_mode": "training.deterministic",
    "dtype": "training.precision",
    "eval_iterations": "training.eval_iters",
    "gradient_clipping": "training.clip_grad",
    "grad_clip": "training.clip_grad",
    "head_dim": "model.kv_channels",
    "intermediate_size": "model.ffn_hidden_size",
    "learning_rate": "inner.lr",
    "load": "checkpoint.resume",
    "max_grad_norm": "training.clip_grad",
    "max_iters": "training.train_iters",
    "max_lr": "inner.lr",
    "max_position_embeddings": "model.seq_length",
    "max_steps": "training.train_iters",
    "micro_batch": "training.micro_batch_size",
    "n_embd": "model.hidden_size",
    "n_head": "model.num_attention_heads",
    "n_heads": "model.num_attention_heads",
    "n_layer": "model.num_layers",
    "n_layers": "model.num_layers",
    "num_heads": "model.num_attention_heads",
    "num_hidden_layers": "model.num_layers",
    "num_key_value_heads": "model.num_query_groups",
    "num_kv_heads": "model.num_query_groups",
    "num_steps": "training.train_iters",
    "pipeline_parallel_size": "parallel.pipeline_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "replicas": "parallel.num_replicas",
    "rope_theta": "model.rotary_base",
    "save": "checkpoint.dir",
    "save_dir": "checkpoint.dir",
    "seq_len": "model.seq_length",
    "sequence_length": "model.seq_length",
    "tensor_parallel_size": "parallel.tensor_model_parallel_size",
    "tensorboard_dir": "monitor.dir",
    "tp": "parallel.tensor_model_parallel_size",
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "vocab": "model.vocab_size",
    "warmup_iters": "inner.lr_warmup_iters",
    "warmup_steps": "inner.lr_warmup_iters",
    "wd": "inner.weight_decay",
}

REFUSED_VALUES = {
    ("outer.transport", "auto"): _TRANSPORT,
    ("training.precision", "fp16"): _FP16,
    ("training.precision", "fp8"): _FP8,
    ("training.precision", "fp4"): _FP4,
}


# ---- pydantic's errors as messages -------------------------------------------------------

_TYPE_WORDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
}


_BOUND_WORDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


@dataclass(frozen=True)
class Problem:
    """One thing to fix in a config.

    Attributes:
        key: Dotted config key.
        text: What is wrong with the value, why, and what to do; lines after the first are indented.
    """

    key: str
    text: str

    def format(self, where: Callable[[str], str]) -> str:
        """Return the message, preceded by the place of the key that ``where`` returns."""
        place = where(self.key)
        lines = self.text.splitlines()
        first = f"{place}  {self.key}: {lines[0]}" if place else f"{self.key}: {lines[0]}"
        return "\n".join([first, *(f"  {line}" for line in lines[1:])])


_MOST_PROBLEMS = 20  # of one config; each costs a search for names that look like the wrong one


def validation_problems(error: ValidationError) -> tuple[list[Problem], bool]:
    """Return one problem per pydantic error, and whether all of them are unknown keys.

    If they are, the rest of the config is valid and the rules can be checked without those keys.
    """
    details = _root_causes(error.errors(include_url=False))
    only_unknown = all(detail["type"] == "extra_forbidden" for detail in details)
    shown, more = details[:_MOST_PROBLEMS], len(details) - _MOST_PROBLEMS
    unknown_names = [str(d["loc"][-1]) for d in shown if d["type"] == "extra_forbidden"]
    problems = [_problem(detail, unknown_names) for detail in shown]
    if more > 0:
        last = locate(details[-1]["loc"]).key
        problems.append(Problem(last, f"the last of {more} more problems, which are not shown."))
    return problems, only_unknown


def _root_causes(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Drop "too short" errors of lists that are short only because their entries are wrong."""
    parents = {detail["loc"][:length] for detail in details for length in range(len(detail["loc"]))}
    return [d for d in details if d["type"] != "too_short" or d["loc"] not in parents]


def _problem(detail: ErrorDetails, unknown_names: list[str]) -> Problem:
    """Return the message for one pydantic error."""
    location = locate(detail["loc"])
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return Problem(location.key, _unknown_key(location))
    if kind == "missing":
        name = location.key.rpartition(".")[2]
        typo = difflib.get_close_matches(name, unknown_names, n=1)
        hint = f"\n{typo[0]} looks like a misspelling of it." if typo else ""
        return Problem(location.key, f"not set; it has no default.\n{_about(location)}{hint}")
    if kind == "union_tag_not_found":
        kinds = _kinds(location)
        return Problem(
            location.key, f"kind is not set.\nSet {location.key}.kind to one of {kinds}."
        )
    if kind == "union_tag_invalid":
        tag = detail["ctx"]["tag"]
        return Problem(f"{location.key}.kind", f"{tag!r} is not one of {_kinds(location)}.")
    refused = REFUSED_VALUES.get((location.key, str(value)))
    if refused:
        return Problem(location.key, f"{value} is not accepted: {refused}")
    return Problem(location.key, f"{_wrong_value(detail, location)}\n{_about(location)}".rstrip())


def _wrong_value(detail: ErrorDetails, location: Location) -> str:
    """Return the first line of a message about a value of the wrong type or out of range."""
    kind, value, ctx = detail["type"], detail["input"], detail.get("ctx", {})
    text = _yaml_text(value)
    if kind in ("model_type", "model_attributes_type"):
        sections = section_types(location.info.annotation) if location.info else ()
        keys = [name for section in sections for name in section.model_fields]
        return (
            f"{text} is not a section. The section has the keys {', '.join(dict.fromkeys(keys))}."
        )
    if kind == "literal_error":
        choices = get_args(location.info.annotation) if location.info else ()
        return f"{text} is not one of {', '.join(str(choice) for choice in choices)}."
    if kind in _TYPE_WORDS:
        return f"{text} is not {_TYPE_WORDS[kind]}."
    if kind in _BOUND_WORDS:
        name, words = _BOUND_WORDS[kind]
        return f"{text} is out of range: it must be {words} {ctx[name]}."
    if kind in ("too_short", "string_too_short"):
        return f"{text} is empty."
    return f"{text}: {detail['msg']}."


def _yaml_text(value: Any) -> str:
    """Return a value as written in YAML, shortened to 60 characters."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _about(location: Location) -> str:
    """Return the description of the key."""
    return (location.info.description or "") if location.info else ""


def _kinds(location: Location) -> str:
    """Return the kinds of a section, separated by commas."""
    sections = section_types(location.info.annotation) if location.info else ()
    tags = [str(get_args(s.model_fields["kind"].annotation)[0]) for s in sections]
    return ", ".join(tags)


def _unknown_key(location: Location) -> str:
    """Return the message for a name that the schema does not have in this place."""
    name = location.key.rpartition(".")[2]
    if name in REFUSED_KEYS:
        return f"not accepted: {REFUSED_KEYS[name]}"
    section = location.key.rpartition(".")[0]
    for entry in schema_fields():
        if entry.key == location.key:
            return f"exists only with {entry.variant}.\nRemove it (null does) or change the kind."
    leaves = {entry.key.rpartition(".")[2]: entry for entry in schema_fields()}
    if name in leaves:
        entry = leaves[name]
        only = f" (only with {entry.variant})" if entry.variant else ""
        return f"unknown key in this section. It exists as {entry.key}{only}."
    if name in OTHER_NAMES:
        return f"unknown key. Did you mean {OTHER_NAMES[name]}?"
    siblings = {key: f"{section}.{key}".lstrip(".") for key in location.owner.model_fields}
    others = {key: entry.key for key, entry in leaves.items()}
    for candidates, cutoff in ((siblings, 0.75), (others, 0.75), (siblings, 0.6)):
        near = difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff)
        if near:
            return f"unknown key. Did you mean {candidates[near[0]]}?"
    return f"unknown key. This section has {', '.join(location.owner.model_fields)}."
