"""One schedule: a simulated machine that lives by the dice of a seed, and the check at its end.

Servers bill, appliers apply, commands look; processes are killed at any call, the machine crashes,
the disk fills, fails and spoils bytes, the ledger is locked, clocks go on. Then all is well again,
what waits is written, servers end, and the ledger must have what was told.

Invariant: the same seed gives the same schedule, call by call.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random
from types import SimpleNamespace
from typing import Any
from zlib import crc32

from greenlet import getcurrent

from tests.simulation.disk import BROKEN, FULL, Call, Disk, Killed, error
from tests.simulation.ledgers import MemoryLedger
from tests.simulation.model import Model
from tests.simulation.processes import FOLDER, ApplierProcess, Process, Server
from tests.simulation.records import Engine
from vllm_cost_meter.journal import files, places, reader
from vllm_cost_meter.journal import writer as writer_module
from vllm_cost_meter.ledger import applier as applier_module

# After so many turns without a fault everything has to be done.
TURNS_TO_END = 3000


@dataclass(frozen=True, slots=True)
class Plan:
    """What a seed decides before a schedule begins."""

    to_disk: bool
    servers: int
    turns: int
    segment_bytes: int
    chunk_bytes: int
    group_records: int
    max_records: int
    # The chances of each fault at a turn, or at a call.
    kill: float
    crash: float
    spoil: float
    error: float
    outage: float
    bad: float

    @classmethod
    def of(cls, random: Random) -> "Plan":
        def sometimes(share: float, chance: float) -> float:
            return chance if random.random() < share else 0.0

        return cls(
            to_disk=random.random() < 0.6,
            servers=random.choice((1, 1, 2, 3)),
            turns=random.randint(4, 32),
            segment_bytes=random.choice((600, 2048, 4096, 1 << 14)),
            chunk_bytes=random.choice((200, 1500, 1 << 18)),
            group_records=random.choice((1, 3, 2000)),
            max_records=random.choice((6, 200_000, 200_000)),
            kill=sometimes(0.8, 0.08),
            crash=sometimes(0.6, 0.06),
            spoil=sometimes(0.15, 0.03),
            error=sometimes(0.4, random.choice((0.01, 0.05, 0.2))),
            outage=sometimes(0.5, 0.1),
            bad=sometimes(0.2, 0.1),
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a schedule ended: what was wrong, and what it had of everything."""

    complaints: list[str]
    counts: Counter[str]
    # The same for each run of a seed.
    trace: int


class World:
    """A machine, from its start to the check."""

    def __init__(self, seed: int, *, is_sqlite: bool = False) -> None:
        self.random = Random(seed)
        self.plan = Plan.of(self.random)
        self.main = getcurrent()
        self.model = Model(self.plan.to_disk)
        self.disk = Disk(self.random, self._before)
        self.ledger = self._sqlite_ledger() if is_sqlite else MemoryLedger(self.random)
        self.complaints: list[str] = []
        self.counts: Counter[str] = Counter()
        self.dropped = 0
        self.trace = 0
        self.clock_ns = 10**18
        self._error_chance = 0.0
        self._is_crash_due = False
        self._processes: list[Process] = []
        self._all_servers: list[Server] = []
        self._current: Process | None = None

    # ---- each call of a process

    def _before(self, call: Call) -> None:
        process = self._current
        if process is None:
            return
        process.before(call)
        self.counts["calls"] += 1
        self.trace = crc32(f"{call.name} {len(self.model.told)}".encode(), self.trace)

    def fail_by_chance(self, call: Call) -> None:
        """Raise an error of the disk now and then."""
        if (
            self._error_chance
            and call.name != "close"
            and self.random.random() < self._error_chance
        ):
            self.counts["errors"] += 1
            raise error(self.random.choice((BROKEN, FULL)))

    def _sqlite_ledger(self) -> Any:
        # It needs apsw, and the others do not.
        from tests.simulation.sqlite_ledger import SqliteLedger

        return SqliteLedger(self.disk, self._before_sqlite, lambda: self._current)

    def _before_sqlite(self, call: Call) -> None:
        """Meet a call of SQLite's: others cannot run now, but all else may happen."""
        process = self._current
        if process is None:
            return
        self.counts["SQLite calls"] += 1
        self.trace = crc32(call.name.encode(), self.trace)
        if self._error_chance and self.random.random() < self._error_chance / 3:
            self.counts["SQLite errors"] += 1
            raise error(BROKEN)
        if self.random.random() < self.plan.kill / 10:
            self.counts["SQLite kills"] += 1
            process.is_dead = True
            self._is_crash_due = self.random.random() < 5 * self.plan.crash
            raise Killed

    def _run(self, process: Process, calls: int) -> None:
        before = set(self.disk.open)
        self._current = process
        process.go_on(calls)
        self._current = None
        process.descriptors = (process.descriptors | (self.disk.open.keys() - before)) & (
            self.disk.open.keys()
        )
        if process.is_dead:
            self._gone(process)
        if self._is_crash_due:
            self._crash()

    def _gone(self, process: Process) -> None:
        self.disk.close_all(process.descriptors)
        self._processes.remove(process)

    def _kill(self, process: Process) -> None:
        self._current = process
        process.kill()
        self._current = None
        self._gone(process)

    # ---- the schedule

    def run(self) -> Outcome:
        """Run the schedule, let everything become well, and check."""
        with _machine(self):
            for _ in range(self.plan.turns):
                self._turn()
            self._become_well()
            self.ledger.look(self.model.made, is_end=True)
            self.complaints += self.model.complaints(self.ledger) + self.ledger.complaints
            self.complaints += [c for server in self._all_servers for c in server.complaints()]
        self.counts.update(
            told=len(self.model.told), dropped=self.dropped, damaged=self.model.damaged,
            losses=sum(self.ledger.losses.values()), rows=len(self.ledger.rows),
        )  # fmt: skip
        return Outcome(self.complaints, self.counts, self.trace)

    def _turn(self) -> None:
        random, plan = self.random, self.plan
        self.clock_ns += random.choice((1, 10**6, 10**9))
        self._have_processes()
        chance = random.random
        if chance() < plan.outage:
            self._change_outage()
        if plan.error and chance() < 0.2:
            self._error_chance = 0.0 if self._error_chance else plan.error
        if plan.spoil and chance() < plan.spoil:
            self._spoil()
        if chance() < 0.05:
            self._start(ApplierProcess(self, is_command=True))
        if chance() < 0.03:
            self.ledger.checkpoint()
        process = random.choice(self._processes)
        if isinstance(process, Server) and not process.is_stopping:
            process.bill(random.choice((0, 1, 1, 2, 5)))
        self._run(process, random.choice((1, 2, 3, 5, 10, 30, 100)))
        if self._processes and chance() < plan.kill:
            self.counts["kills"] += 1
            self._kill(random.choice(self._processes))
        if chance() < plan.crash:
            self._crash()
        if self._processes and chance() < 0.02:
            random.choice(self._processes).is_stopping = True

    def _have_processes(self) -> None:
        servers = sum(isinstance(each, Server) for each in self._processes)
        if servers < self.plan.servers and (not servers or self.random.random() < 0.3):
            run_id = f"run-{len(self._all_servers)}"
            server = Server(self, Engine(run_id, self.plan.bad))
            self._all_servers.append(server)
            self._start(server)
        appliers = sum(isinstance(each, ApplierProcess) for each in self._processes)
        if appliers < 2 and self.random.random() < 0.2:
            self._start(ApplierProcess(self))

    def _start(self, process: Process) -> None:
        self._processes.append(process)

    def _change_outage(self) -> None:
        if self.random.random() < 0.5:
            self.ledger.is_out = not self.ledger.is_out
        else:
            self.disk.is_full = not self.disk.is_full
        self.counts["outages"] += 1

    def _crash(self) -> None:
        self.counts["crashes"] += 1
        self._is_crash_due = False
        for process in list(self._processes):
            self._kill(process)
        self.disk.crash()
        self.ledger.crash()
        self.ledger.look(self.model.made)
        self.model.crash(self.ledger)

    def _spoil(self) -> None:
        """Change a byte of a segment."""
        segments = [file for path, file in self.disk.files() if path.endswith(".segment")]
        if not segments:
            return
        file = self.random.choice(segments)
        used = len(bytes(file.data).rstrip(b"\0"))
        if used and used <= len(file.synced):
            at = self.random.randrange(used)
            flip = self.random.randrange(1, 256)
            file.data[at] ^= flip
            file.synced[at] ^= flip
            self.model.damaged += 1

    def _become_well(self) -> None:
        self.ledger.is_out = self.disk.is_full = False
        self._error_chance = 0.0
        self.plan = replace(self.plan, kill=0.0, crash=0.0)
        for process in list(self._processes):
            if isinstance(process, ApplierProcess) and self.random.random() < 0.5:
                self._kill(process)
            else:
                process.is_stopping = True
        for _ in range(TURNS_TO_END):
            if not self._processes:
                break
            self._run(self.random.choice(self._processes), 1000)
        else:
            self.complaints.append("processes do not end")
        self.clock_ns += 2 * 10**9
        self._run_to_end(ApplierProcess(self, is_command=True))
        of_journals = [path for path, _ in self.disk.files() if path.startswith(str(FOLDER))]
        if left := [path for path in of_journals if "applier.lock" not in path]:
            self.complaints.append(f"left over: {left}")

    def _run_to_end(self, process: Process) -> None:
        self._start(process)
        for _ in range(TURNS_TO_END):
            self._run(process, 1000)
            if process.is_dead:
                return
        self.complaints.append("an applier does not end")
        self._kill(process)


@contextmanager
def _machine(world: World) -> Iterator[None]:
    """Put the world's disk, clock and dice where the product's code looks for them."""
    clock = SimpleNamespace(monotonic=lambda: world.clock_ns / 1e9, time_ns=lambda: world.clock_ns)
    dice = SimpleNamespace(token_hex=lambda size: world.random.randbytes(size).hex())
    places_of = {(files, name): getattr(world.disk, name) for name in Disk.FUNCTIONS} | {
        (places, "secrets"): dice,
        (applier_module, "time"): clock,
        (reader, "CHUNK_BYTES"): world.plan.chunk_bytes,
        (writer_module, "GROUP_RECORDS_MAX"): world.plan.group_records,
    }
    before = {(module, name): getattr(module, name) for module, name in places_of}
    for (module, name), value in places_of.items():
        setattr(module, name, value)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        for (module, name), value in before.items():
            setattr(module, name, value)


def run(seed: int, *, is_sqlite: bool = False) -> Outcome:
    """Run the schedule of a seed, with the ledger in memory or in a real SQLite."""
    return World(seed, is_sqlite=is_sqlite).run()
