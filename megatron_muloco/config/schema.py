"""Schema of a run: every section and key that a config file may have.

Keys that Megatron has keep Megatron's names and meanings. `docs/reference/config.md` is generated
from the descriptions here.
"""

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr

from megatron_muloco.config.document import place_of
from megatron_muloco.config.inner import InnerConfig
from megatron_muloco.config.outer import OuterConfig
from megatron_muloco.config.section import Count, PositiveInt, Section

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DataSource",
    "ModelConfig",
    "MonitorConfig",
    "ParallelConfig",
    "ProfileConfig",
    "RunConfig",
    "TrainingConfig",
]


class ModelConfig(Section):
    """The decoder; the defaults are those of the MuLoCo paper's models."""

    num_layers: PositiveInt = Field(description="Transformer layers.")
    hidden_size: PositiveInt = Field(description="Width of the residual stream.")
    ffn_hidden_size: PositiveInt = Field(
        description="Width of the SwiGLU branch; gate and up each have this many rows."
    )
    num_attention_heads: PositiveInt = Field(description="Query heads.")
    num_query_groups: PositiveInt | None = Field(
        None, description="Key/value heads; default num_attention_heads (no grouping)."
    )
    kv_channels: PositiveInt = Field(128, description="Width of one attention head.")
    seq_length: PositiveInt = Field(description="Tokens per sequence.")
    vocab_size: PositiveInt = Field(description="Tokens of the tokenizer, before padding.")
    make_vocab_size_divisible_by: PositiveInt = Field(
        128,
        description="The vocabulary is padded up to a multiple of this, whatever the "
        "tensor-parallel size, so that a checkpoint fits every layout.",
    )
    rotary_base: float = Field(500_000.0, gt=0, description="Base period of rotary embeddings.")
    norm_epsilon: float = Field(1e-6, gt=0, description="Epsilon of every RMSNorm.")
    qk_layernorm: bool = Field(True, description="RMSNorm over each query and key head.")
    post_layernorm: bool = Field(
        True, description="RMSNorm after attention and after the MLP, before the residual add."
    )
    untie_embeddings_and_output_weights: bool = Field(
        True, description="Give the output head its own matrix."
    )
    init: Literal["muloco", "megatron"] = Field(
        "muloco",
        description="Initialisation: the MuLoCo code's (truncated normal, depth-scaled, unit "
        "embeddings) or Megatron's (normal, scaled output layers).",
    )
    init_method_std: float = Field(
        0.02, gt=0, description="Standard deviation of initial matrices before depth scaling."
    )

    @property
    def query_groups(self) -> int:
        """Key/value heads with the default filled in."""
        return self.num_query_groups or self.num_attention_heads


class ParallelConfig(Section):
    """How the world is divided; the data-parallel size follows from the number of ranks."""

    num_replicas: PositiveInt = Field(
        1, description="K, model replicas that train on their own data between outer steps."
    )
    tensor_model_parallel_size: PositiveInt = Field(1, description="Ranks that slice each matrix.")
    pipeline_model_parallel_size: PositiveInt = Field(1, description="Pipeline stages.")
    context_parallel_size: PositiveInt = Field(
        1, description="Ranks that share each sequence; only 1 is available."
    )
    sequence_parallel: bool = Field(
        False,
        description="Divide norms and residuals over tensor-parallel ranks along the sequence; no "
        "effect at tensor_model_parallel_size 1.",
    )


class DataSource(Section):
    """One indexed dataset."""

    path: str = Field(
        min_length=1, description="Prefix of the .bin and .idx files, from the working directory."
    )
    weight: float = Field(1.0, gt=0, description="Share of the samples, relative to the others.")


class DataConfig(Section):
    """Where tokens come from."""

    train: tuple[DataSource, ...] = Field(
        strict=False, min_length=1, description="Training datasets."
    )
    valid: tuple[DataSource, ...] = Field((), strict=False, description="Held-out datasets.")
    tokenizer_type: Literal["sentencepiece", "huggingface", "tiktoken", "byte-level"] = Field(
        description="Kind of tokenizer."
    )
    tokenizer_model: str | None = Field(
        None, description="Tokenizer file or directory; byte-level needs none."
    )
    mask_document_boundaries: bool = Field(
        True, description="Keep attention from crossing the end of a document."
    )
    seed: int = Field(42, ge=0, description="Seed of the order of samples.")
    cache_dir: str | None = Field(
        None, description="Directory of sample index caches; default beside the data."
    )


class TrainingConfig(Section):
    """Batches, length, precision and what Megatron overlaps."""

    micro_batch_size: PositiveInt = Field(
        description="Sequences per forward pass of one data-parallel rank."
    )
    global_batch_size: PositiveInt = Field(
        description="Sequences per inner step over all replicas."
    )
    train_iters: Count | None = Field(
        None,
        description="Inner steps. Give exactly one of train_iters, train_tokens and "
        "tokens_per_parameter.",
    )
    train_tokens: Count | None = Field(
        None, description="Tokens over all replicas; rounded up to whole steps."
    )
    tokens_per_parameter: float | None = Field(
        None,
        gt=0,
        description="Tokens per parameter, embeddings included; rounded up to whole steps.",
    )
    seed: int = Field(42, ge=0, description="Seed of the initial weights.")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="Dtype of forward and backward; masters are fp32 either way."
    )
    accumulate_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="Dtype in which gradients are accumulated and reduced in a replica."
    )
    clip_grad: float = Field(
        1.0, ge=0, description="Largest global gradient norm of a replica; 0 does not clip."
    )
    recompute_granularity: Literal["none", "selective", "full"] = Field(
        "none", description="What is recomputed in backward: nothing, attention, or whole layers."
    )
    recompute_method: Literal["uniform", "block"] = Field(
        "uniform",
        description="Which layers full recompute covers: all in chunks, or the first ones.",
    )
    recompute_num_layers: PositiveInt | None = Field(
        None, description="Layers per chunk (uniform) or layers recomputed (block), per stage."
    )
    overlap_grad_reduce: bool = Field(
        False, description="Reduce gradients in a replica while backward runs."
    )
    overlap_param_gather: bool = Field(
        False, description="Gather updated parameters in a replica while forward runs."
    )
    eval_interval: int = Field(
        0, ge=0, description="Inner steps between evaluations of the anchor; 0 never evaluates."
    )
    eval_iters: PositiveInt = Field(10, description="Global batches per evaluation.")
    distributed_timeout_minutes: PositiveInt = Field(
        10, description="Minutes after which a collective that does not finish ends the run."
    )


class CheckpointConfig(Section):
    """State on disk."""

    dir: str | None = Field(
        None,
        description="Directory that all ranks see, from the working directory; none saves nothing.",
    )
    save_interval: int = Field(
        0, ge=0, description="Inner steps between checkpoints; 0 saves at the end and on request."
    )
    keep: PositiveInt = Field(2, description="Newest checkpoints to keep.")
    async_save: bool = Field(
        False, description="Write while training goes on; only false is available."
    )
    resume: str = Field(
        "auto",
        min_length=1,
        description="auto (the latest in dir, if any), none, or a checkpoint directory.",
    )


class ProfileConfig(Section):
    """Which inner steps are profiled, and what the trace holds."""

    steps: tuple[PositiveInt, PositiveInt] | None = Field(
        None,
        strict=False,
        description="First and last inner step to profile, such as [11, 40]; none profiles "
        "nothing. Needs monitor.dir; traces go to its directory profile.",
    )
    ranks: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0,), strict=False, description="Ranks that write a Chrome trace each."
    )
    with_memory: bool = Field(False, description="Record allocations and frees.")
    with_stack: bool = Field(False, description="Record Python stacks.")
    record_shapes: bool = Field(False, description="Record the shapes of operator inputs.")
    nvtx: bool = Field(
        False, description="Emit the spans as NVTX ranges as well, for Nsight; CUDA only."
    )


class MonitorConfig(Section):
    """What a run reports about itself."""

    dir: str | None = Field(None, description="TensorBoard directory; none writes no events.")
    log_interval: PositiveInt = Field(10, description="Inner steps between console lines.")
    pseudogradient_interval: int = Field(
        1, ge=0, description="Rounds between pseudogradient diagnostics; 0 is off."
    )
    sample_tokens: int = Field(
        0, ge=0, description="Tokens that the anchor writes at the end of the run; 0 is off."
    )
    sample_prompt: str = Field("The", min_length=1, description="What that text begins with.")
    digest_interval: int = Field(
        10,
        ge=0,
        description="Rounds between checks that the anchors of all replicas are equal; 0 is off.",
    )
    debug_digests: bool = Field(
        False, description="Check anchors and duplicated parameters after every outer step."
    )
    profile: ProfileConfig = Field(
        default_factory=ProfileConfig, description="Which inner steps are profiled."
    )


class RunConfig(Section):
    """A whole run, checked."""

    model: ModelConfig = Field(description="The decoder.")
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig, description="How the ranks of the world are divided."
    )
    data: DataConfig = Field(description="Where tokens come from.")
    training: TrainingConfig = Field(description="Batches, length and precision.")
    inner: InnerConfig = Field(description="The optimizer of every replica.")
    outer: OuterConfig = Field(description="How replicas meet.")
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="What is saved, where, and how a run goes on."
    )
    monitor: MonitorConfig = Field(
        default_factory=MonitorConfig, description="What a run reports about itself."
    )

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    def where(self, key: str) -> str:
        """Return ``file:line`` of a dotted key or its nearest written parent, else nothing."""
        return place_of(self._sources, key)

    def with_sources(self, sources: dict[str, str]) -> "RunConfig":
        """Return the same values, remembering where each was written."""
        located = self.model_copy()
        located._sources = dict(sources)
        return located

    def digest(self) -> str:
        """Return a short hash of all values; equal on all ranks or they do not run the same run."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
