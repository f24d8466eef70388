"""Text to indexed datasets: readers, tokenizer, order, errors and interruptions."""

import gzip
import hashlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_muloco.data import indexed as indexed_module
from megatron_muloco.data import prepare as prepare_module
from megatron_muloco.data.indexed import check_indexed, open_indexed, read_manifest
from megatron_muloco.data.prepare import (
    BadRecord,
    Part,
    PrepareOptions,
    layout_of,
    prepare,
    raw_records,
    text_of,
)
from megatron_muloco.data.tokenizer import (
    check_tokenizer,
    check_vocab_size,
    load_encoder,
    load_tokenizer,
    tokenizer_digest,
    train_tokenizer,
)
from megatron_muloco.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
WORDS = ["the", "replica", "anchor", "takes", "mean", "of", "pseudogradients", "naïve", "数", "42"]
BYTES = PrepareOptions("byte-level", workers=1)


def sentences(count, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 40))) + ".\n" for _ in range(count)]


def write_jsonl(path, texts, **extra):
    lines = [json.dumps({"text": text, **extra}) + "\n" for text in texts]
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(lines)
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(sentences(300), vocab_size=320))
    return str(path)


def documents(prefix):
    """The token lists of a dataset, read without Megatron."""
    files = open_indexed(prefix)
    found, start = [], 0
    for length in files.lengths.tolist():
        found.append(files.tokens[start : start + length].tolist())
        start += length
    return found


def contents(prefix):
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


# Readers


@pytest.mark.parametrize(
    ("name", "layout"),
    [("a.jsonl", "jsonl"), ("a.json.gz", "jsonl"), ("a.txt", "text"), ("a.v2.gz", "text")],
)
def test_layout_follows_the_name(name, layout):
    assert layout_of(name) == layout


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_paragraphs_and_whole_files_lose_nothing(tmp_path, suffix):
    data = "\ufeffone\ntwo\n\n\n  three\n \nfour".encode()
    path = str(tmp_path / f"a.txt{suffix}")
    Path(path).write_bytes(gzip.compress(data) if suffix else data)
    paragraphs = [(r.line, text_of(r, "")) for r in raw_records(path, "paragraphs")]
    assert paragraphs == [(1, "one\ntwo\n"), (5, "  three\n"), (7, "four")]
    (whole,) = raw_records(path, "text")
    assert text_of(whole, "") == data.decode("utf-8-sig")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x"', "not valid JSON"),
        (b'["text"]', "a JSON list where an object"),
        (b'{"body": "x"}', "no key 'text'; the keys are 'body' .--json-keys names"),
        (b'{"text": 7}', "'text' is a int, not a string"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b'{"text": "\xff"}', "not valid UTF-8"),
    ],
    ids=["cut", "list", "key", "number", "surrogate", "encoding"],
)
def test_bad_line_is_named_by_file_and_line(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    good, bad = raw_records(str(path), "jsonl")
    assert text_of(good, "text") == "fine"
    with pytest.raises(BadRecord, match=reason) as error:
        text_of(bad, "text")
    assert f"{path}:3: " in str(error.value)


def test_bad_encoding_in_a_whole_file_is_named_by_its_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\nthr\xffee\n")
    with pytest.raises(BadRecord, match=r"a\.txt:3: not valid UTF-8"):
        text_of(next(iter(raw_records(str(path), "text"))), "")


def test_damaged_gzip_is_refused_even_when_lines_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    write_jsonl(path, sentences(50))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"a\.jsonl\.gz: damaged gzip"):
        list(raw_records(str(path), "jsonl"))


# Tokenizer


@pytest.mark.parametrize(
    "text",
    [
        " leading and trailing \n",
        "\n\n\ttabs\r\n  and    runs of blanks\n",
        "<s> </s> <unk> <0x41> are text",
        "数学 naïve e\u0301 \ufb01 \u00a0 🙂 \x00\x01\x7f",
        "0123456789" * 30,
        "",
    ],
    ids=["blanks", "lines", "controls", "unicode", "digits", "empty"],
)
def test_tokenizer_returns_every_text_exactly(model, text):
    (ids,) = load_encoder("sentencepiece", model).encode_batch([text])
    assert load_tokenizer("sentencepiece", model).detokenize(ids) == text
    assert not {0, 1, 2, 3} & set(ids)  # unk, bos, eos and pad never come from text


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_encoder_agrees_with_megatron(model, kind):
    path = model if kind == "sentencepiece" else None
    encoder, tokenizer = load_encoder(kind, path), load_tokenizer(kind, path)
    assert (encoder.vocab_size, encoder.eod) == (tokenizer.vocab_size, tokenizer.eod)
    texts = sentences(20, seed=1)
    assert encoder.encode_batch(texts) == [tokenizer.tokenize(text) for text in texts]


def test_training_is_deterministic():
    assert train_tokenizer(sentences(200), vocab_size=300) == train_tokenizer(
        iter(sentences(200)), vocab_size=300
    )


@pytest.mark.parametrize(
    ("texts", "size", "reason"),
    [
        (["abc"], 100, "leaves no room"),
        (["abc"], 5000, "cannot build it from 1 lines"),
        ([], 300, "no text"),
    ],
    ids=["small", "large", "empty"],
)
def test_impossible_vocabulary_is_explained(texts, size, reason):
    with pytest.raises(ConfigError, match=reason):
        train_tokenizer(texts, vocab_size=size)


def test_line_longer_than_the_trainer_takes_is_used(model):
    text = "".join(random.Random(0).choices("abcdefghij ", k=100_000))
    assert len(train_tokenizer([text], vocab_size=300)) > 0


def test_unusable_tokenizers_are_refused(model, tmp_path):
    foreign = tmp_path / "foreign.model"
    foreign.write_bytes(b"not a model")
    for load in (load_encoder, load_tokenizer):
        with pytest.raises(ConfigError, match="not a usable sentencepiece tokenizer"):
            load("sentencepiece", str(foreign))
        with pytest.raises(ConfigError, match="does not exist"):
            load("sentencepiece", str(tmp_path / "absent.model"))
        with pytest.raises(ConfigError, match="is not one of"):
            load("wordpiece", str(foreign))
    with pytest.raises(ConfigError, match="smaller than the 320 ids"):
        load_tokenizer("sentencepiece", model, model_vocab_size=319)
    assert load_tokenizer("sentencepiece", model, model_vocab_size=320).vocab_size == 320
    assert check_vocab_size(320, 320) == []


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [("sentencepiece", "Train one with"), ("huggingface", "Hugging Face tokenizer there"),
     ("tiktoken", "vocabulary file of a tiktoken")],
)  # fmt: skip
def test_the_remedy_for_a_missing_tokenizer_is_that_of_its_type(kind, remedy):
    (problem,) = check_tokenizer(kind, "./absent")
    assert problem.startswith("data.tokenizer_model: ./absent does not exist. ")
    assert remedy in problem


# ---- splits -------------------------------------------------------------------------------


def test_a_split_gives_every_document_to_one_side_and_keeps_it_there():
    texts = sentences(400)
    sides = {text: [Part(0.25, 7, valid).takes(text) for valid in (False, True)] for text in texts}
    assert all(sorted(side) == [False, True] for side in sides.values())
    more = Part(0.5, 7, True)  # a larger share holds out the same documents, and others
    held_out = {text for text, (_, valid) in sides.items() if valid}
    assert all(more.takes(text) for text in held_out)
    # 400 draws of 1/4: mean 100, standard deviation 8.7; six of them either way.
    assert 48 < len(held_out) < 152
    assert held_out != {text for text in texts if Part(0.25, 8, True).takes(text)}


def test_the_two_sides_of_a_split_hold_all_documents(tmp_path):
    texts = sentences(60)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    command = [sys.executable, str(REPOSITORY / "tools/prepare_data.py"), f"--input={source}"]
    command += [f"--output-prefix={tmp_path}/a", "--tokenizer-type=byte-level", "--workers=1"]
    subprocess.run([*command, "--split=0.3"], check=True, env=os.environ, timeout=120)
    part = Part(0.3, 0, True)
    whole = prepare([source], str(tmp_path / "whole"), BYTES)
    sides = {name: documents(tmp_path / f"a_{name}") for name in ("train", "valid")}
    expected = {True: [], False: []}
    for text, document in zip(texts, documents(tmp_path / "whole"), strict=True):
        expected[part.takes(text)].append(document)
    assert sides == {"train": expected[False], "valid": expected[True]}
    counts = [read_manifest(str(tmp_path / f"a_{name}")).documents for name in sides]
    assert sum(counts) == whole.documents
    refused = subprocess.run([*command, "--split=1.5"], capture_output=True, text=True, timeout=120)
    assert (refused.returncode, "between 0 and 1" in refused.stderr) == (2, True)


def test_digest_follows_the_content(model, tmp_path):
    copy = tmp_path / "copy.model"
    copy.write_bytes(Path(model).read_bytes())
    assert tokenizer_digest("sentencepiece", model) == tokenizer_digest("sentencepiece", str(copy))
    copy.write_bytes(copy.read_bytes() + b"\0")
    assert tokenizer_digest("sentencepiece", model) != tokenizer_digest("sentencepiece", str(copy))


# Preparing


def test_dataset_holds_every_document_in_order(tmp_path, model):
    first, second = sentences(30), sentences(20, seed=2)
    inputs = [
        write_jsonl(tmp_path / "a.jsonl", [*first, " \n"]),
        write_jsonl(tmp_path / "b.jsonl.gz", second),
    ]
    (tmp_path / "c.txt").write_text("a whole file\n\nis one document\n")
    prefix = str(tmp_path / "deep" / "er" / "set")
    manifest = prepare(
        [*inputs, str(tmp_path / "c.txt")],
        prefix,
        PrepareOptions("sentencepiece", model, workers=1),
    )
    texts = [*first, *second, "a whole file\n\nis one document\n"]
    expected = [[*ids, 2] for ids in load_encoder("sentencepiece", model).encode_batch(texts)]
    assert documents(prefix) == expected
    assert (manifest.documents, manifest.empty, manifest.skipped) == (51, 1, 0)
    assert manifest.tokens == sum(map(len, expected))
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert manifest == read_manifest(prefix)
    assert check_indexed(prefix) == []


def test_megatron_reads_the_dataset(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = str(tmp_path / "set")
    prepare([write_jsonl(tmp_path / "a.jsonl", ["ab", "c"])], prefix, BYTES)
    dataset = IndexedDataset(prefix)
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[97, 98, 0], [99, 0]]
    assert dataset.document_indices.tolist() == [0, 1, 2]


def test_documents_do_not_depend_on_the_number_of_workers(tmp_path, model, monkeypatch):
    monkeypatch.setattr(prepare_module, "_BATCH_BYTES", 300)  # many batches out of a small file
    inputs = [write_jsonl(tmp_path / f"{i}.jsonl", sentences(60, seed=i)) for i in range(2)]
    results = []
    for workers in (1, 3):
        prefix = str(tmp_path / f"set{workers}")
        prepare(inputs, prefix, PrepareOptions("sentencepiece", model, workers=workers))
        results.append(contents(prefix))
    assert results[0] == results[1]


def test_bad_records_fail_or_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text"\n{"text": "y"}\nnull\n')
    prefix = str(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: not valid JSON.*--on-error skip"):
        prepare([str(path)], prefix, BYTES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]
    reported = []
    options = PrepareOptions("byte-level", workers=1, on_error="skip")
    manifest = prepare([str(path)], prefix, options, report_bad=reported.append)
    assert documents(prefix) == [[120, 0], [121, 0]]
    assert manifest.skipped == 2
    assert [message.split(": ")[0][-2:] for message in reported] == [":2", ":4"]


def test_without_eod_documents_are_only_text(tmp_path):
    prefix = str(tmp_path / "set")
    options = PrepareOptions("byte-level", workers=1, append_eod=False, json_key="body")
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "ab"}\n')
    prepare([str(path)], prefix, options)
    assert documents(prefix) == [[97, 98]]


def test_input_without_text_makes_no_dataset(tmp_path):
    with pytest.raises(ConfigError, match=r"no text for .* in 1 inputs"):
        prepare([write_jsonl(tmp_path / "a.jsonl", ["", "\n"])], str(tmp_path / "set"), BYTES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["set.json", "set.bin", "set.idx", "set.json.partial"])
def test_input_is_never_written_over(tmp_path, name, overwrite):
    path = write_jsonl(tmp_path / "corpus.jsonl", ["precious"])
    linked = tmp_path / name
    linked.symlink_to(path)  # the same file under another name
    options = PrepareOptions("byte-level", workers=1, layout="jsonl", overwrite=overwrite)
    before = linked.read_bytes()
    for given in (str(linked), path):
        with pytest.raises(ConfigError, match=f"output .*{name} is the input .*, which would be"):
            prepare([given], str(tmp_path / "set"), options)
    assert linked.is_symlink()
    assert linked.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["corpus.jsonl", name])


def test_tokenizer_is_an_input_too(tmp_path, model):
    mine = tmp_path / "set.bin"
    mine.write_bytes(Path(model).read_bytes())
    options = PrepareOptions("sentencepiece", str(mine), workers=1, overwrite=True)
    with pytest.raises(ConfigError, match=r"is the input .*set\.bin, which would be lost"):
        prepare([write_jsonl(tmp_path / "a.jsonl", ["text"])], str(tmp_path / "set"), options)
    assert mine.read_bytes() == Path(model).read_bytes()


@pytest.mark.parametrize("suffix", [".json", ".bin", ".idx"])
def test_unrelated_file_is_kept_unless_told(tmp_path, suffix):
    path = write_jsonl(tmp_path / "a.jsonl", ["text"])
    other = tmp_path / f"set{suffix}"
    other.write_text("somebody else's")
    with pytest.raises(ConfigError, match=f"output .*set{suffix} exists already. Use --overwrite"):
        prepare([path], str(tmp_path / "set"), BYTES)
    assert other.read_text() == "somebody else's"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", other.name]


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_runs_with_one_prefix_do_not_mix(tmp_path, overwrite):
    """The second begins while the first writes, and again when the first has ended."""
    prefix = str(tmp_path / "set")
    first = write_jsonl(tmp_path / "a.jsonl", ["first"])
    second = write_jsonl(tmp_path / "b.jsonl", ["the second"])
    refused = []

    def start_another(read, tokens):
        with pytest.raises(ConfigError) as error:
            prepare([second], prefix, PrepareOptions("byte-level", workers=1, overwrite=overwrite))
        refused.append(str(error.value))

    manifest = prepare([first], prefix, BYTES, progress=start_another)
    assert "another process is writing it" in refused[0]
    assert documents(prefix) == [[*b"first", 0]]
    assert read_manifest(prefix) == manifest


def test_lock_of_a_file_that_was_renamed_meanwhile_is_not_the_lock(tmp_path, monkeypatch):
    """The first run publishes between the second's opening of the temporary file and its lock."""
    prefix = str(tmp_path / "set")
    path = write_jsonl(tmp_path / "a.jsonl", ["text"])
    real, opened = os.open, []

    def open_and_publish(name, flags, *args):
        descriptor = real(name, flags, *args)
        if str(name).endswith(".bin.partial") and not opened:
            opened.append(name)
            Path(name).rename(f"{prefix}.bin")
        return descriptor

    monkeypatch.setattr(indexed_module.os, "open", open_and_publish)
    with pytest.raises(ConfigError, match=r"set\.bin exists already"):
        prepare([path], prefix, BYTES)
    assert Path(f"{prefix}.bin").read_bytes() == b""  # what the first run published


def test_manifest_binds_the_files_and_the_largest_id(tmp_path):
    prefix = str(tmp_path / "set")
    manifest = prepare([write_jsonl(tmp_path / "a.jsonl", ["aez", "b"])], prefix, BYTES)
    digests = [hashlib.sha256(data).hexdigest() for data in contents(prefix)]
    assert [manifest.bin_digest, manifest.idx_digest] == digests
    assert manifest.largest_id == ord("z")


def test_id_outside_of_the_tokenizer_s_own_vocabulary_is_refused(tmp_path, monkeypatch):
    class Lying:
        vocab_size, eod = 100, 0

        def encode_batch(self, texts):
            return [list(text.encode()) for text in texts]

    monkeypatch.setattr(prepare_module, "_encoder", lambda *_: Lying())
    with pytest.raises(ConfigError, match="ids from 0 to 122, but says that it has 100 ids"):
        prepare([write_jsonl(tmp_path / "a.jsonl", ["z"])], str(tmp_path / "set"), BYTES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_existing_dataset_is_kept_unless_told(tmp_path):
    prefix = str(tmp_path / "set")
    path = write_jsonl(tmp_path / "a.jsonl", ["old"])
    prepare([path], prefix, BYTES)
    write_jsonl(tmp_path / "a.jsonl", ["new text"])
    with pytest.raises(ConfigError, match="exists already"):
        prepare([path], prefix, BYTES)
    prepare([path], prefix, PrepareOptions("byte-level", workers=1, overwrite=True))
    assert documents(prefix) == [[*b"new text", 0]]


@pytest.mark.parametrize("steps_done", [0, 1, 2, 3])
def test_publishing_stopped_anywhere_leaves_a_whole_dataset_or_none(
    tmp_path, monkeypatch, steps_done
):
    """Replacing an old dataset takes an unlink and three renames; stop before each of them."""
    prefix = str(tmp_path / "set")
    path = write_jsonl(tmp_path / "a.jsonl", ["old"])
    prepare([path], prefix, BYTES)
    write_jsonl(tmp_path / "a.jsonl", ["other text"])
    calls = []
    for name in ("unlink", "replace"):
        real = getattr(Path, name)

        def stop_after(self, *args, real=real, **kwargs):
            if self.name.endswith(".idx") or not kwargs:  # not the clean-up, which a kill prevents
                if len(calls) == steps_done:
                    raise KeyboardInterrupt
                calls.append(self.name)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(Path, name, stop_after)
    with pytest.raises(KeyboardInterrupt):
        prepare([path], prefix, PrepareOptions("byte-level", workers=1, overwrite=True))
    monkeypatch.undo()
    if Path(f"{prefix}.idx").exists():
        assert check_indexed(prefix) == []
        assert documents(prefix) == [[*b"old", 0]]
    else:
        assert "interrupted" in check_indexed(prefix)[0]


def test_killed_run_leaves_nothing_that_looks_complete(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", sentences(2000))
    script = textwrap.dedent("""
        import multiprocessing, os, signal
        from megatron_muloco.data import prepare as module

        def kill(read, tokens):
            if tokens:
                pids = [child.pid for child in multiprocessing.active_children()]
                print(*pids, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)

        if __name__ == "__main__":
            module._BATCH_BYTES = 10_000
            options = module.PrepareOptions("byte-level", workers=2)
            module.prepare(["a.jsonl"], "set", options, progress=kill)
    """)
    (tmp_path / "script.py").write_text(script)
    killed = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # The pipes were shared with the workers, so reading to their end has waited for both to leave.
    workers = [int(pid) for pid in killed.stdout.split()]
    assert len(workers) == 2
    assert not any(Path(f"/proc/{pid}/cmdline").exists() and b"script.py" in
                   Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers)  # fmt: skip
    assert (tmp_path / "set.bin.partial").exists()
    assert (
        not list(tmp_path.glob("*.idx"))
        + list(tmp_path.glob("*.bin"))
        + list(tmp_path.glob("set.json"))
    )
    prefix = str(tmp_path / "set")
    assert "neither" in check_indexed(prefix)[0]
    prepare([str(tmp_path / "a.jsonl")], prefix, BYTES)
    assert open_indexed(prefix).documents == 2000
    assert not list(tmp_path.glob("*.partial"))


# Command lines


def tool(name):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PREPARE = ["prepare_data", "--output-prefix", "set", "--input"]
TRAIN = ["train_tokenizer", "--input", "a.jsonl", "--output"]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ([*PREPARE, "no.txt", "a.jsonl"], "input no.txt does not exist"),
        ([*PREPARE, "."], "input . is a directory"),
        ([*PREPARE, "a.jsonl"], "data.tokenizer_model is not set"),
        ([*PREPARE, "a.jsonl", "--json-keys", "a", "b"], "once per key"),
        ([*PREPARE, "a.jsonl", "--tokenizer-type", "byte-level"], "a.jsonl:1: not valid JSON"),
        ([*TRAIN, "t.model"], "a.jsonl:1: not valid JSON"),
        ([*TRAIN, "a.jsonl", "--overwrite"], "a.jsonl is the input a.jsonl, which would be lost"),
        ([*TRAIN, "a.jsonl"], "a.jsonl is the input a.jsonl, which would be lost"),
        ([*TRAIN, "t.model", "--sample-fraction", "0"], "not in (0, 1]"),
        (["demo_corpus", "--packages", "no_such_package"], "no_such_package not installed"),
        (["fetch_corpus"], "apt-get, apt-cache, dpkg-deb not found"),
    ],
)
def test_tools_report_bad_input_and_write_nothing(tmp_path, monkeypatch, capsys, command, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "a.jsonl").write_text("nonsense\n")
    assert tool(command[0]).main([*command[1:]]) == 2
    errors = capsys.readouterr().err
    assert "error: " in errors
    assert reason in errors
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_bad_line_behind_many_good_ones_is_named_by_train_tokenizer(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, sentences(200))
    path.write_text(path.read_text() + "nonsense\n")
    arguments = ["--input", str(path), "--output", str(tmp_path / "t.model")]
    assert tool("train_tokenizer").main(arguments) == 2
    assert f"error: {path}:201: not valid JSON" in capsys.readouterr().err


def test_demo_corpus_does_not_write_over_files_of_others(tmp_path, capsys):
    mine = tmp_path / "train.jsonl"
    mine.write_text("precious")
    arguments = ["--output-dir", str(tmp_path), "--packages", "numpy"]
    assert tool("demo_corpus").main(arguments) == 2
    assert "has train.jsonl, which this tool did not write" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["train.jsonl"]
    assert mine.read_text() == "precious"


def test_train_tokenizer_as_a_command_writes_what_the_function_makes(tmp_path):
    texts = sentences(200)
    write_jsonl(tmp_path / "a.jsonl", texts)
    script = str(REPOSITORY / "tools" / "train_tokenizer.py")
    arguments = ["--input", "a.jsonl", "--output", "t.model", "--vocab-size", "300"]
    result = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "t.model: 300 ids" in result.stdout
    assert (tmp_path / "t.model").read_bytes() == train_tokenizer(texts, vocab_size=300)
