"""`RULES`: the conditions that hold between several keys of a config, one function per rule.

A rule takes a parsed config, and the topology where it is known, and yields problems.
`find_problems` runs the rules and `check` raises their problems. Bounds of single keys are in the
schema. Rules about the outer step are in `config.outer_rules`, those about the division of the
model over ranks in `config.layout_rules`. Checks that read files (datasets, tokenizer) are in
`megatron_muloco.data.checks`.
"""

from collections.abc import Callable, Iterable, Iterator

from megatron_muloco.config.derived import smallest_topology, stage_layers, train_iterations
from megatron_muloco.config.inner import MuonInner
from megatron_muloco.config.layout_rules import (
    batch_divides,
    context_parallel_attention_is_dense,
    ffn_divides,
    head_width_is_even,
    heads_divide,
    layers_divide,
    rampup_reaches_the_batch,
    sequence_divides,
    tied_embedding_has_a_scale,
    vocabulary_divides,
)
from megatron_muloco.config.messages import Problem
from megatron_muloco.config.outer import NoOuter
from megatron_muloco.config.outer_rules import (
    additive_apply_overlaps,
    block_size_has_blocks,
    codec_is_deterministic,
    data_parallelism_has_one_replica,
    exceptions_fit_the_compression,
    fragments_have_layers,
    norm_ratio_is_above_one,
    overlap_is_shorter_than_the_spacing,
    rounds_of_schedules_ascend,
    run_has_a_round,
    usable_replicas_exist,
)
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.errors import ConfigError
from megatron_muloco.topology import Topology

__all__ = ["RULES", "Rule", "check", "find_problems"]

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


def wsd_has_a_decay(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require the length of WSD's decay, and that warm-up and decay fit into the run."""
    inner = config.inner
    decay = inner.lr_wsd_decay_iters
    if inner.lr_decay_style != "WSD":
        if decay is not None:
            yield Problem(
                "inner.lr_wsd_decay_iters",
                f"{decay}, but lr_decay_style is {inner.lr_decay_style}, which does not use it.\n"
                "Use lr_decay_style: WSD, or remove it.",
            )
        return
    if decay is None:
        yield Problem(
            "inner.lr_wsd_decay_iters",
            "lr_decay_style is WSD, but the length of its decay is not given.\nSet "
            "lr_wsd_decay_iters, often a tenth to a fifth of the steps.",
        )
        return
    steps = train_iterations(config)
    if steps is not None and inner.lr_warmup_iters + decay > steps:
        yield Problem(
            "inner.lr_wsd_decay_iters",
            f"{decay} steps of decay and {inner.lr_warmup_iters} of warm-up are more than the "
            f"run's {steps} steps.\nUse fewer, or a longer run.",
        )


def recompute_is_complete(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require ``recompute_num_layers`` with full recomputation, and only there."""
    training = config.training
    layers = max(map(len, stage_layers(config, topology or smallest_topology(config))))
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
    elif training.recompute_method == "uniform" and layers % training.recompute_num_layers:
        yield Problem(
            "training.recompute_num_layers",
            f"chunks of {training.recompute_num_layers} do not divide the {layers} layers of a "
            "pipeline stage, and Megatron would look for layers that are not there.\nUse a divisor "
            f"of {layers}, or recompute_method: block.",
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


def retained_steps_are_saved(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require a multiple of save_interval for the interval of checkpoints that are kept."""
    retained, saved = config.checkpoint.save_retain_interval, config.checkpoint.save_interval
    if retained is None or (saved and retained % saved == 0):
        return
    why = f"is no multiple of save_interval {saved}" if saved else "needs a save_interval"
    yield Problem(
        "checkpoint.save_retain_interval",
        f"{retained} {why}, so the steps to keep would not all be saved.\n"
        f"Use a multiple of {saved or 'checkpoint.save_interval'}, or null.",
    )


def resuming_has_a_place(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require checkpoint.dir for resuming."""
    if config.checkpoint.resume not in ("auto", "none") and config.checkpoint.dir is None:
        yield Problem(
            "checkpoint.resume",
            f"{config.checkpoint.resume}, but checkpoint.dir is not set, so the run could not save "
            "its own checkpoints.\nGive a directory for them.",
        )


def spike_ratios_are_above_one(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require ratios of the spike policy above 1 (0 is off), and an anchor to roll back to."""
    spikes = config.training.spikes
    for name in ("max_norm_ratio", "max_loss_ratio"):
        ratio = getattr(spikes, name)
        if 0 < ratio <= 1:
            yield Problem(
                f"training.spikes.{name}",
                f"{ratio:g} is not above the median itself, so half of all steps would be "
                "spikes.\nUse 0 to turn it off, or a ratio well above 1, for instance 5.",
            )
    if not spikes.max_loss_ratio:
        return
    if isinstance(config.outer, NoOuter):
        yield Problem(
            "training.spikes.max_loss_ratio",
            f"{spikes.max_loss_ratio:g}, but outer.kind is none, so there is no anchor to go back "
            "to.\nUse max_norm_ratio, or an outer step.",
        )
    if 2 * spikes.patience > spikes.window:
        yield Problem(
            "training.spikes.patience",
            f"{spikes.patience} is more than half of window {spikes.window}, so a high loss would "
            "be the median before a replica is set back.\nUse less patience or a longer window.",
        )


def first_weights_are_used(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Refuse weights to begin with beside a checkpoint to resume."""
    checkpoint = config.checkpoint
    if checkpoint.init_from is not None and checkpoint.resume not in ("auto", "none"):
        yield Problem(
            "checkpoint.init_from",
            f"{checkpoint.init_from}, but checkpoint.resume is {checkpoint.resume}, whose weights "
            "the run would take.\nRemove one of them.",
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


def attention_is_deterministic(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Refuse ``deterministic`` with attention whose backward pass torch's mode does not cover."""
    impl = config.model.attention_impl
    if config.training.deterministic and impl in ("flex", "te"):
        yield Problem(
            "model.attention_impl",
            f"{impl}, but training.deterministic is true; torch's deterministic mode covers its "
            "flash and memory-efficient attention only.\nUse auto, dense or varlen, or "
            "training.deterministic: false.",
        )


RULES: tuple[Rule, ...] = (
    one_length,
    one_weight_decay,
    warmup_is_shorter_than_the_run,
    wsd_has_a_decay,
    heads_divide,
    head_width_is_even,
    tied_embedding_has_a_scale,
    ffn_divides,
    vocabulary_divides,
    layers_divide,
    sequence_divides,
    context_parallel_attention_is_dense,
    batch_divides,
    rampup_reaches_the_batch,
    data_parallelism_has_one_replica,
    fragments_have_layers,
    exceptions_fit_the_compression,
    block_size_has_blocks,
    attention_is_deterministic,
    codec_is_deterministic,
    additive_apply_overlaps,
    norm_ratio_is_above_one,
    usable_replicas_exist,
    overlap_is_shorter_than_the_spacing,
    rounds_of_schedules_ascend,
    run_has_a_round,
    recompute_is_complete,
    gather_overlap_needs_reduce_overlap,
    evaluation_has_data,
    tokenizer_is_named,
    saving_has_a_place,
    retained_steps_are_saved,
    resuming_has_a_place,
    first_weights_are_used,
    gram_matrices_have_precision,
    precision_of_gradients_fits,
    profile_has_a_window,
    saved_rounds_exist,
    spike_ratios_are_above_one,
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
