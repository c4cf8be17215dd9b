"""The engine meter: feeds vLLM's events to the books of one engine; one per scheduler.

It lives in the EngineCore process, between the hooks (`vllm_hooks/`, which read vLLM's objects) and
the books (plain arithmetic). Hooks enter through `run` only, which reads the clock, contains every
error, and measures the meter's own time. The meter starts no thread. Its only I/O is the optional
step log and, for a snapshot, the energy counter of the GPUs. A bill that can ride on the request's
last output goes back to the hook. Other bills wait in `late` for the next step's outputs.

Invariant: a request that was `ended` is billed exactly once, or its time is booked as lost.
"""

import os
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar, TypeVarTuple

from vllm_cost_meter.attribution.priors import NOTHING_KNOWN, Prior
from vllm_cost_meter.engine.books import EngineBooks, EngineState, RequestFacts
from vllm_cost_meter.engine.energy.meter import EnergyMeter
from vllm_cost_meter.engine.energy.nvml import EnergyCounter
from vllm_cost_meter.engine.step_log import StepLogWriter
from vllm_cost_meter.errors import StepLogError
from vllm_cost_meter.guard import Guard
from vllm_cost_meter.logs import meter_logger
from vllm_cost_meter.records.bill import Bill
from vllm_cost_meter.records.client_text import stored
from vllm_cost_meter.records.engine import EngineIdentity
from vllm_cost_meter.records.snapshot import Snapshot
from vllm_cost_meter.units.time import NS_PER_SECOND

logger = meter_logger()

Ts = TypeVarTuple("Ts")
R = TypeVar("R")

# Number of ended requests that are remembered. If an end comes twice, it does so at once.
ENDED_MAX = 4_096


def process_created_ns(stat: Path = Path("/proc/self/stat")) -> int:
    """Return the monotonic instant at which this process was created, to 10 ms; Linux only.

    The source is field 22 of /proc/self/stat: start time in clock ticks since boot (proc(5)). On
    other systems this returns now, and the time before is not metered.
    """
    if not stat.exists():
        return time.monotonic_ns()
    # The command name (field 2) may contain spaces and parentheses; fields count after the last.
    fields_after_name = stat.read_text().rpartition(")")[2].split()
    ticks = int(fields_after_name[19])
    # Read both clocks right after each other: time that passes between them is an error.
    now_ns = time.monotonic_ns()
    since_boot_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    age_ns = since_boot_ns - ticks * NS_PER_SECOND // os.sysconf("SC_CLK_TCK")
    return now_ns - max(age_ns, 0)


class BegunWith(NamedTuple):
    """The prompt tokens that a request began with, and that this engine did not compute for it.

    `cached` were in the engine's own prefix cache, `external` came over a KV connector. Where it is
    unknown which they were, `external` is None and `cached` has them all.
    """

    cached: int
    external: int | None


@dataclass(frozen=True, slots=True)
class Clock:
    """Where an engine's meter reads the time: monotonic, UTC, and when its process was created."""

    monotonic_ns: Callable[[], int] = time.monotonic_ns
    unix_ns: Callable[[], int] = time.time_ns
    created_ns: Callable[[], int] = process_created_ns


SYSTEM_CLOCK = Clock()


class NoMeter:
    """The stand-in for an engine without a meter: every hook passes through."""

    riding = False
    late = ()

    def run(self, hook: str, body: object, *args: object) -> None:
        """Do nothing."""


class EngineMeter:
    """Feeds the events of one engine to its books, and contains its own errors."""

    def __init__(
        self,
        *,
        engine: EngineIdentity,
        prior: Prior = NOTHING_KNOWN,
        step_log: Path | None = None,
        energy: EnergyCounter | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """Open the books. `step_log` is the first engine's file; others append their index."""
        self.guard = Guard("engine")
        self._clock = clock
        self._monotonic_ns = clock.monotonic_ns
        self.own_ns = 0
        # True while update_from_output runs. A request that ends then has an output for its bill.
        self.riding = False
        self.late: list[tuple[int, Bill]] = []
        self.books = EngineBooks(
            run_id=uuid.uuid4().hex,
            engine=engine,
            created_ns=clock.created_ns(),
            now_ns=clock.monotonic_ns(),
            unix_ns=clock.unix_ns(),
            prior=prior,
        )
        self.engine = engine
        self.run_id = self.books.run_id
        # The books take these events as they come. The methods are bound once, so that a hook that
        # calls its meter pays for no call in between.
        self.open = self.books.open
        self.preempt = self.books.preempt
        self.begin_step = self.books.begin_step
        self.adopt = self.books.adopt
        self.fall_asleep = self.books.fall_asleep
        self.wake_up = self.books.wake_up
        self.begin_dummy = self.books.begin_dummy
        self.end_dummy = self.books.end_dummy
        # Made right after the books: they have booked only startup so far, which has no energy.
        self.energy = EnergyMeter(energy or EnergyCounter(()), engine.gpus, clock.monotonic_ns())
        self._step_log = self._open_step_log(step_log) if step_log is not None else None
        # What each request began with when it was first scheduled.
        self._begun_with: dict[str, BegunWith] = {}
        # The requests that ended last, oldest first.
        self._ended: dict[str, None] = {}
        # The length that an output will have if no token is cut off, for requests with drafts in
        # the step that is processed now.
        self._outputs_uncut: dict[str, int] = {}
        # Aborted requests that still pay for steps in flight, with their API server.
        self._leaving: dict[str, tuple[int, RequestFacts]] = {}

    def run(
        self,
        hook: str,
        body: Callable[["EngineMeter", int, *Ts], R],
        *args: *Ts,
    ) -> R | None:
        """Call `body(self, now_ns, ...)` for `hook`. Never raises; None after an error."""
        guard = self.guard
        if guard.off:
            return None
        now_ns = self._monotonic_ns()
        try:
            result = body(self, now_ns, *args)
            if guard.failing:
                guard.succeeded(hook)
            return result
        except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
            self._contain(hook, error)
            return None
        finally:
            self.own_ns += self._monotonic_ns() - now_ns

    def placed(
        self, request_id: str, computed_tokens: int, external_tokens: int | None = 0
    ) -> None:
        """Note that a request starts, or resumes, to run from `computed_tokens` on.

        `external_tokens` is how many of them came over a KV connector, None if that is unknown.
        """
        resumed = request_id in self._begun_with
        if not resumed:
            cached_tokens = computed_tokens - (external_tokens or 0)
            self._begun_with[request_id] = BegunWith(cached_tokens, external_tokens)
        self.books.meter.position(request_id, computed_tokens, resumed)

    def result_came(
        self,
        key: object,
        rejected: dict[str, int] | None,
        now_ns: int,
        outputs_uncut: dict[str, int] | None = None,
    ) -> None:
        """Split the time of step `key`, and bill aborted requests that had no later step.

        `rejected` has the number of rejected draft tokens by request. `outputs_uncut` has, for
        requests with drafts, the length their outputs will have if vLLM cuts no token off.
        """
        if self._outputs_uncut:  # They belong to an earlier step.
            self._outputs_uncut = {}
        if self.books.end_step(key, now_ns, rejected) and outputs_uncut:
            self._outputs_uncut = outputs_uncut
        for request_id in self.books.meter.drained():
            self._bill_late(request_id, now_ns)

    def ended(
        self, request_id: str, client_index: int, facts: RequestFacts, now_ns: int
    ) -> Bill | None:
        """Note that a request has ended. Return its bill if that can ride on its last output."""
        if self._has_ended(request_id):
            return None
        if not self.books.meter.is_open(request_id):
            # Its arrival was missed, but it still gets its bill.
            self.books.open(request_id, facts["prompt_tokens"], now_ns)
        begun_with = self._begun_with.pop(request_id, None) or self._never_placed()
        # A count taken after a preemption may include output tokens, so it is capped at the prompt.
        facts["cached_tokens"] = min(begun_with.cached, facts["prompt_tokens"])
        facts["external_tokens"] = begun_with.external
        self._ended[stored(request_id)] = None
        if len(self._ended) > ENDED_MAX:
            del self._ended[next(iter(self._ended))]
        if self.riding:
            output_tokens = facts["output_tokens"]
            uncut_tokens = self._outputs_uncut.get(request_id, output_tokens)
            return self._bill(request_id, facts, now_ns, max(uncut_tokens - output_tokens, 0))
        self._leaving[request_id] = (client_index, facts)
        if self.books.leave(request_id):
            self._bill_late(request_id, now_ns)
        return None

    def _never_placed(self) -> BegunWith:
        """Return what a request began with whose first step was not seen: nothing if it had none.

        After an error the step may have been missed.
        """
        return BegunWith(0, None if self.guard.errors else 0)

    def take_late(self) -> list[tuple[int, Bill]]:
        """Return and forget the bills that wait for an output to ride on."""
        late, self.late = self.late, []
        return late

    def snapshot(
        self,
        acknowledged: int,
        known: Collection[str],
        running: int,
        waiting: int,
        kv_cache_usage: float | None,
    ) -> Snapshot:
        """Return the books now. `known` are the ids of the requests that the scheduler holds.

        The time that this call takes counts in `own_ns` of the next snapshot.
        """
        began_ns, own_ns = self._monotonic_ns(), self.own_ns
        self.run("reconcile", EngineMeter._reconcile, known)
        if self._step_log is not None:
            self._step_log.flush()
        now_ns = self._monotonic_ns()
        state = EngineState(
            running=running,
            waiting=waiting,
            kv_cache_usage=kv_cache_usage,
            own_ns=self.own_ns,
            errors=self.guard.errors,
            state="off" if self.guard.off else "on",
        )
        snapshot = self.books.snapshot(now_ns, self._clock.unix_ns(), acknowledged, state)
        snapshot = self.energy.added_to(snapshot, self.books, now_ns, acknowledged)
        self.own_ns = own_ns + self._monotonic_ns() - began_ns
        return snapshot

    def _open_step_log(self, path: Path) -> StepLogWriter | None:
        """Start the step log and feed it from the books; None if the file cannot be used."""
        if self.engine.engine_index:
            path = path.with_name(f"{path.name}.engine{self.engine.engine_index}")
        try:
            log = StepLogWriter(
                path,
                model=self.engine.model,
                vllm_version=self.engine.vllm_version,
                run_id=self.books.run_id,
                gpus=self.books.gpus,
            )
        except StepLogError as error:
            logger.error("cost meter: steps are not logged: %s", error)
            return None
        unix_ns = self._clock.unix_ns
        self.books.on_step = lambda parts, features, gpu_ns: log.write(
            parts, gpu_ns, unix_ns(), features
        )
        return log

    def _bill_late(self, request_id: str, now_ns: int) -> None:
        client_index, facts = self._leaving.pop(request_id)
        self.late.append((client_index, self._bill(request_id, facts, now_ns)))

    def _bill(self, request_id: str, facts: RequestFacts, now_ns: int, cut_tokens: int = 0) -> Bill:
        bill = self.books.bill(request_id, facts, now_ns, cut_tokens)
        self.energy.billed(request_id, bill)
        return bill

    def _has_ended(self, request_id: str) -> bool:
        """Tell whether this end was told before: ended lately, and not opened again since."""
        if stored(request_id) not in self._ended:
            return False
        return request_id in self._leaving or not self.books.meter.is_open(request_id)

    def _reconcile(self, now_ns: int, known: Collection[str]) -> None:
        """Repair the books after a contained error, so that no request stays open for ever."""
        still_open = set(self.books.meter.request_ids())
        for request_id in list(self._leaving):
            if request_id not in still_open:
                del self._leaving[request_id]
            elif self.books.leave(request_id):
                self._bill_late(request_id, now_ns)
        for request_id in self.books.meter.request_ids():
            if request_id not in known and request_id not in self._leaving:
                self._begun_with.pop(request_id, None)
                self.books.write_off(request_id, now_ns)

    def _contain(self, hook: str, error: Exception) -> None:
        self.guard.failed(hook, error)
        try:
            if self.guard.off:
                self.books.switch_off(self._monotonic_ns())
            else:
                self.books.abandon(self._monotonic_ns())
        except Exception as second:  # noqa: BLE001 - metering may fail, serving may not
            self.guard.failed(f"{hook} (clean-up)", second)
