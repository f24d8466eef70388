"""The matrices of one pipeline stage and their owners, as the parameter table will have them."""

from functools import partial

from megatron_muloco.config.inner import MuonInner
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.optim.forms import Implementation, automatic_form
from megatron_muloco.optim.units import LayerShape, Unit, is_vector, split
from megatron_muloco.planning.parameters import stage_parameters
from megatron_muloco.topology import Topology

__all__ = ["stage_units"]


def stage_units(config: RunConfig, topology: Topology, *, accelerator: bool) -> tuple[Unit, ...]:
    """Return the units of a pipeline stage, all stages having as many; none without Muon.

    Args:
        config: The run.
        topology: Its tensor and pipeline sizes count.
        accelerator: Whether ranks have one, for the form and with it the cost of a unit.
    """
    if not isinstance(config.inner, MuonInner):
        return ()
    model, tensor, muon = config.model, topology.tensor, config.inner.muon
    shape = LayerShape(
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.kv_channels,
        ffn_hidden_size=model.ffn_hidden_size,
    )
    parameters = stage_parameters(model, topology, stage=0, tp_rank=0)
    return tuple(
        unit
        for param in parameters  # in the order of the modules, by which ties of owners are broken
        if not is_vector(param)
        for unit in split(
            param,
            shape,
            tensor_size=tensor,
            steps=muon.num_ns_steps,
            split_heads=muon.split_heads,
            choose_form=partial(_form, config.inner, accelerator),
        )
    )


def _form(inner: MuonInner, accelerator: bool, rows: int, columns: int) -> Implementation:
    if inner.muon.ns_impl != "auto":
        return inner.muon.ns_impl
    precise = inner.muon.compute_dtype(accelerator=accelerator) == "fp32"
    return automatic_form(rows, columns, precise=precise, cpu=not accelerator)
