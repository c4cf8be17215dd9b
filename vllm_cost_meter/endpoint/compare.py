"""`GET /cost/compare` at the side endpoint: a comparison with API prices, in a child process.

The table of API prices takes some 90 MB of memory, and Python prices every request. Neither belongs
in a process that answers others. So a child process does it. At most one runs at a time, at the
lowest priority, with limits on its time and memory. If memory is short, the system ends it first.
The question is its input and a typed result its output (see `compare_child`).

Invariant: whatever happens to the child, the caller gets an answer or a one-line error, and serving
goes on.
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

from vllm_cost_meter.endpoint.compare_child import LEDGER_VARIABLE, ComparisonWork, Result
from vllm_cost_meter.endpoint.dependencies import FOR_ADMINS, asked_wrongly
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.economics.answers import Comparison
from vllm_cost_meter.ledger.economics.api_comparison import ComparisonQuestion
from vllm_cost_meter.reports.grammar import engines_named
from vllm_cost_meter.units.calendar import EXPECTED, WEEK, hours_of_window

# The limit is long because a busy processor leaves little time to the lowest priority.
TIMEOUT_S = 120.0
# The limit on the child's address space; a hundred thousand requests take a tenth of it.
MEMORY_BYTES_MAX = 4 * 1024**3
LOWEST_PRIORITY = 19
CHILD = "vllm_cost_meter.endpoint.compare_child"


class ComparisonQuery(BaseModel):
    """The query parameters of a comparison."""

    window: str = Field(WEEK, description=f"{EXPECTED}; widened to whole UTC hours.")
    model: list[str] = Field([], description="PROVIDER/MODEL of genai-prices, or patterns.")
    provider: list[str] = Field([], description="Providers, or patterns.")
    label: list[str] = Field([], description="Only offers with one of these labels.")
    max_usd_per_m_output: float | None = Field(
        None, description="Only offers up to so many USD per million output tokens of the mix."
    )
    ratio: str | None = Field(
        None, description="A supposed ratio of input to output tokens, as 3:1."
    )
    volume: list[str] = Field([], description="Supposed tokens per month, such as 1M..1B.")
    filter: str | None = Field(
        None, description="Engines to answer about, such as label:pool=spot; all by default."
    )

    def question(self) -> ComparisonQuestion:
        """Return the question. Raises ValueError for faults that can be seen without a child."""
        hours_of_window(self.window)
        engines_named(self.filter)
        return ComparisonQuestion(
            self.window,
            tuple(self.model),
            tuple(self.provider),
            tuple(self.label),
            self.max_usd_per_m_output,
            self.ratio,
            tuple(self.volume),
            filter=self.filter,
        )


class ComparingError(Exception):
    """A comparison failed through no fault of the caller."""


class Comparer:
    """Compares costs on one ledger in a child process. Thread-safe; a call blocks."""

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

    def __call__(self, question: ComparisonQuestion) -> Comparison:
        """Return the answer.

        Raises ValueError for a wrong question, and ComparingError or LedgerError for other faults.
        """
        # A caller that waits would hold one of the endpoint's few threads.
        if not self._lock.acquire(blocking=False):
            raise ComparingError("compare: another comparison is running; ask again in a minute")
        try:
            return self._answer(question)
        finally:
            self._lock.release()

    def _answer(self, question: ComparisonQuestion) -> Comparison:
        child = self._start()
        with child:
            try:
                _hold_back(child.pid, self._timeout_s)
                work = msgspec.msgpack.encode(ComparisonWork(question, self._handed()))
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
        environment = {name: v for name, v in os.environ.items() if name.upper() != LEDGER_VARIABLE}
        try:
            return subprocess.Popen(  # noqa: S603 - our own command, and no shell
                # Without -P, files in the server's working directory could replace any module.
                [sys.executable, "-P", "-m", CHILD],
                env={**environment, LEDGER_VARIABLE: self._ledger_url},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise ComparingError(f"compare: cannot be started: {error.strerror}") from None


def _hold_back(pid: int, timeout_s: float) -> None:
    """Give a child the lowest priority, and make it the first victim if memory runs out."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, LOWEST_PRIORITY)
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000", encoding="ascii")
    if sys.platform == "linux":
        # These limits end the child even if this server dies and cannot.
        seconds = int(timeout_s) + 1
        with contextlib.suppress(OSError, ValueError):
            resource.prlimit(pid, resource.RLIMIT_CPU, (seconds, seconds))
            resource.prlimit(pid, resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))


def _answer_of(status: int, out: bytes) -> Comparison:
    """Return the answer that an ended child wrote, or raise its error."""
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
    comparer: Callable[[ComparisonQuestion], Comparison],
    refresh: Callable[[], None],
) -> None:
    """Add the route. `refresh` brings the ledger up to now before it is read."""

    @app.get("/cost/compare", dependencies=FOR_ADMINS)
    async def compare(asked: Annotated[ComparisonQuery, Query()]) -> Comparison:
        """Return the cost of a window's requests here, and what APIs would have charged."""
        with asked_wrongly():
            question = asked.question()
        await asyncio.to_thread(refresh)
        try:
            with asked_wrongly():
                return await asyncio.to_thread(comparer, question)
        except ComparingError as error:
            raise HTTPException(503, str(error), {"Retry-After": "60"}) from None
