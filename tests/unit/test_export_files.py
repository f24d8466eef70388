"""Files of exports: safetensors, tokenizers, windows of texts, and errors with their remedies."""

import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch

from megatron_muloco.config.schema import ModelConfig
from megatron_muloco.data.tokenizer import train_tokenizer
from megatron_muloco.errors import ConfigError
from tests.support.tensors import assert_equal
from tools.export import export, new_directory
from tools.exporting.gemma3 import embedding_scale
from tools.exporting.hugging_face import FAMILIES, ImportedModel, choose_family
from tools.exporting.megatron import release_key, require_expressible
from tools.exporting.safetensors_file import SafetensorsDirectory, write_safetensors
from tools.exporting.scoring import windows
from tools.exporting.tokenizer_files import write_tokenizer

needs_tokenizers = pytest.mark.skipif(
    importlib.util.find_spec("tokenizers") is None, reason="tokenizers is not installed"
)
MODEL = ModelConfig(
    num_layers=1,
    hidden_size=8,
    ffn_hidden_size=12,
    num_attention_heads=2,
    kv_channels=4,
    seq_length=16,
    vocab_size=512,
)


def changed(**keys: object) -> ModelConfig:
    return ModelConfig.model_validate({**MODEL.model_dump(), **keys})


# ---- safetensors -------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [10**9, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_come_back(limit: int, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.tensor([-0.0, 2.5]),
        "c": torch.ones(9),
    }
    shapes = {name: tuple(values.shape) for name, values in tensors.items()}
    total = write_safetensors(
        tmp_path, shapes, iter(tensors.items()), dtype=dtype, max_file_bytes=limit
    )
    assert total == 17 * dtype.itemsize
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (limit == 20)
    back = SafetensorsDirectory(tmp_path)
    assert back.shapes() == shapes
    for name, values in tensors.items():
        assert_equal(back.tensor(name), values)


@pytest.mark.parametrize("damage", ["header", "range", "dtype", "cut"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path, {"a": (2,)}, iter([("a", torch.ones(2))]), dtype=torch.float32)
    path = tmp_path / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(
        {
            "header": b"\xff" * 8 + raw[8:],
            "range": raw.replace(b"[0,8]", b"[0,9]"),
            "dtype": raw.replace(b"F32", b"F99"),
            "cut": raw[:-1],
        }[damage]
    )
    with pytest.raises(ConfigError, match="not a safetensors file"):
        SafetensorsDirectory(tmp_path)


def test_an_index_names_files_of_its_directory_only(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="missing"):
        SafetensorsDirectory(tmp_path)


# ---- what a target can express -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "first"),
    [
        ({}, "gemma3"),
        ({"post_layernorm": False}, "qwen3"),
        ({"post_layernorm": False, "qk_layernorm": False}, "llama"),
        ({"num_attention_heads": 3}, "lfm3"),  # the hidden size is no multiple of it
    ],
)
def test_the_default_target_can_express_the_model(keys: dict[str, object], first: str) -> None:
    assert choose_family(changed(**keys)).key == first


def test_a_target_that_cannot_names_the_keys_and_those_that_can() -> None:
    with pytest.raises(ConfigError, match=r"post_layernorm is true.*gemma3 or lfm3"):
        choose_family(MODEL, "qwen3")
    with pytest.raises(ConfigError, match="no Hugging Face class"):
        choose_family(changed(qk_layernorm=False))
    with pytest.raises(ConfigError, match="post_layernorm is true"):
        require_expressible(MODEL)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
def test_a_config_describes_its_model(family: object) -> None:
    model = next(
        each
        for each in (
            MODEL,
            changed(post_layernorm=False),
            changed(post_layernorm=False, qk_layernorm=False),
        )
        if not family.unsupported(each)  # type: ignore[attr-defined]
    )
    from tools.exporting.family import shared_config

    config = {**shared_config(model, torch.float32), **family.config(model)}  # type: ignore[attr-defined]
    fields = {**family.model(config), "init": model.init}  # type: ignore[attr-defined]
    found = ModelConfig.model_validate({**fields, "num_query_groups": None})
    assert found == model
    for key, value in {
        "attention_bias": True,
        "hidden_act": "gelu",
        "hidden_activation": "gelu",
    }.items():
        if key in config:
            with pytest.raises(ConfigError, match=key):
                family.model({**config, key: value})  # type: ignore[attr-defined]


def test_gemmas_scale_is_that_of_the_dtype() -> None:
    assert embedding_scale(4608, torch.bfloat16) == 68.0
    assert embedding_scale(256, torch.float32) == 16.0


def test_megatrons_keys() -> None:
    assert release_key("decoder.layers.3.input_layernorm.weight") == (
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        3,
    )
    assert release_key("output_layer.weight") == ("output_layer.weight", None)


# ---- tokenizers --------------------------------------------------------------------------------

TEXTS = [
    "Returns the sum of all elements.\n\n    for x in range(10):\n\tyield x  # tab",
    "naïve café, 東京 and 🙂 \u200b; 3.14159 == 2026",
    "   leading and trailing   ",
    "",
]


@needs_tokenizers
@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_ids_and_texts_are_those_of_training(kind: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from megatron_muloco.data.tokenizer import load_encoder

    path = None
    if kind == "sentencepiece":
        path = tmp_path / "t.model"
        source = Path(__file__).read_text(encoding="utf-8")
        path.write_bytes(train_tokenizer([source] * 3, vocab_size=400))
    data = {"tokenizer_type": kind, "tokenizer_model": path and str(path)}
    target = tmp_path / "out"
    target.mkdir()
    written = write_tokenizer(data, MODEL, target)
    encoder = load_encoder(kind, path and str(path))
    theirs = Tokenizer.from_file(str(target / "tokenizer.json"))
    texts = [*TEXTS, Path(__file__).read_text(encoding="utf-8").split("TEXTS = ")[0]]
    for text, ids in zip(texts, encoder.encode_batch(texts), strict=True):
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids) == text
    assert written.end_id == encoder.eod
    assert not written.notes


def test_a_tokenizer_of_another_kind_is_left_out_with_a_note(tmp_path: Path) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 50),
        model_writer=model,
        vocab_size=120,
        model_type="unigram",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path / "unigram.model"
    path.write_bytes(model.getvalue())
    data = {"tokenizer_type": "sentencepiece", "tokenizer_model": str(path)}
    assert "no BPE" in write_tokenizer(data, MODEL, tmp_path).notes[0]
    assert not (tmp_path / "tokenizer.json").exists()
    assert write_tokenizer({"tokenizer_type": "tiktoken"}, MODEL, tmp_path).notes


# ---- texts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 4, 5, 11])
def test_windows_predict_every_token_once(count: int) -> None:
    ids = list(range(100, 100 + count))
    predicted: list[int] = []
    for inputs, targets in windows(ids, first=0, length=4):
        assert len(targets) <= len(inputs) <= 4
        assert inputs[len(inputs) - len(targets) + 1 :] == targets[:-1]
        predicted += targets
    assert predicted == ids


# ---- errors ------------------------------------------------------------------------------------


def test_a_directory_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            export(path, tmp_path / "to", form="hf")
    assert not (tmp_path / "to").exists()


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="exists already"), new_directory(tmp_path / "there"):
        pass
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "new") as temporary:
        (temporary / "file").write_text(f"{1 // 0}")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_model_of_an_unknown_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        ImportedModel(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(ConfigError, match="GPT2LMHeadModel"):
        ImportedModel(tmp_path)
