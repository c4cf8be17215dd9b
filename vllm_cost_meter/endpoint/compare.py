"""`GET /cost/compare` at the side endpoint: the command `compare --json` in a process of its own.

What APIs charge takes some 90 MB of memory, and every request is priced in Python: neither belongs
in a process that serves. So a child does it, of which there is one at a time, at the lowest
priority, with bounds on its time and memory; the first to be ended where memory is short. Its
arguments are a list and no shell sees them; where the ledger is stands in its environment, as a URL
may hold a password.

Invariant: whatever becomes of the child, the asker gets an answer or one line, and serving nothing.
"""

import contextlib
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import orjson
from fastapi import FastAPI, HTTPException, Query
from pydantic import BaseModel, ConfigDict, Field

from vllm_cost_meter.endpoint.dependencies import FOR_ADMINS, asked_wrongly
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.units.calendar import EXPECTED, WEEK, hours_of_window

# Long, as at the lowest priority a busy processor leaves it little.
TIMEOUT_S = 120.0
# Address space of the child; it takes a tenth of that for a hundred thousand requests.
MEMORY_BYTES_MAX = 4 * 1024**3
LOWEST_PRIORITY = 19
LEDGER = "COST_METER_LEDGER"
PROGRAM = "vllm-cost-meter: "
# Of a command: what was asked is wrong.
ASKED_WRONGLY = 2


class Asked(BaseModel):
    """The words of a question, which are options of the command."""

    model_config = ConfigDict(extra="forbid")

    window: str = Field(WEEK, description=f"{EXPECTED}; widened to whole UTC hours.")
    model: list[str] = Field([], description="PROVIDER/MODEL of genai-prices, or patterns.")
    provider: list[str] = Field([], description="Providers, or patterns.")
    label: list[str] = Field([], description="Only offers with one of these labels.")
    max_usd_per_m_output: float | None = Field(
        None, description="Only offers up to this, for the measured mix."
    )
    ratio: str | None = Field(None, description="What if: input to output tokens, such as 3:1.")
    volume: list[str] = Field([], description="What if: tokens per month, such as 1M..1B.")

    def options(self) -> list[str]:
        """Return the options of the command. Raises ValueError for what needs no child."""
        hours_of_window(self.window)
        # In one piece, as a value may begin like an option.
        found = [
            f"--{name.replace('_', '-')}={value}"
            for name, said in self.model_dump(exclude_none=True).items()
            for value in (said if isinstance(said, list) else [said])
        ]
        if any("\0" in option for option in found):
            raise ValueError("compare: expected text, got a NUL character")
        return found


class ComparingError(Exception):
    """A comparison did not come about, and not by the asker's fault."""


class Comparer:
    """Runs `compare --json` over one ledger in a child process. Thread-safe; blocks."""

    def __init__(self, ledger_url: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self._ledger_url = ledger_url
        self._timeout_s = timeout_s
        self._lock = threading.Lock()

    def __call__(self, options: Sequence[str]) -> dict[str, Any]:
        """Return its answer. Raises ValueError for what the command refuses, else ComparingError
        or LedgerError."""
        # Who waits holds one of the endpoint's few threads.
        if not self._lock.acquire(blocking=False):
            raise ComparingError("compare: another comparison is running; ask again in a minute")
        try:
            return self._answer(options)
        finally:
            self._lock.release()

    def _answer(self, options: Sequence[str]) -> dict[str, Any]:
        child = self._start(options)
        with child:
            try:
                _hold_back(child.pid, self._timeout_s)
                out, err = child.communicate(timeout=self._timeout_s)
            except subprocess.TimeoutExpired:
                raise ComparingError(
                    f"compare: expected an answer within {self._timeout_s:g} s, got none;"
                    " ask for a shorter window or fewer offers"
                ) from None
            finally:
                child.kill()
        return _told(child.returncode, out, err)

    def _start(self, options: Sequence[str]) -> "subprocess.Popen[str]":
        environment = {name: v for name, v in os.environ.items() if name.upper() != LEDGER}
        try:
            return subprocess.Popen(  # noqa: S603 - our own command, and no shell
                # Without -P the folder that the server was started in could replace any module.
                [sys.executable, "-P", "-m", "vllm_cost_meter.cli", "compare", "--json", *options],
                env={**environment, LEDGER: self._ledger_url},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:
            raise ComparingError(f"compare: cannot be started: {error.strerror}") from None


def _hold_back(pid: int, timeout_s: float) -> None:
    """Make a child the last to get the processor and the first to be ended without memory."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, LOWEST_PRIORITY)
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000", encoding="ascii")
    if sys.platform == "linux":
        # Also of use if this server ends meanwhile: nobody would be left to end the child.
        seconds = int(timeout_s) + 1
        with contextlib.suppress(OSError, ValueError):
            resource.prlimit(pid, resource.RLIMIT_CPU, (seconds, seconds))
            resource.prlimit(pid, resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))


def _told(status: int, out: str, err: str) -> dict[str, Any]:
    """Return the answer of a child that ended."""
    line = (err.strip().splitlines() or [""])[-1].removeprefix(PROGRAM)
    if status == ASKED_WRONGLY:  # every LedgerError names the ledger first
        raise LedgerError(line) if line.startswith("ledger") else ValueError(line)
    if status == 0:
        with contextlib.suppress(orjson.JSONDecodeError):
            answer: dict[str, Any] = orjson.loads(out)
            return answer
    raise ComparingError(f"compare: expected an answer, got exit status {status}: {line}")


def add_compare(
    app: FastAPI,
    comparer: Callable[[Sequence[str]], dict[str, Any]],
    refresh: Callable[[], None],
) -> None:
    """Add the route. `refresh` brings the ledger up to now before it is read."""

    @app.get("/cost/compare", dependencies=FOR_ADMINS)
    def compare(asked: Annotated[Asked, Query()]) -> dict[str, Any]:
        """Return what the requests of a window cost here, and what they would have at APIs."""
        with asked_wrongly():
            options = asked.options()
        refresh()
        try:
            with asked_wrongly():
                return comparer(options)
        except ComparingError as error:
            raise HTTPException(503, str(error), {"Retry-After": "60"}) from None
