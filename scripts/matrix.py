"""Run the integration tests on several versions of vLLM, one after another, and print a table.

Usage: `make matrix`, or `python scripts/matrix.py VERSION...`. Each version has its own environment
in `.cache/matrix`. The Makefile's own targets set it up and test it, so only vLLM differs from
`make test`. The environments stay, and a second run installs nothing. They share the checkout with
its native part built in place.

A failure on one version does not stop the others; the exit status is then 1. The table also goes to
`.cache/matrix/table.md`, with the reason for each skipped test. All versions take hours, so each
result is kept with the commit that it is of. A run that was interrupted goes on where it was: a
version that passed on this very commit is not run again, unless the checkout has changes.

Invariant: every requested version has a row. A row has counts only if pytest wrote them on the
version that the row names, and for the commit that it names.
"""

import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

FOLDER = Path(".cache") / "matrix"
TESTS = "tests/integration"
HEADER = (
    "| vLLM | torch | passed | failed | skipped | minutes | commit |\n|---|---|---|---|---|---|---|"
)
# This prints the versions of vLLM and torch as their metadata have them, with "+cpu".
VERSIONS_THERE = "from importlib.metadata import version as v; print(v('vllm'), v('torch'))"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The tests' results on one version. Without counts, `problem` says why."""

    version: str
    torch: str = ""
    passed: int = 0
    failed: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    problem: str = ""
    commit: str = ""

    @property
    def ok(self) -> bool:
        """True if tests ran and all passed."""
        return self.passed > 0 and not self.failed and not self.problem


def row(outcome: Outcome) -> str:
    """Return a version's row in the Markdown table."""
    if outcome.problem:
        cells = [outcome.version, outcome.torch, outcome.problem, "", "", "", outcome.commit]
    else:
        counts = (outcome.passed, len(outcome.failed), len(outcome.skipped))
        minutes = f"{outcome.seconds / 60:.1f}"
        cells = [outcome.version, outcome.torch, *map(str, counts), minutes, outcome.commit]
    return f"| {' | '.join(cells)} |"


def table(outcomes: list[Outcome]) -> str:
    """Return the Markdown table, and below it each skipped test with its reason."""
    lines = [HEADER, *map(row, outcomes)]
    reasons = [
        f"- {test} on {outcome.version}: {reason}"
        for outcome in outcomes
        for test, reason in outcome.skipped
    ]
    return "\n".join([*lines, *(["", "Skipped:", "", *reasons] if reasons else [])]) + "\n"


def make(log: Path, *arguments: str) -> bool:
    """Run make with its output in a log; return whether it succeeded."""
    command = ["make", "--no-print-directory", *arguments]
    with log.open("a", encoding="utf-8") as file:
        return subprocess.run(command, stdout=file, stderr=file, check=False).returncode == 0


def read_report(path: Path) -> tuple[int, tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Return a JUnit file's results: number passed, names failed, (name, reason) skipped."""
    passed, failed, skipped = Counter[str](), [], []
    # A test that passed, but whose fixture then failed to end, is in the file twice.
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif (skip := case.find("skipped")) is not None:
            skipped.append((name, skip.get("message") or "no reason given"))
        else:
            passed[name] += 1
    return len(passed.keys() - set(failed)), tuple(dict.fromkeys(failed)), tuple(skipped)


def run(version: str, folder: Path = FOLDER) -> Outcome:
    """Set up the environment for a version, and run the tests in it."""
    log, report = folder / f"{version}.log", folder / f"{version}.xml"
    log.write_text("")
    report.unlink(missing_ok=True)
    environment = folder / version
    same = (f"VENV={environment}", f"VLLM={version}", f"PYTHON={sys.executable}")
    print(f"==> vLLM {version}: setting up (minutes the first time; {log})", flush=True)
    if not make(log, "setup", *same):
        return Outcome(version, problem=f"could not be installed: {last_line(log)}")
    present, torch = there(environment)
    if present != f"{version}+cpu":
        return Outcome(version, torch, problem=f"found vLLM {present} in {environment} instead")
    print(f"==> vLLM {version}: {TESTS}", flush=True)
    start = time.monotonic()
    make(log, "test", *same, f"TEST_ARGS={TESTS} --junitxml={report}")
    seconds = time.monotonic() - start
    if not report.exists():
        return Outcome(version, torch, problem=f"the tests did not end: {last_line(log)}")
    passed, failed, skipped = read_report(report)
    if not passed and not failed:
        return Outcome(version, torch, problem=f"no test ran: {last_line(log)}")
    for name in failed:
        print(f"    failed: {name}", flush=True)
    return Outcome(version, torch, passed, failed, skipped, seconds)


def there(environment: Path) -> tuple[str, str]:
    """Return the versions of vLLM and torch in an environment."""
    command = [str(environment / "bin" / "python"), "-c", VERSIONS_THERE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    vllm, torch = done.stdout.split()
    return vllm, torch


def last_line(log: Path) -> str:
    """Return a log's last line with text, fit for a table cell."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip().replace("|", "\\|")[:200] if lines else f"{log} is empty"


def commit_here() -> str:
    """Return the checkout's commit, shortened; with a + if files differ from it."""
    revision = ["git", "rev-parse", "--short=9", "HEAD"]
    short = subprocess.run(revision, capture_output=True, text=True, check=True).stdout.strip()
    status = ["git", "status", "--porcelain"]
    changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip()
    return f"{short}+" if changed else short


def kept(version: str, commit: str) -> Outcome | None:
    """Return the result of a version that passed on this commit; None if there is none."""
    path = FOLDER / f"{version}.json"
    if commit.endswith("+") or not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    outcome = Outcome(
        **{
            **found,
            "failed": tuple(found["failed"]),
            "skipped": tuple(map(tuple, found["skipped"])),
        }
    )
    return outcome if outcome.ok and outcome.commit == commit else None


def main(versions: list[str]) -> int:
    if not versions:
        print("expected the versions of vLLM to test, got none: make matrix MATRIX='0.32.0'")
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for version in versions:
        commit = commit_here()
        if (outcome := kept(version, commit)) is not None:
            print(f"==> vLLM {version}: passed on {commit} already", flush=True)
        else:
            outcome = replace(run(version), commit=commit)
            text = json.dumps(asdict(outcome), indent=1)
            (FOLDER / f"{version}.json").write_text(text, encoding="utf-8")
        outcomes.append(outcome)
        # The table is written after each version, so an interrupted run leaves its results.
        (FOLDER / "table.md").write_text(table(outcomes), encoding="utf-8")
    print(f"\n{table(outcomes)}", end="")
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
