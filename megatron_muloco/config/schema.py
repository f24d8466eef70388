"""`RunConfig`: the config schema of a run, with every section and key of a config file.

A key that Megatron also has keeps Megatron's name and meaning. `docs/reference/config.md` is
generated from the descriptions here.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, field_validator

from megatron_muloco.config.document import place_of
from megatron_muloco.config.inner import InnerConfig
from megatron_muloco.config.outer import OuterConfig
from megatron_muloco.config.section import (
    Count,
    Degree,
    Extent,
    Layers,
    Minutes,
    PositiveInt,
    Section,
    Seed,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DataSource",
    "ModelConfig",
    "MonitorConfig",
    "ParallelConfig",
    "ProfileConfig",
    "RunConfig",
    "SavePseudogradientsConfig",
    "SpikesConfig",
    "TrainingConfig",
]


class ModelConfig(Section):
    """Shape of the decoder; the defaults are those of the MuLoCo paper's models."""

    num_layers: Layers = Field(description="Transformer layers.")
    hidden_size: Extent = Field(description="Width of the residual stream.")
    ffn_hidden_size: Extent = Field(
        description="Width of the SwiGLU MLP; gate and up each have this many rows."
    )
    num_attention_heads: Extent = Field(description="Query heads.")
    num_query_groups: Extent | None = Field(
        None, description="Key/value heads; by default num_attention_heads (no grouping)."
    )
    kv_channels: Extent = Field(128, description="Width of one attention head.")
    seq_length: Extent = Field(description="Tokens per sequence.")
    vocab_size: Extent = Field(description="Number of tokens of the tokenizer, before padding.")
    make_vocab_size_divisible_by: Extent = Field(
        128,
        description="The vocabulary is padded up to a multiple of this number. It does not "
        "depend on the tensor-parallel size, so that a checkpoint fits every layout.",
    )
    rotary_base: float = Field(500_000.0, gt=0, description="Base period of rotary embeddings.")
    norm_epsilon: float = Field(1e-6, gt=0, description="Epsilon of every RMSNorm.")
    qk_layernorm: bool = Field(True, description="Apply RMSNorm to each query and key head.")
    post_layernorm: bool = Field(
        True,
        description="Apply RMSNorm after attention and after the MLP, before the residual add.",
    )
    attention_impl: Literal["auto", "dense", "varlen", "flex", "te"] = Field(
        "auto",
        description="How attention inside documents is computed: dense with a mask of all pairs, "
        "varlen on packed documents (torch's varlen_attn on CUDA in bf16, else a loop over "
        "documents), flex with torch's flex_attention (CUDA), te with Transformer Engine (CUDA, "
        "bf16). All agree within rounding. auto is varlen on CUDA in bf16 where torch has it and "
        "on CPUs from 1,024 tokens a sequence, else dense. Not Megatron's attention_backend, which "
        "chooses among the kernels of Transformer Engine.",
    )
    untie_embeddings_and_output_weights: bool = Field(
        True, description="Use separate matrices for the embedding and the output head."
    )
    transformer_impl: Literal["local", "transformer_engine"] = Field(
        "local",
        description="Linear layers and norms of the decoder: Megatron's own, or Transformer "
        "Engine's where it can be imported. Parameters have the same names and shapes, so a "
        "checkpoint fits both.",
    )
    init: Literal["muloco", "megatron"] = Field(
        "muloco",
        description="Initialisation: muloco as in the MuLoCo code (truncated normal, scaled by "
        "depth, embeddings of unit variance; a tied embedding has the head's scale "
        "hidden_size^-0.5), or megatron (normal, output layers scaled by depth).",
    )
    init_method_std: float = Field(
        0.02, gt=0, description="Standard deviation of initial matrices before depth scaling."
    )

    @property
    def query_groups(self) -> int:
        """Key/value heads with the default filled in."""
        return self.num_query_groups or self.num_attention_heads


class ParallelConfig(Section):
    """Parallel sizes; the data-parallel size follows from the number of ranks."""

    num_replicas: Degree = Field(
        1, description="K, the number of replicas; each trains on its own data between outer steps."
    )
    tensor_model_parallel_size: Degree = Field(
        1, description="Ranks that share each matrix by slicing it."
    )
    pipeline_model_parallel_size: Degree = Field(
        1, description="Pipeline stages that share the layers."
    )
    context_parallel_size: Degree = Field(
        1,
        description="Ranks that share each sequence: each holds two chunks of it, and gathers keys "
        "and values of the others for attention.",
    )
    num_layers_in_first_pipeline_stage: PositiveInt | None = Field(
        None,
        description="Layers of the first pipeline stage; by default an equal share. The stages "
        "between the first and the last one hold equal numbers of layers.",
    )
    num_layers_in_last_pipeline_stage: PositiveInt | None = Field(
        None,
        description="Layers of the last pipeline stage, which also computes output head and loss; "
        "by default an equal share.",
    )
    sequence_parallel: bool = Field(
        False,
        description="Divide norms and residual stream over tensor-parallel ranks along the "
        "sequence; has no effect with tensor_model_parallel_size 1.",
    )


class DataSource(Section):
    """One indexed dataset and its weight."""

    path: str = Field(
        min_length=1,
        description="Prefix of the .bin and .idx files, relative to the working directory.",
    )
    weight: float = Field(
        1.0, gt=0, description="Share of the samples, relative to the other datasets."
    )


class DataConfig(Section):
    """Datasets and tokenizer."""

    train: tuple[DataSource, ...] = Field(
        strict=False,
        min_length=1,
        description="Training datasets. A path alone stands for a dataset of weight 1.",
    )
    valid: tuple[DataSource, ...] = Field((), strict=False, description="Held-out datasets.")
    test: tuple[DataSource, ...] = Field(
        (),
        strict=False,
        description="Held-out datasets that are evaluated once, at the end of the run, for results "
        "on text that no choice was made with.",
    )
    tokenizer_type: Literal["sentencepiece", "huggingface", "tiktoken", "byte-level"] = Field(
        description="Type of the tokenizer."
    )
    tokenizer_model: str | None = Field(
        None, description="File or directory of the tokenizer; byte-level needs none."
    )
    mask_document_boundaries: bool = Field(
        True, description="Mask attention across document boundaries."
    )
    seed: Seed = Field(42, description="Seed of the sample order.")
    cache_dir: str | None = Field(
        None, description="Directory of the sample index caches; by default beside the data."
    )

    @field_validator("train", "valid", "test", mode="before")
    @classmethod
    def _paths_are_sources(cls, value: object) -> object:
        """Return sources for paths: ``data/a`` or ``[data/a]`` for ``[{path: data/a}]``."""
        entries = [value] if isinstance(value, str) else value
        if not isinstance(entries, list | tuple):
            return value
        return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]


class SpikesConfig(Section):
    """What a replica does when its gradient norm or loss leaps."""

    max_norm_ratio: float = Field(
        0.0,
        ge=0,
        description="Skip an inner step whose gradient norm is more than this many times the "
        "median of the last window steps; 0 is off.",
    )
    max_loss_ratio: float = Field(
        0.0,
        ge=0,
        description="Set a replica back to the anchor, with moments of zero, when its loss was "
        "more than this many times the median of the last window steps for patience steps in a "
        "row; 0 is off. Needs an outer step.",
    )
    window: PositiveInt = Field(
        100,
        description="Inner steps of the medians. Nothing is compared before so many steps. Every "
        "finite value counts, also of a skipped step, so that a lasting change is accepted after "
        "half of them.",
    )
    patience: PositiveInt = Field(
        10, description="Inner steps in a row with a high loss before a replica is set back."
    )


class TrainingConfig(Section):
    """Batches, length, precision and overlap of the inner steps."""

    micro_batch_size: Extent = Field(
        description="Sequences per forward pass of one data-parallel rank."
    )
    rampup_batch_size: tuple[Extent, Extent, PositiveInt] | None = Field(
        None,
        strict=False,
        description="Start, increment and samples, such as [256, 256, 1000000]: the batch begins "
        "with the start and rises in equal parts of the samples to global_batch_size. When not "
        "set, the batch is global_batch_size from the first step.",
    )
    global_batch_size: Extent = Field(description="Sequences per inner step over all replicas.")
    train_iters: Count | None = Field(
        None,
        description="Inner steps of the run. Set exactly one of train_iters, train_tokens and "
        "tokens_per_parameter.",
    )
    train_tokens: Count | None = Field(
        None, description="Tokens of the run over all replicas; rounded up to whole steps."
    )
    tokens_per_parameter: float | None = Field(
        None,
        gt=0,
        le=1e9,
        description="Tokens of the run per parameter, embeddings included; rounded up to whole "
        "steps.",
    )
    seed: Seed = Field(42, description="Seed of the initial weights.")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="Dtype of forward and backward; master weights are fp32 in both cases."
    )
    accumulate_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="Dtype in which a replica accumulates and reduces its gradients."
    )
    clip_grad: float = Field(
        1.0, ge=0, description="Maximum global gradient norm of a replica; 0 disables clipping."
    )
    spikes: SpikesConfig = Field(
        default_factory=SpikesConfig,
        description="What a replica does when its gradient norm or loss leaps.",
    )
    max_skipped_steps: int = Field(
        20,
        ge=0,
        description="Skipped inner steps in a row after which plain data parallelism stops with "
        "exit code 17; 0 never stops. A step is skipped when its gradient norm is not finite or a "
        "spike. With an outer step, outer.guard.max_empty_rounds is the limit instead.",
    )
    recompute_granularity: Literal["none", "selective", "full"] = Field(
        "none",
        description="Activations that backward recomputes: none, those of attention (selective), "
        "or those of whole layers (full).",
    )
    recompute_method: Literal["uniform", "block"] = Field(
        "uniform",
        description="Layers that full recomputation covers: all, in chunks (uniform), or the first "
        "ones of a stage (block).",
    )
    recompute_num_layers: PositiveInt | None = Field(
        None, description="Layers per chunk (uniform), or layers recomputed per stage (block)."
    )
    overlap_grad_reduce: bool = Field(
        False, description="Overlap the gradient reduction inside a replica with backward."
    )
    overlap_param_gather: bool = Field(
        False, description="Overlap the parameter gather inside a replica with forward."
    )
    fusions: Literal["auto", "none"] = Field(
        "auto",
        description="Fused kernels of the model: auto fuses on a GPU what this machine can (the "
        "first lines say what), none nothing. On a CPU nothing is fused.",
    )
    deterministic: bool = Field(
        False,
        description="Use only kernels and collectives with the same result in every run. On a CPU "
        "it has no effect: runs there have equal bits always.",
    )
    eval_interval: int = Field(
        0, ge=0, description="Inner steps between evaluations of the anchor; 0 disables them."
    )
    eval_iters: Extent = Field(10, description="Global batches per evaluation.")
    check_weight_hash_across_dp_replicas_interval: int = Field(
        0,
        ge=0,
        description="Inner steps between checks inside a replica that its ranks hold the same "
        "model parameters, and that these are the rounded master weights; 0 is off.",
    )
    check_memory: bool = Field(
        True, description="Refuse to start on a GPU that has less memory than the plan needs."
    )
    distributed_timeout_minutes: Minutes = Field(
        10.0, description="Minutes after which an unfinished collective ends the run."
    )
    control_timeout_minutes: Minutes = Field(
        60.0,
        description="The same limit for the small messages of start-up and checkpoints, which wait "
        "for ranks that read and write files.",
    )


class CheckpointConfig(Section):
    """Checkpoints on disk."""

    dir: str | None = Field(
        None,
        description="Checkpoint directory, visible to all ranks, relative to the working "
        "directory; when not set, nothing is saved.",
    )
    save_interval: int = Field(
        0,
        ge=0,
        description="Inner steps between checkpoints; 0 saves only at the end and at a stop "
        "request.",
    )
    keep: PositiveInt = Field(
        2, description="Number of checkpoints to keep; older ones are deleted."
    )
    save_retain_interval: PositiveInt | None = Field(
        None,
        description="Checkpoints whose step is a multiple of this number are kept for ever, beside "
        "the newest ones; when not set, none.",
    )
    async_save: bool = Field(
        False,
        description="Write checkpoints in the background: training waits only until each rank's "
        "parts are copied to host memory, which needs that much of it.",
    )
    resume: str = Field(
        "auto",
        min_length=1,
        description="Checkpoint to resume from: auto (the latest in dir, if there is one), none, "
        "or the directory of a checkpoint.",
    )
    allow_changes: tuple[Literal["replicas", "method", "inner_optimizer"], ...] = Field(
        (),
        strict=False,
        description="Changes of the training that a resume may make: replicas "
        "(parallel.num_replicas), method (outer.kind) and inner_optimizer (inner.kind). A change "
        "that is not named is refused.",
    )
    init_from: str | None = Field(
        None,
        min_length=1,
        description="Checkpoint of this package whose weights a new run begins with: a directory "
        "of checkpoints, one of them, or its final_anchor. Only the anchor is read; optimizers, "
        "data and steps begin afresh.",
    )


class ProfileConfig(Section):
    """Which inner steps are profiled, and what the trace holds."""

    steps: tuple[PositiveInt, PositiveInt] | None = Field(
        None,
        strict=False,
        description="First and last inner step to profile, such as [11, 40]; when not set, "
        "nothing is profiled. Needs monitor.dir; traces are written to its directory profile.",
    )
    ranks: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0,), strict=False, description="Ranks of which each writes a Chrome trace."
    )
    with_memory: bool = Field(False, description="Record allocations and frees.")
    with_stack: bool = Field(False, description="Record Python stacks.")
    record_shapes: bool = Field(False, description="Record the shapes of operator inputs.")
    nvtx: bool = Field(
        False,
        description="Emit the spans as NVTX ranges for Nsight in place of a trace; CUDA only.",
    )


class WandbConfig(Section):
    """Where the run appears in Weights & Biases, beside TensorBoard; needs the package wandb."""

    project: str | None = Field(
        None, description="Project; when not set, nothing is sent to Weights & Biases."
    )
    group: str | None = Field(None, description="Group of runs within the project.")
    team: str | None = Field(None, description="Team or user; by default that of the login.")


class SavePseudogradientsConfig(Section):
    """Which rounds' pseudogradients are saved, and where."""

    dir: str | None = Field(
        None,
        description="Directory of the files, visible to all ranks; when not set, nothing is saved.",
    )
    rounds: tuple[PositiveInt, PositiveInt] = Field(
        (1, 1), strict=False, description="First and last round to save, such as [1, 20]."
    )
    interval: PositiveInt = Field(1, description="Rounds between two saved ones.")
    steps: bool = Field(
        False,
        description="Also save what each inner step subtracted from the matrices, for the "
        "decomposition of the nuclear norm: one fp32 copy of them per step. Needs one fragment "
        "without overlap or mixing.",
    )


class MonitorConfig(Section):
    """Console lines, TensorBoard events and checks."""

    dir: str | None = Field(
        None, description="TensorBoard directory; when not set, no events are written."
    )
    log_interval: PositiveInt = Field(10, description="Inner steps between console lines.")
    pseudogradient_interval: int = Field(
        1, ge=0, description="Rounds between pseudogradient diagnostics; 0 is off."
    )
    sample_tokens: int = Field(
        0,
        ge=0,
        description="Tokens to generate from the anchor at the end of the run; 0 is off, as are "
        "several pipeline stages or context-parallel ranks.",
    )
    sample_prompt: str = Field("The", min_length=1, description="Prompt of the generated text.")
    digest_interval: int = Field(
        10,
        ge=0,
        description="Rounds between checks that all replicas hold the same anchor and outer "
        "momentum, and tensor-parallel ranks the same norm weights; 0 is off.",
    )
    debug_digests: bool = Field(
        False, description="Check anchors and replicated parameters after every outer step."
    )
    profile: ProfileConfig = Field(
        default_factory=ProfileConfig, description="Which inner steps are profiled."
    )
    wandb: WandbConfig = Field(
        default_factory=WandbConfig,
        description="Weights & Biases, through DeepSpeed's monitor.",
    )
    save_pseudogradients: SavePseudogradientsConfig = Field(
        default_factory=SavePseudogradientsConfig,
        description="Which rounds' pseudogradients are saved, and where.",
    )


class RunConfig(Section):
    """The configuration of a whole run."""

    model: ModelConfig = Field(description="Shape of the decoder.")
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig,
        description="Parallel sizes; the data-parallel size follows from the number of ranks.",
    )
    data: DataConfig = Field(description="Datasets and tokenizer.")
    training: TrainingConfig = Field(
        description="Batches, length, precision and overlap of the inner steps."
    )
    inner: InnerConfig = Field(
        description="Inner optimizer: the optimizer of each replica between outer steps."
    )
    outer: OuterConfig = Field(
        description="Outer step: when and how replicas exchange pseudogradients."
    )
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="Saving and resuming."
    )
    monitor: MonitorConfig = Field(
        default_factory=MonitorConfig, description="Console lines, TensorBoard events and checks."
    )

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)
    _warnings: tuple[str, ...] = PrivateAttr(default=())

    def where(self, key: str) -> str:
        """Return ``file:line`` of a dotted key or its nearest written parent, else nothing."""
        return place_of(self._sources, key)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to say at start about values that are allowed and probably not meant."""
        return self._warnings

    def with_sources(self, sources: dict[str, str], warnings: Iterable[str] = ()) -> "RunConfig":
        """Return a copy that knows ``file:line`` of each key, and what to warn of."""
        located = self.model_copy()
        located._sources = dict(sources)
        located._warnings = tuple(warnings)
        return located

    def digest(self) -> str:
        """Return a short hash of all values; it must be equal on all ranks of a run."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
