"""Write docs/reference/config.md from the config schema, or check that it is up to date."""

import argparse
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic_core import PydanticUndefined

from megatron_muloco.config.inner import PerOptimizer
from megatron_muloco.config.messages import (
    SchemaField,
    is_tagged,
    schema_fields,
    section_types,
)

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "config.md"

INTRODUCTION = """# Config reference

<!-- Written by tools/config_reference.py from the schema; edit the descriptions there. -->

A run is one YAML file. `extends:` names files to start from, relative to the file that contains
it. Later ones override earlier ones, the file itself overrides them, and `--set section.key=value`
overrides everything. Mappings merge key by key, everything else is replaced, and `null` resets a
key to its default. Unknown and repeated keys are refused. Keys that Megatron has keep Megatron's
names.

Batches are counted in sequences. Intervals are in inner steps unless the description says rounds.
"""


def main(arguments: list[str] | None = None) -> int:
    """Return 0 when the page is written or up to date, 1 when it is not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args(arguments)
    text = reference()
    if options.check:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
            return 0
        print(f"{PAGE} is out of date; run python tools/config_reference.py", file=sys.stderr)
        return 1
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")
    return 0


def reference() -> str:
    """Return the whole page."""
    parts = [INTRODUCTION]
    for entry in schema_fields():
        inner = section_types(entry.info.annotation)
        if "." not in entry.key:
            parts.append(f"\n## {entry.key}\n\n{entry.info.description}\n\n{HEADER}")
        elif not inner or get_origin(entry.info.annotation) is tuple or _takes_number(entry):
            parts += [
                _row(replace(entry, variant=variant, definitions={variant: info}))
                for variant, info in entry.definitions.items()
            ]
    return "".join(parts)


HEADER = "| key | values | default | meaning |\n|---|---|---|---|\n"


def _row(entry: SchemaField) -> str:
    """Return one line of a table."""
    meaning = entry.info.description or ""
    if entry.variant:
        meaning += f" *(only with {entry.variant})*"
    return (
        f"| `{entry.key}` | {_values(entry)} | {_default(entry)} | {meaning} |\n"
    )  # fmt: skip


def _default(entry: SchemaField) -> str:
    """Return the default as it would be written in YAML."""
    if entry.info.is_required():
        return "required"
    value = entry.info.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined:
        return "not set"
    if value == ():
        return "none"
    if isinstance(value, tuple):
        value = list(value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _values(entry: SchemaField) -> str:
    """Return the allowed values: a type with its bounds, or the choices."""
    if entry.key.rpartition(".")[2] == "kind":
        section = entry.key.rpartition(".")[0]
        owner = next(field for field in schema_fields() if field.key == section)
        kinds = [str(get_args(s.model_fields["kind"].annotation)[0])
                 for s in section_types(owner.info.annotation)]  # fmt: skip
        return ", ".join(f"`{kind}`" for kind in kinds)
    annotation, metadata = entry.info.annotation, entry.info.metadata
    if _takes_number(entry):
        annotation, metadata = get_args(annotation)[0], []
    bounds = [
        f"{sign} {_bound(getattr(item, name))}"
        for item in _constraints(annotation, metadata)
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if getattr(item, name, None) is not None
    ]
    words = " ".join([_type_words(annotation), ", ".join(bounds)]).strip()
    if not _takes_number(entry):
        return words
    other = (
        "one per optimizer"
        if PerOptimizer in section_types(entry.info.annotation)
        else "a schedule"
    )
    return f"{words}, or {other}"


def _bound(value: float) -> str:
    """Return a bound in digits, or as a power of ten where it is a large one."""
    return f"{value:g}" if isinstance(value, float) or value % 10**6 == 0 else f"{value}"


def _takes_number(entry: SchemaField) -> bool:
    """Return whether a plain number may stand in place of the section."""
    annotation = entry.info.annotation
    members = get_args(annotation) if is_tagged(annotation) else ()
    return any(not section_types(member) for member in members)


def _constraints(annotation: Any, metadata: list[Any]) -> list[Any]:
    """Return the bounds of a field, also those inside ``X | None``."""
    nested = getattr(annotation, "__metadata__", ())
    found = [*metadata, *(m for item in nested for m in getattr(item, "metadata", [item]))]
    if get_origin(annotation) in (Union, types.UnionType):
        for argument in get_args(annotation):
            found += _constraints(argument, [])
    return found


def _type_words(annotation: Any) -> str:
    """Return a type in plain words."""
    if hasattr(annotation, "__metadata__"):
        annotation = annotation.__origin__
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if origin in (Union, types.UnionType):
        return next(_type_words(a) for a in get_args(annotation) if a is not types.NoneType)
    if origin is tuple:
        return "list"
    return {int: "whole number", float: "number", bool: "`true`, `false`", str: "text"}[annotation]


if __name__ == "__main__":
    sys.exit(main())
