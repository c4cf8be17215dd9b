"""Stable import path of the stat logger: the entry point `vllm.stat_logger_plugins` names it."""

from vllm_cost_meter.vllm_hooks.stat_logger import CostStatLogger

__all__ = ["CostStatLogger"]
