"""Runs commands outside the checkout, in an environment that has the wheel."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What earlier versions of setup.py have built, or an earlier Python.
STALE = (
    "vllm_cost_meter/_attribution_c.cpython-311-x86_64-linux-gnu.so",
    "vllm_cost_meter/attribution/_fit.cpython-311-x86_64-linux-gnu.so",
)


@dataclass(frozen=True, slots=True)
class Installed:
    """An environment with the wheel, and a folder outside the checkout to run things in."""

    bin: Path
    elsewhere: Path
    package: Path

    def run(self, *command: str | Path, status: int = 0) -> str:
        """Run a command of the environment in the folder, and return what it prints."""
        program, *arguments = command
        return run(self.bin / program, *arguments, folder=self.elsewhere, status=status)


def run(*command: str | Path, folder: Path, status: int = 0) -> str:
    """Run a command that knows neither the checkout nor a setting, and return what it prints."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VLLM_PLUGINS") and not name.startswith("COST_METER_")
    }
    done = subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True)
    assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
    return done.stdout
