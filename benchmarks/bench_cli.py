"""CPU time that the command line takes to start, beside what Python and its libraries take.

Goal: `--version` at most 0.1 s above `python -c pass`, `--help` at most 0.1 s above
`python -c 'import typer, rich'`, and `report` on a small ledger at most 1 s in all.
Method: each program is run in turn, round after round, so that a busy machine slows all alike; the
figure is the median of user and system time of the process. Run it with
`python -m benchmarks.bench_cli`.
Limits: files are in the page cache after the first round, which is not counted.
"""

import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.component.cli.test_cli import write_ledger

ROUNDS = 15
ABOVE_S_MAX = 0.1
REPORT_S_MAX = 1.0


def cpu_s(command: list[str]) -> float:
    """Return the user and system time of one run of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def measure(commands: dict[str, list[str]]) -> dict[str, float]:
    """Return the median CPU time of each command, run in turn."""
    found: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(ROUNDS + 1):
        for name, command in commands.items():
            used_s = cpu_s(command)
            if number:
                found[name].append(used_s)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        ledger = write_ledger(Path(folder) / "ledger.db")
        meter = [sys.executable, "-m", "vllm_cost_meter.cli"]
        found = measure(
            {
                "python -c pass": [sys.executable, "-c", "pass"],
                "--version": [*meter, "--version"],
                "import typer, rich": [sys.executable, "-c", "import typer, rich"],
                "--help": [*meter, "--help"],
                "report": [*meter, "report", "--ledger", str(ledger)],
            }
        )
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"median CPU seconds of {ROUNDS} runs each, in turn:")
    for name, used_s in found.items():
        print(f"  {name:20} {used_s:.3f}")
    version_s = found["--version"] - found["python -c pass"]
    help_s = found["--help"] - found["import typer, rich"]
    met = version_s <= ABOVE_S_MAX and help_s <= ABOVE_S_MAX and found["report"] <= REPORT_S_MAX
    print(
        f"above: --version {version_s:.3f}, --help {help_s:.3f}; goal {'met' if met else 'NOT met'}"
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
