"""Settings whose sections a fleet shares: from where they come, and what else may not have them."""

from pathlib import Path

import pytest

from tests.support.fleet_settings import FILE, tenant_entry
from vllm_cost_meter.config.fleet import FleetPlace
from vllm_cost_meter.config.kept_copy import kept_path, read_kept, write_kept
from vllm_cost_meter.config.loading import fleet_place, load_settings, settings_with
from vllm_cost_meter.config.shared_changes import planned, pushed, put
from vllm_cost_meter.config.shared_text import plan_lines, toml_text
from vllm_cost_meter.errors import SettingError
from vllm_cost_meter.records.shared_settings import (
    NOTHING_SHARED,
    KeptSettings,
    SharedEntry,
    SharedSettings,
    canonical,
    decoded_copy,
    encoded,
    in_order,
    may_follow,
)

FLEET = "postgresql+psycopg://meter@db/fleet"
ENVIRON = {"COST_METER_FLEET": FLEET, "COST_METER_FLEET_SETTINGS": "true"}


def shared(*entries: SharedEntry, version: int = 1) -> SharedSettings:
    return SharedSettings(version, in_order(entries))


ONE = shared(tenant_entry("search"))


def of_file(text: str, folder: Path) -> SharedSettings:
    (folder / "shared.toml").write_text(text)
    declared = load_settings({}, config=folder / "shared.toml")
    return shared(*pushed(NOTHING_SHARED, declared, "shared.toml"))


# -- where they come from -----------------------------------------------------------------------


def test_the_sections_come_from_the_fleet_and_all_else_from_this_server() -> None:
    environ = {**ENVIRON, "COST_METER_GPU_HOUR_USD": "2", "COST_METER_PORT": "9000"}
    settings = load_settings(environ, shared=lambda _: ONE)
    assert [tenant.name for tenant in settings.tenants] == ["search"]
    assert (settings.port, str(settings.gpu_hour_usd), settings.shared_version) == (9000, "2", 1)


def test_who_gives_them_is_told_where_the_ledger_and_the_fleet_are() -> None:
    asked: list[FleetPlace] = []

    def give(place: FleetPlace) -> SharedSettings:
        asked.append(place)
        return ONE

    load_settings({**ENVIRON, "COST_METER_LEDGER": "sqlite:////x/ledger.db"}, shared=give)
    [place] = asked
    assert (place.ledger, place.fleet) == ("sqlite:////x/ledger.db", FLEET)


def test_without_the_setting_nobody_is_asked() -> None:
    def fail(_place: FleetPlace) -> SharedSettings:
        raise AssertionError

    settings = load_settings({"COST_METER_FLEET": FLEET}, shared=fail)
    off = load_settings({**ENVIRON, "COST_METER_FLEET_SETTINGS": "false"}, shared=fail)
    assert (settings.shared_version, off.shared_version) == (None, None)


@pytest.mark.parametrize("section", ["tenants", "prices", "budgets", "overheads"])
def test_a_file_that_has_one_of_the_sections_too_is_one_line_with_both_places(
    section, tmp_path
) -> None:
    path = tmp_path / "meter.toml"
    path.write_text(f'fleet = "{FLEET}"\nfleet_settings = true\n{section} = []\n')
    with pytest.raises(SettingError) as caught:
        load_settings({}, config=path, shared=lambda _: ONE)
    assert str(caught.value) == (
        f"{section} ({path}): expected it in the fleet's settings alone"
        " (COST_METER_FLEET_SETTINGS), got it here as well"
    )


def test_an_environment_that_has_one_is_refused_too_before_any_database_is_asked() -> None:
    def fail(_place: FleetPlace) -> SharedSettings:
        raise AssertionError

    with pytest.raises(SettingError, match=r"^COST_METER_TENANTS \(environment\): expected it in"):
        load_settings({**ENVIRON, "COST_METER_TENANTS": "[]"}, shared=fail)


def test_a_wrong_fleet_is_said_before_it_is_asked() -> None:
    with pytest.raises(SettingError, match="COST_METER_FLEET "):
        load_settings({**ENVIRON, "COST_METER_FLEET": "sqlite:///x"}, shared=lambda _: ONE)
    with pytest.raises(SettingError, match="COST_METER_FLEET_SETTINGS .*true or false"):
        fleet_place({"COST_METER_FLEET_SETTINGS": "perhaps"})


def test_what_is_wrong_in_a_shared_entry_is_told_by_its_name_and_version() -> None:
    wrong = shared(SharedEntry("prices", "h100", canonical({"id": "h100", "amount": "-1"})))
    with pytest.raises(SettingError) as caught:
        load_settings(ENVIRON, shared=lambda _: wrong)
    assert str(caught.value).startswith("prices 'h100'.amount (the fleet's settings, version 1): ")


# -- the copy -----------------------------------------------------------------------------------


def kept(settings: SharedSettings) -> KeptSettings:
    return KeptSettings("db:/fleet", "2026-11-30T12:00:00Z", settings.digest(), settings)


def test_the_copy_is_beside_the_ledger_and_by_default_what_a_process_reads(
    tmp_path, monkeypatch
) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    path = kept_path(url)
    assert path == tmp_path / "ledger.db.fleet-settings.json"
    write_kept(path, kept(ONE))
    settings = load_settings({**ENVIRON, "COST_METER_LEDGER": url})
    assert [tenant.name for tenant in settings.tenants] == ["search"]
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert kept_path(None) == tmp_path / "vllm-cost-meter" / path.name


def test_a_copy_comes_back_as_it_was_and_no_part_of_it_is_one(tmp_path) -> None:
    whole = encoded(kept(of_file(FILE, tmp_path)))
    assert decoded_copy(whole) == kept(of_file(FILE, tmp_path))
    for size in range(0, len(whole), 7):
        with pytest.raises(ValueError, match="no whole copy"):
            decoded_copy(whole[:size])


def test_a_copy_that_was_edited_or_is_of_a_later_meter_is_refused(tmp_path) -> None:
    whole = encoded(kept(ONE))
    with pytest.raises(ValueError, match="was changed"):
        decoded_copy(whole.replace(b"search", b"seerch"))
    with pytest.raises(ValueError, match="format 2"):
        decoded_copy(whole.replace(b'"format": 1', b'"format": 2'))


def test_without_a_copy_the_line_says_where_it_would_be(tmp_path) -> None:
    environ = {**ENVIRON, "COST_METER_LEDGER": f"sqlite:///{tmp_path}/ledger.db"}
    assert read_kept(kept_path(environ["COST_METER_LEDGER"])) is None
    with pytest.raises(SettingError, match=r"ledger\.db\.fleet-settings\.json\): expected a copy"):
        load_settings(environ)


# -- what follows what --------------------------------------------------------------------------

TWO = shared(tenant_entry("web"), version=2)


@pytest.mark.parametrize(
    ("has", "found", "digest", "follows"),
    [
        (None, ONE, None, True),
        (ONE, TWO, ONE.digest(), True),  # the database knows what this server has
        (ONE, ONE, ONE.digest(), True),
        (TWO, ONE, None, False),  # it was restored
        (ONE, TWO, TWO.digest(), False),  # and went on by the same numbers
        (TWO, SharedSettings(3, TWO.entries, 3), None, True),  # an administrator began anew
        (SharedSettings(3, ONE.entries), SharedSettings(3, TWO.entries, 3), "other", False),
    ],
)
def test_a_server_takes_over_what_goes_on_from_what_it_has(has, found, digest, follows) -> None:
    assert may_follow(has, found, digest) is follows


# -- changes ------------------------------------------------------------------------------------


def test_a_file_comes_back_from_its_entries(tmp_path) -> None:
    whole = of_file(FILE, tmp_path)
    assert of_file(toml_text(whole), tmp_path) == whole


def test_rules_keep_their_positions_unless_their_order_changes(tmp_path) -> None:
    whole = of_file(FILE, tmp_path)
    rules = [(one.name, one.position) for one in whole.of("tenant_rules")]
    assert rules == [("by-key", 10), ("by-user", 20)]
    more = shared(*put(whole, "tenant_rules", "by-lora", {"rule": "lora"}, 15), version=2)
    text = toml_text(more)
    (tmp_path / "more.toml").write_text(text)
    again = pushed(more, load_settings({}, config=tmp_path / "more.toml"), "more.toml")
    assert in_order(again) == more.entries
    moved = put(more, "tenant_rules", "by-user", {"rule": "user"}, 5)
    assert [one.name for one in shared(*moved).of("tenant_rules")] == [
        "by-user",
        "by-key",
        "by-lora",
    ]


def test_no_line_of_a_change_has_a_whole_digest(tmp_path) -> None:
    whole = of_file(FILE, tmp_path)
    table = {**whole.of("tenants")[0].table, "api_key_sha256": ["ab" * 32]}
    entries = put(whole, "tenants", "search", table)
    plan = planned(whole, entries, lambda one: settings_with(one, {}), now_hour=0)
    [line] = plan_lines(plan)
    assert line.startswith("change tenants search: api_key_sha256 [")
    assert "[abababab...]" in line
    assert "ab" * 8 not in line


def test_a_change_of_one_entry_leaves_the_others_as_they_are(tmp_path) -> None:
    whole = of_file(FILE, tmp_path)
    entries = put(whole, "tenants", "new", {})
    plan = planned(whole, entries, lambda one: settings_with(one, {}), now_hour=0)
    assert [(change.kind, change.entry.name) for change in plan.changes] == [("create", "new")]
    assert set(whole.entries) < set(plan.after.entries)
