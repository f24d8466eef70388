"""Files that were written to do harm: none runs code, and none is used without a word.

Every file kind that the program reads has a row in `DATA_FILES` or `CHECKPOINT_FILES`. A payload
makes a marker file when anything unpickles or executes it.
"""

import contextlib
import io
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_muloco.checkpoint.directory import read_index
from megatron_muloco.checkpoint.layout import INDEX_FILE, LATEST_FILE, STATE_FILE, find_latest
from megatron_muloco.checkpoint.state import Description, read_description
from megatron_muloco.config import load_config
from megatron_muloco.data.checks import check_sources
from megatron_muloco.data.datasets import build_datasets
from megatron_muloco.data.indexed import file_digest
from megatron_muloco.data.prepare import PrepareOptions, prepare
from megatron_muloco.data.tokenizer import load_encoder, load_tokenizer
from megatron_muloco.errors import CheckpointError, ConfigError
from megatron_muloco.monitor.pseudogradients import _read_shards
from tests.distributed.test_checkpoint import save_after, started, state_of, store_of
from tests.support.faults import describe_again
from tests.support.spawn import run_ranks
from tests.support.tiny_models import MUON, NESTEROV, finish_tiny

SECTIONS: dict[str, Any] = {"inner": MUON, "outer": NESTEROV}
SEQ_LENGTH = 8


class Payload:
    """Pickles to a call of ``function`` with ``arguments``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def opens(marker: Path) -> Payload:
    return Payload(open, str(marker), "w")


# ---- the index of a checkpoint ------------------------------------------------------------------


def dotted(marker: Path) -> bytes:
    """A pickle that reaches ``os.mkdir`` through a module that the index names."""
    module, name = b"torch.serialization", b"os.mkdir"
    path = str(marker).encode()
    strings = b"".join(b"\x8c" + bytes([len(text)]) + text for text in (module, name))
    return b"\x80\x04" + strings + b"\x93" + b"\x8c" + bytes([len(path)]) + path + b"\x85R."


INDICES: dict[str, Callable[[Metadata, Path], bytes]] = {
    "whole": lambda _, marker: pickle.dumps(opens(marker)),
    "eval": lambda _, marker: pickle.dumps(Payload(eval, f"open({str(marker)!r}, 'w')")),
    "old protocol": lambda _, marker: pickle.dumps(opens(marker), protocol=0),
    "dotted name": lambda _, marker: dotted(marker),
    "beside the rest": lambda index, marker: pickle.dumps(
        Metadata(index.state_dict_metadata, opens(marker), index.storage_data)
    ),
    "method of a member": lambda _, marker: pickle.dumps(
        Payload(getattr, Payload(Path, str(marker)), "touch")
    ),
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_is_read_without_running_what_it_names(
    name: str, index: Metadata, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    (tmp_path / INDEX_FILE).write_bytes(INDICES[name](index, marker))
    with pytest.raises(CheckpointError, match=r"\.metadata is not an index of tensors"):
        read_index(tmp_path)
    assert not marker.exists()
    with pytest.raises(CheckpointError, match="is not the index that was saved"):
        read_index(tmp_path, "0" * 64)


def test_a_payload_runs_where_it_is_unpickled(tmp_path: Path) -> None:
    """Otherwise the tests of this file would show nothing."""
    (tmp_path / INDEX_FILE).write_bytes(pickle.dumps(opens(tmp_path / "marker")))
    with contextlib.suppress(AttributeError):  # what it made is no index
        FileSystemReader(tmp_path).read_metadata()
    assert (tmp_path / "marker").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one rank."""
    directory = tmp_path_factory.mktemp("whole")
    run_ranks(save_after, 1, 1, 0, SECTIONS, directory)
    return directory / "iter_0000001"


@pytest.fixture(scope="module")
def index(whole: Path) -> Metadata:
    return FileSystemReader(whole).read_metadata()


def test_an_index_is_what_torch_reads(whole: Path, index: Metadata) -> None:
    ours = read_index(whole, read_description(whole).index_digest)
    assert ours.state_dict_metadata == index.state_dict_metadata
    assert ours.storage_data.keys() == index.storage_data.keys()
    for key, place in index.storage_data.items():
        own = ours.storage_data[key]
        assert (own.relative_path, own.offset, own.length) == (
            place.relative_path, place.offset, place.length,
        )  # fmt: skip


def first_place(index: Metadata) -> Any:
    return next(iter(index.storage_data.values()))


def first_chunk(index: Metadata) -> Any:
    return next(iter(index.state_dict_metadata.values())).chunks[0]  # type: ignore[union-attr]


WRONG_VALUES: dict[str, tuple[Callable[[Metadata], Any], str]] = {
    "path outside": (
        lambda i: vars(first_place(i)).update(relative_path="../x"), "'../x' is no file name",
    ),
    "absolute path": (
        lambda i: vars(first_place(i)).update(relative_path="/x"), "'/x' is no file name",
    ),
    "negative offset": (lambda i: vars(first_place(i)).update(offset=-1), "are no sizes"),
    "offset of text": (lambda i: vars(first_place(i)).update(offset="1"), "are no sizes"),
    "huge length": (lambda i: vars(first_place(i)).update(length=2**70), "are no sizes"),
    "transformed": (
        lambda i: vars(first_place(i)).update(transform_descriptors=["stream.zstd"]),
        "transformed",
    ),
    "chunk outside": (
        lambda i: vars(first_chunk(i)).update(offsets=torch.Size([10**9, 0])), "lies outside",
    ),
    "lost place": (lambda i: i.storage_data.popitem(), "has no place"),
    "no places": (lambda i: vars(i).update(storage_data=None), "no entries"),
    "no tensors": (lambda i: vars(i).update(state_dict_metadata=[1]), "no entries"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_an_index_with_wrong_values_is_refused(name: str, index: Metadata, tmp_path: Path) -> None:
    damage, expected = WRONG_VALUES[name]
    wrong = pickle.loads(pickle.dumps(index))
    damage(wrong)
    (tmp_path / INDEX_FILE).write_bytes(pickle.dumps(wrong))
    with pytest.raises(CheckpointError, match=expected):
        read_index(tmp_path)


# ---- the rest of a checkpoint -------------------------------------------------------------------


def replace_tensor(path: Path, marker: Path, *, as_bytes: bool = False) -> None:
    """Let the first tensor of the anchor point to a payload, also with a description that fits."""
    index = FileSystemReader(path).read_metadata()
    place = next(p for i, p in index.storage_data.items() if i.fqn.startswith("anchor."))
    if as_bytes:
        name = next(name for name in index.state_dict_metadata if name.startswith("anchor."))
        index.state_dict_metadata[name] = BytesStorageMetadata()
    stream = io.BytesIO()
    torch.save(opens(marker), stream)
    file = path / place.relative_path
    place.offset, place.length = file.stat().st_size, len(stream.getvalue())
    file.write_bytes(file.read_bytes() + stream.getvalue())
    (path / INDEX_FILE).write_bytes(pickle.dumps(index))
    describe_again(path)


def replace_index(path: Path, marker: Path) -> None:
    (path / INDEX_FILE).write_bytes(pickle.dumps(opens(marker)))
    describe_again(path)


def payload_in(name: str) -> Callable[[Path, Path], None]:
    def write(path: Path, marker: Path) -> None:
        torch.save(opens(marker), path / name)

    return write


LOADED = "loaded"
CHECKPOINT_FILES: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "tensor": (replace_tensor, "cannot be read: rank 0: UnpicklingError: Weights only load failed"),
    "tensor as bytes": (lambda p, m: replace_tensor(p, m, as_bytes=True), "is not a tensor"),
    "index": (replace_index, "names .*open, which no index of tensors needs"),
    "description": (payload_in(STATE_FILE), "muloco.json is damaged"),
    # These are written for readers of the format and for people, and never read here.
    "common state": (payload_in("common.pt"), LOADED),
    "format": (payload_in("metadata.json"), LOADED),
    "config": (payload_in("run_config.yaml"), LOADED),
}


def load_each(paths: list[Path]) -> list[str]:
    """Load checkpoints one after the other; return what came of each."""
    run = started(SECTIONS)
    found = []
    for path in paths:
        try:
            store_of(run, path).load(path, state_of(run))
            found.append(LOADED)
        except CheckpointError as error:
            found.append(str(error))
    finish_tiny()
    return found


def test_no_file_of_a_checkpoint_runs_code(whole: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for name, (damage, _) in CHECKPOINT_FILES.items():
        shutil.copytree(whole, tmp_path / name)
        damage(tmp_path / name, marker)
    (messages,) = run_ranks(load_each, 1, [tmp_path / name for name in CHECKPOINT_FILES])
    for (_, expected), message in zip(CHECKPOINT_FILES.values(), messages, strict=True):
        with pytest.raises(CheckpointError, match=expected):
            raise CheckpointError(message)
    assert not marker.exists()


@pytest.mark.parametrize("text", ["__import__('os')", "../../x", "9" * 5000, "-1", "1\x00", "①"])
def test_a_latest_file_that_names_no_step_is_not_followed(
    text: str, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / whole.name)
    (tmp_path / LATEST_FILE).write_text(text)
    found = find_latest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "which is no step" in found.note


# ---- edits of the description -------------------------------------------------------------------

VALUES: tuple[Any, ...] = (None, True, -1, 10**30, 0.5, float("nan"), "x", [], {}, [[{"x": 1}]])


def edits(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield the tree with one value lost or replaced, for each value that loading reads."""
    for path in paths_of(tree):
        for value in ("lost", *VALUES):
            edited = json.loads(json.dumps(tree))
            owner = edited
            for key in path[:-1]:
                owner = owner[key]
            if value == "lost":
                del owner[path[-1]]
            else:
                owner[path[-1]] = value
            yield f"{'.'.join(map(str, path))} {value}", edited


def paths_of(tree: dict[str, Any]) -> list[tuple[Any, ...]]:
    own = ("replicas", 0)
    return [
        *((key,) for key in tree if key != "content_digest"),
        ("topology", "num_replicas"),
        ("topology", "tensor"),
        ("scalars", "consumed_samples"),
        own,
        *((*own, key) for key in ("digests", "inner_step", "synchronizer")),
        (*own, "digests", "anchor"),
        *((*own, "synchronizer", key) for key in ("step", "guard", "in_flight", "progress")),
        (*own, "synchronizer", "progress", 0),
        (*own, "synchronizer", "progress", 0, "steps"),
        *(("config", key) for key in ("model", "parallel", "inner", "outer")),
        *(("config", key, "kind") for key in ("inner", "outer")),
        ("config", "parallel", "num_replicas"),
    ]


def test_every_edit_of_the_description_is_noticed(whole: Path, tmp_path: Path) -> None:
    tree = json.loads((whole / STATE_FILE).read_text())
    found = 0
    for what, edited in edits(tree):
        (tmp_path / STATE_FILE).write_text(json.dumps(edited))
        if edited == tree:  # the value that it had
            continue
        with pytest.raises(CheckpointError, match=r"muloco\.json (is damaged|has format)"):
            pytest.fail(f"{what}: {read_description(tmp_path)}")
        found += 1
    assert found > 300


def test_every_flipped_bit_of_the_description_is_noticed(whole: Path, tmp_path: Path) -> None:
    content = (whole / STATE_FILE).read_bytes()
    generator = np.random.default_rng(0)
    file = tmp_path / STATE_FILE
    before = read_description(whole)
    for at in generator.integers(0, len(content), 300):
        flipped = bytearray(content)
        flipped[at] ^= 1 << int(generator.integers(8))
        file.write_bytes(flipped)
        assert outcome(tmp_path) in (str(before), str(file)), at  # a space may become a tab


def outcome(path: Path) -> str:
    """Return a description as text, or the file that the refusal names."""
    try:
        return str(read_description(path))
    except CheckpointError as error:
        return str(error).split()[0]


def test_an_edit_with_a_digest_that_fits_loads_or_is_refused(whole: Path, tmp_path: Path) -> None:
    """A digest is no signature. Values of the wrong kind still end in an error with their place."""
    tree = json.loads((whole / STATE_FILE).read_text())
    del tree["content_digest"]
    paths = []
    for number, (_, edited) in enumerate(edits(tree)):
        if edited.keys() == tree.keys():
            path = tmp_path / f"edit-{number}" / "iter_0000001"
            path.mkdir(parents=True)
            for file in whole.iterdir():
                (path / file.name).symlink_to(file)
            (path / STATE_FILE).unlink()
            (path / STATE_FILE).write_text(Description(**edited).to_json())
            paths.append(path)
    (messages,) = run_ranks(load_each, 1, paths, timeout_s=300)
    for message in messages:
        assert (
            message == LOADED
            or "Resume from an older" in message
            or "format" in message
            or ("another configuration" in message)
        ), message


def test_a_checkpoint_of_the_format_without_digests_is_read(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    tree = json.loads((whole / STATE_FILE).read_text())
    del tree["content_digest"], tree["index_digest"]
    (tmp_path / STATE_FILE).write_text(json.dumps({**tree, "format": 1}))
    assert read_description(tmp_path).anchor_digest == tree["anchor_digest"]
    (tmp_path / STATE_FILE).write_text(json.dumps(tree))  # of format 2, it lost its digests
    with pytest.raises(CheckpointError, match="is damaged"):
        read_description(tmp_path)


# ---- data ---------------------------------------------------------------------------------------


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    text = tmp_path / "text.jsonl"
    lines = (json.dumps({"text": "abcdefghij" * (1 + i % 3)}) + "\n" for i in range(30))
    text.write_text("".join(lines))
    prepare([str(text)], str(tmp_path / "set"), PrepareOptions("byte-level", workers=1))
    return str(tmp_path / "set")


def samples(prefix: str, cache: Path) -> list[list[int]]:
    datasets = build_datasets(
        train=[SimpleNamespace(path=prefix, weight=1.0)],
        valid=[],
        train_samples=60,
        valid_samples=0,
        seq_length=SEQ_LENGTH,
        seed=1,
        tokenizer=load_tokenizer("byte-level"),
        cache_dir=str(cache),
    )
    return [datasets.train[i]["tokens"].tolist() for i in range(60)]


def write_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(opens(marker)))


def read_config(path: Path, text: str) -> None:
    path.write_text(text)
    load_config(path)


def read_archive(path: Path, marker: Path) -> None:
    np.savez(path, metadata=np.array([opens(marker)], dtype=object))
    list(_read_shards(path.with_name(path.name + ".npz")))


DATA_FILES: dict[str, tuple[Callable[[str, Path, Path], Any], str]] = {
    "index": (
        lambda p, _, m: (write_pickle(Path(f"{p}.idx"), m), _refuse(p)),
        "does not start like a Megatron index",
    ),
    "tokens": (
        lambda p, _, m: (write_pickle(Path(f"{p}.bin"), m), _refuse(p)),
        "do not belong together",
    ),
    "manifest": (
        lambda p, _, m: (write_pickle(Path(f"{p}.json"), m), _refuse(p)),
        "is not a manifest",
    ),
    "sentencepiece model": (
        lambda _, d, m: (
            write_pickle(d / "t.model", m),
            load_encoder("sentencepiece", str(d / "t.model")),
        ),
        "t.model",
    ),
    "config": (
        lambda _, d, m: read_config(
            d / "c.yaml", f"model: !!python/object/apply:os.mkdir [{str(m)!r}]\n"
        ),
        "c.yaml",
    ),
    "config with a new object": (
        lambda _, d, m: read_config(d / "c.yaml", f"? !!python/object/new:open [{str(m)!r}, w]\n"),
        "c.yaml",
    ),
    "archive of pseudogradients": (lambda _, d, m: read_archive(d / "a", m), "cannot be read"),
}


def _refuse(prefix: str) -> None:
    raise ConfigError(check_sources([prefix], SEQ_LENGTH))


@pytest.mark.parametrize("name", DATA_FILES)
def test_no_file_of_a_run_runs_code(name: str, prefix: str, tmp_path: Path) -> None:
    act, expected = DATA_FILES[name]
    marker = tmp_path / "marker"
    with pytest.raises(ConfigError, match=expected):
        act(prefix, tmp_path, marker)
    assert not marker.exists()


# ---- caches of index arrays ---------------------------------------------------------------------


def cached(cache: Path, key: str) -> Path:
    (file,) = cache.rglob(f"samples-train-*-{key}.npy")
    return file


def bind_again(file: Path) -> None:
    """Renew the digest of an array, as someone would who may write to the cache."""
    base, _, key = file.stem.rpartition("-")
    path = file.with_name(f"{base}.json")
    stored = json.loads(path.read_text())
    stored["digests"][key] = file_digest(file)
    path.write_text(json.dumps(stored))


def pickled_array(cache: Path, marker: Path) -> None:
    for key in ("document", "sample", "shuffle"):
        file = cached(cache, key)
        np.save(file, np.array([opens(marker)] * 100, dtype=object), allow_pickle=True)
        bind_again(file)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


def zeroed(cache: Path, marker: Path) -> None:
    file = cached(cache, "document")
    np.save(file, np.zeros_like(np.load(file)))


CACHES: dict[str, Callable[[Path, Path], Any]] = {
    "pickled": pickled_array,
    "pickle": lambda c, m: write_pickle(cached(c, "shuffle"), m),
    "torn": lambda c, _: cached(c, "sample").write_bytes(cached(c, "sample").read_bytes()[:-7]),
    "empty": lambda c, _: cached(c, "sample").write_bytes(b""),
    "lost": lambda c, _: cached(c, "shuffle").unlink(),
    "flipped": lambda c, _: flip(cached(c, "shuffle")),
    "zeroed": zeroed,
    "pickle as description": lambda c, m: write_pickle(next(c.rglob("*.json")), m),
    "no digests": lambda c, _: next(c.rglob("*.json")).write_text("{}"),
    "of other data": lambda c, _: next(c.rglob("*.json")).write_text('{"origin": "x"}'),
    "nested": lambda c, _: next(c.rglob("*.json")).write_text("[" * 100_000),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_that_changed_is_built_again(
    name: str, prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, marker = tmp_path / "cache", tmp_path / "marker"
    before = samples(prefix, cache)
    contents = {file.name: file.read_bytes() for file in cache.rglob("*.*")}
    assert samples(prefix, cache) == before
    assert not caplog.messages
    CACHES[name](cache, marker)
    assert samples(prefix, cache) == before
    assert not marker.exists()
    assert "building it again" in caplog.text
    assert {file.name: file.read_bytes() for file in cache.rglob("*.*")} == contents


def test_samples_are_those_of_megatrons_own_cache(prefix: str, tmp_path: Path) -> None:
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQ_LENGTH,
        blend_per_split=[([prefix], None), None, None],
        path_to_cache=str(tmp_path / "megatron"),
        tokenizer=load_tokenizer("byte-level"),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    theirs = BlendedMegatronDatasetBuilder(GPTDataset, [60, 0, 0], lambda: True, config).build()[0]
    ours = samples(prefix, tmp_path / "ours")
    assert [theirs[i]["tokens"].tolist() for i in range(60)] == ours


# ---- indices that contradict themselves ---------------------------------------------------------


def edit_index(prefix: str, part: str, change: Callable[[Any], Any]) -> None:
    """Change one of the arrays of an index in place."""
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    sequences, ends = (int(n) for n in np.frombuffer(content, np.int64, 2, 18))
    first, kind, count = {
        "lengths": (34, np.int32, sequences),
        "offsets": (34 + 4 * sequences, np.int64, sequences),
        "documents": (34 + 12 * sequences, np.int64, ends),
        "counts": (18, np.int64, 2),
    }[part]
    change(np.frombuffer(memoryview(content)[first:], kind, count))
    path.write_bytes(content)


def put(at: int, value: int) -> Callable[[Any], None]:
    return lambda array: array.__setitem__(at, value)


INCONSISTENT: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "negative length": ("lengths", put(5, -3), "sequence 5 has length -3"),
    "longer": ("lengths", put(5, 99), "sequence 6 begins at byte .* and not at"),
    "swapped": ("lengths", lambda a: a[:2].__setitem__(slice(None), a[1::-1].copy()), "sequence 1"),
    "reversed": ("offsets", lambda a: a.__setitem__(slice(None), a[::-1].copy()), "sequence 0"),
    "repeated": ("offsets", lambda a: put(4, a[3])(a), "sequence 4 begins at byte"),
    "far off": ("offsets", put(7, 2**62), "sequence 7 begins at byte 4611686018427387904"),
    "negative offset": ("offsets", put(7, -8), "sequence 7 begins at byte -8"),
    "documents go back": ("documents", put(9, 2), "document 8 ends at sequence 2"),
    "documents beyond": ("documents", put(9, 2**40), "document 8 ends at sequence 1099511627776"),
    "documents begin late": ("documents", put(0, 1), "document 0 begins at sequence 1"),
    "documents end early": ("documents", put(-1, 29), "the documents end at sequence 29 of 30"),
    "fewer sequences": ("counts", put(0, 29), "its counts of sequences and documents cannot be"),
    "fewer documents": ("counts", put(1, 30), "its counts of sequences and documents cannot be"),
    "huge count": ("counts", put(0, 2**62), "is shorter than its 4611686018427387904 sequences"),
}


@pytest.mark.parametrize("name", INCONSISTENT)
@pytest.mark.parametrize("block", [4, 1 << 22])
def test_an_index_that_contradicts_itself_is_refused_at_its_first_bad_entry(
    name: str, block: int, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_muloco.data.indexed._BLOCK", block)
    assert check_sources([prefix], SEQ_LENGTH) == []
    part, change, expected = INCONSISTENT[name]
    edit_index(prefix, part, change)
    (problem,) = check_sources([prefix], SEQ_LENGTH)
    with pytest.raises(ConfigError, match=expected):
        raise ConfigError(problem)
    assert f"{prefix}.idx" in problem


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tokens": 7}, "says tokens 7, but the dataset has"),
        ({"documents": 31}, "says documents 31, but the dataset has 30"),
        ({"dtype": "int64"}, "says dtype int64, but the dataset has"),
        ({"tokens": -1}, "tokens is negative"),
        ({"tokens": "630"}, "tokens is not of type int"),
        ({"tokens": True}, "tokens is not of type int"),
        ({"inputs": {}}, "inputs is not of type list"),
        ({"surprise": 1}, "is not a manifest"),
    ],
)
def test_a_manifest_that_lies_is_refused(
    changes: dict[str, Any], expected: str, prefix: str
) -> None:
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    (problem,) = check_sources([prefix], SEQ_LENGTH)
    assert expected in problem
