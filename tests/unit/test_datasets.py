"""Megatron's datasets over prepared text, microbatches, start-up checks and statistics."""

import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_muloco.config import load_config
from megatron_muloco.config.schema import DataConfig
from megatron_muloco.data import checks
from megatron_muloco.data.batches import BatchSource, IdRange, collate, document_ids, read_ahead
from megatron_muloco.data.checks import check_data, check_run_data
from megatron_muloco.data.datasets import build_datasets
from megatron_muloco.data.indexed import open_indexed
from megatron_muloco.data.prepare import PrepareOptions, prepare
from megatron_muloco.data.sampler import BatchLayout
from megatron_muloco.data.tokenizer import load_tokenizer, masks_padding
from megatron_muloco.errors import ConfigError
from tools.corpora.statistics import token_counts, unigram_cross_entropy

SEQ_LENGTH = 8


def source(prefix, weight=1.0):
    return SimpleNamespace(path=str(prefix), weight=weight)


def make(directory, name, texts):
    """A byte-level dataset of some documents."""
    path = directory / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prefix = str(directory / name)
    prepare([str(path)], prefix, PrepareOptions("byte-level", workers=1, overwrite=True))
    return prefix


@pytest.fixture
def prefixes(tmp_path):
    """Two datasets with letters of their own."""
    lower = make(tmp_path, "lower", ["abcdefghij" * (1 + i % 3) for i in range(30)])
    upper = make(tmp_path, "upper", ["KLMNOPQRST" * (1 + i % 2) for i in range(20)])
    return lower, upper


def build(train, valid=(), *, train_samples=40, valid_samples=0, seed=1, cache=None):
    return build_datasets(
        train=train,
        valid=valid,
        train_samples=train_samples,
        valid_samples=valid_samples,
        seq_length=SEQ_LENGTH,
        seed=seed,
        tokenizer=load_tokenizer("byte-level"),
        cache_dir=str(cache) if cache else None,
    )


def tokens_of(dataset, count):
    return torch.stack([dataset[i]["tokens"] for i in range(count)])


def test_samples_are_shifted_text_with_every_position_counted(prefixes):
    datasets = build([source(prefixes[0])], [source(prefixes[1])], valid_samples=4)
    for dataset, letters in ((datasets.train, b"abcdefghij"), (datasets.valid, b"KLMNOPQRST")):
        sample = dataset[0]
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        assert set(sample["tokens"].tolist()) <= {0, *letters}
        assert sample["loss_mask"].tolist() == [1.0] * SEQ_LENGTH
        assert sample["position_ids"].tolist() == list(range(SEQ_LENGTH))
        assert "attention_mask" not in sample


def test_one_epoch_reads_every_token_about_once(prefixes):
    """All samples of an epoch are consecutive pieces, so only the last partial one is left out."""
    files = open_indexed(prefixes[0])
    whole = (len(files.tokens) - 1) // SEQ_LENGTH
    dataset = build([source(prefixes[0])], train_samples=whole).train
    read = Counter(tokens_of(dataset, whole).flatten().tolist())
    there = Counter(files.tokens.tolist())
    assert not read - there
    assert sum((there - read).values()) <= SEQ_LENGTH


def test_order_depends_on_the_seed_alone(prefixes, tmp_path):
    one, again, other = (
        tokens_of(build([source(prefixes[0])], seed=seed, cache=tmp_path / cache).train, 40)
        for seed, cache in ((1, "a"), (1, "b"), (2, "a"))
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_blend_follows_the_weights_without_a_process_group(prefixes):
    blend = [source(prefixes[0], 3.0), source(prefixes[1], 1.0)]
    tokens = tokens_of(build(blend, train_samples=80).train, 80)
    from_upper = ((tokens > 0) & (tokens < ord("a"))).any(dim=1)
    assert from_upper.sum() == 20
    assert not torch.distributed.is_initialized()


def test_dataset_prepared_again_does_not_use_the_old_index(tmp_path):
    prefix = make(tmp_path, "set", ["aaaaaaaaaaaa"] * 20)
    build([source(prefix)])
    make(tmp_path, "set", ["bb", "c" * 50] * 8)
    dataset = build([source(prefix)]).train
    assert set(tokens_of(dataset, 40).flatten().tolist()) == {0, ord("b"), ord("c")}


def test_longer_run_begins_with_the_same_samples_within_one_epoch(prefixes):
    blend = [source(prefixes[0], 3.0), source(prefixes[1], 1.0)]
    for sources in (blend[:1], blend):
        short, long = (build(sources, train_samples=n).train for n in (10, 40))
        assert torch.equal(tokens_of(short, 10), tokens_of(long, 10))


def test_text_is_repeated_when_more_is_asked_than_there_is(prefixes):
    there = len(open_indexed(prefixes[0]).tokens) // SEQ_LENGTH
    assert len(build([source(prefixes[0])], train_samples=5 * there).train) >= 5 * there


def test_cache_that_cannot_be_written_is_named(prefixes, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache_dir: .* cannot be written"):
        build([source(prefixes[0])], cache=tmp_path / "file")


def test_batches_of_all_ranks_are_the_samples_of_the_step(prefixes):
    dataset = build([source(prefixes[0])], train_samples=36).train
    layout = BatchLayout(12, 2, 3, 1)
    step = torch.cat(
        [
            BatchSource(dataset, layout, replica=r, dp_rank=d, steps=3).microbatch(3, i)["tokens"]
            for r in range(2) for d in range(3) for i in range(layout.num_microbatches)
        ]
    )  # fmt: skip
    assert torch.equal(step, tokens_of(dataset, 36)[24:])


def test_batch_source_is_a_function_of_the_step(prefixes):
    dataset = build([source(prefixes[0])]).train
    batches = BatchSource(dataset, BatchLayout(4, 1, 1, 2), replica=0, dp_rank=0, steps=10)
    forward = [batches.microbatch(step, 1)["labels"] for step in range(1, 11)]
    backward = [batches.microbatch(step, 1)["labels"] for step in range(10, 0, -1)]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    assert forward[0].shape == (2, SEQ_LENGTH)


def test_more_steps_than_samples_are_refused(prefixes):
    dataset = build([source(prefixes[0])], train_samples=4).train
    steps = len(dataset) // 4 + 1
    with pytest.raises(ValueError, match=f"{steps} steps need {steps * 4} samples"):
        BatchSource(dataset, BatchLayout(4, 1, 1, 2), replica=0, dp_rank=0, steps=steps)


def test_collate_stacks_what_the_model_takes():
    sample = {key: torch.arange(3) for key in ("tokens", "labels", "loss_mask", "position_ids")}
    batch = collate([{**sample, "dataset_id": 0}, {**sample, "dataset_id": 1}])
    assert set(batch) == set(sample)
    assert all(value.shape == (2, 3) for value in batch.values())


def test_reading_ahead_keeps_order_and_named_tensors() -> None:
    taken = []

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for index in range(4):
            taken.append(index)
            yield {"tokens": torch.tensor(index), "labels": torch.tensor(-index)}

    ahead = read_ahead(batches(), ("tokens",), pin=lambda tensor: tensor * 10)
    assert next(ahead) == {"tokens": torch.tensor(0)}
    assert [int(batch["tokens"]) for batch in ahead] == [10, 20, 30]
    assert taken == [0, 1, 2, 3]


def test_an_error_of_reading_ahead_reaches_the_step_that_needs_the_batch() -> None:
    def batches() -> Iterator[dict[str, torch.Tensor]]:
        yield {"tokens": torch.tensor(1)}
        raise OSError("the disk")

    ahead = read_ahead(batches(), ("tokens",), pin=lambda tensor: tensor)
    assert int(next(ahead)["tokens"]) == 1
    with pytest.raises(OSError, match="the disk"):
        next(ahead)


def test_end_of_document_belongs_to_the_document_it_ends():
    tokens = torch.tensor([[5, 9, 5, 5, 9, 9, 5], [9, 5, 5, 5, 5, 5, 9], [5, 5, 5, 5, 5, 5, 5]])
    assert document_ids(tokens, eod=9).tolist() == [
        [0, 0, 1, 1, 1, 2, 3],
        [0, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0],
    ]


# Start-up checks


def problems(train, *, model_vocab_size=None, seq_length=0, **changes):
    sources = [{"path": prefix} for prefix in train]
    section = DataConfig(train=sources, **{"tokenizer_type": "byte-level", **changes})
    return check_data(section, model_vocab_size=model_vocab_size, seq_length=seq_length)


def test_good_data_has_no_problems(prefixes):
    assert problems(prefixes, model_vocab_size=512, seq_length=SEQ_LENGTH) == []


def cut_bin(prefix):
    Path(f"{prefix}.bin").write_bytes(Path(f"{prefix}.bin").read_bytes()[:-1])


def cut_idx(prefix):
    Path(f"{prefix}.idx").write_bytes(Path(f"{prefix}.idx").read_bytes()[:-1])


def empty_dataset(prefix):
    header = Path(f"{prefix}.idx").read_bytes()[:18]
    Path(f"{prefix}.idx").write_bytes(header + bytes([0] * 8 + [1] + [0] * 7 + [0] * 8))
    Path(f"{prefix}.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: [Path(f"{p}{s}").unlink() for s in (".bin", ".idx")], "neither .* exists"),
        (lambda p: Path(f"{p}.bin").unlink(), "is there but .*lower.bin is not"),
        (lambda p: Path(f"{p}.idx").unlink(), "is there but .*lower.idx is not"),
        (
            lambda p: Path(f"{p}.idx").write_bytes(b"MMIDIDX"),
            "does not start like a Megatron index",
        ),
        (
            lambda p: Path(f"{p}.idx").write_bytes(b"x" * 100),
            "does not start like a Megatron index",
        ),
        (cut_bin, "do not belong together"),
        (cut_idx, "is shorter than its 30 sequences"),
        (empty_dataset, "holds no tokens"),
    ],
    ids=["none", "no-bin", "no-idx", "tiny", "magic", "cut-bin", "cut-idx", "empty"],
)
def test_damaged_dataset_is_one_problem_that_says_what_to_do(prefixes, damage, reason):
    damage(prefixes[0])
    (problem,) = problems(prefixes)
    assert f"dataset {prefixes[0]}: " in problem
    assert "Run: python tools/prepare_data.py" in problem
    with pytest.raises(ConfigError, match=reason):
        build([source(prefixes[0])])


def test_problems_of_a_run_are_placed_in_its_config(tmp_path):
    path = tmp_path / "run.yaml"
    lines = ["train: [{path: a}, {path: b}]", "valid: [{path: b}]", "tokenizer_model: absent"]
    shipped = Path(__file__).parents[2] / "configs" / "cpu_k2.yaml"
    path.write_text(f"extends: {shipped}\ndata:\n" + "".join(f"  {line}\n" for line in lines))
    first, second, tokenizer = check_run_data(load_config(path))
    assert first.startswith(f"{path}:3  data.train.0.path: dataset a: neither")
    assert second.startswith(f"{path}:3  data.train.1.path: dataset b: neither")  # and only once
    assert tokenizer.startswith(f"{path}:5  data.tokenizer_model: absent does not exist.")


def test_prefix_with_suffix_is_recognised(prefixes):
    (problem,) = problems([prefixes[0] + ".bin"])
    assert "without .bin" in problem


def test_all_problems_are_reported_at_once(prefixes, tmp_path):
    found = problems(
        ["missing", *prefixes], tokenizer_type="sentencepiece",
        tokenizer_model=str(tmp_path / "absent"), seq_length=10_000,
    )  # fmt: skip
    assert len(found) == 4  # the missing dataset, the tokenizer, and two that are too short
    assert sum("fewer than the 10001 of one sample" in problem for problem in found) == 2


def test_other_tokenizer_than_the_one_it_was_made_with_is_a_problem(prefixes):
    path = Path(f"{prefixes[0]}.json")
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "tokenizer_digest": "0" * 64}))
    (problem,) = problems(prefixes)
    assert "its tokens were made by a byte-level tokenizer of 512 ids" in problem
    path.write_text("[]")
    assert "is not a manifest" in problems(prefixes)[0]
    path.unlink()  # as prepared by another tool
    assert problems(prefixes) == []


def test_vocabulary_larger_than_the_model_is_a_problem(prefixes):
    (problem,) = problems(prefixes, model_vocab_size=256)
    assert "model.vocab_size: 256 is smaller than the 512 ids" in problem


def foreign(directory, tokens, dtype=np.int32):
    """A dataset without a manifest, as another tool writes it: documents of 24 tokens."""
    builder = IndexedDatasetBuilder(str(directory / "foreign.bin"), dtype=dtype)
    for start in range(0, len(tokens), 24):
        builder.add_document(np.array(tokens[start : start + 24], dtype), [24])
    builder.finalize(str(directory / "foreign.idx"))
    return str(directory / "foreign")


@pytest.mark.parametrize("stray", [512, -1, 2**31 - 1])
def test_stray_id_of_another_tool_is_a_problem_at_start(tmp_path, stray):
    prefix = foreign(tmp_path, [*range(1, 240), stray])
    (problem,) = problems([prefix], model_vocab_size=512)
    low, high = min(1, stray), max(239, stray)
    assert f"its ids go from {low} to {high}, but the model has embeddings for 0 to 511" in problem
    assert problems([foreign(tmp_path, [*range(240)])], model_vocab_size=512) == []


@pytest.mark.parametrize("stray", [512, -1, 2**31 - 1])
def test_stray_id_in_a_file_too_large_to_scan_is_refused_at_its_microbatch(
    tmp_path, monkeypatch, stray
):
    monkeypatch.setattr(checks, "_SCANNED_BYTES", 0)
    prefix = foreign(tmp_path, [*range(1, 240), stray])
    assert problems([prefix], model_vocab_size=512) == []
    samples = 239 // SEQ_LENGTH  # of one epoch
    tokenizer = load_tokenizer("byte-level")
    dataset = build([source(prefix)], train_samples=samples).train
    holding = [
        place
        for place in range(samples)
        if stray in dataset[place]["tokens"] or stray in dataset[place]["labels"]
    ]
    # The order of documents decides whether it is in one sample, in two (as the label of one and
    # the input of the next), or in the tokens that are left over.
    assert len(holding) in (1, 2)
    batches = BatchSource(
        dataset, BatchLayout(1, 1, 1, 1), replica=0, dp_rank=0, steps=samples,
        ids=IdRange(512, masks_padding(tokenizer)),
    )  # fmt: skip
    for place in holding:
        with pytest.raises(ConfigError, match=f"the samples {place} has id {stray}, but the model"):
            batches.microbatch(place + 1, 0)
    whole = next(place for place in range(samples) if place not in holding)
    assert batches.microbatch(whole + 1, 0)["tokens"].shape == (1, SEQ_LENGTH)


def test_ids_of_the_model_and_masked_padding_pass():
    sample = {
        "tokens": torch.tensor([0, 3, 0]),
        "labels": torch.tensor([3, 0, 0]),
        "loss_mask": torch.tensor([1.0, 0.0, 1.0]),
        "position_ids": torch.arange(3),
    }
    IdRange(4, masks_padding=True).check(collate([sample]), [0])
    with pytest.raises(ConfigError, match="has id 3, but the model has embeddings for 0 to 2"):
        IdRange(3, masks_padding=True).check(collate([sample]), [0])
    with pytest.raises(ConfigError, match="has id -1"):
        IdRange(4, masks_padding=False).check(collate([sample]), [0])


def test_padding_is_masked_where_it_is_an_id_of_its_own():
    assert masks_padding(load_tokenizer("byte-level"))
    assert masks_padding(SimpleNamespace(pad=3, eos=2, eod=2))
    assert not masks_padding(SimpleNamespace(pad=2, eos=2, eod=2))
    assert not masks_padding(SimpleNamespace(pad=-1, eos=2, eod=2))
    special = {"pad_token": 0, "bos_token": 0}
    assert not masks_padding(SimpleNamespace(pad=0, eod=2, special_tokens_dict=special))


def swap(prefix, suffix):
    """Replace one file of a dataset by that of another of the same size."""
    path = Path(f"{prefix}{suffix}")
    other = make(path.parent, "other", ["zyxwvutsrq" * (3 - i % 3) for i in range(30)])
    data = Path(f"{other}{suffix}").read_bytes()
    assert len(data) == path.stat().st_size
    path.write_bytes(data)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_file_of_another_dataset_is_a_problem(prefixes, suffix):
    swap(prefixes[0], suffix)
    (problem,) = problems(prefixes, model_vocab_size=512)
    assert f"dataset {prefixes[0]}: its files are not those that" in problem


@pytest.mark.parametrize(
    "changes", [{"tokens": 1}, {"documents": 29}, {"dtype": "int32"}, {"idx_digest": "0" * 64}]
)
def test_manifest_that_lies_is_a_problem(prefixes, changes):
    path = Path(f"{prefixes[0]}.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    (problem,) = problems(prefixes)
    words = "its files are not those that" if "idx_digest" in changes else "do not belong together"
    assert words in problem


def test_manifest_without_digests_is_accepted(prefixes):
    path = Path(f"{prefixes[0]}.json")
    older = json.loads(path.read_text())
    for key in ("largest_id", "bin_digest", "idx_digest"):
        del older[key]
    path.write_text(json.dumps(older))
    assert problems(prefixes, model_vocab_size=512) == []


def test_checks_and_sampler_import_neither_torch_nor_megatron():
    code = (
        "import sys, megatron_muloco.data.checks, megatron_muloco.data.sampler, "
        "tools.corpora.docstrings, megatron_muloco.data.prepare, "
        "tools.corpora.statistics, megatron_muloco.data.tokenizer; "
        "print([name for name in ('torch', 'megatron', 'sentencepiece') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# Statistics


def test_unigram_cross_entropy_is_the_formula(tmp_path):
    train = make(tmp_path, "train", ["aab"])  # a: 2, b: 1, end: 1
    held_out = make(tmp_path, "held_out", ["abc"])  # and c, which was never seen
    size = 512
    probabilities = [n / (4 + size) for n in (3, 2, 1, 2)]
    expected = -sum(map(math.log, probabilities)) / 4
    assert unigram_cross_entropy([train], [held_out], size) == pytest.approx(expected, rel=1e-12)


def test_counts_add_up_over_datasets_and_refuse_another_vocabulary(prefixes):
    counts = token_counts(list(prefixes), 512)
    assert counts.sum() == sum(len(open_indexed(prefix).tokens) for prefix in prefixes)
    assert counts[0] == 50  # one end per document
    assert np.flatnonzero(counts).tolist() == [0, *b"KLMNOPQRST", *b"abcdefghij"]
    with pytest.raises(ConfigError, match="holds id 106, but the vocabulary has 100"):
        token_counts([prefixes[0]], 100)
