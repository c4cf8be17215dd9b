"""The command `validate`: how wrong each attribution method is, in a simulation or for real."""

from vllm_cost_meter.cli.validate.command import validate

__all__ = ["validate"]
