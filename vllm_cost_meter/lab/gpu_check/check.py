"""Run the parts of a check one after another within a time, and write what is known after each.

A part that fails, or for which too little time is left, is noted with its reason, and the next one
is tried. So a check that is killed, or meets a machine that does not do all, leaves what it had.

Invariant: each part that was asked for is measured, left out or failed, and the results say which.
"""

import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_cost_meter.errors import CostMeterError, ServerError, in_one_line
from vllm_cost_meter.lab.gpu_check import plan as parts
from vllm_cost_meter.lab.gpu_check.books import measure_books
from vllm_cost_meter.lab.gpu_check.card import NvidiaCard
from vllm_cost_meter.lab.gpu_check.energy import measure_energy
from vllm_cost_meter.lab.gpu_check.findings import FAILED, LEFT_OUT, MEASURED
from vllm_cost_meter.lab.gpu_check.machine import card_here, machine_facts
from vllm_cost_meter.lab.gpu_check.model import shape_of
from vllm_cost_meter.lab.gpu_check.overlap import measure_overlap
from vllm_cost_meter.lab.gpu_check.page import write_results
from vllm_cost_meter.lab.gpu_check.plan import CheckPlan, TimeBudget
from vllm_cost_meter.lab.gpu_check.served import (
    ALONE,
    METERED,
    UNMETERED,
    Checked,
    Servers,
    keep_logs,
)
from vllm_cost_meter.lab.gpu_check.throughput import measure_throughput
from vllm_cost_meter.lab.validation.real_server.session import ServerPlan, changes, play

LOGS = "logs.txt.gz"
# What is left for the end of servers and for the results.
CLOSING_S = 15

TellLine = Callable[[str], None]


class GpuCheck:
    """One check, from the machine to the results. `found` is what the results are made of."""

    def __init__(self, plan: CheckPlan, show: TellLine) -> None:
        """Find the card, and make the folder. Raises ServerError, ValueError or OSError.

        `show` is called with a line for each thing that is begun.
        """
        self._plan, self._show = plan, show
        self._card: NvidiaCard | None = card_here(allow_cpu=plan.allow_cpu)
        memory = None if self._card is None else self._card.facts.memory_bytes or 0
        self._shape = shape_of(plan.shape, memory)
        on_cpu = self._card is None
        self._sizes = plan.sizes or (parts.ON_CPU if on_cpu else parts.ON_GPU)
        self._time = TimeBudget(plan.budget_s - CLOSING_S)
        self._servers: Servers | None = None
        plan.folder.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, Any] = {
            "began_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["vllm-cost-meter", *sys.argv[1:]]),
            "budget_s": plan.budget_s,
            "is_gpu": not on_cpu,
            "machine": machine_facts(self._card),
            "model": {"shape": self._shape.name, **self._shape.config},
            "servers": {},
            "seconds": 0.0,
            "parts": {
                name: {"state": LEFT_OUT, "why": "the check ended before"}
                for name in parts.PARTS
                if name in plan.parts
            },
        }

    def run(self) -> None:
        """Run all parts; each result is written as soon as it is there."""
        shape, work = self._shape, Path(tempfile.mkdtemp(prefix="vllm-cost-meter-gpu-check-"))
        try:
            model = shape.write(work / "model")
            self._servers = Servers(
                model, shape.context_tokens, work, self._card is None, self._plan.vllm_arguments
            )
            self._write()
            with self._started(ALONE, parts.PARTS[:-1]) as checked:
                if checked is not None:
                    self._on_one(checked)
            self._throughput()
        finally:
            self._close(work)

    def _close(self, work: Path) -> None:
        """Keep the logs, and leave nothing else of the folder of the servers, whatever happens."""
        try:
            keep_logs(work, self._plan.folder / LOGS)
        except OSError as error:
            self._show(f"the logs of the servers cannot be kept: {in_one_line(error)}")
        finally:
            shutil.rmtree(work, ignore_errors=True)
        self._write()

    def _on_one(self, checked: Checked) -> None:
        """The parts that need one server."""
        sizes, seed, show = self._sizes, self._plan.seed, self._show
        game = sizes.game
        until_s = self._time.spent_s + game.budget_part * self._time.budget_s
        plan = ServerPlan(
            players=game.players,
            prompt_tokens=game.prompt_tokens,
            output_tokens=game.output_tokens,
            rounds=game.rounds,
            seed=seed,
        )

        def left_s() -> float:
            return min(self._time.left_s, until_s - self._time.spent_s)

        self._part(parts.GAME, game.needs_s, lambda: play(checked.judged, plan, show, left_s))
        energy = sizes.energy
        self._part(
            parts.ENERGY,
            energy.needs_s,
            lambda: measure_energy(checked, self._card, energy, show),
        )
        overlap = sizes.overlap
        self._part(
            parts.OVERLAP, overlap.needs_s, lambda: measure_overlap(checked, overlap, seed, show)
        )
        # It takes a few seconds, and is worth those that are kept for the end.
        self._part(parts.BOOKS, 0, lambda: measure_books(checked, seed))

    def _throughput(self) -> None:
        """The part that needs two servers."""
        size = self._sizes.throughput
        if parts.THROUGHPUT not in self._plan.parts:
            return
        needs_s = size.needs_s + 2 * self._sizes.start_s
        if why := self._time.why_not(needs_s):
            self._note(parts.THROUGHPUT, LEFT_OUT, why)
            return
        with ExitStack() as stack:
            both: list[Checked] = []
            for name in (UNMETERED, METERED):
                started = stack.enter_context(self._started(name, [parts.THROUGHPUT]))
                if started is None:
                    return
                both.append(started)
            unmetered, metered = both
            self._part(
                parts.THROUGHPUT,
                size.needs_s,
                lambda: measure_throughput(
                    metered,
                    unmetered,
                    size,
                    self._plan.seed,
                    metered.ledger.parent,
                    lambda: self._time.left_s,
                    self._show,
                ),
            )

    @contextmanager
    def _started(self, name: str, wanted: Sequence[str]) -> Iterator[Checked | None]:
        """Start a server for some parts, None if none of them is asked for or it does not start."""
        asked = [part for part in wanted if part in self._plan.parts]
        if not asked:
            yield None
            return
        self._show(f"starting the server {name}")
        with ExitStack() as stack:
            try:
                assert self._servers is not None  # noqa: S101 - `run` made it
                checked = stack.enter_context(
                    self._servers.running(name, self._on_stage(), step_log=name == ALONE)
                )
            except (CostMeterError, OSError) as error:
                for part in asked:
                    self._note(part, FAILED, f"the server {name} did not start: {error}")
                yield None
                return
            yield checked

    def _on_stage(self) -> TellLine:
        """Return what shows the stages of a start, and ends it when the time is over."""
        show = changes(self._show)

        def told(stage: str) -> None:
            show(stage)
            if self._time.left_s < 0:
                raise ServerError(f"expected it up in time, and the time is over ({stage})")

        return told

    def _part(self, name: str, needs_s: float, measure: Callable[[], Mapping[str, Any]]) -> None:
        """Measure a part, if it is asked for and there is time, and write the results."""
        if name not in self._plan.parts:
            return
        if needs_s and (why := self._time.why_not(needs_s)):
            self._note(name, LEFT_OUT, why)
            return
        self._show(f"{name}: {self._time.left_s:.0f} s left")
        began_s = time.monotonic()
        try:
            figures = measure()
        except Exception as error:  # noqa: BLE001 - the next part may work
            why = str(error) if isinstance(error, CostMeterError) else in_one_line(error)
            self._note(name, FAILED, why)
            return
        self.found["parts"][name] = {
            "state": MEASURED,
            "seconds": round(time.monotonic() - began_s, 1),
            "figures": figures,
        }
        self._write()

    def _note(self, name: str, state: str, why: str) -> None:
        self._show(f"{name}: {state}: {why.splitlines()[0]}")
        self.found["parts"][name] = {"state": state, "why": why}
        self._write()

    def _write(self) -> None:
        if self._servers is not None:
            self.found["servers"] = self._servers.as_dict()
        self.found["seconds"] = round(self._time.spent_s, 1)
        try:
            write_results(self.found, self._plan.folder)
        except Exception as error:  # noqa: BLE001 - the figures count, and those are written first
            self.found["page_failed"] = in_one_line(error)
            self._show(f"the page cannot be written: {in_one_line(error)}")
