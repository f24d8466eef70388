"""Adapter to Megatron's data-parallel wrapper and distributed optimizer.

No other module reads their private attributes. Both supported Megatron versions have the ones used
here, and `MasterView` checks at start that the masters it finds partition every parameter.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor

from megatron_muloco.comm.collectives import gather_objects
from megatron_muloco.comm.groups import Groups
from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.model.names import describe_parameters
from megatron_muloco.params import GPT_NAMES, ParameterNames, ParamInfo, Shard

__all__ = [
    "MasterView",
    "build_distributed_optimizer",
    "find_distributed_optimizer",
    "keep_statistics_inside",
    "norm_of_all",
    "wrap_data_parallel",
]


def wrap_data_parallel(
    stage: torch.nn.Module,
    groups: Groups,
    *,
    reduce_in_fp32: bool,
    overlap_grad_reduce: bool,
    overlap_param_gather: bool,
    bucket_size: int | None = None,
) -> DistributedDataParallel:
    """Wrap a pipeline stage in Megatron's DDP over the replica's dp x cp ranks and set its hooks.

    Args:
        stage: The bare GPTModel of this stage.
        groups: This rank's groups.
        reduce_in_fp32: Accumulate and reduce gradients in fp32 rather than in their own dtype.
        overlap_grad_reduce: Reduce buckets while backward runs.
        overlap_param_gather: Gather parameters while forward runs.
        bucket_size: Elements of a bucket; Megatron's default when ``None``.
    """
    config: Any = stage.config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=reduce_in_fp32,
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather,
        use_distributed_optimizer=True,
        check_for_nan_in_grad=False,  # a non-finite gradient norm skips the step and is counted
        bucket_size=bucket_size,
    )
    ddp = DistributedDataParallel(config, ddp_config, stage, pg_collection=groups.pg)
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = ddp.no_sync if overlap_grad_reduce else None
    config.grad_scale_func = None
    return ddp


def build_distributed_optimizer(
    ddp: DistributedDataParallel,
    groups: Groups,
    inner: torch.optim.AdamW,
    config: OptimizerConfig,
) -> DistributedOptimizer:
    """Return Megatron's distributed optimizer, which shards its fp32 masters over dp x cp.

    Args:
        ddp: The wrapped stage.
        groups: This rank's groups.
        inner: An AdamW (Megatron 0.16 accepts nothing else) over the stage's parameters; its
            parameter groups are replaced by flat fp32 shards.
        config: Megatron's optimizer settings.
    """
    optimizer = DistributedOptimizer(
        inner,
        config,
        None,  # grad_scaler: no fp16
        None,  # init_state_fn: this package saves and loads the state
        model_chunks=[ddp],
        per_model_buffers={0: ddp.buffers},
        data_parallel_group=groups.pg.intra_dp_cp,
        data_parallel_group_gloo=None,
        data_parallel_group_idx=groups.pg.mp.rank(),
        distributed_optimizer_instance_id=0,
    )
    keep_statistics_inside(optimizer, groups)
    return optimizer


def keep_statistics_inside(optimizer: DistributedOptimizer, groups: Groups) -> None:
    """Make the optimizer compute gradient norms over its replica; its default is WORLD.

    On a GPU without apex and Transformer Engine, Megatron computes a norm for every shard and waits
    for each of them; `norm_of_all` replaces that function. On a CPU Megatron's own stays.
    """
    optimizer.grad_stats_parallel_group = groups.pg.intra_dist_opt
    optimizer.tp_group = groups.pg.tp
    if torch.cuda.is_available() and clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = norm_of_all


def norm_of_all(
    _chunk_size: int, _overflow: Tensor, tensor_lists: list[list[Tensor]], _per_tensor: bool
) -> tuple[Tensor, None]:
    """Return the norm of all tensors together, ``[1]`` in fp32, without waiting for the device.

    It has the signature of apex's ``multi_tensor_l2norm``. The result is the norm of the norms of
    the tensors, as in Megatron's function of that signature, and on a CPU has its bits.
    """
    norms = [norm for tensors in tensor_lists for norm in torch._foreach_norm(tensors)]
    return torch.linalg.vector_norm(torch.stack(norms).float()).view(1), None


def find_distributed_optimizer(optimizer: Any) -> DistributedOptimizer:
    """Return the one distributed optimizer that a Megatron optimizer is or contains.

    Raises:
        RuntimeMismatch: There is none, or more than one that holds parameters.
    """
    members: Iterable[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    found = [
        member
        for member in members
        if isinstance(member, DistributedOptimizer) and not member.is_stub_optimizer
    ]
    others = [member for member in members if not isinstance(member, DistributedOptimizer)]
    if len(found) != 1 or others:
        kinds = ", ".join(type(member).__name__ for member in members)
        raise RuntimeMismatch(
            f"the outer step needs exactly one DistributedOptimizer, but got [{kinds}]; its fp32 "
            "masters are what replicas exchange. Build the optimizer with "
            "use_distributed_optimizer=True and without experts."
        )
    return found[0]


class MasterView:
    """The fp32 masters of this rank's shards, by model-wide parameter name.

    Invariant: the shards on the dp x cp ranks partition every parameter (checked once), and every
    trainable parameter appears on some pipeline stage.

    Attributes:
        shards: This rank's non-empty shards, in the order of the stage's parameters.
        masters: Name -> flat fp32 tensor. With an fp32 model these are views of the parameters.
        raw_masters: The same tensors as Megatron's optimizer has them, not detached.
        infos: Every trainable parameter of this stage, also those without a shard on this rank.
        optimizer: Megatron's distributed optimizer.
        names: Names of the model's parameters.

    Collectives: construction gathers every rank's ranges over dp x cp; all its ranks construct it.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        optimizer: DistributedOptimizer,
        groups: Groups,
        names: ParameterNames = GPT_NAMES,
    ) -> None:
        self.optimizer = optimizer
        self.names = names
        self._ddp = ddp
        self._gather_now = not ddp.ddp_config.overlap_param_gather
        tensor_group = groups.pg.tp
        described = describe_parameters(ddp.module, tensor_rank=tensor_group.rank(), names=names)
        self.infos: dict[str, ParamInfo] = {name: info for name, (info, _) in described.items()}
        self._parameters = {name: parameter for name, (_, parameter) in described.items()}
        by_parameter = dict(_model_and_master(optimizer))
        self.raw_masters: dict[str, Tensor] = {}
        shards: list[Shard] = []
        for name, (info, parameter) in described.items():
            if parameter in by_parameter:
                place = optimizer._get_model_param_range_map(parameter)["param"]
                shards.append(Shard(info, place.start, place.end))
                self.raw_masters[name] = by_parameter[parameter]
        self.shards: tuple[Shard, ...] = tuple(shards)
        self.masters: Mapping[str, Tensor] = {
            name: master.detach() for name, master in self.raw_masters.items()
        }
        self._check_partition(groups)

    def _check_partition(self, groups: Groups) -> None:
        """Raise unless every element of every parameter has one master in the dp x cp group."""
        mine = {shard.name: (shard.start, shard.end) for shard in self.shards}
        pieces = gather_objects(groups.pg.intra_dp_cp, mine)
        for name, info in self.infos.items():
            ranges = sorted(piece[name] for piece in pieces if name in piece)
            edges = [0, *(end for _, end in ranges)]
            if [start for start, _ in ranges] != edges[:-1] or edges[-1] != info.numel:
                raise RuntimeMismatch(
                    f"the masters of {name} do not cover its {info.numel} elements once: {ranges}. "
                    "This Megatron version shards its optimizer in a way that is not supported."
                )

    def parameters(self) -> Mapping[str, Tensor]:
        """Return the model parameters of this stage by name, whole, in the model's precision."""
        return self._parameters

    @torch.no_grad()
    def differing(self) -> list[str]:
        """Return the names of this rank's shards whose parameters are not their rounded masters."""
        found = []
        for shard in self.shards:
            own = self._parameters[shard.name].detach().view(-1)[shard.start : shard.end]
            rounded = self.masters[shard.name].to(own.dtype)
            # Compared as bytes: NaN equals NaN, and 0.0 differs from -0.0.
            if not torch.equal(own.view(torch.uint8), rounded.view(torch.uint8)):
                found.append(shard.name)
        return found

    @torch.no_grad()
    def publish(self) -> None:
        """Copy masters to model parameters and update the parameters of every rank.

        Collectives: a parameter all-gather over dp x cp. With ``overlap_param_gather`` the next
        forward pass does it instead, except inside `gathered`. Every rank of the replica must call
        it.
        """
        self.optimizer._copy_main_params_to_model_params()
        if self._gather_now:
            self._ddp.start_param_sync(force_sync=True)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Make `publish` gather parameters at once instead of on the next forward pass.

        Collectives: with ``overlap_param_gather``, a parameter all-gather over dp x cp on entry;
        every rank of the replica must enter it.
        """
        overlapped = not self._gather_now
        if overlapped:
            self._ddp.disable_forward_pre_hook(param_sync=True)
        self._gather_now = True
        try:
            yield
        finally:
            if overlapped:
                self._gather_now = False
                self._ddp.enable_forward_pre_hook()


def _model_and_master(
    optimizer: DistributedOptimizer,
) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Yield each model parameter with a shard on this rank, and that shard's fp32 master."""
    # Megatron lists 16-bit parameters, whose masters are copies, and fp32 parameters, whose masters
    # are views of them, separately.
    pairs = (
        (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
        (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
    )
    for model_groups, master_groups in pairs:
        for model_group, master_group in zip(model_groups, master_groups, strict=True):
            yield from zip(model_group, master_group, strict=True)
