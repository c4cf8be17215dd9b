"""Run `vllm-cost-meter` as `python -m vllm_cost_meter.cli`."""

from vllm_cost_meter.cli import app

app()
