"""Cost of a run by arithmetic alone: memory, traffic, time, and the plan that prints them."""

from megatron_muloco.planning.memory import MemoryPlan, memory_plan
from megatron_muloco.planning.report import render_plan
from megatron_muloco.planning.traffic import TrafficPlan, traffic_plan

__all__ = ["MemoryPlan", "TrafficPlan", "memory_plan", "render_plan", "traffic_plan"]
