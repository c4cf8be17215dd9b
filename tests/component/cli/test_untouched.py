"""A command that only reads leaves the ledger and its folder as they were, to the byte."""

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.small_ledger import small_ledger
from tests.support.untouched import old_ledger, state_of
from tests.support.upkeep import server
from vllm_cost_meter.cli.commands import app, whole
from vllm_cost_meter.ledger.schema import SCHEMA_VERSION

NOBODY = 65_534  # a user id without rights
MONTH = "2027-01"
READINGS = "resource,timestamp,cumulative_usd\ngpu-1,2027-01-15T08:00:00Z,1\n"
# Each command that takes a ledger and only reads it, with the words that it needs.
READ = {
    "report": [],
    "statement": ["--month", MONTH],
    "explain": ["cost-1"],
    "audit": [],
    "budgets": [],
    "invoice list": [],
    "invoice days": [],
    "invoice import": ["FILE", "--format", "snapshots", "--dry-run"],
    "economics": [],
    "compare": ["--model", "gpt-4o-mini", "--provider", "openai"],
    "saturation list": [],
    "ledger check": ["--full"],
    "ledger backup": ["COPY"],
    "doctor": [],
    # Without a port it ends once it has read the ledger.
    "server": [],
}
WRITE = {
    *("invoice import", "saturation import", "sweep"),
    *(
        f"ledger {name}"
        for name in ("apply", "restore", "merge", "compact", "repair", "migrate", "drop")
    ),
}


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    monkeypatch.setenv("COST_METER_PORT", "off")


@pytest.fixture
def folder(tmp_path):
    """Return a folder for the ledger, and for nothing else."""
    folder = tmp_path / "vllm-cost-meter"
    folder.mkdir(mode=0o755)
    return folder


@contextmanager
def not_root() -> Iterator[None]:
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def run(name: str, path: Path, elsewhere: Path) -> str:
    """Run a command on a ledger; return what it says."""
    named = {"FILE": elsewhere / "readings.csv", "COPY": elsewhere / "copy.db"}
    named["FILE"].write_text(READINGS)
    words = [str(named.get(word, word)) for word in READ[name]]
    result = CliRunner().invoke(app, [*name.split(), *words, "--ledger", str(path)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output + result.stderr


def commands_with_a_ledger(group, above=()) -> Iterator[str]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands_with_a_ledger(command, (*above, name))
        elif any("--ledger" in parameter.opts for parameter in command.params):
            yield " ".join((*above, name))


def test_every_command_that_takes_a_ledger_is_known_to_read_or_to_write_it():
    assert {*READ, *WRITE} == set(commands_with_a_ledger(whole()))


@pytest.mark.parametrize("name", READ)
def test_no_command_makes_a_ledger_that_is_not_there(name, tmp_path, folder):
    before = state_of(folder)
    said = run(name, folder / "deep" / "ledger.db", tmp_path)
    assert "ledger.db: " in said
    assert state_of(folder) == before


@pytest.mark.parametrize("name", READ)
def test_no_command_changes_a_ledger_at_rest_nor_looser_modes(name, tmp_path, folder):
    small_ledger(folder).close()
    (folder / "ledger.db").chmod(0o644)
    before = state_of(folder)
    run(name, folder / "ledger.db", tmp_path)
    assert state_of(folder) == before


@pytest.mark.parametrize(("place", "name"), list(enumerate(READ)))
def test_no_command_migrates_an_older_ledger(place, name, tmp_path, folder):
    # All commands ask one way which version a ledger has. So each is tried on a few versions, and
    # each version by a few commands.
    for version in range(1 + place % 4, SCHEMA_VERSION, 4):
        path = folder / f"{version}.db"
        old_ledger(path, version)
        path.chmod(0o640)
        before = state_of(folder)
        said = run(name, path, tmp_path)
        assert name == "ledger backup" or "vllm-cost-meter ledger migrate" in said, said
        assert state_of(folder) == before, version
        (tmp_path / "copy.db").unlink(missing_ok=True)


@pytest.mark.parametrize("name", READ)
def test_no_command_changes_a_ledger_that_a_server_has_open(name, tmp_path, folder):
    path = folder / "ledger.db"
    with server(path) as running:
        before = state_of(folder)
        run(name, path, tmp_path)
        assert state_of(folder) == before
        assert running.stop() == 1


@pytest.mark.parametrize("name", READ)
def test_no_command_takes_up_the_log_that_a_killed_server_left(name, tmp_path, folder):
    path = folder / "ledger.db"
    with server(path):
        pass  # it is killed
    before = state_of(folder)
    assert before["ledger.db-wal"][3]
    run(name, path, tmp_path)
    assert state_of(folder) == before
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM requests").fetchone() == (1,)


@pytest.mark.parametrize("name", READ)
def test_every_command_reads_in_a_folder_where_it_may_not_write(name):
    # Not tmp_path: only root may even look into that where the tests run as root.
    with (
        tempfile.TemporaryDirectory() as ledgers,
        tempfile.TemporaryDirectory() as elsewhere,
    ):
        folder = Path(ledgers)
        small_ledger(folder).close()
        (folder / "ledger.db").chmod(0o444)
        folder.chmod(0o555)
        Path(elsewhere).chmod(0o777)
        before = state_of(folder)
        with not_root():
            said = run(name, folder / "ledger.db", Path(elsewhere))
        assert "unable to open" not in said
        assert "readonly" not in said
        assert state_of(folder) == before
        folder.chmod(0o700)
