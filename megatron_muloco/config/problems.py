"""Sentences for what is wrong with a config: what, where, why, what to do."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_muloco.config.fields import Location, locate, schema_fields, section_types
from megatron_muloco.config.support import OTHER_NAMES, REFUSED_KEYS, REFUSED_VALUES

__all__ = ["Problem", "validation_problems"]

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
    """Something to fix.

    Attributes:
        key: Dotted config key.
        text: What is wrong with the value, why, and what to do; later lines are printed indented.
    """

    key: str
    text: str

    def format(self, where: Callable[[str], str]) -> str:
        """Return the message with the place of the key before it."""
        place = where(self.key)
        lines = self.text.splitlines()
        first = f"{place}  {self.key}: {lines[0]}" if place else f"{self.key}: {lines[0]}"
        return "\n".join([first, *(f"  {line}" for line in lines[1:])])


def validation_problems(error: ValidationError) -> tuple[list[Problem], bool]:
    """Return one problem per pydantic error, and whether all of them are unknown keys."""
    details = _root_causes(error.errors(include_url=False))
    only_unknown = all(detail["type"] == "extra_forbidden" for detail in details)
    unknown_names = [str(d["loc"][-1]) for d in details if d["type"] == "extra_forbidden"]
    return [_problem(detail, unknown_names) for detail in details], only_unknown


def _root_causes(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Drop "too short" where a list is only short because its entries are wrong."""
    parents = {detail["loc"][:length] for detail in details for length in range(len(detail["loc"]))}
    return [d for d in details if d["type"] != "too_short" or d["loc"] not in parents]


def _problem(detail: ErrorDetails, unknown_names: list[str]) -> Problem:
    """Return the sentence for one pydantic error."""
    location = locate(detail["loc"])
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return Problem(location.key, _unknown_key(location))
    if kind == "missing":
        name = location.key.rpartition(".")[2]
        typo = difflib.get_close_matches(name, unknown_names, n=1)
        hint = f"\n{typo[0]} looks like a misspelling of it." if typo else ""
        return Problem(location.key, f"not set, and it has no default.\n{_about(location)}{hint}")
    if kind == "union_tag_not_found":
        kinds = _kinds(location)
        return Problem(location.key, f"has no kind.\nWrite {location.key}.kind: one of {kinds}.")
    if kind == "union_tag_invalid":
        tag = detail["ctx"]["tag"]
        return Problem(f"{location.key}.kind", f"{tag!r} is not one of {_kinds(location)}.")
    refused = REFUSED_VALUES.get((location.key, str(value)))
    if refused:
        return Problem(location.key, f"{value} is not offered: {refused}")
    return Problem(location.key, f"{_wrong_value(detail, location)}\n{_about(location)}".rstrip())


def _wrong_value(detail: ErrorDetails, location: Location) -> str:
    """Return what is wrong with a value of the wrong type or out of range."""
    kind, value, ctx = detail["type"], detail["input"], detail.get("ctx", {})
    shown = _shown(value)
    if kind in ("model_type", "model_attributes_type"):
        sections = section_types(location.info.annotation) if location.info else ()
        keys = [name for section in sections for name in section.model_fields]
        return f"{shown} is not a section. It has the keys {', '.join(dict.fromkeys(keys))}."
    if kind == "literal_error":
        choices = get_args(location.info.annotation) if location.info else ()
        return f"{shown} is not one of {', '.join(str(choice) for choice in choices)}."
    if kind in _TYPE_WORDS:
        return f"{shown} is not {_TYPE_WORDS[kind]}."
    if kind in _BOUND_WORDS:
        name, words = _BOUND_WORDS[kind]
        return f"{shown} is out of range: it must be {words} {ctx[name]}."
    if kind in ("too_short", "string_too_short"):
        return f"{shown} is empty."
    return f"{shown}: {detail['msg']}."


def _shown(value: Any) -> str:
    """Return a value as the reader wrote it, shortened."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _about(location: Location) -> str:
    """Return the description of the key."""
    return (location.info.description or "") if location.info else ""


def _kinds(location: Location) -> str:
    """Return the kinds that a section has."""
    sections = section_types(location.info.annotation) if location.info else ()
    tags = [str(get_args(s.model_fields["kind"].annotation)[0]) for s in sections]
    return ", ".join(tags)


def _unknown_key(location: Location) -> str:
    """Return the reason for refusing a name that the schema lacks, with the nearest one it has."""
    name = location.key.rpartition(".")[2]
    if name in REFUSED_KEYS:
        return f"not offered: {REFUSED_KEYS[name]}"
    section = location.key.rpartition(".")[0]
    for entry in schema_fields():
        if entry.key == location.key:
            return f"belongs to {entry.variant} only.\nRemove it (null does) or change the kind."
    leaves = {entry.key.rpartition(".")[2]: entry for entry in schema_fields()}
    if name in leaves:
        entry = leaves[name]
        only = f" (only with {entry.variant})" if entry.variant else ""
        return f"unknown key here. It exists as {entry.key}{only}."
    if name in OTHER_NAMES:
        return f"unknown key. Did you mean {OTHER_NAMES[name]}?"
    siblings = {key: f"{section}.{key}".lstrip(".") for key in location.owner.model_fields}
    others = {key: entry.key for key, entry in leaves.items()}
    for candidates, cutoff in ((siblings, 0.75), (others, 0.75), (siblings, 0.6)):
        near = difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff)
        if near:
            return f"unknown key. Did you mean {candidates[near[0]]}?"
    return f"unknown key. This section has {', '.join(location.owner.model_fields)}."
