"""The command `doctor`: check the installation, the ledger, and the server that runs."""

from vllm_cost_meter.cli.doctor.command import doctor_, examine

__all__ = ["doctor_", "examine"]
