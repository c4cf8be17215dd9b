"""Stable import path of the ASGI middleware, for vLLM's option `--middleware`."""

from vllm_cost_meter.api_server.middleware import CostMiddleware

__all__ = ["CostMiddleware"]
