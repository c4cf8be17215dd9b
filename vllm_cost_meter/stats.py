"""The stat logger under its stable name, which is an entry point of vLLM's."""

from vllm_cost_meter.vllm_hooks.stat_logger import CostStatLogger

__all__ = ["CostStatLogger"]
