"""Real servers that send to one database, disturbed at random for minutes: `make soak-fleet`.

The short form, with each disturbance once, is `tests/ecosystem/test_fleet_of_servers.py`. In the
end the servers are stopped, and the fleet must have what they have, to the nanosecond.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from random import Random

from tests.ecosystem.fleet_world import DISK_MIB, Fleet
from tests.ecosystem.line import Cut
from tests.ecosystem.machines import Machine
from tests.ecosystem.postgresql import postgresql


class Disturbances:
    """What happens to a fleet; `counts` says how often each did."""

    def __init__(self, fleet: Fleet, random: Random) -> None:
        self.counts: Counter[str] = Counter()
        self._fleet = fleet
        self._random = random
        self._kinds: dict[str, tuple[int, Callable[[Machine], None]]] = {
            "line cut": (6, self._cut),
            "line held": (2, self._hold),
            "line unplugged": (2, self._unplug),
            "database killed": (2, lambda _: fleet.kill_database()),
            "disk of the database full": (2, lambda _: fleet.fill_disk()),
            "server killed": (1, self._kill),
            "server killed with what it had not sent": (2, self._kill_unplugged),
            "server stopped": (1, self._stop),
            "server stopped without the database": (1, self._stop_unplugged),
        }

    def one(self) -> None:
        """Let one happen to one of the machines."""
        kinds = list(self._kinds)
        (name,) = self._random.choices(kinds, [weight for weight, _ in self._kinds.values()])
        machine = self._random.choice(self._fleet.machines)
        print(f"{time.strftime('%X')} {machine.server.folder.name}: {name}", flush=True)
        self._kinds[name][1](machine)
        self.counts[name] += 1

    def _cut(self, machine: Machine) -> None:
        self._fleet.cut(machine, *self._random.choices(list(Cut), k=self._random.randint(1, 4)))

    def _hold(self, machine: Machine) -> None:
        with machine.line.held():
            time.sleep(self._random.uniform(0.2, 8))

    def _unplug(self, machine: Machine) -> None:
        with self._fleet.unplugged(machine):
            time.sleep(self._random.uniform(0.2, 8))

    def _kill(self, machine: Machine) -> None:
        self._fleet.kill(machine)
        self._start_again(machine)

    def _kill_unplugged(self, machine: Machine) -> None:
        with self._fleet.unplugged(machine):
            self._fleet.kill(machine)
        self._start_again(machine)

    def _stop(self, machine: Machine) -> None:
        self._fleet.stop(machine)
        self._start_again(machine)

    def _stop_unplugged(self, machine: Machine) -> None:
        with self._fleet.unplugged(machine):
            self._fleet.stop(machine)
        self._start_again(machine)

    def _start_again(self, machine: Machine) -> None:
        time.sleep(self._random.choice((0, 0, 20)))  # Its run is then dead for the fleet.
        machine.launch()
        machine.wait()


def soak(folder: Path, seconds: float, seed: int) -> list[str]:
    """Disturb a fleet for so long; return what is wrong in the end."""
    with ExitStack() as stack:
        fleet = Fleet(folder, stack.enter_context(postgresql(DISK_MIB)), stack)
        fleet.begin(stack)
        disturbances = Disturbances(fleet, Random(seed))
        until_s = time.monotonic() + seconds
        with fleet.steady.asked(), fleet.ahead.asked():
            while time.monotonic() < until_s:
                disturbances.one()
        for machine in fleet.machines:
            fleet.stop(machine)
            fleet.bring_in(machine)
        fleet.beside.close()
        told = sum(len(machine.told) for machine in fleet.machines)
        print(f"{told} replies, {fleet.beside.looks} looks, {dict(disturbances.counts)}")
        wrong = [*fleet.wrong(), *fleet.beside.failures]
        return wrong + [f"complete too early: {seen}" for seen in fleet.called_complete_early()]


def main() -> int:
    """Return the exit code: 1 if the fleet has something else than its servers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="soak-fleet-"))
    wrong = soak(folder, 60 * given.minutes, given.seed)
    print(*wrong[:50], sep="\n")
    if wrong:
        print(f"NOT AS PROMISED in {len(wrong)} places; ledgers and logs: {folder}")
        return 1
    print("nothing lost, nothing doubled")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
