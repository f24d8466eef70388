"""`RULES`: the conditions that hold between several keys of a config, one function per rule.

A rule takes a parsed config, and the topology where it is known, and yields problems.
`find_problems` runs the rules and `check` raises their problems. Bounds of single keys are in the
schema. Checks that read files (datasets, tokenizer) are in `megatron_muloco.data.checks`.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

from megatron_muloco.config.derived import (
    padded_vocab_size,
    smallest_topology,
    spacing_of_launches,
    train_iterations,
)
from megatron_muloco.config.inner import MuonInner
from megatron_muloco.config.messages import Problem
from megatron_muloco.config.outer import (
    AverageOuter,
    CompressionConfig,
    GroupedCompression,
    Interval,
    NesterovOuter,
    NoCompression,
    NoOuter,
    Steps,
    interval_at,
    interval_values,
)
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.errors import ConfigError
from megatron_muloco.topology import Topology

__all__ = [
    "RULES",
    "Rule",
    "additive_apply_overlaps",
    "batch_divides",
    "block_size_has_blocks",
    "check",
    "data_parallelism_has_one_replica",
    "exceptions_fit_the_compression",
    "ffn_divides",
    "find_problems",
    "fragments_have_layers",
    "head_width_is_even",
    "heads_divide",
    "layers_divide",
    "norm_ratio_is_above_one",
    "overlap_is_shorter_than_the_spacing",
    "rounds_of_schedules_ascend",
    "run_has_a_round",
    "sequence_divides",
    "tied_embedding_has_a_scale",
    "vocabulary_divides",
]


# ---- outer step --------------------------------------------------------------------------


def data_parallelism_has_one_replica(
    config: RunConfig, topology: Topology | None
) -> Iterator[Problem]:
    """Require one replica where there is no outer step."""
    replicas = config.parallel.num_replicas
    if isinstance(config.outer, NoOuter) and replicas > 1:
        yield Problem(
            "parallel.num_replicas",
            f"{replicas}, but outer.kind is none, so the replicas would never be synchronised.\n"
            "Use num_replicas 1 (all ranks become data-parallel), or outer.kind nesterov or "
            "average.",
        )


def fragments_have_layers(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require at least one layer and one step of the round for each fragment."""
    if isinstance(config.outer, NoOuter):
        return
    count, interval = config.outer.fragments.count, config.outer.sync_interval
    if count > config.model.num_layers:
        yield Problem(
            "outer.fragments.count",
            f"{count} is more than the {config.model.num_layers} layers of the model, but a "
            "fragment holds at least one whole layer.\nUse fewer fragments.",
        )
    if count > min(interval_values(interval)):
        yield Problem(
            "outer.fragments.count",
            f"{count} is more than {_shortest(interval)}, so several fragments would be launched "
            "in one step.\nUse fewer fragments.",
        )


def _shortest(interval: Interval) -> str:
    """Return ``sync_interval H``, or ``the shortest sync_interval H`` of a schedule."""
    values = interval_values(interval)
    return f"{'the shortest ' if len(values) > 1 else ''}sync_interval {min(values)}"


def overlap_is_shorter_than_the_spacing(
    config: RunConfig, topology: Topology | None
) -> Iterator[Problem]:
    """Require that at most ``max_in_flight`` fragments are in flight at once."""
    if isinstance(config.outer, NoOuter):
        return
    outer = config.outer
    spacing = max(1, spacing_of_launches(outer))
    shortest = _shortest(outer.sync_interval)
    if outer.overlap_steps >= min(interval_values(outer.sync_interval)):
        yield Problem(
            "outer.overlap_steps",
            f"{outer.overlap_steps} is not shorter than {shortest}, so a fragment would be "
            "launched again before its result is applied.\n"
            "Use fewer overlap_steps or a longer sync_interval.",
        )
    elif outer.overlap_steps >= spacing * outer.max_in_flight:
        steps = (
            f"the {spacing} steps between two launches"
            if outer.max_in_flight == 1
            else f"{outer.max_in_flight} times the {spacing} steps between two launches"
        )
        yield Problem(
            "outer.overlap_steps",
            f"{outer.overlap_steps} is not shorter than {steps}\n"
            f"({shortest} / fragments.count {outer.fragments.count}), so "
            f"{outer.max_in_flight + 1} fragments would be in flight at once.\nUse overlap_steps "
            f"of at most {spacing * outer.max_in_flight - 1}, fewer fragments, a longer "
            f"sync_interval, or max_in_flight above {outer.max_in_flight}.",
        )


def additive_apply_overlaps(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require overlap for ``apply: additive``, and no mixing weight beside it."""
    if isinstance(config.outer, NoOuter) or config.outer.apply != "additive":
        return
    if config.outer.overlap_steps == 0:
        yield Problem(
            "outer.apply",
            "additive, but overlap_steps is 0, so there is no progress between launch and apply to "
            "add.\nUse mix, or overlap_steps above 0.",
        )
    if config.outer.mixing_weight is not None:
        yield Problem(
            "outer.mixing_weight",
            f"{config.outer.mixing_weight:g} has no effect with apply additive, which keeps all "
            "progress since the launch.\nRemove it or use apply: mix.",
        )


def exceptions_fit_the_compression(
    config: RunConfig, topology: Topology | None
) -> Iterator[Problem]:
    """Allow a number of bits as an exception only for kinds that have ``bits``."""
    compression = _compression(config)
    if isinstance(compression, NoCompression) or compression.has_bits:
        return
    for key, bits in compression.exceptions:
        if bits not in (None, "none"):
            yield Problem(
                f"outer.compression.exceptions.{key}",
                f"{bits}, but kind {compression.kind} has no choice of bits.\n"
                "Use none to send these parameters in fp32, or kind linear or statistical.",
            )


def block_size_has_blocks(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Allow ``block_size`` of quantizers only with granularity block."""
    compression = _compression(config)
    if not isinstance(compression, GroupedCompression) or compression.granularity == "block":
        return
    if compression.block_size is not None:
        yield Problem(
            "outer.compression.block_size",
            f"{compression.block_size} has no effect with granularity {compression.granularity}.\n"
            "Remove it or set outer.compression.granularity: block.",
        )


def _compression(config: RunConfig) -> CompressionConfig:
    return NoCompression() if isinstance(config.outer, NoOuter) else config.outer.compression


def norm_ratio_is_above_one(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require a ratio of the guard above 1, or 0 for off."""
    if isinstance(config.outer, NoOuter):
        return
    ratio = config.outer.guard.max_norm_ratio
    if 0 < ratio <= 1:
        yield Problem(
            "outer.guard.max_norm_ratio",
            f"{ratio:g} excludes norms on both sides of the median, so every replica would be "
            "excluded.\nUse 0 to turn it off, or a ratio well above 1, for instance 10.",
        )


def run_has_a_round(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require at least one outer step in the run."""
    iterations = train_iterations(config)
    if isinstance(config.outer, NoOuter) or iterations is None:
        return
    first = interval_at(config.outer.sync_interval, 1)
    if first > iterations:
        yield Problem(
            "outer.sync_interval",
            f"{first} is longer than the run of {iterations} steps, so no "
            "outer step would ever happen.\nUse a shorter interval or a longer run.",
        )


def rounds_of_schedules_ascend(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require that the rounds of a schedule start at 1 and ascend."""
    if isinstance(config.outer, NoOuter):
        return
    for key, schedule in _schedules(config.outer):
        if not isinstance(schedule, Steps):
            continue
        rounds = [first for first, _ in schedule.values]
        if rounds[0] != 1:
            yield Problem(
                f"{key}.values.0",
                f"the first round is {rounds[0]}, so there is no value for the rounds before it.\n"
                "Start with the pair [1, value]; rounds are counted from 1.",
            )
        for place, (before, after) in enumerate(pairwise(rounds), 1):
            if after <= before:
                yield Problem(
                    f"{key}.values.{place}",
                    f"round {after} comes after round {before}, but each pair holds until the next "
                    "one.\nList the pairs in ascending order of rounds, each round once.",
                )


def _schedules(outer: NesterovOuter | AverageOuter) -> Iterator[tuple[str, object]]:
    yield "outer.sync_interval", outer.sync_interval
    yield "outer.lr", outer.lr
    yield "outer.momentum", outer.momentum


# ---- divisibility of the model and the batch ---------------------------------------------


def heads_divide(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require that query heads and query groups divide evenly over tensor-parallel ranks."""
    heads, groups = config.model.num_attention_heads, config.model.query_groups
    tp = config.parallel.tensor_model_parallel_size
    if heads % groups:
        yield Problem(
            "model.num_query_groups",
            f"{groups} does not divide the {heads} attention heads, so heads cannot share keys "
            f"evenly.\nUse one of {_divisors(heads)}.",
        )
    if heads % tp:
        yield Problem(
            "parallel.tensor_model_parallel_size",
            f"{tp} does not divide the {heads} attention heads, but each rank holds whole heads.\n"
            f"Use one of {_divisors(heads)}.",
        )
    elif groups % tp:
        yield Problem(
            "parallel.tensor_model_parallel_size",
            f"{tp} does not divide the {groups} query groups, but each rank holds whole groups.\n"
            f"Use one of {_divisors(groups)}.",
        )


def head_width_is_even(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require an even head width, because rotary embeddings rotate pairs of channels."""
    if config.model.kv_channels % 2:
        yield Problem(
            "model.kv_channels",
            f"{config.model.kv_channels} is odd, but rotary embeddings rotate pairs of "
            "channels.\nUse an even number.",
        )


def tied_embedding_has_a_scale(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require branch norms for a tied embedding that starts at the head's scale.

    Without them the residual stream is mostly the input token's own row, and the tied head turns it
    into a logit of about sqrt(hidden_size): the first loss is many nats above ln(vocabulary).
    """
    model = config.model
    tied = not model.untie_embeddings_and_output_weights
    if tied and model.init == "muloco" and not model.post_layernorm:
        yield Problem(
            "model.untie_embeddings_and_output_weights",
            "false, but model.init is muloco and model.post_layernorm false; that initialisation "
            "has no scale\nfor a table that is embedding and output head without norms after the "
            "branches.\nUse model.init: megatron, or model.post_layernorm: true, or untie them.",
        )


def ffn_divides(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require that MLP rows divide evenly over tensor-parallel ranks."""
    tp, ffn = config.parallel.tensor_model_parallel_size, config.model.ffn_hidden_size
    if ffn % tp:
        yield Problem(
            "model.ffn_hidden_size",
            f"{ffn} is not divisible by tensor_model_parallel_size {tp}, but each rank holds an "
            "equal share of the MLP.\n"
            "Change one of them.",
        )


def vocabulary_divides(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require that the padded vocabulary divides evenly over tensor-parallel ranks."""
    tp, padded = config.parallel.tensor_model_parallel_size, padded_vocab_size(config.model)
    if padded % tp:
        yield Problem(
            "model.make_vocab_size_divisible_by",
            f"{config.model.make_vocab_size_divisible_by} pads the vocabulary to {padded}, which "
            f"tensor_model_parallel_size {tp} does not divide.\nThe padded size must not depend on "
            "the layout, so that a checkpoint fits every layout. Use a multiple of "
            f"{tp}.",
        )


def layers_divide(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require the same number of layers on every pipeline stage."""
    pp, layers = config.parallel.pipeline_model_parallel_size, config.model.num_layers
    if layers % pp:
        yield Problem(
            "parallel.pipeline_model_parallel_size",
            f"{pp} does not divide the {layers} layers, but all stages hold the same number of "
            "layers.\n"
            f"Use one of {_divisors(layers)}.",
        )


def sequence_divides(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require that sequence parallelism divides the sequence evenly."""
    tp, length = config.parallel.tensor_model_parallel_size, config.model.seq_length
    if config.parallel.sequence_parallel and length % tp:
        yield Problem(
            "model.seq_length",
            f"{length} is not divisible by tensor_model_parallel_size {tp}, over which "
            "sequence_parallel divides it.\nChange one of them or set sequence_parallel: false.",
        )


def batch_divides(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require the same number of microbatches on every data-parallel rank."""
    layout = topology or smallest_topology(config)
    micro, batch = config.training.micro_batch_size, config.training.global_batch_size
    unit = layout.num_replicas * layout.data * micro
    if batch % unit:
        below = batch - batch % unit
        near = f"{below} or {below + unit}" if below else f"{unit}"
        yield Problem(
            "training.global_batch_size",
            f"{batch} is not divisible by {layout.num_replicas} replicas x dp {layout.data} x "
            f"micro_batch_size {micro} = {unit}.\nIt is the number of sequences per inner step "
            f"over all replicas, and every rank takes the same share. Use {near}.",
        )


def _divisors(number: int) -> str:
    """Return the divisors of a number, separated by commas."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


# ---- run, inner optimizer, data and checkpoints ------------------------------------------

Rule = Callable[[RunConfig, Topology | None], Iterable[Problem]]


def one_length(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require exactly one length of the run."""
    names = ("train_iters", "train_tokens", "tokens_per_parameter")
    given = [name for name in names if getattr(config.training, name) is not None]
    if not given:
        yield Problem(
            "training.train_iters",
            "the length of the run is not given.\n"
            "Set exactly one of training.train_iters, training.train_tokens and "
            "training.tokens_per_parameter.",
        )
    elif len(given) > 1:
        yield Problem(
            f"training.{given[-1]}",
            f"{getattr(config.training, given[-1])}, but {' and '.join(given[:-1])} "
            f"{'is' if len(given) == 2 else 'are'} set as well.\nOnly one length can be used. "
            "Set the others to null.",
        )


def one_weight_decay(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require exactly one of weight_decay and weight_decay_base."""
    given = config.inner.weight_decay is not None
    base_given = config.inner.decay_base is not None
    if given and base_given:
        yield Problem(
            "inner.weight_decay",
            f"{config.inner.weight_decay}, but weight_decay_base "
            f"({config.inner.decay_base}) is set as well.\nOnly one can be used. Set one of "
            "them to null.",
        )
    if not given and not base_given:
        yield Problem(
            "inner.weight_decay",
            "neither weight_decay nor weight_decay_base is set.\nSet one of them; 0.0 is no decay.",
        )


def warmup_is_shorter_than_the_run(
    config: RunConfig, topology: Topology | None
) -> Iterator[Problem]:
    """Require a warm-up that is shorter than the run."""
    iterations = train_iterations(config)
    if iterations is not None and config.inner.lr_warmup_iters >= iterations:
        yield Problem(
            "inner.lr_warmup_iters",
            f"{config.inner.lr_warmup_iters} is not shorter than the run of {iterations} steps, so "
            "the peak learning rate is never reached.\nUse fewer warm-up steps or a longer run.",
        )


def recompute_is_complete(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require ``recompute_num_layers`` with full recomputation, and only there."""
    training = config.training
    layers = config.model.num_layers // config.parallel.pipeline_model_parallel_size
    if training.recompute_granularity != "full":
        if training.recompute_num_layers is not None:
            yield Problem(
                "training.recompute_num_layers",
                f"{training.recompute_num_layers} has no effect with recompute_granularity "
                f"{training.recompute_granularity}.\nUse recompute_granularity: full or remove it.",
            )
    elif training.recompute_num_layers is None:
        yield Problem(
            "training.recompute_num_layers",
            "not set, but recompute_granularity full needs it.\nUse 1 to recompute layer by layer.",
        )
    elif training.recompute_num_layers > layers:
        yield Problem(
            "training.recompute_num_layers",
            f"{training.recompute_num_layers} is more than the {layers} layers of a pipeline "
            f"stage.\nUse at most {layers}.",
        )


def gather_overlap_needs_reduce_overlap(
    config: RunConfig, topology: Topology | None
) -> Iterator[Problem]:
    """Require overlap of the gradient reduction for overlap of the parameter gather."""
    if config.training.overlap_param_gather and not config.training.overlap_grad_reduce:
        yield Problem(
            "training.overlap_param_gather",
            "true, but overlap_grad_reduce is false; Megatron overlaps both or the reduction "
            "only.\nSet overlap_grad_reduce: true.",
        )


def evaluation_has_data(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require held-out data for evaluation."""
    if config.training.eval_interval > 0 and not config.data.valid:
        yield Problem(
            "training.eval_interval",
            f"{config.training.eval_interval}, but data.valid is empty.\nAdd a dataset, or use "
            "eval_interval 0.",
        )


def tokenizer_is_named(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require a tokenizer file for every type but byte-level."""
    if config.data.tokenizer_type != "byte-level" and config.data.tokenizer_model is None:
        yield Problem(
            "data.tokenizer_model",
            f"not set, but tokenizer_type {config.data.tokenizer_type} needs it.\nGive the "
            "tokenizer's file or directory.",
        )


def saving_has_a_place(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require checkpoint.dir for saving."""
    if config.checkpoint.save_interval > 0 and config.checkpoint.dir is None:
        yield Problem(
            "checkpoint.save_interval",
            f"{config.checkpoint.save_interval}, but checkpoint.dir is not set.\nGive a directory "
            "that is visible to all ranks, or use save_interval 0.",
        )


def resuming_has_a_place(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require checkpoint.dir for resuming."""
    if config.checkpoint.resume not in ("auto", "none") and config.checkpoint.dir is None:
        yield Problem(
            "checkpoint.resume",
            f"{config.checkpoint.resume}, but checkpoint.dir is not set, so the run could not save "
            "its own checkpoints.\nGive a directory for them.",
        )


def profile_has_a_window(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """A profile covers steps in order and goes to a directory."""
    steps = config.monitor.profile.steps
    if steps is None:
        return
    if steps[0] > steps[1]:
        yield Problem(
            "monitor.profile.steps",
            f"[{steps[0]}, {steps[1]}] ends before it begins.\nGive the first and the last inner "
            "step, such as [11, 40].",
        )
    if config.monitor.dir is None:
        yield Problem(
            "monitor.profile.steps",
            f"[{steps[0]}, {steps[1]}], but monitor.dir is not set.\nTraces are written to its "
            "directory profile. Name a directory, or remove monitor.profile.",
        )


def saved_rounds_exist(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Pseudogradients are saved of rounds in order, and steps where they add up to them."""
    saved, outer = config.monitor.save_pseudogradients, config.outer
    if saved.dir is None:
        return
    key, (first, last) = "monitor.save_pseudogradients", saved.rounds
    if isinstance(outer, NoOuter):
        text = f"{saved.dir}, but outer.kind is none: there are no pseudogradients."
        yield Problem(f"{key}.dir", f"{text}\nSet it to null, or use another outer.kind.")
    elif saved.steps and (
        outer.fragments.count > 1 or outer.overlap_steps or outer.effective_mixing_weight
    ):
        text = "true, but the steps of a round add up to its pseudogradient only with one fragment,"
        remedy = "without overlap and with mixing_weight 0. Use these, or steps: false."
        yield Problem(f"{key}.steps", f"{text}\n{remedy}")
    if first > last:
        yield Problem(f"{key}.rounds", f"[{first}, {last}] ends before it begins.\nSwap the two.")


def precision_of_gradients_fits(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require fp32 accumulation in fp32 runs."""
    if config.training.precision == "fp32" and config.training.accumulate_dtype == "bf16":
        yield Problem(
            "training.accumulate_dtype",
            "bf16, but precision is fp32; Megatron accumulates in the dtype of the parameters or "
            "wider.\nUse fp32.",
        )


def gram_matrices_have_precision(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require fp32 for Gram matrices, which lose small singular values in bf16."""
    inner = config.inner
    if not isinstance(inner, MuonInner) or inner.muon.ns_impl not in ("triangle", "gram"):
        return
    if inner.muon.ns_dtype != "fp32":
        also = " (auto is bf16 on accelerators)" if inner.muon.ns_dtype == "auto" else ""
        yield Problem(
            "inner.muon.ns_impl",
            f"{inner.muon.ns_impl}, but ns_dtype is {inner.muon.ns_dtype}{also}; a Gram matrix in "
            "bf16 loses small singular values.\nUse ns_impl: auto or plain, or ns_dtype: fp32.",
        )


RULES: tuple[Rule, ...] = (
    one_length,
    one_weight_decay,
    warmup_is_shorter_than_the_run,
    heads_divide,
    head_width_is_even,
    tied_embedding_has_a_scale,
    ffn_divides,
    vocabulary_divides,
    layers_divide,
    sequence_divides,
    batch_divides,
    data_parallelism_has_one_replica,
    fragments_have_layers,
    exceptions_fit_the_compression,
    block_size_has_blocks,
    additive_apply_overlaps,
    norm_ratio_is_above_one,
    overlap_is_shorter_than_the_spacing,
    rounds_of_schedules_ascend,
    run_has_a_round,
    recompute_is_complete,
    gather_overlap_needs_reduce_overlap,
    evaluation_has_data,
    tokenizer_is_named,
    saving_has_a_place,
    resuming_has_a_place,
    gram_matrices_have_precision,
    precision_of_gradients_fits,
    profile_has_a_window,
    saved_rounds_exist,
)


def find_problems(
    config: RunConfig, topology: Topology | None = None, *, rules: Iterable[Rule] = RULES
) -> list[Problem]:
    """Return all problems that the rules find, in the order of the rules.

    Args:
        config: A parsed config.
        topology: The layout of the ranks; by default the smallest one.
        rules: The rules to run; `(*RULES, *more)` adds rules.
    """
    return [problem for rule in rules for problem in rule(config, topology)]


def check(
    config: RunConfig, topology: Topology | None = None, *, rules: Iterable[Rule] = RULES
) -> None:
    """Raise one ConfigError with all problems that the rules find, if there are any."""
    problems = find_problems(config, topology, rules=rules)
    if problems:
        raise ConfigError([problem.format(config.where) for problem in problems])
