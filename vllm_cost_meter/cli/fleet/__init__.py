"""The commands `fleet ...`: what the servers of a fleet share."""

from vllm_cost_meter.cli.fleet.commands import app

__all__ = ["app"]
