"""A fleet's settings over HTTP: `vllm-cost-meter server`, a process of its own, by its port."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from tests.ecosystem.postgresql import Server
from tests.ecosystem.test_fleet_settings_pulled import push
from tests.support.fleet import sent
from tests.support.fleet_settings import FILE, KEYS, changed_to, key_sha256
from tests.support.openapi import assert_fits
from tests.support.waiting import wait_for
from vllm_cost_meter.ledger.fleet.opening import shared_store

TOKEN = "a-token-of-the-operators"
PATH = "/cost/fleet/settings"


@pytest.fixture(scope="module")
def fleet(server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    url = server.new_database()
    folder = tmp_path_factory.mktemp("fleet")
    sent(f"sqlite:///{folder}/ledger.db", url)
    with shared_store(url) as store:
        push(store, folder, FILE)
    return url


@pytest.fixture(scope="module")
def base(fleet: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server over the fleet, with the settings that it shares."""
    yield from serving(fleet, tmp_path_factory.mktemp("server"), COST_METER_ADMIN_TOKEN=TOKEN)


def serving(fleet: str, folder: Path, **more: str) -> Iterator[str]:
    command = [str(Path(sys.executable).parent / "vllm-cost-meter"), "server"]
    command += ["--ledger", fleet, "--port", "0"]
    environ = {**os.environ, "COST_METER_FLEET_SETTINGS": "true", **more}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, env=environ)
    try:
        found = wait_for(
            lambda: re.search(r"(http://\S+)/cost/summary", (folder / "log").read_text()),
            timeout_s=60,
        )
        yield found[1]
    finally:
        process.terminate()
        process.wait(20)


def ask(
    base: str, method: str, path: str, token: str | None = TOKEN, **body: Any
) -> httpx.Response:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    return httpx.request(
        method, f"{base}{path}", headers=headers, timeout=60, json=body if body else None
    )


def version(base: str) -> int:
    return ask(base, "GET", PATH).json()["version"]


def put(base: str, section: str, name: str, entry: dict, **more: Any) -> httpx.Response:
    given = {"expected_version": version(base), **more}
    return ask(base, "PUT", f"{PATH}/entry", section=section, name=name, entry=entry, **given)


def test_an_operator_reads_what_the_fleet_shares_now_and_before(base: str) -> None:
    assert put(base, "tenants", "new", {"tags": {"team": "x"}}).json()["is_written"] is True
    now = ask(base, "GET", PATH).json()
    assert "new" in [each["name"] for each in now["settings"]["tenants"]]
    first = ask(base, "GET", f"{PATH}?version=1").json()
    assert [each["name"] for each in first["settings"]["tenants"]] == ["search", "web"]


def test_an_entry_is_put_and_ended_and_history_says_by_whom(base: str) -> None:
    budget = {"tenant": "search", "gpu_seconds": 100}
    put(base, "budgets", "of-search", budget, changed_by="anna")
    given = {"section": "budgets", "name": "of-search", "expected_version": version(base)}
    ended = ask(base, "POST", f"{PATH}/end", **given).json()
    assert [(change["kind"], change["name"]) for change in ended["changes"]] == [
        ("end", "of-search")
    ]
    newest, older = ask(base, "GET", f"{PATH}/history?limit=2").json()["versions"]
    assert newest["changed_by"] == "an operator, by HTTP from 127.0.0.1"
    assert older["changed_by"] == "anna, by HTTP from 127.0.0.1"
    assert older["changes"][0]["entry"]["gpu_seconds"] == "100"
    assert newest["changes"][0]["entry"] is None


def test_a_change_on_an_older_version_is_refused_with_the_present_one(base: str) -> None:
    present = version(base)
    refused = put(base, "tenants", "late", {}, expected_version=present - 1)
    assert refused.status_code == 409
    said = refused.json()["error"]["message"]
    assert said == f"expected_version: expected {present}, the latest version, got {present - 1}"
    assert version(base) == present


@pytest.mark.parametrize(
    ("section", "name", "entry", "said"),
    [
        ("prices", "x", {"amount": -1}, "prices 'x'.amount (the fleet's settings, version "),
        ("tenants", "child", {"parent": "nobody"}, "each parent to be a declared tenant"),
        ("tenants", "a", {"name": "b"}, "expected 'a', as the entry is named, got 'b'"),
        ("invoices", "x", {}, "expected one of tenants, tenant_rules"),
        ("prices", "gpu-2026", {}, "prices 'gpu-2026'.amount"),
    ],
)
def test_what_is_not_valid_is_one_line_and_writes_nothing(base, section, name, entry, said) -> None:
    before = version(base)
    refused = put(base, section, name, entry)
    assert refused.status_code == 422
    assert said in refused.json()["error"]["message"]
    assert version(base) == before


def test_money_that_was_reported_moves_only_if_that_is_meant(base: str) -> None:
    price = {
        "amount": "3",
        "scope": "gpu",
        "kind": "reserved",
        "effective_from": "2026-01-01T00:00:00Z",
        "source": "another contract",
    }
    refused = put(base, "prices", "gpu-2026", price)
    assert refused.status_code == 422
    assert "one that moves money of hours that began" in refused.json()["error"]["message"]
    tried = put(base, "prices", "gpu-2026", price, dry_run=True).json()
    assert (tried["is_written"], tried["moves"][0]["before"], tried["moves"][0]["after"]) == (
        False,
        "2.1 USD per GPU-hour",
        "3 USD per GPU-hour",
    )
    assert tried["moves"][0]["begins"] == "2026-01-01T00:00:00.000000Z"
    assert put(base, "prices", "gpu-2026", price, moves_money=True).status_code == 200


def test_a_tenant_and_a_stranger_neither_see_nor_change_anything(base: str) -> None:
    for token, status in ((KEYS["search"], 403), (None, 401), ("a-wrong-token-of-nobody", 401)):
        for method, path in (("GET", PATH), ("GET", f"{PATH}/history")):
            assert ask(base, method, path, token).status_code == status
        given = {"section": "tenants", "name": "eve", "entry": {}, "expected_version": 1}
        assert ask(base, "PUT", f"{PATH}/entry", token, **given).status_code == status
        given.pop("entry")
        assert ask(base, "POST", f"{PATH}/end", token, **given).status_code == status


def test_the_server_itself_takes_a_change_over_within_seconds(base: str, fleet: str) -> None:
    """Whoever makes it: here a key of a tenant, by the command line's way."""
    key = "sk-of-a-tenant-that-came-later"
    assert ask(base, "GET", "/cost/budgets", key).status_code == 401
    with shared_store(fleet) as store:
        now = store.read()
        store.change(now, changed_to(now, "late", api_key_sha256=[key_sha256(key)]), "somebody")
        made = now.version + 1
    wait_for(lambda: ask(base, "GET", "/cost/budgets", key).status_code == 200, timeout_s=30)
    assert f"cost_meter_settings_version {made}.0" in ask(base, "GET", "/metrics").text


def test_answers_are_as_the_document_says(base: str) -> None:
    document = ask(base, "GET", "/openapi.json").json()
    assert_fits(document, PATH, ask(base, "GET", PATH).json())
    history = ask(base, "GET", f"{PATH}/history").json()
    assert history["versions"]
    assert_fits(document, f"{PATH}/history", history)
    tried = put(base, "tenants", "tried", {}, dry_run=True).json()
    assert_fits(document, f"{PATH}/entry", tried)
    with pytest.raises(jsonschema.ValidationError):
        assert_fits(document, f"{PATH}/entry", {**tried, "more": 1})


def test_without_an_admin_token_nobody_changes_anything(fleet, tmp_path) -> None:
    for base in serving(fleet, tmp_path):
        assert ask(base, "GET", PATH, None).status_code == 200
        given = {"section": "tenants", "name": "eve", "entry": {}, "expected_version": 1}
        refused = ask(base, "PUT", f"{PATH}/entry", None, **given)
        assert refused.status_code == 403
        assert "COST_METER_ADMIN_TOKEN" in refused.json()["error"]["message"]
