"""The ASGI middleware under the stable name that `--middleware` is given."""

from vllm_cost_meter.api_server.middleware import CostMiddleware

__all__ = ["CostMiddleware"]
