"""What a check runs on: card, driver, versions of what takes part, and the meter's own commit.

Invariant: what is not known is None.
"""

import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.lab.gpu_check.card import WHAT_TO_DO, NvidiaCard
from vllm_cost_meter.lab.server import is_cpu_build
from vllm_cost_meter.version import __version__

CHECKOUT = Path(__file__).resolve().parents[3]
GIT_TIMEOUT_S = 10
# Variables that a page shows begin with one of these, and have none of those in their names.
SHOWN = ("CUDA_", "NCCL_", "OMP_", "TORCH", "VLLM_")
SECRET = ("KEY", "PASSWORD", "SECRET", "TOKEN")


def card_here(*, allow_cpu: bool) -> NvidiaCard | None:
    """Return the card to check, None for a check on the CPU that was allowed.

    Raises ServerError, with one line, if there is no card and the CPU is not allowed, or if vLLM
    is none for GPUs.
    """
    if not is_cpu_build():
        return NvidiaCard()
    if allow_cpu:
        return None
    NvidiaCard()  # Who has no GPU hears of that first.
    raise ServerError(
        f"expected vLLM for GPUs, got its CPU build {metadata.version('vllm')}; {WHAT_TO_DO}"
    )


def machine_facts(card: NvidiaCard | None) -> dict[str, Any]:
    """Return what the check runs on, ready for JSON."""
    return {
        "gpu": None if card is None else asdict(card.facts),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "vllm": _version("vllm"),
        "torch": _version("torch"),
        "meter": __version__,
        "meter_commit": _commit(),
        "environment": environment_shown(os.environ),
    }


def environment_shown(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that change how a server computes; none that may be a secret."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith(SHOWN) and not any(word in name for word in SECRET)
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the checkout that this runs from, with a mark if it was changed."""
    if not (CHECKOUT / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ("git", "-C", str(CHECKOUT), *words)
        done = subprocess.run(  # noqa: S603 - our own command
            command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True
        )
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return f"{commit}, changed" if git("status", "--porcelain") else commit
    except (OSError, subprocess.SubprocessError):
        return None
