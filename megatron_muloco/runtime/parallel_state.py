"""Copy of this replica's process groups in the globals of Megatron's ``parallel_state``.

This package passes groups explicitly. A few places in Megatron still read the globals (the
vocabulary-parallel cross entropy of 0.16, checkpoint helpers, scratch buffers), and they must see
the groups of *this replica*. No other module writes those globals.
"""

import torch
from megatron.core import parallel_state

from megatron_muloco.comm.groups import Groups
from megatron_muloco.errors import RuntimeMismatch

__all__ = ["mirror_groups", "require_unset", "unmirror_groups"]

# Global of parallel_state -> field of ProcessGroupCollection. Names that a Megatron version lacks
# are skipped; the *_GTP_REMAT ones exist from 0.17 on, where the getters prefer them.
_GROUPS = {
    "_TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "_PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "_MODEL_PARALLEL_GROUP": "mp",
    "_EMBEDDING_GROUP": "embd",
    "_POSITION_EMBEDDING_GROUP": "pos_embd",
    "_CONTEXT_PARALLEL_GROUP": "cp",
    "_TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tp_cp",
    "_DATA_PARALLEL_GROUP": "dp",
    "_DATA_PARALLEL_GROUP_WITH_GTP_REMAT": "dp",
    "_DATA_PARALLEL_GROUP_WITH_CP": "dp_cp",
    "_DATA_PARALLEL_GROUP_WITH_CP_WITH_GTP_REMAT": "dp_cp",
    "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP": "intra_dp_cp",
    "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_WITH_GTP_REMAT": "intra_dp_cp",
    "_GTP_WEIGHT_REMAT_GROUP": "gtp_remat",
    "_EXPERT_GTP_WEIGHT_REMAT_GROUP": "expt_gtp_remat",
    "_TENSOR_AND_DATA_PARALLEL_GROUP": "tp_dp",
    "_TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "tp_dp_cp",
    "_EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "_EXPERT_TENSOR_PARALLEL_GROUP": "expt_tp",
    "_EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "tp_ep",
    "_EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": "tp_ep_pp",
    "_EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP_WITH_EGTP": "tp_ep_pp_with_egtp_remat",
    "_EXPERT_DATA_PARALLEL_GROUP": "expt_dp",
    "_EXPERT_DATA_PARALLEL_GROUP_WITH_GTP_REMAT": "expt_dp_gtp_remat",
    "_INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP": "intra_expt_dp",
    "_INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP_WITH_GTP_REMAT": "intra_expt_dp",
    "_INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "intra_dist_opt",
}
_RANK_LISTS = {
    "_TENSOR_MODEL_PARALLEL_GLOBAL_RANKS": "tp",
    "_PIPELINE_GLOBAL_RANKS": "pp",
    "_MODEL_PARALLEL_GLOBAL_RANKS": "mp",
    "_CONTEXT_PARALLEL_GLOBAL_RANKS": "cp",
    "_DATA_PARALLEL_GLOBAL_RANKS": "dp",
    "_DATA_PARALLEL_GLOBAL_RANKS_WITH_CP": "dp_cp",
    "_EXPERT_MODEL_PARALLEL_RANKS": "ep",
    "_GTP_WEIGHT_REMAT_GLOBAL_RANKS": "gtp_remat",
    "_EXPERT_GTP_WEIGHT_REMAT_GLOBAL_RANKS": "expt_gtp_remat",
    "_EMBEDDING_GLOBAL_RANKS": "embd",
    "_POSITION_EMBEDDING_GLOBAL_RANKS": "pos_embd",
}


def require_unset() -> None:
    """Raise if this process already has Megatron groups.

    Raises:
        RuntimeMismatch: ``parallel_state`` holds groups, either of one model that spans all
            replicas or of an earlier call.
    """
    if parallel_state.model_parallel_is_initialized():
        raise RuntimeMismatch(
            "megatron.core.parallel_state is already initialised; its groups would mix the "
            "replicas. initialize_replicas builds all groups: call it once, and do not call "
            "initialize_model_parallel."
        )


def mirror_groups(groups: Groups) -> None:
    """Set Megatron's globals to this replica's groups. No collectives.

    Raises:
        RuntimeMismatch: As `require_unset`.
    """
    require_unset()
    for name, field in _GROUPS.items():
        if hasattr(parallel_state, name):
            setattr(parallel_state, name, getattr(groups.pg, field, None))
    for name, field in _RANK_LISTS.items():
        group = getattr(groups.pg, field, None)
        if hasattr(parallel_state, name) and group is not None:
            setattr(parallel_state, name, torch.distributed.get_process_group_ranks(group))
    parallel_state._set_global_memory_buffer()


def unmirror_groups() -> None:
    """Clear Megatron's globals, so that this process can mirror other groups."""
    for name in (*_GROUPS, *_RANK_LISTS, "_GLOBAL_MEMORY_BUFFER"):
        if hasattr(parallel_state, name):
            setattr(parallel_state, name, None)
