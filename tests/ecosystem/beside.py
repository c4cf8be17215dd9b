"""Whoever looks at a fleet while its servers send: audits and reports, without a pause.

Each audit is noted: which runs it called complete, and which bills it knew then.

Invariant: a look that fails is in `failures`, unless the database was away.
"""

import itertools
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from sqlalchemy.exc import SQLAlchemyError

from tests.ecosystem.books import rows_of
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.lab.server import command_path
from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.queries.answers import Audit
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.reader import LedgerReader

_COMMANDS = (("audit",), ("report",), ("report", "requests"), ("audit", "--full", "--json"))
# A command loads Python and the meter: one at a time, behind everything else.
_COMMAND_EVERY_S = 4.0
_LOOK_EVERY_S = 0.5
# Without a wait for bills that are on their way.
_NOW = AsOf(settle_s=0)


class Seen(NamedTuple):
    """What an audit said of a run, and when by the monotonic clock.

    `last_seq` is the last bill of it that the fleet had right afterwards. The audit itself names
    the last one up to its cut, while the engine seems to live.
    """

    at_s: float
    run_id: str
    state: str
    last_seq: int


class Beside:
    """Looks at a fleet and at ledgers until it is closed."""

    def __init__(self, fleet: str, ledgers: Sequence[str]) -> None:
        self.failures: list[str] = []
        self.seen: list[Seen] = []
        self.looks = 0
        self.commands = 0
        self._fleet = fleet
        self._ledgers = ledgers
        self._aways = 0
        self._is_away = threading.Event()
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=self._look_on), threading.Thread(target=self._run_on)
        ]  # fmt: skip
        for thread in self._threads:
            thread.start()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Let looks fail meanwhile."""
        self._aways += 1
        self._is_away.set()
        try:
            yield
        finally:
            self._is_away.clear()

    def close(self) -> None:
        """End the looks."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _look_on(self) -> None:
        while not self._is_over.wait(_LOOK_EVERY_S):
            with self._allowed("reader"):
                began_s = time.monotonic()
                with LedgerReader(self._fleet) as reader:
                    audit = reader.audit(_NOW)
                    reader.report(aggregate="tenant,hour", as_of=_NOW)
                self._note(began_s, audit)
                for ledger in self._ledgers:
                    with LedgerReader(ledger) as reader:
                        reader.audit(_NOW)
                        reader.tenants(as_of=_NOW)
                self.looks += 1

    @contextmanager
    def _allowed(self, what: str) -> Iterator[None]:
        """Note a failure, unless the database is away, or was during the look."""
        before = self._aways
        was_away = self._is_away.is_set()
        try:
            yield
        except (LedgerError, SQLAlchemyError, subprocess.CalledProcessError) as error:
            if not was_away and before == self._aways:
                output = getattr(error, "stderr", "")
                self.failures.append(f"{what}: {error} {output}")

    def _note(self, began_s: float, audit: Audit) -> None:
        if audit["fleet"] is None:
            return
        states = {run["run_id"]: run["state"] for run in audit["fleet"]["incomplete"]}
        last = {row["run_id"]: row["last_seq"] for row in rows_of(self._fleet, schema.bill_sums)}
        for run_id in (run["run_id"] for run in audit["runs"]):
            state = states.get(run_id, "complete")
            self.seen.append(Seen(began_s, run_id, state, last.get(run_id, 0)))

    def _run_on(self) -> None:
        for words in itertools.cycle(_COMMANDS):
            if self._is_over.wait(_COMMAND_EVERY_S):
                return
            with self._allowed(" ".join(words)):
                command = [command_path("vllm-cost-meter"), *words, "--ledger", self._fleet]
                done = subprocess.run(
                    ["nice", "-n", "19", *command], capture_output=True, text=True, check=False
                )
                # An audit of books that are not all here yet says so by its status.
                if done.returncode not in ((0, 1) if words[0] == "audit" else (0,)) or (
                    "Traceback" in done.stderr
                ):
                    done.check_returncode()
                self.commands += 1
