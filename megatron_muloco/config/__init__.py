"""Configuration of a run: reads YAML into frozen, checked models. Imports no torch."""

from megatron_muloco.config.derived import Derived, derive, smallest_topology, topology_of
from megatron_muloco.config.inner import learning_rate
from megatron_muloco.config.load import load_config, with_compression
from megatron_muloco.config.messages import Problem
from megatron_muloco.config.rules import RULES, Rule, check, find_problems
from megatron_muloco.config.schema import RunConfig

__all__ = [
    "RULES",
    "Derived",
    "Problem",
    "Rule",
    "RunConfig",
    "check",
    "derive",
    "find_problems",
    "learning_rate",
    "load_config",
    "smallest_topology",
    "topology_of",
    "with_compression",
]
