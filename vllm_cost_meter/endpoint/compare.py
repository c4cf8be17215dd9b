"""`GET /cost/compare` at the side endpoint: a comparison in a process of its own.

What APIs charge takes some 90 MB of memory, and every request is priced in Python: neither belongs
in a process that answers others. So a child does it, of which there is one at a time, at the lowest
priority, with bounds on its time and memory; the first to be ended where memory is short. The
question is its input and a typed result its output (`compare_child`).

Invariant: whatever becomes of the child, the asker gets an answer or one line, and serving nothing.
"""

import asyncio
import contextlib
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import orjson
from fastapi import FastAPI, HTTPException, Query
from pydantic import BaseModel, Field

from vllm_cost_meter.endpoint.compare_child import LEDGER, Result, Work
from vllm_cost_meter.endpoint.dependencies import FOR_ADMINS, asked_wrongly
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.economics.answers import Comparison
from vllm_cost_meter.ledger.economics.api_comparison import Question
from vllm_cost_meter.units.calendar import EXPECTED, WEEK, hours_of_window

# Long, as at the lowest priority a busy processor leaves it little.
TIMEOUT_S = 120.0
# Address space of the child; it takes a tenth of that for a hundred thousand requests.
MEMORY_BYTES_MAX = 4 * 1024**3
LOWEST_PRIORITY = 19
CHILD = "vllm_cost_meter.endpoint.compare_child"


class Asked(BaseModel):
    """The words of a question."""

    window: str = Field(WEEK, description=f"{EXPECTED}; widened to whole UTC hours.")
    model: list[str] = Field([], description="PROVIDER/MODEL of genai-prices, or patterns.")
    provider: list[str] = Field([], description="Providers, or patterns.")
    label: list[str] = Field([], description="Only offers with one of these labels.")
    max_usd_per_m_output: float | None = Field(
        None, description="Only offers up to this, for the measured mix."
    )
    ratio: str | None = Field(None, description="What if: input to output tokens, such as 3:1.")
    volume: list[str] = Field([], description="What if: tokens per month, such as 1M..1B.")

    def question(self) -> Question:
        """Return the question. Raises ValueError for what needs no child."""
        hours_of_window(self.window)
        return Question(
            self.window,
            tuple(self.model),
            tuple(self.provider),
            tuple(self.label),
            self.max_usd_per_m_output,
            self.ratio,
            tuple(self.volume),
        )


class ComparingError(Exception):
    """A comparison did not come about, and not by the asker's fault."""


class Comparer:
    """Answers questions on one ledger in a child process. Thread-safe; blocks."""

    def __init__(
        self,
        ledger_url: str,
        handed: Callable[[], bytes | None] = lambda: None,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`handed` gives the settings to compare by; without any, the child reads its own."""
        self._ledger_url = ledger_url
        self._handed = handed
        self._timeout_s = timeout_s
        self._lock = threading.Lock()

    def __call__(self, question: Question) -> Comparison:
        """Return the answer. Raises ValueError for a wrong question, else ComparingError or
        LedgerError."""
        # Who waits holds one of the endpoint's few threads.
        if not self._lock.acquire(blocking=False):
            raise ComparingError("compare: another comparison is running; ask again in a minute")
        try:
            return self._answer(question)
        finally:
            self._lock.release()

    def _answer(self, question: Question) -> Comparison:
        child = self._start()
        with child:
            try:
                _hold_back(child.pid, self._timeout_s)
                work = msgspec.msgpack.encode(Work(question, self._handed()))
                out, _ = child.communicate(work, timeout=self._timeout_s)
            except subprocess.TimeoutExpired:
                raise ComparingError(
                    f"compare: expected an answer within {self._timeout_s:g} s, got none;"
                    " ask for a shorter window or fewer offers"
                ) from None
            finally:
                child.kill()
        return _answer_of(child.returncode, out)

    def _start(self) -> "subprocess.Popen[bytes]":
        environment = {name: v for name, v in os.environ.items() if name.upper() != LEDGER}
        try:
            return subprocess.Popen(  # noqa: S603 - our own command, and no shell
                # Without -P the folder that the server was started in could replace any module.
                [sys.executable, "-P", "-m", CHILD],
                env={**environment, LEDGER: self._ledger_url},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
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


def _answer_of(status: int, out: bytes) -> Comparison:
    """Return the answer of a child that ended."""
    try:
        result: Result = orjson.loads(out)
    except orjson.JSONDecodeError:
        raise ComparingError(f"compare: expected an answer, got exit status {status}") from None
    if (answer := result.get("answer")) is not None:
        return answer
    line, kind = result["error"], result["kind"]
    if kind == "question":
        raise ValueError(line)
    if kind == "ledger":
        raise LedgerError(line)
    raise ComparingError(f"compare: expected an answer, got {line}")


def add_compare(
    app: FastAPI,
    comparer: Callable[[Question], Comparison],
    refresh: Callable[[], None],
) -> None:
    """Add the route. `refresh` brings the ledger up to now before it is read."""

    @app.get("/cost/compare", dependencies=FOR_ADMINS)
    async def compare(asked: Annotated[Asked, Query()]) -> Comparison:
        """Return what the requests of a window cost here, and what they would have at APIs."""
        with asked_wrongly():
            question = asked.question()
        await asyncio.to_thread(refresh)
        try:
            with asked_wrongly():
                return await asyncio.to_thread(comparer, question)
        except ComparingError as error:
            raise HTTPException(503, str(error), {"Retry-After": "60"}) from None
