"""Ranks that build the datasets together read the samples that one process would."""

import json
from types import SimpleNamespace

import torch

from megatron_muloco.data.batches import BatchSource
from megatron_muloco.data.datasets import build_datasets
from megatron_muloco.data.prepare import PrepareOptions, prepare
from megatron_muloco.data.sampler import BatchLayout
from megatron_muloco.data.tokenizer import load_tokenizer
from tests.support.spawn import run_ranks

LAYOUT = BatchLayout(8, 2, 1, 2)
STEPS = 3


def _build(prefixes: list[str], cache: str):
    sources = [SimpleNamespace(path=path, weight=1.0 + i) for i, path in enumerate(prefixes)]
    return build_datasets(
        train=sources,
        valid=sources[:1],
        train_samples=STEPS * LAYOUT.global_batch_size,
        valid_samples=LAYOUT.global_batch_size,
        seq_length=16,
        seed=3,
        tokenizer=load_tokenizer("byte-level"),
        cache_dir=cache,
    )


def _read_my_part(prefixes: list[str], cache: str):
    """Return this rank's training and held-out tokens, one replica per rank."""
    datasets = _build(prefixes, cache)
    replica = torch.distributed.get_rank()
    train = BatchSource(datasets.train, LAYOUT, replica=replica, dp_rank=0, steps=STEPS)
    held_out = LAYOUT.held_out()
    valid = BatchSource(datasets.valid, held_out, replica=0, dp_rank=0, steps=1)
    return (
        [
            train.microbatch(step, i)["tokens"].tolist()
            for step in range(1, STEPS + 1)
            for i in range(LAYOUT.num_microbatches)
        ],
        [valid.microbatch(1, i)["tokens"].tolist() for i in range(held_out.num_microbatches)],
    )


def test_two_replicas_share_the_stream_and_evaluate_on_the_same_text(tmp_path):
    prefixes = []
    for name in ("first", "second"):
        path = tmp_path / f"{name}.jsonl"
        texts = (f"{name} document {i}, a few words long" for i in range(20))
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prefixes.append(str(tmp_path / name))
        prepare([str(path)], prefixes[-1], PrepareOptions("byte-level", workers=1))
    (train0, valid0), (train1, valid1) = run_ranks(
        _read_my_part, 2, prefixes, str(tmp_path / "shared"), timeout_s=120
    )
    alone = _build(prefixes, str(tmp_path / "alone"))
    stream = [alone.train[i]["tokens"].tolist() for i in range(STEPS * LAYOUT.global_batch_size)]
    shared = [
        sample
        for step in range(STEPS)
        for replica in (train0, train1)
        for microbatch in replica[2 * step : 2 * step + 2]
        for sample in microbatch
    ]
    assert shared == stream
    assert valid0 == valid1
