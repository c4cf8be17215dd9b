"""Load, kills and faults for minutes, and then whether each cost that a client saw is there once.

`make soak` runs it for half an hour, with real servers beside the fake ones. The short form is a
test of `make test`.
"""

import argparse
import json
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import NamedTuple

from tests.soak.clients import Clients
from tests.soak.faults import Faults
from tests.soak.servers import FakeServers, RealServers
from tests.support.raw_rows import texts
from vllm_cost_meter.ledger.catching_up import catch_up
from vllm_cost_meter.ledger.reader import LedgerReader

TRIES = 20


class Times(NamedTuple):
    """How many there were, and how long they took."""

    count: int
    median_s: float
    longest_s: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Times | None":
        if not seconds:
            return None
        return cls(len(seconds), round(median(seconds), 2), round(max(seconds), 2))


@dataclass
class Outcome:
    """What came of it. Where all went well `lost` and what is behind it are empty."""

    seen: int = 0
    without_cost: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    # From the start of a process until it could be asked.
    starts_s: "Times | None" = None
    real_starts_s: "Times | None" = None
    seen_of_real: int = 0
    lost: list[str] = field(default_factory=list)
    other_value: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    journal_losses: int = 0
    runs_out_of_balance: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)

    @property
    def is_well(self) -> bool:
        if self.real_starts_s is not None and not self.seen_of_real:
            return False  # Then it proved nothing of them.
        return bool(self.seen) and not (
            self.lost or self.other_value or self.doubled or self.journal_losses
            or self.runs_out_of_balance or self.damage
        )  # fmt: skip


def soak(folder: Path, seconds: float, *, seed: int, is_real: bool) -> Outcome:
    """Do it in a folder; return what came of it."""
    random, ledger = Random(seed), folder / "ledger.db"
    servers = [FakeServers(name, folder) for name in ("one", "two")]
    faults = Faults(random, servers, ledger)
    # Real servers start beside the load, and need the processors too.
    clients = Clients(pause_s=0.02 if is_real else 0.002)
    for server in servers:
        clients.start(server.port, 2)
    real = RealServers(folder, ledger, Random(seed)) if is_real else None
    if real is not None:
        real.start()
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            time.sleep(random.uniform(0.2, 2))
            faults.one()
    finally:
        clients.stop()
        for server in servers:
            server.stop()
        if real is not None:
            real.stop()
        faults.end()
    outcome = Outcome(
        without_cost=clients.without_cost, faults=dict(faults.counts),
        starts_s=Times.of([each for server in servers for each in server.starts_s]),
    )  # fmt: skip
    seen = dict(clients.seen)
    if real is not None:
        seen |= real.clients.seen
        outcome.seen_of_real = len(real.clients.seen)
        outcome.real_starts_s = Times.of(real.starts_s)
        outcome.faults = outcome.faults | {
            "real server killed": real.kills, "engine of a real server killed": real.engine_kills
        }  # fmt: skip
    _check(ledger, seen, outcome)
    return outcome


def _check(ledger: Path, seen: Mapping[str, int], outcome: Outcome) -> None:
    """Compare what clients saw with the ledger, once it has all that journals hold."""
    for _ in range(TRIES):
        if catch_up(f"sqlite:///{ledger}") == 0:
            break
        time.sleep(0.5)
    outcome.seen = len(seen)
    with closing(sqlite3.connect(ledger)) as connection:
        asked = "SELECT http_request_id, cost_nanousd FROM "
        told = dict(texts(connection.execute(asked + "replies")))
        bills: dict[str, list[int]] = {}
        for name, cost in texts(connection.execute(asked + "requests")):
            bills.setdefault(name, []).append(cost)
        (outcome.journal_losses,) = connection.execute(
            "SELECT count(*) FROM journal_losses"
        ).fetchone()
        checked = [line for (line,) in connection.execute("PRAGMA integrity_check")]
    outcome.damage = [] if checked == ["ok"] else checked
    for name, cost in seen.items():
        if name not in told or name not in bills:
            outcome.lost.append(name)
        elif len(bills[name]) > 1:
            outcome.doubled.append(name)
        elif {told[name], *bills[name]} != {cost}:
            outcome.other_value.append(name)
    with LedgerReader(f"sqlite:///{ledger}") as reader:
        audit = reader.audit()
    outcome.runs_out_of_balance = [
        run["run_id"]
        for run in audit["runs"]
        if run["ledger_difference_ns"] and not run["missing_bills"]
    ]


def main() -> int:
    """Return the exit code: 1 if a cost that a client saw is not there once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--no-real-server", action="store_true")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    outcome = soak(folder, 60 * given.minutes, seed=given.seed, is_real=not given.no_real_server)
    if outcome.is_well:
        shutil.rmtree(folder)
    else:
        print(f"what is left, logs and the times of all faults: {folder}")
    print(json.dumps(asdict(outcome), indent=1))
    verdict = "nothing lost, nothing doubled" if outcome.is_well else "NOT AS PROMISED"
    print(
        f"{verdict}: seen {outcome.seen}, lost {len(outcome.lost)}, doubled"
        f" {len(outcome.doubled)}, of another value {len(outcome.other_value)};"
        f" {sum(outcome.faults.values())} kills, faults and looks"
    )
    return 0 if outcome.is_well else 1


if __name__ == "__main__":
    sys.exit(main())
