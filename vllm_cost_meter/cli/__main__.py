"""`python -m vllm_cost_meter.cli` is `vllm-cost-meter`."""

from vllm_cost_meter.cli import app

app()
