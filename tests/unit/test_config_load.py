"""Reading: files merge in order, values keep their places, and broken files are named."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_muloco.config import RunConfig, load, load_config
from megatron_muloco.config.document import Document, merge, parse_override, read_document
from megatron_muloco.config.load import load_document
from megatron_muloco.config.schema import DataSource
from megatron_muloco.errors import ConfigError

SHIPPED = Path(__file__).parents[2] / "configs"
CPU = SHIPPED / "cpu_k2.yaml"


def write(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_later_files_win_and_the_file_itself_wins_over_them(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "x: {one: 1, two: 1, three: 1}\nlist: [1, 2, 3]\n")
    write(tmp_path, "deep/b.yaml", "extends: ../a.yaml\nx: {two: 2, three: 2}\n")
    run = write(tmp_path, "run.yaml", "extends: [a.yaml, deep/b.yaml]\nx: {three: 3}\nlist: [9]\n")
    document = load_document(run, ["x.four=4"])
    assert document.values == {"x": {"one": 1, "two": 2, "three": 3, "four": 4}, "list": [9]}
    assert document.places["x.one"].endswith("a.yaml:1")
    assert document.places["x.two"].endswith("b.yaml:2")
    assert document.places["x.three"].endswith("run.yaml:2")
    assert document.places["x.four"] == "--set x.four=4"
    assert "list.1" not in document.places


def test_null_takes_a_key_back_to_its_default(tmp_path: Path) -> None:
    run = write(tmp_path, "run.yaml", f"extends: {CPU}\ntraining: {{seed: 7}}\n")
    assert load_config(run).training.seed == 7
    default = RunConfig.model_fields["training"].annotation.model_fields["seed"].default
    assert load_config(run, ["training.seed=null"]).training.seed == default
    assert load_config(run, ["training.seed="]).training.seed == default


def test_a_nulled_section_can_be_built_anew() -> None:
    config = load_config(CPU, ["outer=null", "outer.kind=none", "parallel.num_replicas=1"])
    assert config.outer.kind == "none"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("2.5e-4", 2.5e-4), ("1E-4", 1e-4), ("+1e-4", 1e-4), (".5", 0.5), ("1", 1.0)],
)
def test_numbers_as_people_write_them(text: str, value: float) -> None:
    assert load_config(CPU, [f"inner.lr={text}"]).inner.lr == value


def test_counts_may_be_written_as_floats() -> None:
    config = load_config(CPU, ["training.train_iters=null", "training.train_tokens=2.5e6"])
    assert config.training.train_tokens == 2_500_000


def test_values_of_overrides_are_yaml() -> None:
    config = load_config(CPU, ["data.train=[{path: a, weight: 2}, {path: b}]"])
    assert [(source.path, source.weight) for source in config.data.train] == [("a", 2), ("b", 1)]


@pytest.mark.parametrize("written", ["a", "[a]", "[{path: a}]", "[{path: a, weight: 1}]"])
def test_a_path_alone_is_a_dataset(written: str) -> None:
    assert load_config(CPU, [f"data.train={written}"]).data.train == (DataSource(path="a"),)


def test_configs_are_frozen_and_remember_their_places() -> None:
    config = load_config(CPU, ["inner.lr=0.5"])
    with pytest.raises(ValidationError, match="frozen"):
        config.inner.lr = 1.0  # type: ignore[misc]
    assert config.where("inner.lr") == "--set inner.lr=0.5"
    assert config.where("outer.guard.max_norm_ratio") == config.where("outer")
    assert config.where("outer").startswith(str(CPU))
    assert config.where("nothing.like.this") == ""


def test_values_survive_being_saved() -> None:
    config = load_config(CPU)
    again = RunConfig.model_validate(config.model_dump(mode="json"))
    assert again.model_dump() == config.model_dump()
    assert again.digest() == config.digest() == load_config(CPU).digest()
    assert load_config(CPU, ["inner.lr=0.5"]).digest() != config.digest()


def test_a_missing_file(tmp_path: Path) -> None:
    message = problems_of(tmp_path / "absent.yaml")
    assert "absent.yaml: cannot be read (No such file or directory)" in message
    assert "cannot be read: it is a directory, pipe or device" in problems_of(tmp_path)
    os.mkfifo(tmp_path / "pipe.yaml")  # an open of it would wait for a writer
    assert "it is a directory, pipe or device" in problems_of(tmp_path / "pipe.yaml")


@pytest.mark.parametrize("text", ["", "\n# only a comment\n", "{}"])
def test_an_empty_file(tmp_path: Path, text: str) -> None:
    assert "run.yaml: the file is empty. A config needs the sections" in problems_of(
        write(tmp_path, "run.yaml", text)
    )


@pytest.mark.parametrize(("text", "kind"), [("- 1\n- 2\n", "list"), ("hello", "str"), ("3", "int")])
def test_a_file_that_is_not_a_mapping(tmp_path: Path, text: str, kind: str) -> None:
    message = problems_of(write(tmp_path, "run.yaml", text))
    assert f"run.yaml:1  the file holds a {kind}, not sections" in message


@pytest.mark.parametrize(
    ("text", "line"),
    [("a: [1, 2\nb: 3\n", 2), ("a: 1\n  b: 2\n", 2), ("a: 'open\n", 2), ("a: *nowhere\n", 1)],
)
def test_broken_yaml_is_named_by_line(tmp_path: Path, text: str, line: int) -> None:
    message = problems_of(write(tmp_path, "run.yaml", text))
    assert f"run.yaml:{line}  not valid YAML: " in message


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "run.yaml: not a UTF-8 text file" in problems_of(path)
    path.write_bytes(b"a: \x00")
    assert "run.yaml  not valid YAML" in problems_of(path)


def test_repeated_keys_are_refused_with_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", "model:\n  seq_length: 1\n  seq_length: 2\nmodel: {}\n")
    message = problems_of(path)
    assert f"{path}:3  model.seq_length: repeated; first written at {path}:2." in message
    assert f"{path}:4  model: repeated; first written at {path}:1." in message


def test_a_key_repeated_on_one_line_is_not_sent_to_itself(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", "model: {seq_length: 1, seq_length: 2}\n")
    assert f"{path}:1  model.seq_length: repeated; twice on this line." in problems_of(path)


@pytest.mark.parametrize("text", ["a: &x {b: 1}\nc: {<<: *x}\n", "? [1, 2]\n: 3\n"])
def test_keys_are_plain_words(tmp_path: Path, text: str) -> None:
    assert "a key must be a plain word" in problems_of(write(tmp_path, "run.yaml", text))


def test_an_alias_that_contains_itself(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", "a: &x\n  b: *x\n")
    assert "a.b: this alias contains itself" in problems_of(path)


def test_unreadable_values_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", "a: !!python/object:os.system {}\nb: 2026-13-77\n")
    message = problems_of(path)
    assert f"{path}:2  b: month must be in 1..12" in message


def test_extends_of_a_missing_file_is_named_where_it_is_written(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", "model: {}\nextends: models/none.yaml\n")
    message = problems_of(path)
    assert f"{path}:2  extends: models/none.yaml does not exist" in message
    assert str(tmp_path / "models/none.yaml") in message


@pytest.mark.parametrize("text", ["extends: 3\n", "extends: [1]\n", "extends: {a: b}\n"])
def test_extends_is_a_name_or_names(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, "run.yaml", text)
    assert f"{path}:1  extends: expected a file name" in problems_of(path)


def test_a_circle_of_extends(tmp_path: Path) -> None:
    a = write(tmp_path, "a.yaml", "extends: b.yaml\nx: 1\n")
    write(tmp_path, "b.yaml", "extends: a.yaml\n")
    message = problems_of(a)
    assert "extends itself" in message
    assert "a.yaml extends " in message
    assert "b.yaml extends " in message


def test_one_file_may_be_reached_twice(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "x: 1\n")
    write(tmp_path, "a.yaml", "extends: base.yaml\n")
    write(tmp_path, "b.yaml", "extends: base.yaml\ny: 2\n")
    run = write(tmp_path, "run.yaml", "extends: [a.yaml, b.yaml]\nz: 3\n")
    assert load_document(run).values == {"x": 1, "y": 2, "z": 3}


@pytest.mark.parametrize("text", ["nonsense", "=3", "a..b=3", "a.=3"])
def test_overrides_have_a_form(text: str) -> None:
    assert f"--set {text}: not of the form section.key=value" in problems_of(CPU, text)


def test_all_broken_overrides_are_reported() -> None:
    message = problems_of(CPU, "one", "inner.lr=[1", "two")
    assert message.count("not of the form") == 2
    assert "--set inner.lr=[1  not valid YAML" in message
    assert "--set inner.muon={eps: 1, eps: 2}  inner.muon.eps: repeated" in problems_of(
        CPU, "inner.muon={eps: 1, eps: 2}"
    )


def bomb() -> str:
    """A file of 20 lines that stands for 2^20 values."""
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 20)]
    return "\n".join(lines)


HOSTILE: dict[str, tuple[str, str]] = {
    "aliases": (bomb(), "the config has more than 20000 values"),
    "brackets": ("a: " + "[" * 2000 + "]" * 2000, "nested more than 20 levels deep"),
    "braces": ("{a: " * 30 + "1" + "}" * 30, "nested more than 20 levels deep"),
    "large": ("# " + "x" * 2**20, "more than 1048576 characters"),
    "nul": ('checkpoint: {dir: "a\\0b"}', "checkpoint.dir: 'a\\x00b' holds a NUL character"),
    "surrogate": ('checkpoint: {dir: "a\\ud800"}', "checkpoint.dir: 'utf-8' codec can't encode"),
    "code": ("a: !!python/name:os.getcwd", "could not determine a constructor"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_with_their_name(tmp_path: Path, case: str) -> None:
    text, reason = HOSTILE[case]
    message = problems_of(write(tmp_path, "run.yaml", text))
    assert "run.yaml" in message
    assert reason in message


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        (f"a={'[' * 2000}", "nested more than 20 levels deep"),
        ("a=*b", "not valid YAML"),
        ("a." * 1000 + "b=1", "not of the form section.key=value"),
        ("model.num_layers=1e9", "1000000000.0 is not a whole number"),
        ("model.num_layers=1000000000", "it must be at most 1024"),
        ("model.num_attention_heads=1000000000", "it must be at most 100000000"),
        ("parallel.pipeline_model_parallel_size=1000000000", "it must be at most 65536"),
        ("parallel.tensor_model_parallel_size=32768", "does not divide the 3 attention heads"),
        ("training.train_iters=1e30", "it must be at most 1000000000000000000"),
        ("training.train_iters=1e9", "has 100000000 rounds, and at most 5000000 are possible"),
        ("training.rampup_batch_size=[1, 1, 100000000000000]", "it must be at most 1000000000000"),
        ("training.control_timeout_minutes=1000000000", "it must be at most 527040"),
        ("data.seed=4294967296", "it must be below 4294967296"),
        ("training.seed=-1", "it must be at least 0"),
        ("inner.muon.num_ns_steps=1000000000", "it must be at most 100"),
    ],
)
def test_values_that_no_run_can_use_are_refused(override: str, reason: str) -> None:
    assert reason in problems_of(CPU, override)


def test_a_ramp_of_the_batch_with_endless_increments_is_refused() -> None:
    changes = ["training.global_batch_size=100000000", "training.rampup_batch_size=[2, 2, 1000]"]
    message = problems_of(CPU, *changes)
    assert "the batch would rise 49999999 times, and at most 1000 times are possible" in message


def test_a_job_of_more_ranks_than_a_plan_can_list_is_refused() -> None:
    sizes = ("num_replicas", "context_parallel_size")
    message = problems_of(CPU, *(f"parallel.{size}=60000" for size in sizes))
    assert "3600000000 ranks are more than the 65536 that a job may have" in message


def test_only_the_first_of_thousands_of_unknown_keys_are_explained(tmp_path: Path) -> None:
    lines = "".join(f"unknown_{i}: 1\n" for i in range(5000))
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "run.yaml", f"extends: {CPU}\n{lines}"))
    *shown, last = caught.value.problems
    assert len(shown) == 20
    assert all("unknown key" in problem for problem in shown)
    assert "the last of 4980 more problems, which are not shown" in last


def test_an_unknown_key_is_refused_when_it_is_null() -> None:
    for key in ("outer.fragmets", "nonsense", "training.train_iter"):
        assert f"{key}: unknown key" in problems_of(CPU, f"{key}=null")
    sources = "data.train=[{path: a, wieght: }]"
    assert "data.train.0.wieght: unknown key" in problems_of(CPU, sources)
    # One that another kind of the section has is only reset.
    config = load_config(CPU, ["outer.compression.bits=null"])
    assert config.digest() == load_config(CPU).digest()


def test_a_file_that_many_ways_lead_to_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a row of diamonds there are 2^25 ways from the first file to the last."""
    write(tmp_path, "0.yaml", "x: {deep: 1}\n")
    for i in range(1, 26):
        for side in "ab":
            write(tmp_path, f"{i}{side}.yaml", f"extends: {i - 1}.yaml\n{side}{i}: {i}\n")
        write(tmp_path, f"{i}.yaml", f"extends: [{i}a.yaml, {i}b.yaml]\n")
    read: list[str] = []

    def counting(path: str) -> Document:
        read.append(path)
        return read_document(path)

    monkeypatch.setattr(load, "read_document", counting)
    monkeypatch.setattr(load, "_LONGEST_CHAIN", 100)
    document = load_document(tmp_path / "25.yaml")
    assert len(read) == len(set(read)) == 76
    assert document.values == {"x": {"deep": 1}} | {
        f"{side}{i}": i for i in range(1, 26) for side in "ab"
    }


def test_a_long_chain_of_extends_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "0.yaml", "x: 1\n")
    for i in range(1, 500):
        write(tmp_path, f"{i}.yaml", f"extends: {i - 1}.yaml\n")
    assert "a chain of more than 30 files" in problems_of(tmp_path / "499.yaml")


values = st.recursive(
    st.integers() | st.text(max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
mappings = st.dictionaries(st.sampled_from("abc"), values, max_size=3)


@given(mappings, mappings)
def test_merging_keeps_what_only_one_says_and_the_last_word_on_the_rest(
    one: dict[str, object], two: dict[str, object]
) -> None:
    merged = merge(Document(one), Document(two)).values
    assert merged.keys() == one.keys() | two.keys()
    for key, value in merged.items():
        below, above = one.get(key), two.get(key)
        if isinstance(below, dict) and isinstance(above, dict):
            assert value == merge(Document(below), Document(above)).values
        else:
            assert value == (above if key in two else below)


def test_reading_leaves_extends_alone() -> None:
    document = read_document(str(SHIPPED / "15b_k16.yaml"))
    assert document.values["extends"] == ["models/15b.yaml", "methods/muloco_k16.yaml"]


def test_an_override_is_one_key() -> None:
    assert parse_override("a.b=[1, {c: 2}]").values == {"a": {"b": [1, {"c": 2}]}}


def test_a_learning_rate_of_another_optimizer_is_warned_of(tmp_path: Path) -> None:
    (warning,) = load_config(CPU, ["inner.kind=adamw"]).warnings
    assert f"inner.lr ({CPU}:" in warning
    assert "was written for muon, but inner.kind (--set inner.kind=adamw) is adamw" in warning
    assert "Set inner.lr too, or extend a file of configs/methods/" in warning
    run = write(tmp_path, "run.yaml", f"extends: {CPU}\ninner: {{kind: adamw}}\n")
    (warning,) = load_config(run).warnings
    assert f"inner.kind ({run}:2) is adamw" in warning
    child = write(tmp_path, "child.yaml", "extends: run.yaml\ntraining: {seed: 1}\n")
    assert len(load_config(child).warnings) == 1
    assert load_config(child, ["inner.kind=muon"]).warnings == ()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["inner.lr=0.01"],
        ["inner.kind=muon"],
        ["inner.kind=adamw", "inner.lr=0.01"],
        ["inner.lr=0.01", "inner.kind=adamw"],
    ],
)
def test_a_learning_rate_that_is_given_with_the_optimizer_is_not(overrides: list[str]) -> None:
    assert load_config(CPU, overrides).warnings == ()


def test_no_shipped_run_is_warned_of() -> None:
    for path in SHIPPED.glob("*_*.yaml"):
        assert load_config(path).warnings == (), path


def test_a_method_file_brings_its_own_learning_rate(tmp_path: Path) -> None:
    text = f"extends: [{CPU}, {SHIPPED}/methods/diloco_k2.yaml]\n"
    assert load_config(write(tmp_path, "run.yaml", text)).warnings == ()
