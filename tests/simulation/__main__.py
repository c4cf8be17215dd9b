"""Run many schedules, print their counts, and each seed that fails: `make simulate-ledger`."""

import argparse
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from os import cpu_count

from tests.simulation.world import run

AT_ONCE, SAID_EVERY = 50, 5_000


def some(first: int, count: int, is_sqlite: bool) -> tuple[Counter[str], dict[int, list[str]]]:
    """Run the schedules of some seeds; return counts, and the complaints of those that failed."""
    counts: Counter[str] = Counter()
    failed = {}
    for seed in range(first, first + count):
        outcome = run(seed, is_sqlite=is_sqlite)
        counts.update(outcome.counts)
        if outcome.complaints:
            failed[seed] = outcome.complaints
    return counts, failed


def simulate(first: int, count: int, is_sqlite: bool, processes: int) -> int:
    """Run schedules in some processes, print what came of them; return how many failed."""
    begun = time.monotonic()
    counts: Counter[str] = Counter()
    failures = 0
    seeds = range(first, first + count, AT_ONCE)
    sizes = [min(AT_ONCE, first + count - seed) for seed in seeds]
    with ProcessPoolExecutor(processes) as pool:
        parts = pool.map(some, seeds, sizes, repeat(is_sqlite))
        for done, (found, failed) in zip(seeds, parts, strict=True):
            if done > first and not (done - first) % SAID_EVERY:
                print(f"{done - first:,} of {count:,}, {failures} failed", flush=True)
            counts.update(found)
            failures += len(failed)
            for seed, complaints in failed.items():
                again = f"SEED={seed}{' ON=sqlite' if is_sqlite else ''}"
                print(f"{again}: {'; '.join(complaints[:3])}"[:600], flush=True)
    took_s = time.monotonic() - begun
    ledger = "SQLite" if is_sqlite else "a ledger in memory"
    print(
        f"{failures} of {count:,} schedules on {ledger} failed, {took_s:.0f} s:",
        ", ".join(f"{name} {number:,}" for name, number in sorted(counts.items())),
        flush=True,
    )
    return failures


def main() -> int:
    """Return the exit code: 1 if a schedule failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=100_000)
    parser.add_argument("--sqlite-schedules", type=int, default=2_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="replay this one")
    parser.add_argument("--on", choices=("memory", "sqlite"), default="memory", help="with --seed")
    parser.add_argument("--processes", type=int, default=cpu_count())
    given = parser.parse_args()
    if given.seed is not None:
        return min(simulate(given.seed, 1, given.on == "sqlite", 1), 1)
    failures = 0
    for count, is_sqlite in ((given.schedules, False), (given.sqlite_schedules, True)):
        if count:
            failures += simulate(given.first, count, is_sqlite, given.processes)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
