"""Settings that a fleet shares, in a real PostgreSQL: versions, rights, and what a change moves."""

import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from typer.testing import CliRunner

from tests.ecosystem.roles import as_role, make_roles
from tests.ecosystem.test_postgresql import rows
from tests.support.fleet_settings import FILE, changed_to, ended_to, key_sha256
from vllm_cost_meter.cli.commands import PIPE_CLOSED, app
from vllm_cost_meter.cli.options import settings_of
from vllm_cost_meter.config.shared_changes import restarted
from vllm_cost_meter.errors import ConflictError, LedgerError, SettingError
from vllm_cost_meter.ledger.fleet.opening import shared_store
from vllm_cost_meter.ledger.fleet.shared_settings import SharedStore
from vllm_cost_meter.records.shared_settings import SharedSettings


@pytest.fixture
def meter(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch):
    """Run a command on the fleet; return its exit status and what it says."""
    monkeypatch.setenv("COST_METER_FLEET", url)
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["fleet", "settings", *words])
        return result.exit_code, result.stdout + result.stderr

    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "shared.toml"
    path.write_text(FILE)
    return path


@pytest.fixture
def store(url: str) -> Iterator[SharedStore]:
    with shared_store(url, creates=True) as store:
        yield store


def shown(meter, *words: str) -> dict:
    status, said = meter("show", "--json", *words)
    assert status == 0, said
    return json.loads(said)


# -- versions -----------------------------------------------------------------------------------


def test_a_push_makes_the_fleets_settings_equal_to_the_files(meter, file) -> None:
    status, said = meter("push", str(file), "--moves-money")
    assert status == 0, said
    assert said.splitlines()[-1] == "version 1"
    assert "create tenants search" in said
    assert "create prices gpu-2026" in said
    found = shown(meter)
    assert found["version"] == 1
    assert [each["name"] for each in found["settings"]["tenants"]] == ["search", "web"]
    assert found["settings"]["prices"][0]["amount"] == "2.10"
    assert [each["id"] for each in found["settings"]["tenant_rules"]] == ["by-key", "by-user"]


def test_a_push_of_what_is_shown_changes_nothing(meter, file, tmp_path) -> None:
    meter("push", str(file), "--moves-money")
    _, text = meter("show")
    (tmp_path / "shown.toml").write_text(text)
    assert meter("push", str(tmp_path / "shown.toml")) == (0, "nothing changes: version 1\n")


def test_values_that_are_only_written_otherwise_change_nothing(meter, file) -> None:
    meter("push", str(file), "--moves-money")
    file.write_text(FILE.replace("amount = 2.10", 'amount = "2.10"'))
    assert meter("push", str(file)) == (0, "nothing changes: version 1\n")


def test_a_dry_run_says_what_would_change_and_writes_nothing(meter, file, url) -> None:
    meter("push", str(file), "--moves-money")
    file.write_text(FILE.replace('tags = { team = "find" }', 'tags = { team = "web" }'))
    status, said = meter("push", str(file), "--dry-run")
    assert status == 0
    assert said.splitlines() == [
        "change tenants search: tags {'team': 'find'} -> {'team': 'web'}",
        "nothing was written: --dry-run",
    ]
    assert rows(url, "SELECT max(version) FROM settings_versions") == [(1,)]


def test_rules_keep_their_order_and_a_new_one_goes_where_it_is_put(meter, file) -> None:
    meter("push", str(file), "--moves-money")
    status, said = meter("set", "tenant_rules", "by-lora", "rule=lora", "--position", "15")
    assert (status, said.splitlines()[-1]) == (0, "version 2")
    order = [each["id"] for each in shown(meter)["settings"]["tenant_rules"]]
    assert order == ["by-key", "by-lora", "by-user"]


def test_every_past_version_can_be_shown(meter, file) -> None:
    meter("push", str(file), "--moves-money")
    meter("set", "budgets", "search-month", "tenant=search", "gpu_seconds=100")
    meter("end", "tenants", "web")
    names = [
        [each["name"] for each in shown(meter, "--version", str(version))["settings"]["tenants"]]
        for version in (0, 1, 2, 3)
    ]
    assert names == [[], ["search", "web"], ["search", "web"], ["search"]]
    assert meter("show", "--version", "4")[0] == 2


def test_history_says_who_changed_what_when_by_the_databases_clock(meter, file, url) -> None:
    meter("push", str(file), "--moves-money")
    meter("end", "tenants", "web")
    status, said = meter("history", "--json")
    assert status == 0
    newest, oldest = json.loads(said)["versions"]
    assert (newest["version"], newest["changed_as"]) == (2, "meter")
    assert re.fullmatch(r".+@.+", newest["changed_by"])
    [change] = newest["changes"]
    assert (change["section"], change["name"], change["entry"]) == ("tenants", "web", None)
    assert oldest["changed_at"] < newest["changed_at"]
    assert "tenants web (ended)" in meter("history")[1]


def test_an_api_key_is_never_written_only_its_digest(meter, file, url, monkeypatch) -> None:
    meter("push", str(file), "--moves-money")
    monkeypatch.setenv("WEB_KEY", "sk-a-new-key-of-the-web-team")
    status, said = meter("set", "tenants", "web", "--key-from-env", "WEB_KEY")
    assert status == 0
    told = said + meter("show")[1] + meter("history", "--json")[1]
    stored = str(rows(url, "SELECT * FROM settings_changes"))
    assert "sk-a-new-key" not in told + stored
    assert key_sha256("sk-a-new-key-of-the-web-team") in stored


@pytest.mark.parametrize(
    "words",
    [
        ("push", "shared.toml", "--dry-run"),
        ("show",),
        ("history",),
        ("set", "tenants", "x"),
        ("end", "tenants", "web"),
        ("restart", "--after", "9"),
    ],
    ids=lambda words: words[0],
)
def test_a_reader_that_closes_the_pipe_ends_the_command_quietly(
    meter, file, monkeypatch, capfd, words
) -> None:
    meter("push", str(file), "--moves-money")
    capfd.readouterr()
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody, monkeypatch.context() as without:
        without.setattr("sys.stdout", nobody)
        with pytest.raises(SystemExit) as end:
            app(args=["fleet", "settings", *words], standalone_mode=False)
    assert (end.value.code, capfd.readouterr().err) == (PIPE_CLOSED, "")


# -- two at once --------------------------------------------------------------------------------


def test_of_two_administrators_at_once_one_is_refused_and_told_the_present_version(url) -> None:
    with shared_store(url, creates=True) as one, shared_store(url) as other:
        before = one.read()
        first, second = (changed_to(before, name) for name in ("first", "second"))
        one.change(before, first, "one")
        with pytest.raises(ConflictError, match="expected version 0, got version 1") as refused:
            other.change(before, second, "other")
        assert refused.value.version == 1
        assert other.read() == first


def test_of_many_at_the_same_instant_each_version_is_one_change(url) -> None:
    with shared_store(url, creates=True):
        pass
    refused: list[ConflictError] = []
    made: list[str] = []
    together = threading.Barrier(6)

    def change(name: str) -> None:
        with shared_store(url) as store:
            before = store.read()
            together.wait()
            try:
                store.change(before, changed_to(before, name), name)
                made.append(name)
            except ConflictError as error:
                refused.append(error)

    threads = [threading.Thread(target=change, args=(f"tenant-{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(refused)) == (1, 5)
    with shared_store(url) as store:
        assert [entry.name for entry in store.read().entries] == made


def test_a_change_that_expects_another_version_is_refused(meter, file) -> None:
    meter("push", str(file), "--moves-money")
    status, said = meter("end", "tenants", "web", "--expect", "7")
    assert status == 2
    assert "expected version 1, the latest, got 7" in said


# -- who reads them -----------------------------------------------------------------------------


def test_commands_use_them_for_the_fleet_and_for_the_ledger_of_a_server(
    meter, file, url, tmp_path, monkeypatch
) -> None:
    meter("push", str(file), "--moves-money")
    monkeypatch.setenv("COST_METER_FLEET_SETTINGS", "true")
    own = f"sqlite:///{tmp_path}/ledger.db"
    monkeypatch.setenv("COST_METER_LEDGER", own)
    shown = CliRunner().invoke(app, ["prices", "--json"]).stdout
    assert [price["key"] for price in json.loads(shown)["prices"]] == ["gpu-2026"]
    listed = CliRunner().invoke(app, ["tenants", "list", "--json"]).stdout
    assert [tenant["name"] for tenant in json.loads(listed)["tenants"]] == ["search", "web"]
    for ledger in (url, own):
        assert [price.id for price in settings_of(ledger, None).prices] == ["gpu-2026"]
    assert [path.name for path in tmp_path.iterdir()] == ["shared.toml"]
    monkeypatch.delenv("COST_METER_FLEET")
    assert [price.id for price in settings_of(url, None).prices] == ["gpu-2026"]
    with pytest.raises(SettingError, match="expected COST_METER_FLEET beside it, got none"):
        settings_of(own, None)


def test_tenants_that_the_fleet_shares_are_not_edited_in_a_file(
    meter, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("COST_METER_FLEET_SETTINGS", "true")
    (tmp_path / "meter.toml").write_text("")
    result = CliRunner().invoke(app, ["tenants", "add", "x", "--config", "meter.toml"])
    assert result.exit_code == 2
    assert "`vllm-cost-meter fleet settings set tenants` does it" in result.stderr
    assert (tmp_path / "meter.toml").read_text() == ""


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("set", "prices", "x", "amount=-1"),
            "prices 'x'.amount (the fleet's settings, version 2)",
        ),
        (("set", "prices", "x", "amount=1"), "prices 'x'."),
        (("set", "tenants", "new", "parent=nobody"), "each parent to be a declared tenant"),
        (("set", "invoices", "x", "a=b"), "expected one of tenants, tenant_rules, prices"),
        (("set", "budgets", "b", "tenant=serach", "gpu_seconds=1"), "perhaps 'search'"),
        (("end", "tenants", "nobody"), "no 'nobody' at version 1"),
        (("end", "tenants", "search"), "search"),
        (("set", "tenants", "web", "api_key_sha256=sk-raw-key"), "64 hexadecimal digits"),
    ],
)
def test_a_change_that_is_not_valid_as_a_whole_is_one_line_and_writes_nothing(
    meter, file, url, words, said
) -> None:
    file.write_text(FILE + '\n[[budgets]]\nname = "s"\ntenant = "search"\ngpu_seconds = 5\n')
    meter("push", str(file), "--moves-money")
    if words == ("end", "tenants", "search"):  # its budget would count nobody
        meter("end", "tenant_rules", "by-user")
    before = rows(url, "SELECT max(version) FROM settings_versions")
    status, line = meter(*words)
    assert (status, line.count("\n")) == (2, 1)
    assert said in line
    assert "sk-raw-key" not in line
    assert rows(url, "SELECT max(version) FROM settings_versions") == before


def test_a_price_without_an_id_is_refused_in_a_push(meter, file, tmp_path) -> None:
    file.write_text(FILE.replace('id = "gpu-2026"\n', ""))
    status, said = meter("push", str(file))
    assert status == 2
    assert said == (
        f"vllm-cost-meter: prices[0].id ({file}): expected a name of its own for each shared"
        " entry, got nothing\n"
    )


# -- money that was reported --------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("set", "prices", "gpu-2026", "amount=3"),
        ("set", "prices", "spot", "amount=1", "scope=gpu", "kind=spot", "host=spot-*")
        + ("source=a list", "effective_from=2026-02-01T00:00:00Z"),
        ("end", "prices", "gpu-2026"),
    ],
)
def test_a_change_of_the_past_is_refused_unless_it_is_meant_and_says_what_it_moves(
    meter, file, words
) -> None:
    meter("push", str(file), "--moves-money")
    status, said = meter(*words)
    assert status == 2
    assert "moves_money to say that it is meant, got one that moves money of hours" in said
    status, said = meter(*words, "--dry-run")
    assert status == 0
    assert "moves money: prices for " in said
    status, said = meter(*words, "--moves-money")
    assert (status, said.splitlines()[-1]) == (0, "version 2")


def test_a_price_of_the_future_or_another_source_moves_nothing(meter, file) -> None:
    meter("push", str(file), "--moves-money")
    later = ("scope=gpu", "kind=spot", "source=x", "effective_from=2999-01-01T00:00:00Z")
    assert meter("set", "prices", "gpu-2999", "amount=9", *later)[0] == 0
    assert meter("set", "prices", "gpu-2026", "source=the same contract")[0] == 0
    assert meter("end", "prices", "gpu-2999")[0] == 0


# -- what is in the database --------------------------------------------------------------------


def test_rows_that_somebody_inserted_into_an_earlier_version_are_found(meter, file, url, store):
    meter("push", str(file), "--moves-money")
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        connection.execute(
            "INSERT INTO settings_changes VALUES (1, 'tenants', 'eve', NULL, '{\"name\":\"eve\"}')"
        )
    with pytest.raises(LedgerError, match="rows that were changed since, past the meter"):
        store.read()


def test_a_version_in_a_later_format_is_refused_by_its_name(url, store) -> None:
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        connection.execute(
            "INSERT INTO settings_versions (version, format, digest, is_restart, changed_by)"
            " VALUES (1, 2, 'x', false, 'a later meter')"
        )
    with pytest.raises(LedgerError, match="expected format 1, got version 1 in format 2"):
        store.read()


def test_a_fleet_without_the_tables_is_said(meter, url) -> None:
    with shared_store(url, creates=True):
        pass
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        connection.execute("DROP TABLE settings_versions, settings_changes")
    status, said = meter("show")
    assert status == 2
    assert "an administrator runs `vllm-cost-meter fleet migrate`" in said


# -- rights -------------------------------------------------------------------------------------


def test_the_roles_of_the_docs_may_do_what_they_are_for_and_nothing_else(
    url: str, store: SharedStore
) -> None:
    make_roles(url)
    with shared_store(as_role(url, "meter_admin")) as admin:
        before = admin.read()
        after = changed_to(before, "search")
        admin.change(before, after, "an administrator")
        [version] = admin.history(9)
        assert version.changed_as == "meter_admin"
    for role in ("meter_writer", "meter_reader"):
        with shared_store(as_role(url, role)) as reader:
            assert reader.read() == after
            with pytest.raises(LedgerError, match="permission denied"):
                reader.change(after, ended_to(after, "search"), "a server")
    for statement in (
        "UPDATE settings_versions SET changed_by = 'x'",
        "DELETE FROM settings_changes",
        "DELETE FROM settings_versions",
        "UPDATE settings_changes SET entry = NULL",
        "INSERT INTO settings_versions VALUES (9, 1, '', false, 'x', 'then', 'somebody else')",
        "INSERT INTO shared_runs VALUES ('x')",
    ):
        with (
            psycopg.connect(as_role(url, "meter_admin").replace("+psycopg", "")) as connection,
            pytest.raises(psycopg.errors.InsufficientPrivilege),
        ):
            connection.execute(statement)


def test_a_restored_database_goes_on_above_what_servers_have(url, store: SharedStore) -> None:
    before = store.read()
    store.change(before, changed_to(before, "search"), "one")
    with pytest.raises(SettingError, match="the highest version that a server has, 1 or more"):
        restarted(store.read(), 0)
    new = restarted(store.read(), 17)
    store.change(store.read(), new, "one")
    assert store.read() == SharedSettings(18, store.read(1).entries, 18)
