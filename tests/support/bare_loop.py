"""A plain Megatron training script that two calls, marked (1) and (2), turn into K replicas.

Everything else is ordinary Megatron code, written with its public functions. ``main`` adds
arguments, data and a log; copy the file and start it as ``deepspeed my_loop.py --config F``.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_muloco import (
    CheckpointStore,
    RunState,
    decoder_block_spec,
    initialise_weights,
    initialize_replicas,
    load_config,
    wrap_optimizer,
)
from megatron_muloco.data.batches import BatchSource
from megatron_muloco.data.datasets import build_datasets
from megatron_muloco.data.sampler import BatchLayout
from megatron_muloco.data.tokenizer import load_tokenizer


@dataclass
class BareRun:
    """Results of a run on this rank."""

    groups: Any
    optimizer: Any
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)


# The microbatches of one inner step, for this rank's replica and data-parallel rank.
Batches = Callable[[int], list[dict[str, torch.Tensor]]]


def train(
    config: Any,
    batches_for: Callable[[Any], Batches],
    steps: int,
    directory: Path | None = None,
    log_directory: Path | None = None,
) -> BareRun:
    """Train this rank up to inner step ``steps``, with the outer steps that are due on the way.

    With a directory it resumes from the newest checkpoint there and saves one at the end.
    """
    groups = initialize_replicas(config)  # (1) instead of initialize_model_parallel
    log = Log(groups, log_directory)
    batches = batches_for(groups)
    model = build_model(config, groups.pg)
    ddp = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        model,
        pg_collection=groups.pg,
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.inner.lr,  # the wrapper sets it, and weight decay, at every step
            bf16=model.config.bf16,
            params_dtype=model.config.params_dtype,
            use_distributed_optimizer=True,
            clip_grad=config.training.clip_grad,
        ),
        [ddp],
        use_gloo_process_groups=False,
        pg_collection=groups.pg,
    )
    optimizer = wrap_optimizer(optimizer, ddp, config, groups)  # (2)

    state = RunState(groups, optimizer.view, optimizer.inner, optimizer.synchronizer, config)
    store = None if directory is None else CheckpointStore(directory, groups)
    if store is not None and (found := store.latest()) is not None:
        optimizer.steps = store.load(found.path, state).step

    run = BareRun(groups, optimizer)
    forward_backward = partial(
        get_forward_backward_func(pp_size=groups.pg.pp.size(), vp_size=None),
        forward_step_func=forward_step,
        model=[ddp],
        seq_length=config.model.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        p2p_communicator=P2PCommunicator(groups.pg.pp, model.config),
        pg_collection=groups.pg,
    )
    for step in range(optimizer.steps + 1, steps + 1):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        microbatches = batches(step)
        losses = forward_backward(
            data_iterator=iter(microbatches), num_microbatches=len(microbatches)
        )
        _, grad_norm, _ = optimizer.step()  # the inner step, and the outer steps that are due
        if losses:  # on the last pipeline stage
            run.losses.append(float(torch.stack([entry["loss"] for entry in losses]).mean()))
            log.write(step, run.losses[-1], grad_norm)
        run.grad_norms.append(grad_norm)
    if store is not None:
        store.save(steps, state)  # every rank, after the same step, before the flush
    if steps == config.training.train_iters:
        optimizer.flush()  # a last synchronization of all replicas
    return run


def build_model(config: Any, pg: Any) -> GPTModel:
    """Build this rank's pipeline stage: the same model as ``pretrain.py`` builds.

    This one has the settings of ``pretrain.py``, spelled out.
    """
    sizes, parallel = config.model, config.parallel
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    transformer = TransformerConfig(
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size,
        ffn_hidden_size=sizes.ffn_hidden_size,
        num_attention_heads=sizes.num_attention_heads,
        num_query_groups=sizes.query_groups,
        kv_channels=sizes.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=sizes.norm_epsilon,
        qk_layernorm=sizes.qk_layernorm,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
    )
    layers = decoder_block_spec(
        sizes.num_layers // pg.pp.size(),
        qk_layernorm=sizes.qk_layernorm,
        post_layernorm=sizes.post_layernorm,
    )
    model = GPTModel(
        transformer,
        layers,
        vocab_size=sizes.vocab_size,
        max_sequence_length=sizes.seq_length,
        pre_process=pg.pp.rank() == 0,
        post_process=pg.pp.rank() == pg.pp.size() - 1,
        share_embeddings_and_output_weights=not sizes.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=sizes.rotary_base,
        pg_collection=pg,
    )
    initialise_weights(
        model,
        pg,
        seed=config.training.seed,
        std=sizes.init_method_std,
        hidden_size=sizes.hidden_size,
    )
    return model.cuda() if torch.cuda.is_available() else model


def forward_step(batches: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[Any, Any]:
    """Run one microbatch; return its output and its loss function, as Megatron expects."""
    batch = next(batches)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, mean_loss


def mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the mean loss per token of a microbatch, to differentiate and to report."""
    loss = losses.float().mean()
    return loss, {"loss": loss.detach().clone()}


def text_batches(config: Any, groups: Any) -> Batches:
    """Return the microbatches of this rank from the datasets of ``config.data``."""
    training = config.training
    datasets = build_datasets(
        train=config.data.train,
        valid=(),
        train_samples=training.train_iters * training.global_batch_size,
        valid_samples=0,
        seq_length=config.model.seq_length,
        seed=config.data.seed,
        tokenizer=load_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model),
    )
    layout = BatchLayout(
        training.global_batch_size,
        groups.topology.num_replicas,
        groups.topology.data,
        training.micro_batch_size,
    )
    source = BatchSource(
        datasets.train,
        layout,
        replica=groups.coords.replica,
        dp_rank=groups.coords.dp,
        steps=training.train_iters,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def batches(step: int) -> list[dict[str, torch.Tensor]]:
        found = [source.microbatch(step, index) for index in range(layout.num_microbatches)]
        return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in found]

    return batches


class Log:
    """Lines and TensorBoard curves of one rank: the first of replica 0's last pipeline stage."""

    def __init__(self, groups: Any, directory: Path | None) -> None:
        coords, last = groups.coords, groups.topology.pipeline - 1
        self._writer = None
        if directory is not None and coords == (0, last, 0, 0, 0):  # replica, pp, dp, cp, tp
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(directory))

    def write(self, step: int, loss: float, grad_norm: float) -> None:
        if self._writer is not None:
            print(f"step {step}: loss {loss:.4f}, gradient norm {grad_norm:.3f}", flush=True)
            self._writer.add_scalar("lm loss", loss, step)
            self._writer.add_scalar("grad-norm", grad_norm, step)
            self._writer.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file, as for pretrain.py")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # from DeepSpeed's launcher
    options = parser.parse_args(arguments)
    config = load_config(options.config, options.set)
    train(
        config,
        partial(text_batches, config),
        steps=config.training.train_iters,
        directory=None if config.checkpoint.dir is None else Path(config.checkpoint.dir),
        log_directory=None if config.monitor.dir is None else Path(config.monitor.dir),
    )


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
