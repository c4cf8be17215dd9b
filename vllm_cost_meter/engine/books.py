"""The books of one engine run: book every GPU-nanosecond since the process began to one class.

Time is a line, and `_mark_ns` is the point up to which it is booked. Each event of the engine books
the stretch from the mark to now to exactly one class, and moves the mark:

- While steps are in flight, the stretch ends when the result of the oldest step is processed. It is
  that step's busy time (update entry - max(schedule return, previous update entry)), and
  `StepMeter` splits it among the step's requests. These stretches partition the device's busy
  time, even under async scheduling and pipeline parallelism, where steps overlap. Where the
  operator pays preemptions, what they threw away is computed again in the class `recomputed`.
- Otherwise the stretch is `sleep`, `host` (unfinished requests, but no step running) or `idle`.

A stretch that crosses a UTC hour is cut there. The amounts of each open request are cut there too,
so that months balance. The books handle plain values only, no clocks and no vLLM objects.

Invariant: at any snapshot the classes add up to (now - created) x gpus over the run, and within
each hour to the run's part of that hour. The billed total equals the sum of all bills. The class
`in_flight` equals the amounts of the open requests plus the step that runs.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NotRequired, TypedDict

from vllm_cost_meter.attribution import StepMeter
from vllm_cost_meter.attribution.cost_model import (
    NO_ERROR,
    SHAPLEY,
    Coefficients,
    PhaseErrors,
    Planes,
)
from vllm_cost_meter.attribution.priors import NOTHING_KNOWN, Prior
from vllm_cost_meter.engine.model_facts import recorded, saved_ns
from vllm_cost_meter.engine.step_log import PartFeatures, PlainPart
from vllm_cost_meter.records.accrued import Accrued
from vllm_cost_meter.records.bill import Bill, UsagePiece
from vllm_cost_meter.records.client_text import stored
from vllm_cost_meter.records.engine import VICTIM, EngineIdentity
from vllm_cost_meter.records.snapshot import ClassTotals, Snapshot
from vllm_cost_meter.units.time import NS_PER_HOUR

NOTHING_ACCRUED = Accrued()


class RequestFacts(TypedDict):
    """Facts that the engine knows about a request when it ends.

    `external_tokens` is None if it is unknown. Then `cached_tokens` may contain some.
    """

    engine_status: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    external_tokens: NotRequired[int | None]


class EngineState(TypedDict):
    """Facts of a snapshot's instant that do not come from the books."""

    running: int
    waiting: int
    kv_cache_usage: float | None
    own_ns: int
    errors: int
    state: str


class EngineBooks:
    """The books of one run. All `now_ns` are monotonic and never decrease; `unix_ns` is UTC."""

    def __init__(
        self,
        *,
        run_id: str,
        engine: EngineIdentity,
        created_ns: int,
        now_ns: int,
        unix_ns: int,
        prior: Prior = NOTHING_KNOWN,
    ) -> None:
        """Open the books at `now_ns`; all time since `created_ns` is booked as startup.

        KV cache blocks are counted only if the engine has a block size.
        """
        if engine.gpus < 1:
            raise ValueError(f"an engine has at least 1 GPU, got {engine.gpus}")
        self.run_id = run_id
        self.engine = engine
        self.gpus = engine.gpus  # Every step uses all of them.
        block_size = engine.kv_block_size or 0
        # Else what a preemption threw away is computed again in the class `recomputed`.
        charges_recomputed = engine.preemption_paid_by == VICTIM
        self.meter = StepMeter(engine.method, prior, block_size, charges_recomputed)
        self.prior = prior.source
        # Called with a step's parts, their features and GPU-ns before the step is split.
        self.on_step: Callable[[list[PlainPart], list[PartFeatures], int], None] | None = None
        self.steps = 0
        self.busy_ns = 0
        self._created_ns = min(created_ns, now_ns)
        self._mark_ns = self._created_ns
        created_unix_ns = unix_ns - (now_ns - self._created_ns)
        self._started_at_ns = created_unix_ns
        self._totals = ClassTotals()
        self._hours: dict[int, ClassTotals] = {}
        self._changed: dict[int, int] = {}
        self._number = 0
        self._last_seq = 0
        self._billed_ns = 0
        self._asleep = False
        self._off = False
        # What of the meter's `uncharged_ns` is booked.
        self._uncharged_ns = 0
        self._in_flight: deque[tuple[object, int]] = deque()
        # The model version when each open request came, and its amounts before this hour.
        self._first_models: dict[str, int] = {}
        self._earlier: dict[str, _Earlier] = {}
        # The latest model version in each snapshot, by the snapshot's number.
        self._told_models: dict[int, int] = {}
        self._acknowledged_model = -1
        self._hour = created_unix_ns // NS_PER_HOUR
        self._hour_end_ns = self._created_ns + NS_PER_HOUR - created_unix_ns % NS_PER_HOUR
        self._cell = self._cell_of(self._hour)
        self._spend(now_ns, "startup")

    # -- events of the engine ---------------------------------------------------------------

    def open(
        self,
        request_id: str,
        prompt_tokens: int,
        now_ns: int,
        has_lora: bool = False,
        is_guided: bool = False,
    ) -> None:
        """Note that a request joined the engine. A second call while it is open changes nothing."""
        if not self.meter.open_requests:  # The class of waiting time changes only with the first.
            self._book_waiting(now_ns)
        self.meter.open(request_id, prompt_tokens, has_lora, is_guided)
        self._first_models.setdefault(request_id, self.meter.model_version)

    def preempt(self, request_id: str, now_ns: int) -> None:
        """Note that a running request lost its place and its KV cache blocks."""
        self.meter.release(request_id, now_ns)

    def begin_step(
        self,
        key: object,
        scheduled: dict[str, int],
        now_ns: int,
        decoding: list[str] | None = None,
        encoded: dict[str, int] | None = None,
    ) -> None:
        """Note that a step with tokens was scheduled; `key` identifies it until its result comes.

        `scheduled` has the tokens of each request. Requests in `decoding` have one token each and
        are not in `scheduled`. `encoded` has the tokens that an encoder computes, by request.
        """
        self._book_waiting(now_ns)
        self._in_flight.append((key, self.meter.begin(scheduled, now_ns, decoding, encoded)))

    def end_step(self, key: object, now_ns: int, rejected: dict[str, int] | None = None) -> bool:
        """Note that the result of step `key` came. Returns False for a step that was never begun.

        `rejected` has the number of rejected draft tokens by request. Results come in schedule
        order, so steps that began before `key` will never get one, and this step takes their time.
        """
        in_flight = self._in_flight
        if not in_flight or in_flight[0][0] is not key:
            if not any(begun is key for begun, _ in in_flight):
                return False
            while in_flight[0][0] is not key:
                in_flight.popleft()
        _, step = in_flight.popleft()
        if self.on_step is not None:
            step_ns = (now_ns - self._mark_ns) * self.gpus
            parts, features = self.meter.step_parts(step), self.meter.step_features(step)
            self.on_step(parts, features, step_ns)
        self.busy_ns += now_ns - self._mark_ns
        if now_ns >= self._hour_end_ns:
            self._share_until_hour(step, now_ns)
        gpu_ns = self._advance(now_ns)
        self._book_busy(gpu_ns, self.meter.settle(step, gpu_ns, rejected))
        self.steps += 1
        return True

    def leave(self, request_id: str) -> bool:
        """Note that a request was aborted. Return True to bill it now, False if steps still run."""
        return self.meter.leave(request_id)

    def bill(self, request_id: str, facts: RequestFacts, now_ns: int, cut_tokens: int = 0) -> Bill:
        """Close a request and return its final, numbered bill.

        `cut_tokens` is the number of tokens of its last step that lay behind its end.
        """
        if cut_tokens:  # Trim before an hour is cut: the tokens belong to the step just ended.
            self.meter.trim(request_id, cut_tokens)
        if self.meter.open_requests == 1 or now_ns >= self._hour_end_ns:
            self._book_waiting(now_ns)
        earlier = self._earlier.pop(request_id, None) or _Earlier()
        earlier.add(self._hour, self.meter.close(request_id, now_ns))
        is_own_cache = facts.get("external_tokens", 0) is not None
        if is_own_cache and (cached_tokens := facts["cached_tokens"]):
            earlier.note_saved(saved_ns(self.meter.model(), cached_tokens))
        earlier.note_errors(self._errors_of(earlier.used, facts))
        self._last_seq += 1
        for piece in earlier.pieces:
            self._book_billed(piece.gpu_time_ns, piece.hour)
            self._billed_ns += piece.gpu_time_ns
        return Bill(
            run_id=self.run_id,
            seq=self._last_seq,
            request_id=stored(request_id),
            method=self.engine.method,
            steps=earlier.used.steps,
            batch=earlier.used.batch,
            first_model=self._first_models.pop(request_id, self.meter.model_version),
            last_model=self.meter.model_version,
            pieces=tuple(earlier.pieces),
            **facts,
        )

    def _errors_of(self, used: Accrued, facts: RequestFacts) -> PhaseErrors | None:
        """Return how far the charge of a request that ends may be off; None if it is unknown."""
        if used.batch == used.steps:
            return NO_ERROR
        if self.engine.method != SHAPLEY:
            return None
        context = facts["prompt_tokens"] + facts["output_tokens"]
        errors = PhaseErrors.of(self.meter.model().charge_errors, used.prefill_tokens, context)
        return errors if errors.are_known(used.prefill_ns, used.decode_ns) else None

    def adopt(self, planes: Planes, coefficients: Coefficients, two_planes: bool) -> None:
        """Continue from the ledger's earlier fit, unless the model has learnt from steps by now."""
        if self.meter.model_version == 0:
            self.meter.adopt(planes, coefficients, two_planes)
            self.prior = "ledger"

    def fall_asleep(self, now_ns: int) -> None:
        """Note that the engine sleeps from now on."""
        self._book_waiting(now_ns)
        self._asleep = True

    def wake_up(self, now_ns: int) -> None:
        """Note that the engine is fully awake again."""
        self._book_waiting(now_ns)
        self._asleep = False

    def begin_dummy(self, now_ns: int) -> None:
        """Note that a data-parallel dummy batch begins, which uses the GPU for no request."""
        self._book_waiting(now_ns)

    def end_dummy(self, now_ns: int) -> None:
        """Note that a dummy batch has ended. If steps are in flight, they keep its time."""
        if not self._in_flight:
            self._spend(now_ns, "dummy")

    def abandon(self, now_ns: int) -> None:
        """After an error, forget the steps in flight, and book all unbooked time as lost.

        This may be more time than the error touched, but unknown time is never called idle.
        """
        self.meter.abandon()
        self._in_flight.clear()
        self._spend(now_ns, "lost")

    def write_off(self, request_id: str, now_ns: int) -> None:
        """Book the time of an open request as lost, because nobody will ever bill it."""
        self._book_waiting(now_ns)
        earlier = self._earlier.pop(request_id, None)
        self._first_models.pop(request_id, None)
        self._book_lost(self.meter.discard(request_id), self._hour)
        for piece in earlier.pieces if earlier else ():
            self._book_lost(piece.gpu_time_ns, piece.hour)

    def switch_off(self, now_ns: int) -> None:
        """Give up: book all unbilled time, and all time from now on, as lost."""
        self.abandon(now_ns)
        for request_id in self.meter.request_ids():
            self.write_off(request_id, now_ns)
        self._off = True

    def snapshot(
        self, now_ns: int, unix_ns: int, acknowledged: int, state: EngineState
    ) -> Snapshot:
        """Return all books at `now_ns`, with the hours changed since snapshot `acknowledged`."""
        self._book_until(now_ns)
        self._follow_wall_clock(now_ns, unix_ns)
        self._number += 1
        self._forget_acknowledged(acknowledged)
        # The step in flight has no result yet, so its time cannot be split. The snapshot shows it
        # as in flight, and it is booked when the result comes.
        running_ns = (now_ns - self._mark_ns) * self.gpus
        so_far = ClassTotals(in_flight=running_ns)
        hours = {hour: replace(self._hours[hour]) for hour in self._changed}
        hours[self._hour] = self._cell.plus(so_far)
        self._told_models[self._number] = self.meter.model_version
        return Snapshot(
            run_id=self.run_id,
            number=self._number,
            taken_at_ns=unix_ns,
            started_at_ns=self._started_at_ns,
            wall_ns=now_ns - self._created_ns,
            engine=self.engine,
            totals=self._totals.plus(so_far),
            last_seq=self._last_seq,
            billed_ns=self._billed_ns,
            steps=self.steps,
            busy_ns=self.busy_ns,
            prior=self.prior,
            cost_models=tuple(
                recorded(model) for model in self.meter.models(self._acknowledged_model)
            ),
            hours=hours,
            step_ns=running_ns,
            live=tuple(self._live(now_ns)),
            equal_splits=self.meter.fallbacks,
            missed_arrivals=self.meter.strangers,
            steps_in_flight=self.meter.steps_in_flight,
            **state,
        )

    # -- what the energy is divided by ------------------------------------------------------

    def open_gpu_ns(self) -> dict[str, int]:
        """Return the GPU-ns of each open request so far."""
        used = self.meter.open_gpu_ns()
        for request_id, earlier in self._earlier.items():
            if earlier.pieces and request_id in used:
                used[request_id] += earlier.used.gpu_time_ns
        return used

    def running(self) -> list[str]:
        """Return the requests of the step in flight that is to be split next."""
        if not self._in_flight:
            return []
        return [part[0] for part in self.meter.step_parts(self._in_flight[0][1])]

    def _live(self, now_ns: int) -> list[tuple[str, Accrued]]:
        """Return the amounts of each open request so far; requests without any are left out.

        This runs once a second for all running requests, so it copies no amounts without need.
        """
        live = []
        for request_id in self.meter.request_ids():
            used = self.meter.accrued(request_id, now_ns)
            earlier = self._earlier.get(request_id)
            if earlier is not None and earlier.pieces:
                live.append((stored(request_id), earlier.used.plus(used)))
            elif any(used):
                live.append((stored(request_id), used))
        return live

    # -- booking ----------------------------------------------------------------------------

    def _book_waiting(self, now_ns: int) -> None:
        if not self._in_flight:
            self._spend(now_ns, self._waiting_class())

    def _waiting_class(self) -> str:
        if self._off:
            return "lost"
        if self._asleep:
            return "sleep"
        return "host" if self.meter.open_requests else "idle"

    def _book_until(self, now_ns: int) -> None:
        """Book up to now; with a step in flight, only up to the begin of the present hour."""
        if self._in_flight:
            self._share_until_hour(self._in_flight[0][1], now_ns)
        else:
            self._spend(now_ns, self._waiting_class())

    def _spend(self, now_ns: int, name: str) -> None:
        while now_ns >= self._hour_end_ns:
            self._add(name, self._advance(self._hour_end_ns))
            self._start_hour(self._hour + 1, self._hour_end_ns + NS_PER_HOUR)
        self._add(name, self._advance(now_ns))

    def _share_until_hour(self, step: int, now_ns: int) -> None:
        """Split a running step's time among its requests up to each hour that has ended."""
        while now_ns >= self._hour_end_ns:
            gpu_ns = self._advance(self._hour_end_ns)
            self._book_busy(gpu_ns, self.meter.share(step, gpu_ns))
            self._start_hour(self._hour + 1, self._hour_end_ns + NS_PER_HOUR)

    def _advance(self, now_ns: int) -> int:
        gpu_ns = (now_ns - self._mark_ns) * self.gpus
        self._mark_ns = now_ns
        return gpu_ns

    def _book_busy(self, gpu_ns: int, tail_ns: int) -> None:
        recomputed_ns = self.meter.uncharged_ns - self._uncharged_ns
        self._totals.in_flight += gpu_ns - tail_ns - recomputed_ns
        self._cell.in_flight += gpu_ns - tail_ns - recomputed_ns
        if tail_ns:
            self._add("tail", tail_ns)
        if recomputed_ns:
            self._uncharged_ns += recomputed_ns
            self._add("recomputed", recomputed_ns)

    def _add(self, name: str, gpu_ns: int) -> None:
        totals, cell = self._totals, self._cell
        setattr(totals, name, getattr(totals, name) + gpu_ns)
        setattr(cell, name, getattr(cell, name) + gpu_ns)

    def _book_billed(self, gpu_ns: int, hour: int) -> None:
        for totals in (self._totals, self._cell_of(hour)):
            totals.in_flight -= gpu_ns
            totals.requests += gpu_ns

    def _book_lost(self, gpu_ns: int, hour: int) -> None:
        for totals in (self._totals, self._cell_of(hour)):
            totals.in_flight -= gpu_ns
            totals.lost += gpu_ns

    # -- hours ------------------------------------------------------------------------------

    def _cell_of(self, hour: int) -> ClassTotals:
        self._changed[hour] = self._number + 1
        cell = self._hours.get(hour)
        if cell is None:
            cell = self._hours[hour] = ClassTotals()
        return cell

    def _start_hour(self, hour: int, end_ns: int) -> None:
        for request_id, used in self.meter.cut(self._mark_ns):
            self._earlier.setdefault(request_id, _Earlier()).add(self._hour, used)
        self._changed[self._hour] = self._number + 1
        self._hour = hour
        self._hour_end_ns = end_ns
        self._cell = self._cell_of(hour)

    def _follow_wall_clock(self, now_ns: int, unix_ns: int) -> None:
        """Move the hour's end to UTC's, because the wall clock may drift or be set."""
        hour = unix_ns // NS_PER_HOUR
        end_ns = now_ns + NS_PER_HOUR - unix_ns % NS_PER_HOUR
        if hour != self._hour:
            if self._in_flight:
                step = self._in_flight[0][1]
                gpu_ns = self._advance(now_ns)
                self._book_busy(gpu_ns, self.meter.share(step, gpu_ns))
            self._start_hour(hour, end_ns)
        self._hour_end_ns = end_ns

    def _forget_acknowledged(self, acknowledged: int) -> None:
        """Stop sending past hours and models that the reader already has in their latest form."""
        for hour, number in list(self._changed.items()):
            if number <= acknowledged and hour != self._hour:
                del self._changed[hour]
        for number in [number for number in self._told_models if number <= acknowledged]:
            self._acknowledged_model = self._told_models.pop(number)


@dataclass(slots=True)
class _Earlier:
    """The amounts of an open request before the present hour, in all and by hour."""

    pieces: list[UsagePiece] = field(default_factory=list)
    used: Accrued = NOTHING_ACCRUED

    def add(self, hour: int, used: Accrued) -> None:
        """Add the amounts of an hour."""
        piece = UsagePiece.of(hour, used)
        if any(piece[1:]) or not self.pieces:
            self.pieces.append(piece)
        self.used = self.used.plus(used) if self.used is not NOTHING_ACCRUED else used

    def note_saved(self, saved_ns: int) -> None:
        """Note the GPU time that the prefix cache saved, in the latest hour."""
        self.pieces[-1] = self.pieces[-1]._replace(saved_estimate_ns=saved_ns)

    def note_errors(self, errors: PhaseErrors | None) -> None:
        """Note how much of each hour's time may belong to other requests, if that is known."""
        if errors is not None:
            self.pieces = [
                piece._replace(charge_error_ns=errors.gpu_ns(piece.prefill_ns, piece.decode_ns))
                for piece in self.pieces
            ]
