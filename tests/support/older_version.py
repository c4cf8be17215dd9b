"""Another version of the meter, from this repository's history, in processes of its own.

Servers of a fleet are not upgraded at the same instant. So what an older one sends must go well
together with what a newer one made.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("old_sender.py")


def sources_of(commit: str, folder: Path) -> Path:
    """Put the sources of a commit into a folder. Skips the test where the history is not there."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"expected the history of the repository, got none: {done.stderr.decode()}")
    # Not by `tarfile`: before Python 3.11.4 it has no filter, and later ones warn without one.
    subprocess.run(["tar", "-x", "-C", str(folder)], input=done.stdout, check=True)
    return folder


class OldSender:
    """A process of another version that has a ledger, and sends it to a fleet when told."""

    def __init__(self, sources: Path, ledger_url: str, fleet_url: str) -> None:
        """`sources` is a folder of `sources_of`."""
        self._sources = sources
        # The native part is not built there, and not needed. -P: nothing beside the script counts.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT), ledger_url, fleet_url],
            env={**os.environ, "PYTHONPATH": str(sources), "COST_METER_PURE_PYTHON": "1"},
            cwd=sources,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    def write(self, run: str, begin: int, end: int) -> None:
        """Apply records of `tests.ecosystem.test_fleet.records_of` to its ledger."""
        assert self._do("write", run=run, begin=begin, end=end) is None

    def send(self) -> str | None:
        """Send all that waits; return why that failed."""
        return self._do("send")

    def end(self) -> str | None:
        """Say that this was all; return why that failed."""
        return self._do("end")

    def kill(self) -> None:
        """End it as kill -9 does."""
        self._process.kill()
        self._process.communicate()

    def _do(self, what: str, **given: Any) -> str | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": what, **given}) + "\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        assert Path(told["sources"]).is_relative_to(self._sources), told
        error: str | None = told["error"]
        return error


@contextmanager
def old_senders(
    sources: Path, folder: Path, fleet_url: str, *names: str
) -> Iterator[list[OldSender]]:
    """Start a sender for each name, with a ledger of that name in the folder."""
    senders = [OldSender(sources, f"sqlite:///{folder / name}.db", fleet_url) for name in names]
    try:
        yield senders
    finally:
        for sender in senders:
            sender.kill()
