"""Every refusal: the message names the place, the key, the value, the reason and the remedy."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_muloco.config import RULES, Problem, RunConfig, check, find_problems, load_config
from megatron_muloco.config.messages import OTHER_NAMES, REFUSED_KEYS, schema_fields
from megatron_muloco.errors import ConfigError
from megatron_muloco.topology import Topology

CPU = Path(__file__).parents[2] / "configs" / "cpu_k2.yaml"

# name of the rule -> overrides of cpu_k2.yaml and what the report must say
RULE_CASES: dict[str, tuple[list[str], list[str]]] = {
    "one_length": (
        ["training.train_tokens=1e6"],
        ["training.train_tokens: 1000000, but train_iters is set as well."],
    ),
    "one_weight_decay": (
        ["inner.weight_decay_base=0.1"],
        ["inner.weight_decay: 0.01, but weight_decay_base (0.1) is set as well."],
    ),
    "warmup_is_shorter_than_the_run": (
        ["inner.lr_warmup_iters=250"],
        ["inner.lr_warmup_iters: 250 is not shorter than the run of 250 steps"],
    ),
    "wsd_has_a_decay": (
        ["inner.lr_decay_style=WSD"],
        ["inner.lr_wsd_decay_iters: lr_decay_style is WSD, but the length of its decay is not"],
    ),
    "heads_divide": (
        ["parallel.tensor_model_parallel_size=2"],
        ["parallel.tensor_model_parallel_size: 2 does not divide the 3 attention heads"],
    ),
    "head_width_is_even": (["model.kv_channels=63"], ["model.kv_channels: 63 is odd"]),
    "tied_embedding_has_a_scale": (
        ["model.untie_embeddings_and_output_weights=false", "model.post_layernorm=false"],
        [
            "model.untie_embeddings_and_output_weights: false, but model.init is muloco",
            "Use model.init: megatron",
        ],
    ),
    "ffn_divides": (
        ["parallel.tensor_model_parallel_size=3", "model.ffn_hidden_size=500"],
        ["model.ffn_hidden_size: 500 is not divisible by tensor_model_parallel_size 3"],
    ),
    "vocabulary_divides": (
        ["parallel.tensor_model_parallel_size=3"],
        ["make_vocab_size_divisible_by: 128 pads the vocabulary to 4096, which", "multiple of 3"],
    ),
    "layers_divide": (
        ["parallel.pipeline_model_parallel_size=3"],
        [
            "pipeline_model_parallel_size: 3 does not divide the 4 layers",
            "Use one of 1, 2, 4, or set parallel.num_layers_in_last_pipeline_stage, such as to 2.",
        ],
    ),
    "sequence_divides": (
        [
            "parallel.tensor_model_parallel_size=3",
            "parallel.sequence_parallel=true",
            "model.make_vocab_size_divisible_by=3",
        ],
        ["model.seq_length: 256 is not divisible by tensor_model_parallel_size 3"],
    ),
    "context_parallel_attention_is_dense": (
        ["parallel.context_parallel_size=2", "model.attention_impl=varlen"],
        ["model.attention_impl: varlen, but with context_parallel_size 2 a rank attends with"],
    ),
    "batch_divides": (
        ["training.global_batch_size=24"],
        [
            "training.global_batch_size: 24 is not divisible by 2 replicas x dp 1 x "
            "micro_batch_size 8 = 16.",
            "Use 16 or 32.",
        ],
    ),
    "rampup_reaches_the_batch": (
        ["training.rampup_batch_size=[8, 3, 100]"],
        ["training.rampup_batch_size: from 8 in increments of 3 the batch does not reach"],
    ),
    "data_parallelism_has_one_replica": (
        ["outer=null", "outer.kind=none"],
        ["parallel.num_replicas: 2, but outer.kind is none"],
    ),
    "fragments_have_layers": (
        ["outer.fragments.count=5"],
        ["outer.fragments.count: 5 is more than the 4 layers of the model"],
    ),
    "exceptions_fit_the_compression": (
        ["outer.compression={kind: e3m0, exceptions: {norm: 8}}"],
        ["outer.compression.exceptions.norm: 8, but kind e3m0 has no choice of bits"],
    ),
    "block_size_has_blocks": (
        ["outer.compression={kind: linear, bits: 4, block_size: 64}"],
        ["outer.compression.block_size: 64 has no effect with granularity tensor"],
    ),
    "attention_is_deterministic": (
        ["training.deterministic=true", "model.attention_impl=flex"],
        ["model.attention_impl: flex, but training.deterministic is true"],
    ),
    "codec_is_deterministic": (
        ["training.deterministic=true", "outer.compression={kind: statistical, bits: 4}"],
        ["outer.compression.kind: statistical, but training.deterministic is true"],
    ),
    "additive_apply_overlaps": (
        ["outer.apply=additive", "outer.mixing_weight=0.5"],
        [
            "outer.apply: additive, but overlap_steps is 0",
            "outer.mixing_weight: 0.5 has no effect with apply additive",
        ],
    ),
    "norm_ratio_is_above_one": (
        ["outer.guard.max_norm_ratio=1"],
        ["outer.guard.max_norm_ratio: 1 excludes norms on both sides of the median"],
    ),
    "usable_replicas_exist": (
        ["outer.guard.min_usable_replicas=3"],
        ["outer.guard.min_usable_replicas: 3 is more than parallel.num_replicas 2"],
    ),
    "overlap_is_shorter_than_the_spacing": (
        ["outer.overlap_steps=5", "outer.fragments.count=2"],
        ["outer.overlap_steps: 5 is not shorter than the 5 steps between two launches"],
    ),
    "rounds_of_schedules_ascend": (
        [
            "outer.lr={kind: steps, values: [[2, 0.9], [5, 0.8]]}",
            "outer.momentum={kind: steps, values: [[1, 0.5], [5, 0.6], [5, 0.7], [3, 0.8]]}",
            "outer.sync_interval={kind: steps, values: [[1, 10], [1, 20]]}",
        ],
        [
            "outer.lr.values.0: the first round is 2, so there is no value for the rounds before",
            "outer.momentum.values.2: round 5 comes after round 5, but each pair holds until",
            "outer.momentum.values.3: round 3 comes after round 5",
            "outer.sync_interval.values.1: round 1 comes after round 1",
        ],
    ),
    "run_has_a_round": (
        ["outer.sync_interval=251"],
        ["outer.sync_interval: 251 is longer than the run of 250 steps"],
    ),
    "recompute_is_complete": (
        ["training.recompute_granularity=full"],
        ["training.recompute_num_layers: not set, but recompute_granularity full needs it."],
    ),
    "gather_overlap_needs_reduce_overlap": (
        ["training.overlap_param_gather=true"],
        ["training.overlap_param_gather: true, but overlap_grad_reduce is false"],
    ),
    "evaluation_has_data": (
        ["data.valid=[]"],
        ["training.eval_interval: 50, but data.valid is empty."],
    ),
    "tokenizer_is_named": (
        ["data.tokenizer_model=null"],
        ["data.tokenizer_model: not set, but tokenizer_type sentencepiece needs it."],
    ),
    "saving_has_a_place": (
        ["checkpoint.dir=null"],
        ["checkpoint.save_interval: 100, but checkpoint.dir is not set."],
    ),
    "retained_steps_are_saved": (
        ["checkpoint.save_retain_interval=150"],
        ["checkpoint.save_retain_interval: 150 is no multiple of save_interval 100, so the steps"],
    ),
    "resuming_has_a_place": (
        ["checkpoint.dir=null", "checkpoint.save_interval=0", "checkpoint.resume=runs/old"],
        ["checkpoint.resume: runs/old, but checkpoint.dir is not set, so the run could not"],
    ),
    "first_weights_are_used": (
        ["checkpoint.init_from=runs/a", "checkpoint.resume=runs/b"],
        ["checkpoint.init_from: runs/a, but checkpoint.resume is runs/b, whose weights"],
    ),
    "gram_matrices_have_precision": (
        ["inner.muon.ns_impl=gram", "inner.muon.ns_dtype=bf16"],
        ["inner.muon.ns_impl: gram, but ns_dtype is bf16;", "auto or plain, or ns_dtype: fp32"],
    ),
    "precision_of_gradients_fits": (
        ["training.accumulate_dtype=bf16"],
        ["training.accumulate_dtype: bf16, but precision is fp32"],
    ),
    "profile_has_a_window": (
        ["monitor.profile.steps=[20, 10]", "monitor.dir=null"],
        [
            "monitor.profile.steps: [20, 10] ends before it begins.",
            "monitor.profile.steps: [20, 10], but monitor.dir is not set.",
        ],
    ),
    "saved_rounds_exist": (
        [
            "monitor.save_pseudogradients={dir: saved, rounds: [5, 2], steps: true}",
            "outer.fragments.count=2",
        ],
        [
            "monitor.save_pseudogradients.steps: true, but the steps of a round add up",
            "monitor.save_pseudogradients.rounds: [5, 2] ends before it begins.",
        ],
    ),
    "spike_ratios_are_above_one": (
        ["training.spikes={max_norm_ratio: 1, max_loss_ratio: 1.5, patience: 60}"],
        [
            "training.spikes.max_norm_ratio: 1 is not above the median itself",
            "training.spikes.patience: 60 is more than half of window 100",
        ],
    ),
}

OTHER_CASES = [
    (["training.train_iters=null"], "training.train_iters: the length of the run is not given."),
    (
        ["training.train_tokens=1e6", "training.tokens_per_parameter=20"],
        "training.tokens_per_parameter: 20.0, but train_iters and train_tokens are set as well.",
    ),
    (["inner.weight_decay=null"], "inner.weight_decay: neither weight_decay nor weight_decay"),
    (["model.num_query_groups=2"], "model.num_query_groups: 2 does not divide the 3 attention"),
    (
        ["model.num_query_groups=1", "parallel.tensor_model_parallel_size=3"],
        "tensor_model_parallel_size: 3 does not divide the 1 query groups",
    ),
    (
        [
            "training.deterministic=true",
            "outer.compression={kind: topk, density: 0.1, value_bits: 4}",
        ],
        "outer.compression.value_bits: 4, but training.deterministic is true",
    ),
    (
        ["checkpoint.save_interval=0", "checkpoint.save_retain_interval=100"],
        "checkpoint.save_retain_interval: 100 needs a save_interval",
    ),
    (["outer.overlap_steps=10"], "outer.overlap_steps: 10 is not shorter than sync_interval 10"),
    (["outer.fragments.count=11"], "outer.fragments.count: 11 is more than sync_interval 10"),
    (
        ["outer.overlap_steps=6", "outer.fragments.count=3", "outer.max_in_flight=2"],
        "outer.overlap_steps: 6 is not shorter than 2 times the 3 steps between two launches",
    ),
    (
        ["outer.sync_interval={kind: steps, values: [[1, 10], [5, 4]]}", "outer.overlap_steps=4"],
        "outer.overlap_steps: 4 is not shorter than the shortest sync_interval 4, so a fragment",
    ),
    (
        [
            "outer.sync_interval={kind: steps, values: [[1, 10], [5, 6]]}",
            "outer.overlap_steps=3",
            "outer.fragments.count=2",
        ],
        "outer.overlap_steps: 3 is not shorter than the 3 steps between two launches\n"
        "  (the shortest sync_interval 6 / fragments.count 2), so 2 fragments would be",
    ),
    (
        ["outer.sync_interval={kind: steps, values: [[1, 10], [5, 2]]}", "outer.fragments.count=3"],
        "outer.fragments.count: 3 is more than the shortest sync_interval 2, so several",
    ),
    (
        ["outer.sync_interval={kind: steps, values: [[1, 251], [2, 10]]}"],
        "outer.sync_interval: 251 is longer than the run of 250 steps",
    ),
    (["training.recompute_num_layers=1"], "has no effect with recompute_granularity none"),
    (
        ["training.recompute_granularity=full", "training.recompute_num_layers=5"],
        "training.recompute_num_layers: 5 is more than the 4 layers of a pipeline stage.",
    ),
    (
        ["training.recompute_granularity=full", "training.recompute_num_layers=3"],
        "training.recompute_num_layers: chunks of 3 do not divide the 4 layers of a pipeline stage",
    ),
    (["training.global_batch_size=8"], "Use 16."),
    (
        ["parallel.num_layers_in_first_pipeline_stage=2"],
        "parallel.num_layers_in_first_pipeline_stage: 2, but there is one pipeline stage, which",
    ),
    (
        [
            "parallel.pipeline_model_parallel_size=2",
            "parallel.num_layers_in_first_pipeline_stage=2",
            "parallel.num_layers_in_last_pipeline_stage=1",
        ],
        "num_layers_in_last_pipeline_stage: 1, but the two stages hold 3 layers then, and the "
        "model has 4.",
    ),
    (
        ["parallel.pipeline_model_parallel_size=2", "parallel.num_layers_in_last_pipeline_stage=4"],
        "4 of the 4 layers, which leaves 0 for the other stages; each of the 1 needs at least one.",
    ),
    (
        ["parallel.pipeline_model_parallel_size=3", "parallel.num_layers_in_last_pipeline_stage=1"],
        "1 leaves 3 of the 4 layers for the 2 other stages, which hold equal numbers.\n  Use 2.",
    ),
    (["parallel.pipeline_model_parallel_size=8"], "Use one of 1, 2, 4."),
    (
        ["parallel.context_parallel_size=3"],
        "model.seq_length: 256 is not divisible by 6, but each of the 3 context-parallel ranks",
    ),
    (
        [
            "parallel.context_parallel_size=2",
            "parallel.tensor_model_parallel_size=3",
            "parallel.sequence_parallel=true",
        ],
        "256 / context_parallel_size 2 is not divisible by tensor_model_parallel_size 3, over",
    ),
]

VALUE_CASES = [
    (["inner.lrr=3"], "inner.lrr: unknown key. Did you mean inner.lr?"),
    (["inner.learning_rate=3"], "inner.learning_rate: unknown key. Did you mean inner.lr?"),
    (["model.vocab=3"], "model.vocab: unknown key. Did you mean model.vocab_size?"),
    (["modle.num_layers=3"], "modle: unknown key. Did you mean model?"),
    (["inner.muon.momentun=0.9"], "unknown key. Did you mean inner.muon.momentum?"),
    (["data.train=[{path: x, wieght: 3}]"], "data.train.0.wieght: unknown key. Did you mean"),
    (["training.sync_interval=3"], "It exists as outer.sync_interval (only with outer.kind: "),
    (["training.sink_interval=3"], "unknown key. Did you mean outer.sync_interval?"),
    (["monitor.zzzz=3"], "monitor.zzzz: unknown key. This section has dir, log_interval,"),
    (["outer.kind=average"], "outer.lr: exists only with outer.kind: nesterov."),
    (["inner.kind=adamw", "inner.muon.nesterov=true"], "inner.muon: exists only with inner.kind:"),
    (["inner.kind=lion"], "inner.kind: 'lion' is not one of muon, adamw."),
    (["outer.compression={bits: 4}"], "outer.compression.bits: exists only with outer.compressi"),
    (
        ["outer.compression={kind: zip}"],
        "'zip' is not one of none, linear, statistical, e3m0, topk.",
    ),
    (["inner.kind=null"], "inner: kind is not set."),
    (["inner=null"], "inner: not set; it has no default."),
    (["model.hidden_size=null"], "model.hidden_size: not set; it has no default."),
    (["model.num_layers=four"], "model.num_layers: 'four' is not a whole number."),
    (["model.num_layers=4.5"], "model.num_layers: 4.5 is not a whole number."),
    (["model.num_layers=true"], "model.num_layers: true is not a whole number."),
    (["model.num_layers=0"], "model.num_layers: 0 is out of range: it must be at least 1."),
    (["inner.lr=0"], "inner.lr: 0 is out of range: it must be above 0"),
    (["inner.lr='0.1'"], "inner.lr: '0.1' is not a number."),
    (["inner.lr=.nan"], "inner.lr: nan is not a finite number."),
    (["outer.momentum=1"], "outer.momentum: 1 is out of range: it must be below 1"),
    (["outer.sync_interval=0"], "outer.sync_interval: 0 is out of range: it must be at least 1."),
    (["outer.sync_interval=1.5"], "outer.sync_interval: 1.5 is not a whole number."),
    (["outer.lr=[0.9]"], "outer.lr: [0.9] is not a number."),
    (
        ["outer.sync_interval={kind: linear, start: 10, end: 20, rounds: 5}"],
        "outer.sync_interval.kind: 'linear' is not one of steps.",
    ),
    (
        ["outer.sync_interval={kind: steps, values: [[1, 10], [2, 0]]}"],
        "outer.sync_interval.values.1.1: 0 is out of range: it must be at least 1.",
    ),
    (
        ["outer.sync_interval={kind: steps, values: [[1, 2.5]]}"],
        "outer.sync_interval.values.0.1: 2.5 is not a whole number.",
    ),
    (["outer.sync_interval={kind: steps, values: []}"], "outer.sync_interval.values: [] is empty."),
    (
        ["outer.lr={kind: steps, values: [[0, 0.9]]}"],
        "outer.lr.values.0.0: 0 is out of range: it must be at least 1.",
    ),
    (["outer.lr={kind: steps, values: [0.9]}"], "outer.lr.values.0: 0.9 is not a list."),
    (["outer.lr={kind: steps, values: [[1]]}"], "outer.lr.values.0.1: not set; it has no default"),
    (["outer.lr={start: 0.9}"], "outer.lr: kind is not set.\n  Set outer.lr.kind to one of steps"),
    (["outer.lr={kind: exp}"], "outer.lr.kind: 'exp' is not one of steps, linear, cosine."),
    (
        ["outer.lr={kind: linear, start: 0.9, end: 0, rounds: 5}"],
        "outer.lr.end: 0 is out of range: it must be above 0",
    ),
    (
        ["outer.lr={kind: cosine, start: 0.9, end: 0.7, rounds: 1}"],
        "outer.lr.rounds: 1 is out of range: it must be at least 2.",
    ),
    (
        ["outer.lr={kind: cosine, start: 0.9, end: 0.7, rounds: 5, values: [[1, 2]]}"],
        "outer.lr.values: exists only with outer.lr.kind: steps.",
    ),
    (
        ["outer.lr={kind: cosine, start: 0.9, end: 0.7, rouns: 5}"],
        "outer.lr.rouns: unknown key. Did you mean outer.lr.rounds?",
    ),
    (
        ["outer.momentum={kind: linear, start: 0.9, end: 1, rounds: 5}"],
        "outer.momentum.end: 1 is out of range: it must be below 1",
    ),
    (
        ["outer.momentum={kind: steps, values: [[1, -0.1]]}"],
        "outer.momentum.values.0.1: -0.1 is out of range: it must be at least 0",
    ),
    (["inner.min_lr_ratio=2"], "it must be at most 1"),
    (["model.qk_layernorm=1"], "model.qk_layernorm: 1 is not true or false."),
    (["checkpoint.dir=3"], "checkpoint.dir: 3 is not text."),
    (["data.train=3"], "data.train: 3 is not a list."),
    (["data.train=''"], "data.train.0.path: '' is empty."),
    (["data.train=[]"], "data.train: [] is empty."),
    (["data.train=[{path: ''}]"], "data.train.0.path: '' is empty."),
    (["training.precision=tf32"], "training.precision: 'tf32' is not one of bf16, fp32."),
    (["outer.transport=auto"], "outer.transport: auto is not accepted: a rank cannot tell whether"),
    (["training.precision=fp16"], "training.precision: fp16 is not accepted: fp16 needs loss sca"),
    (["model=3"], "model: 3 is not a section. The section has the keys num_la"),
    (["outer.compression={kind: linear, bits: 3}"], "3 is not one of 8, 4, 2, 1."),
]


def report(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(CPU, overrides)
    return str(caught.value)


def test_every_rule_has_a_case() -> None:
    assert [rule.__name__ for rule in RULES] == list(RULE_CASES)


@pytest.mark.parametrize("name", RULE_CASES)
def test_rules(name: str) -> None:
    overrides, expected = RULE_CASES[name]
    message = report(*overrides)
    for text in expected:
        assert text in message
    # and it is this rule that says so
    rule = next(rule for rule in RULES if rule.__name__ == name)
    assert find_problems(unchecked(*overrides), rules=[rule])


def unchecked(*overrides: str) -> RunConfig:
    """Return a parsed config without asking the rules."""
    from megatron_muloco.config.document import without_nulls
    from megatron_muloco.config.load import load_document

    return RunConfig.model_validate(without_nulls(load_document(CPU, overrides).values))


@pytest.mark.parametrize(("overrides", "expected"), OTHER_CASES, ids=lambda value: str(value)[:60])
def test_other_ways_to_break_a_rule(overrides: list[str], expected: str) -> None:
    assert expected in report(*overrides)


@pytest.mark.parametrize(("overrides", "expected"), VALUE_CASES, ids=lambda value: str(value)[:60])
def test_wrong_keys_and_values(overrides: list[str], expected: str) -> None:
    assert expected in report(*overrides)


@pytest.mark.parametrize(
    ("override", "key"),
    [("parallel.virtual_pipeline_model_parallel_size=2", "virtual pipeline stages")],
)
def test_what_is_not_supported_yet_is_refused(override: str, key: str) -> None:
    assert re.search(f"not accepted: {key} (is|are) not supported yet", report(override))


@pytest.mark.parametrize("name", REFUSED_KEYS)
@pytest.mark.parametrize("section", ["model", "training", "parallel"])
def test_well_known_keys_get_a_reason(section: str, name: str) -> None:
    message = report(f"{section}.{name}=1")
    assert f"{section}.{name}: not accepted: " in message
    assert "unknown key" not in message


def test_names_of_other_programs_lead_to_keys_that_exist() -> None:
    keys = {entry.key for entry in schema_fields()}
    assert keys.issuperset(OTHER_NAMES.values())
    # a name that the schema has must never be sent elsewhere
    assert not OTHER_NAMES.keys() & {key.rpartition(".")[2] for key in keys}
    assert not OTHER_NAMES.keys() & REFUSED_KEYS.keys()


def test_messages_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"extends: {CPU}\n\nouter:\n  momentum: 0.7\n  overlap_steps: 12\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}:5  outer.overlap_steps: 12 is not shorter")
    # later lines are indented
    assert all(line.startswith("  ") for line in caught.value.problems[0].splitlines()[1:])


def test_a_missing_key_is_placed_at_its_section(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("outer:\n  kind: nesterov\n  lr: 1.0\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert f"{path}:1  outer.momentum: not set" in message
    assert f"{path}  model: not set" in message


def test_all_problems_come_at_once() -> None:
    message = report(
        "inner.lrr=3", "training.micro_batch_size=four", "training.precision=fp16", "model.fp8=e4m3"
    )
    for key in ("inner.lrr", "training.micro_batch_size", "training.precision", "model.fp8"):
        assert f"{key}: " in message
    message = report("training.global_batch_size=24", "outer.sync_interval=300", "inner.lrr=1")
    for key in ("training.global_batch_size", "outer.sync_interval", "inner.lrr"):
        assert f"{key}: " in message


def test_a_misspelling_of_a_required_key_is_pointed_out(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"extends: {CPU}\nmodel: {{hidden_size: null, hiden_size: 192}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "hiden_size looks like a misspelling of it." in str(caught.value)


def test_the_real_world_is_checked_too() -> None:
    config = load_config(CPU)
    check(config, Topology(2, 1, 1, 1))
    with pytest.raises(ConfigError) as caught:
        check(config, Topology(2, 1, 1, 3))
    assert "16 is not divisible by 2 replicas x dp 3 x micro_batch_size 8 = 48." in str(
        caught.value
    )
    assert str(caught.value).startswith(f"{CPU}:")


def test_other_packages_add_their_rules() -> None:
    def disk_is_full(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
        yield Problem("checkpoint.dir", f"{config.checkpoint.dir} is full.\nDelete something.")

    with pytest.raises(ConfigError, match=r"checkpoint.dir: runs/demo is full\.\n  Delete"):
        check(load_config(CPU), rules=(*RULES, disk_is_full))


@pytest.mark.parametrize(
    "overrides",
    [
        ["outer.state_device=cpu", "outer.transport=device"],
        ["outer.compression={wire_dtype: bf16, kind: none}"],
        ["outer.compression.wire_dtype=bf16"],
        ["parallel.sequence_parallel=true"],
        ["outer.lr=null", "outer.momentum=null", "outer.kind=average"],
        ["inner.lr_decay_style=WSD", "inner.lr_wsd_decay_iters=50"],
        ["inner.kind=adamw", "inner.lr_decay_style=constant", "inner.lr_warmup_iters=0"],
        ["training.recompute_granularity=full", "training.recompute_num_layers=1"],
        ["training.train_iters=251"],
        ["data.tokenizer_type=byte-level", "data.tokenizer_model=null"],
        ["model.num_query_groups=1"],
    ],
    ids=str,
)
def test_what_is_allowed(overrides: list[str]) -> None:
    load_config(CPU, overrides)


def test_a_stage_of_a_ramp_that_ranks_cannot_share_is_refused() -> None:
    ramp = ["training.rampup_batch_size=[8, 4, 100]", "training.micro_batch_size=4"]
    with pytest.raises(ConfigError, match="start 8 and increment 4 are not both divisible by 2 re"):
        load_config(CPU, ramp)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["inner.lr_wsd_decay_iters=10"], "10, but lr_decay_style is cosine, which does not use"),
        (
            ["inner.lr_decay_style=WSD", "inner.lr_wsd_decay_iters=240"],
            "240 steps of decay and 20 of warm-up are more than the run's 250 steps",
        ),
    ],
)
def test_a_decay_of_wsd_that_does_not_fit_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(CPU, overrides)
