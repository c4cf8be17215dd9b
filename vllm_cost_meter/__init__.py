"""vllm_cost_meter: measured cost of every request that a vLLM server runs."""

from vllm_cost_meter.version import __version__

__all__ = ["__version__"]
