"""A small fleet of real servers, and what breaks around them.

Two machines with a vLLM server each send to one PostgreSQL on a small disk, each by a line of its
own. The wall clock of the second one is ten minutes ahead. The first one is for prefill, the second
one for decode, where a router asks for that. Each disturbance is a method, which
returns when it is over and was really felt.

Invariant: what ends it early leaves no process behind.
"""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.ecosystem.beside import Beside, Seen
from tests.ecosystem.books import audited, differences, rows_of, told_otherwise, usage
from tests.ecosystem.line import Cut, line_to
from tests.ecosystem.machines import INTERVAL_S, Machine, clock_ahead, compile_clock
from tests.ecosystem.postgresql import Server
from tests.ecosystem.test_fleet import changed
from tests.integration.server import RECEIVED, SENT_ON
from tests.support.fleet import sent
from tests.support.waiting import wait_for
from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.catching_up import catch_up

AHEAD_S = 600
DISK_MIB = 160
# So long after the last word of a server the fleet's audit knows that it is silent.
SILENT_S = 2 + 2 * INTERVAL_S
_LONG_AGO = "2000-01-01T00:00:00.000000Z"


class Fleet:
    """The fleet. `steady` has the right clock, `ahead` has not."""

    def __init__(self, folder: Path, server: Server, stack: ExitStack) -> None:
        """What it starts ends with the stack."""
        self._server = server
        self.url = server.new_database()
        clock = clock_ahead(compile_clock(folder), AHEAD_S)
        lines = [stack.enter_context(line_to(server.socket)) for _ in range(2)]
        self.steady = Machine("steady", folder, self.url, lines[0], {}, "kv_producer")
        self.ahead = Machine("ahead", folder, self.url, lines[1], clock, "kv_consumer")
        self.machines = [self.steady, self.ahead]
        for machine in self.machines:
            stack.callback(machine.kill)
        self.beside: Beside
        # Runs whose server ended, and since when the fleet knows that it is silent.
        self.silent_since_s: dict[str, float] = {}

    @property
    def ledgers(self) -> list[str]:
        return [machine.ledger_url for machine in self.machines]

    def begin(self, stack: ExitStack) -> None:
        """Start both servers, on an empty database and by lines that break; look at the fleet."""
        for machine in self.machines:
            # The tables, the join, and the first bills.
            machine.line.cut(Cut.AFTER_COMMIT, Cut.BEFORE_COMMIT, Cut.IN_BATCH)
            machine.launch()
        for machine in self.machines:
            machine.wait()
            machine.line.wait_until_cut()
        self.beside = Beside(self.url, self.ledgers)
        stack.callback(self.beside.close)

    def ask_in_halves(self, x_request_id: str) -> list[str]:
        """Ask both servers for one request, as a router does; return the ids of the two bills."""
        return [
            self.steady.ask_half(x_request_id, max_tokens=1, kv_transfer_params=SENT_ON),
            self.ahead.ask_half(x_request_id, max_tokens=8, kv_transfer_params=RECEIVED),
        ]

    # -- disturbances ---------------------------------------------------------------------------

    def cut(self, machine: Machine, *places: Cut) -> None:
        """Cut the line of a machine in transactions."""
        machine.line.cut(*places)
        machine.line.wait_until_cut()

    def kill_database(self) -> None:
        """Kill the database, leave it away for a moment, and start it on its disk."""
        with self.beside.away():
            self._server.kill()
            time.sleep(1)
            self._server.start()

    def fill_disk(self) -> None:
        """Let the disk of the database be full until both senders have met that."""
        disk = self._server.disk
        assert disk is not None
        with self.beside.away():
            known = self.failures()
            disk.fill()
            try:
                wait_for(
                    lambda: all(now > was for now, was in zip(self.failures(), known, strict=True)),
                    timeout_s=240,
                    what="the disk was never full",
                )
            finally:
                disk.free()
            if self._server.has_ended:
                self._server.start()

    def wait_until_known(self, machine: Machine) -> None:
        """Wait until the fleet was told of every run of a machine."""
        wait_for(
            lambda: runs_of(machine.ledger_url) <= told_of(self.url),
            timeout_s=240,
            what="the fleet was told nothing of the run",
        )

    def failures(self) -> list[int]:
        """Return how often each sender that runs has failed, by its server's metrics."""
        return [machine.send_failures() for machine in self.machines if machine.is_up]

    @contextmanager
    def unplugged(self, machine: Machine) -> Iterator[None]:
        """Keep the machine from the database meanwhile; what it bills in there stays with it."""
        with machine.line.unplugged():
            machine.wait_for_replies(8)
            yield

    def kill(self, machine: Machine) -> None:
        """End a server at once."""
        machine.kill()
        self._note_silence(machine)

    def stop(self, machine: Machine) -> None:
        """Stop a server as an operator does."""
        machine.stop()
        self._note_silence(machine)

    def _note_silence(self, machine: Machine) -> None:
        for run_id in runs_of(machine.ledger_url):
            self.silent_since_s.setdefault(run_id, time.monotonic() + SILENT_S)

    # -- the end --------------------------------------------------------------------------------

    def bring_in(self, machine: Machine) -> None:
        """Send what is on the disk of a machine whose server is gone."""
        assert catch_up(machine.ledger_url) == 0
        sent(machine.ledger_url, self.url)

    def wrong(self) -> list[str]:
        """Return what the fleet has otherwise than its ledgers and clients, once all is sent."""
        self.forget_when()
        found = differences(self.ledgers, self.url)
        for machine in self.machines:
            for url in (machine.ledger_url, self.url):
                found += told_otherwise(machine.told, url)
        own = {name: run for url in self.ledgers for name, run in audited(url).items()}
        there = audited(self.url)
        if own != there:
            found.append(f"audits: {own} != {there}")
        if (sums := usage(self.ledgers)) != (of_fleet := usage([self.url])):
            found.append(f"usage: {sums} != {of_fleet}")
        return found

    def called_complete_early(self) -> list[Seen]:
        """Return when a run whose server had ended was complete for the fleet, and was not."""
        last = {name: run["last_seq"] for url in self.ledgers for name, run in audited(url).items()}
        return [
            seen
            for seen in self.beside.seen
            if seen.state == "complete"
            and seen.at_s > self.silent_since_s.get(seen.run_id, math.inf)
            and seen.last_seq < last[seen.run_id]
        ]

    def forget_when(self) -> None:
        """Let the database believe that it was told of no engine for long: then they are dead.

        What a run left behind is told late, and makes its engine alive for half a minute.
        """
        changed(self.url, f"UPDATE told_snapshots SET told_at = '{_LONG_AGO}'")


def runs_of(url: str) -> set[str]:
    """Return the ids of the engine runs of a ledger."""
    return {row["run_id"] for row in rows_of(url, schema.runs)}


def told_of(url: str) -> set[str]:
    """Return the ids of the runs whose engines have told of themselves."""
    return {row["run_id"] for row in rows_of(url, schema.snapshots)}
