"""What must hold between keys: one named rule a function.

A rule looks at a parsed config, and at the topology where one is known, and yields problems. Bounds
of single keys are in the schema. Rules that need files (datasets, tokenizer) live with the data and
join through the ``rules`` argument.
"""

from collections.abc import Callable, Iterable, Iterator

from megatron_muloco.config.derived import train_iterations
from megatron_muloco.config.inner import MuonInner
from megatron_muloco.config.layout_checks import (
    batch_divides,
    ffn_divides,
    head_width_is_even,
    heads_divide,
    layers_divide,
    sequence_divides,
    vocabulary_divides,
)
from megatron_muloco.config.outer_checks import (
    apply_rule_is_one,
    block_size_has_blocks,
    data_parallelism_has_one_replica,
    exceptions_fit_the_code,
    fragments_have_layers,
    norm_band_is_a_band,
    overlap_is_shorter_than_the_spacing,
    rounds_of_schedules_ascend,
    run_has_a_round,
)
from megatron_muloco.config.problems import Problem
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.config.support import UNSUPPORTED
from megatron_muloco.errors import ConfigError
from megatron_muloco.topology import Topology

__all__ = ["RULES", "Rule", "check", "find_problems"]

Rule = Callable[[RunConfig, Topology | None], Iterable[Problem]]


def one_length(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """The length of a run is given once."""
    names = ("train_iters", "train_tokens", "tokens_per_parameter")
    given = [name for name in names if getattr(config.training, name) is not None]
    if not given:
        yield Problem(
            "training.train_iters",
            "no length is given.\nSet exactly one of training.train_iters, training.train_tokens "
            "and training.tokens_per_parameter.",
        )
    elif len(given) > 1:
        yield Problem(
            f"training.{given[-1]}",
            f"{getattr(config.training, given[-1])}, but {' and '.join(given[:-1])} "
            f"{'is' if len(given) == 2 else 'are'} set as well.\nA run has one length. Set the "
            "others to null.",
        )


def one_weight_decay(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Weight decay is given once."""
    given = config.inner.weight_decay is not None
    base_given = config.inner.weight_decay_base is not None
    if given and base_given:
        yield Problem(
            "inner.weight_decay",
            f"{config.inner.weight_decay}, but weight_decay_base is "
            f"{config.inner.weight_decay_base} as well.\nOnly one can count. Set one of them to "
            "null.",
        )
    if not given and not base_given:
        yield Problem(
            "inner.weight_decay",
            "not set, nor is inner.weight_decay_base.\nSet one of them; 0.0 is no decay.",
        )


def warmup_is_shorter_than_the_run(
    config: RunConfig, topology: Topology | None
) -> Iterator[Problem]:
    """The peak learning rate is reached."""
    iterations = train_iterations(config)
    if iterations is not None and config.inner.lr_warmup_iters >= iterations:
        yield Problem(
            "inner.lr_warmup_iters",
            f"{config.inner.lr_warmup_iters} is not shorter than the run of {iterations} steps, so "
            "the peak learning rate is never reached.\nUse fewer warm-up steps or a longer run.",
        )


def recompute_is_complete(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Full recompute says how many layers; the others do not."""
    training = config.training
    layers = config.model.num_layers // config.parallel.pipeline_model_parallel_size
    if training.recompute_granularity != "full":
        if training.recompute_num_layers is not None:
            yield Problem(
                "training.recompute_num_layers",
                f"{training.recompute_num_layers} has no meaning with recompute_granularity "
                f"{training.recompute_granularity}.\nUse recompute_granularity: full or remove it.",
            )
    elif training.recompute_num_layers is None:
        yield Problem(
            "training.recompute_num_layers",
            "not set, and recompute_granularity full needs it.\nUse 1 to recompute layer by layer.",
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
    """Megatron gathers parameters ahead only where it reduces gradients ahead."""
    if config.training.overlap_param_gather and not config.training.overlap_grad_reduce:
        yield Problem(
            "training.overlap_param_gather",
            "true, but overlap_grad_reduce is false; Megatron overlaps both or the reduction "
            "alone.\nSet overlap_grad_reduce: true.",
        )


def evaluation_has_data(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Evaluation needs held-out data."""
    if config.training.eval_interval > 0 and not config.data.valid:
        yield Problem(
            "training.eval_interval",
            f"{config.training.eval_interval}, but data.valid names no dataset.\nAdd one, or use "
            "eval_interval 0.",
        )


def tokenizer_is_named(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Every tokenizer but byte-level is a file."""
    if config.data.tokenizer_type != "byte-level" and config.data.tokenizer_model is None:
        yield Problem(
            "data.tokenizer_model",
            f"not set, and tokenizer_type {config.data.tokenizer_type} needs it.\nName the "
            "tokenizer's file or directory.",
        )


def saving_has_a_place(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Checkpoints go somewhere."""
    if config.checkpoint.save_interval > 0 and config.checkpoint.dir is None:
        yield Problem(
            "checkpoint.save_interval",
            f"{config.checkpoint.save_interval}, but checkpoint.dir is not set.\nName a directory "
            "that all ranks see, or use save_interval 0.",
        )


def resuming_has_a_place(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """A run that goes on from a checkpoint also writes some."""
    if config.checkpoint.resume not in ("auto", "none") and config.checkpoint.dir is None:
        yield Problem(
            "checkpoint.resume",
            f"{config.checkpoint.resume}, but checkpoint.dir is not set, so what follows could not "
            "be saved.\nName a directory for the checkpoints of this run.",
        )


def precision_of_gradients_fits(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """fp32 runs accumulate in fp32."""
    if config.training.precision == "fp32" and config.training.accumulate_dtype == "bf16":
        yield Problem(
            "training.accumulate_dtype",
            "bf16, but precision is fp32; Megatron accumulates in the dtype of the parameters or "
            "wider.\nUse fp32.",
        )


def symmetric_forms_have_precision(
    config: RunConfig, topology: Topology | None
) -> Iterator[Problem]:
    """Gram matrices are not iterated in bf16, where they lose small singular values."""
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


def supported(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """The program can do what the schema can say."""
    for refuse in UNSUPPORTED:
        for key, text in refuse(config):
            yield Problem(key, text)


RULES: tuple[Rule, ...] = (
    one_length,
    one_weight_decay,
    warmup_is_shorter_than_the_run,
    heads_divide,
    head_width_is_even,
    ffn_divides,
    vocabulary_divides,
    layers_divide,
    sequence_divides,
    batch_divides,
    data_parallelism_has_one_replica,
    fragments_have_layers,
    exceptions_fit_the_code,
    block_size_has_blocks,
    apply_rule_is_one,
    norm_band_is_a_band,
    overlap_is_shorter_than_the_spacing,
    rounds_of_schedules_ascend,
    run_has_a_round,
    recompute_is_complete,
    gather_overlap_needs_reduce_overlap,
    evaluation_has_data,
    tokenizer_is_named,
    saving_has_a_place,
    resuming_has_a_place,
    symmetric_forms_have_precision,
    precision_of_gradients_fits,
    supported,
)


def find_problems(
    config: RunConfig, topology: Topology | None = None, *, rules: Iterable[Rule] = RULES
) -> list[Problem]:
    """Return everything that the rules find wrong, in their order.

    Args:
        config: A parsed config.
        topology: The layout of the real world; without it the smallest world is taken.
        rules: Which rules to ask; `(*RULES, *more)` adds those of other packages.
    """
    return [problem for rule in rules for problem in rule(config, topology)]


def check(
    config: RunConfig, topology: Topology | None = None, *, rules: Iterable[Rule] = RULES
) -> None:
    """Raise one ConfigError with everything that the rules find wrong, if anything."""
    problems = find_problems(config, topology, rules=rules)
    if problems:
        raise ConfigError([problem.format(config.where) for problem in problems])
