"""vllm_cost_meter: measured cost of every request that a vLLM server runs."""

__version__ = "0.1.0"
