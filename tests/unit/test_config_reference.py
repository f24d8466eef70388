"""The reference page says what the schema says."""

from pathlib import Path

import pytest

from megatron_muloco.config.messages import locate, schema_fields
from tools import config_reference

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "config.md"


def test_the_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert config_reference.main(["--check"]) == 0, capsys.readouterr().err


def test_an_old_page_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(config_reference, "PAGE", tmp_path / "docs" / "config.md")
    assert config_reference.main(["--check"]) == 1
    assert "is out of date" in capsys.readouterr().err
    assert config_reference.main([]) == 0
    assert config_reference.main(["--check"]) == 0


def test_every_key_has_a_description_and_a_line() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for field in schema_fields():
        assert field.info.description, field.key
        assert field.info.description.endswith("."), field.key
        assert f"`{field.key}`" in page or any(
            other.key.startswith((f"{field.key}.", f"{field.key}[]")) for other in schema_fields()
        )


def test_keys_are_unique() -> None:
    keys = [field.key for field in schema_fields()]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("loc", "key"),
    [
        (("inner", "muon", "muon", "momentum"), "inner.muon.momentum"),
        (("inner", "muon", "lr"), "inner.lr"),
        (
            ("outer", "nesterov", "compression", "none", "wire_dtype"),
            "outer.compression.wire_dtype",
        ),
        (("outer", "nesterov", "lr", "number"), "outer.lr"),
        (("outer", "nesterov", "lr", "cosine", "start"), "outer.lr.start"),
        (
            ("outer", "average", "sync_interval", "steps", "values", 1, 0),
            "outer.sync_interval.values.1.0",
        ),
        (("data", "train", 0, "path"), "data.train.0.path"),
        (("model", "nothing"), "model.nothing"),
    ],
)
def test_error_locations_lose_their_union_tags(loc: tuple[str | int, ...], key: str) -> None:
    assert locate(loc).key == key
