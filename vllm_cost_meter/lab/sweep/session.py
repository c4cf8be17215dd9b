"""One sweep from its first request to its last: what was measured is kept, however it ends."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vllm_cost_meter.console import interruptible
from vllm_cost_meter.errors import CostMeterError, ServerError
from vllm_cost_meter.lab.sweep.bench import Target
from vllm_cost_meter.lab.sweep.curve import Context, curve_file
from vllm_cost_meter.lab.sweep.run import Measured, Plan, Sweep
from vllm_cost_meter.lab.sweep.side_client import Deployment, SideClient, served_by
from vllm_cost_meter.units.text import plain, rounded

FAILED, INTERRUPTED = 1, 130
TOKEN_ENV = "COST_METER_ADMIN_TOKEN"  # noqa: S105 - the name of a variable


class SweepSession:
    """Measures one plan after another, and keeps the curves even if it ends early."""

    def __init__(self, url: str, side_url: str, tokenizer: str | None, output: Path) -> None:
        """Raises ServerError where there is no metered server."""
        self.output = output
        self.side = SideClient(side_url, os.environ.get(TOKEN_ENV))
        model, root = served_by(url)
        self.target = Target(url, model, tokenizer or root)
        self.deployment = self.side.deployment()
        self.curves: list[dict[str, Any]] = []

    def measure(self, plans: Sequence[Plan]) -> int:
        """Measure all shapes; return the exit status. What was measured stays."""
        try:
            with interruptible(), _progress() as watcher:
                for plan in plans:
                    watcher.shapes_left = len(plans) - len(self.curves) - 1
                    self._measure(plan, watcher)
        except KeyboardInterrupt:
            return _failed("interrupted; what was measured until then is kept", INTERRUPTED)
        except CostMeterError as error:
            return _failed(str(error), FAILED)
        return 0

    def _measure(self, plan: Plan, watcher: "TerminalWatcher") -> None:
        measured: list[Measured] = []
        started_at_ns = time.time_ns()
        # Now: at the end of a sweep that fails nobody may be there to tell.
        price, prices = self.side.prices()
        done = False
        try:
            with tempfile.TemporaryDirectory(prefix="vllm-cost-meter-sweep-") as folder:
                sweep = Sweep(plan, self.target, self.side, Path(folder), os.environ, watcher)
                for point in sweep.points():
                    measured += [point]
            self._refuse_another()
            done = True
        finally:
            if measured:
                times_ns = (started_at_ns, time.time_ns())
                context = Context(plan, self.deployment, price, prices, *times_ns, not done)
                self.curves.append(curve_file(context, measured))

    def _refuse_another(self) -> None:
        """Raise ServerError if something else serves than when the sweep began."""
        if (now := self.side.deployment()) != self.deployment:
            raise ServerError(
                f"expected the engines that the sweep began with ({_ids(self.deployment)}), got"
                f" others ({_ids(now)}): was the server restarted?"
            )


class TerminalWatcher:
    """Shows on one line of a terminal what is measured and how long it will take; lines else."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress, self._console = progress, console
        self._task = progress.add_task("starting", total=None)
        self._last = ""
        self.shapes_left = 0

    def plan(self, left_s: float) -> None:
        done_s = self._progress.tasks[0].elapsed or 0.0
        total_s = done_s + left_s * (1 + self.shapes_left)
        self._progress.update(self._task, total=total_s, completed=done_s)

    def doing(self, what: str) -> None:
        self._progress.update(self._task, description=what)
        if not self._console.is_terminal and what != self._last:
            self._console.print(what)
        self._last = what

    def tick(self) -> None:
        self._progress.update(self._task, completed=self._progress.tasks[0].elapsed or 0.0)

    def measured(self, point: Measured) -> None:
        found = point.steady
        notes = [
            *(["more than it serves"] if found.saturated else []),
            *([] if found.saturated or point.settled else ["NOT settled: the warm-up was short"]),
            *([f"{found.failed} requests FAILED"] if found.failed else []),
            *([f"{point.other_requests} OTHER requests came"] if point.other_requests else []),
        ]
        self._console.print(
            f"{point.requests_per_s:g} requests/s, {found.window_s:.0f} s:"
            f" {found.output_tokens_per_s:.6g} output tokens/s, TTFT p99"
            f" {rounded(found.ttft_p99_ms)} ms, utilization {rounded(point.utilization)}"
            + "".join(f"; {note}" for note in notes),
            soft_wrap=True,
        )


@contextmanager
def _progress() -> Iterator[TerminalWatcher]:
    # Not on standard output: that is for the table, or JSON.
    console = Console(stderr=True, markup=False, highlight=False)
    columns = (
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )  # fmt: skip
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        yield TerminalWatcher(progress, console)


def _failed(why: str, status: int) -> int:
    lines = [plain(f"vllm-cost-meter sweep: {line}") for line in why.splitlines()]
    print("\n".join(lines), file=sys.stderr)
    return status


def _ids(deployment: Deployment) -> str:
    return ", ".join(deployment.run_ids)
