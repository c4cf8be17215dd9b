"""A fleet's settings in its servers: at the start, while they run, away, and restored."""

import asyncio
import contextlib
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.component.api_server.test_reload import lines, look
from tests.ecosystem.test_fleet_process import until
from tests.support.fleet_settings import FILE, KEYS, changed_to, ended_to
from vllm_cost_meter.api_server.shipping.follower import Shipping
from vllm_cost_meter.api_server.shipping.messages import ShippingHello
from vllm_cost_meter.api_server.shipping.settings_puller import SettingsPuller, settings_at_start
from vllm_cost_meter.api_server.start_check import what_is_wrong
from vllm_cost_meter.cli.doctor.findings import Outcome
from vllm_cost_meter.cli.doctor.fleet import settings_shared
from vllm_cost_meter.config.fleet import FleetPlace
from vllm_cost_meter.config.kept_copy import kept_path, read_kept
from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.config.reload import reloader_of
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.config.shared_changes import pushed, restarted
from vllm_cost_meter.errors import SettingError
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.fleet.opening import shared_store
from vllm_cost_meter.ledger.fleet.shared_settings import SharedStore
from vllm_cost_meter.records.shared_settings import SharedSettings, in_order

__all__ = ["lines"]

INTERVAL_S = 0.2


@pytest.fixture
def store(url: str) -> Iterator[SharedStore]:
    with shared_store(url, creates=True) as store:
        yield store


@pytest.fixture
def place(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> FleetPlace:
    """The settings of a server of the fleet, in this process's environment."""
    ledger = f"sqlite:///{tmp_path}/ledger.db"
    monkeypatch.setenv("COST_METER_LEDGER", ledger)
    monkeypatch.setenv("COST_METER_FLEET", url)
    monkeypatch.setenv("COST_METER_FLEET_SETTINGS", "true")
    return FleetPlace(ledger=ledger, fleet=url, fleet_settings=True)


def push(store: SharedStore, tmp_path: Path, text: str = FILE) -> SharedSettings:
    """Make the fleet's settings those of a file."""
    (tmp_path / "shared.toml").write_text(text)
    declared = load_settings({}, config=tmp_path / "shared.toml")
    before = store.read()
    entries = in_order(pushed(before, declared, "shared.toml"))
    after = SharedSettings(before.version + 1, entries, before.restart_version)
    store.change(before, after, "a test")
    return after


def nobodys(url: str) -> str:
    """Return the URL of the same database for somebody whom it does not let in."""
    return url.replace("//meter@", "//nobody-of-that-name@")


def away(place: FleetPlace) -> FleetPlace:
    """Return the same fleet, which does not answer."""
    return place.model_copy(update={"fleet": nobodys(str(place.fleet))})


def whose(settings: Settings, name: str) -> str:
    key = f"Bearer {KEYS[name]}".encode()
    return settings.resolver.resolve([(b"authorization", key)]).tenant


# -- at the start -------------------------------------------------------------------------------


def test_a_server_starts_with_the_fleets_settings_and_keeps_a_copy_of_its_own(
    tmp_path, store, place
) -> None:
    push(store, tmp_path)
    assert what_is_wrong() is None
    settings = load_settings()
    assert [whose(settings, name) for name in KEYS] == ["search", "web"]
    assert settings.shared_version == 1
    assert [price.id for price in settings.prices] == ["gpu-2026"]
    path = kept_path(place.ledger)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    kept = read_kept(path)
    assert kept is not None
    assert (kept.settings, kept.pulled_at[:2]) == (store.read(), "20")
    assert [file.name for file in tmp_path.glob(".*")] == []


def test_a_server_starts_from_its_copy_while_the_database_is_away_and_says_so(
    tmp_path, store, place, lines
) -> None:
    push(store, tmp_path)
    first = settings_at_start(place)
    push(store, tmp_path, FILE.replace("2.10", "9"))
    assert settings_at_start(away(place)) == first
    assert "the settings are those of version 1, which came at " in lines[-1]


def test_without_a_database_and_without_a_copy_the_start_stops_with_one_line(
    tmp_path, place, monkeypatch
) -> None:
    monkeypatch.setenv("COST_METER_FLEET", nobodys(str(place.fleet)))
    wrong = what_is_wrong()
    assert wrong is not None
    assert wrong.startswith("cost meter: COST_METER_FLEET_SETTINGS (")
    assert "expected the fleet's settings in its database, or a copy of them, got neither" in wrong
    assert "\n" not in wrong


def test_a_start_waits_for_a_database_that_says_nothing_no_longer_than_it_may(place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql+psycopg://meter@127.0.0.1:{silent.getsockname()[1]}/fleet"
        with pytest.raises(SettingError, match="no answer within 0.2 s"):
            settings_at_start(place.model_copy(update={"fleet": url}), within_s=0.2)


def test_a_torn_copy_is_no_copy_at_a_start_without_the_database(tmp_path, store, place) -> None:
    push(store, tmp_path)
    settings_at_start(place)
    path = kept_path(place.ledger)
    whole = path.read_bytes()
    for torn in (whole[: len(whole) // 2], b"", whole.replace(b"2.10", b"0.10")):
        path.write_bytes(torn)
        with pytest.raises(SettingError, match="expected a copy of the fleet's settings, got"):
            settings_at_start(away(place))
    assert settings_at_start(place) == store.read()
    assert path.read_bytes() != torn


def test_a_copy_of_another_fleet_is_none(tmp_path, store, place) -> None:
    push(store, tmp_path)
    settings_at_start(place)
    other = place.model_copy(update={"fleet": str(place.fleet).replace("/ledger", "/other")})
    with pytest.raises(SettingError, match="got neither"):
        settings_at_start(other)


def test_a_fleet_in_which_nobody_set_anything_is_no_reason_to_bill_nobody(store, place) -> None:
    wrong = what_is_wrong()
    assert wrong is not None
    assert "`vllm-cost-meter fleet settings push FILE` makes them" in wrong


def test_a_node_that_only_runs_engines_asks_no_database(place, monkeypatch) -> None:
    monkeypatch.setenv("COST_METER_FLEET", nobodys(str(place.fleet)))
    assert what_is_wrong(with_ledger=False) is None


# -- while it runs ------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def shipping(place: FleetPlace):
    """The process beside a server that sends, and pulls the settings."""
    open_database(str(place.ledger)).dispose()
    path = str(kept_path(place.ledger))
    hello = ShippingHello(str(place.ledger), str(place.fleet), INTERVAL_S, kept_path=path)
    beside = Shipping(hello)
    beside.start()
    try:
        yield beside
    finally:
        await beside.stop()


def test_prices_and_tenants_change_while_a_server_runs(tmp_path, store, place) -> None:
    push(store, tmp_path)
    assert what_is_wrong() is None
    settings = load_settings()
    reloader = reloader_of(settings, str(place.ledger))
    assert reloader is not None
    look(reloader, settings)

    async def run() -> Settings:
        async with shipping(place) as beside:
            await until(lambda: beside.state.settings_version == 1, "the first version")
            push(
                store, tmp_path, FILE.replace('name = "web"', 'name = "site"').replace("2.10", "9")
            )
            await until(lambda: read_kept(kept_path(place.ledger)).settings.version == 2, "a pull")
            await until(lambda: beside.state.settings_version == 2, "the news")
            assert beside.state.settings_error is None
            return look(reloader, settings)

    new = asyncio.run(run())
    assert (whose(settings, "web"), whose(new, "web")) == ("web", "site")
    assert [str(price.amount) for price in new.prices] == ["9"]
    assert new.shared_version == 2


def test_what_this_meter_does_not_understand_changes_nothing_and_is_said_once(
    tmp_path, url, store, place, lines
) -> None:
    push(store, tmp_path)
    settings_at_start(place)
    puller = SettingsPuller(kept_path(place.ledger), url)
    puller.look(store)
    now = store.read()
    later = changed_to(now, "search", of_a_later_meter=1)
    store.change(now, later, "a later meter")
    lines.clear()
    for _ in range(3):
        puller.look(store)
    assert len(lines) == 1
    assert "tenants 'search'.of_a_later_meter (the fleet's settings, version 2)" in lines[0]
    assert read_kept(kept_path(place.ledger)).settings == now
    store.change(later, changed_to(later, "search"), "the same again")
    puller.look(store)
    assert puller.error is None
    assert read_kept(kept_path(place.ledger)).settings.version == 3


def test_a_whole_that_is_wrong_for_this_server_alone_leaves_its_settings_as_they_were(
    tmp_path, store, place, lines, monkeypatch
) -> None:
    """A header rule without a proof needs this server's own gateway secret."""
    push(store, tmp_path)
    settings_at_start(place)
    settings = load_settings()
    reloader = reloader_of(settings, str(place.ledger))
    look(reloader, settings)
    lines.clear()
    header = '\n[[tenant_rules]]\nid = "gateway"\nrule = "header"\nname = "x-tenant"\n'
    monkeypatch.setenv("COST_METER_GATEWAY_SECRET", "a-secret-of-the-gateway")
    (tmp_path / "more.toml").write_text(FILE + header)
    declared = load_settings(
        {"COST_METER_GATEWAY_SECRET": "a-secret-of-the-gateway"}, config=tmp_path / "more.toml"
    )
    now = store.read()
    after = SharedSettings(2, in_order(pushed(now, declared, "")))
    store.change(now, after, "x")
    monkeypatch.delenv("COST_METER_GATEWAY_SECRET")
    SettingsPuller(kept_path(place.ledger), str(place.fleet)).look(store)
    assert [look(reloader, settings) for _ in range(3)] == [None, None, None]
    [line] = lines
    assert "the settings stay as they were" in line
    assert "the fleet's settings, version 2" in line


# -- a database that was restored ---------------------------------------------------------------


def test_a_restored_database_takes_nothing_away_until_an_administrator_says_so(
    tmp_path, url, store, place, lines
) -> None:
    first = push(store, tmp_path)
    second = changed_to(first, "new-tenant")
    store.change(first, second, "one")
    path = kept_path(place.ledger)
    puller = SettingsPuller(path, url)
    puller.look(store)
    assert read_kept(path).settings == second
    restore(url, first.version)
    lines.clear()
    for _ in range(3):
        puller.look(store)
    assert len(lines) == 1
    assert "was the database restored?" in lines[0]
    assert "vllm-cost-meter fleet settings restart --after 2" in lines[0]
    assert read_kept(path).settings == second
    assert settings_at_start(place) == second
    doctor = settings_shared(load_settings(), str(place.ledger))
    assert doctor.outcome is Outcome.FAIL
    assert "restart --after 2" in doctor.detail
    # It goes on from there, past the number of what was lost, and is as foreign as before.
    other = changed_to(first, "another-tenant")
    store.change(first, other, "two")
    store.change(other, ended_to(other, "another-tenant"), "two")
    puller.look(store)
    assert store.read().version == 3
    assert read_kept(path).settings == second
    now = store.read()
    store.change(now, restarted(now, 3), "an administrator")
    puller.look(store)
    assert puller.error is None
    assert read_kept(path).settings == store.read()
    assert read_kept(path).settings.version == 4
    assert settings_shared(load_settings(), str(place.ledger)).outcome is Outcome.OK


def restore(url: str, version: int) -> None:
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        for table in ("settings_versions", "settings_changes"):
            connection.execute(f"DELETE FROM {table} WHERE version > {version}")
