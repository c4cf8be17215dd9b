"""Budgets that could never be reached are refused: of nobody, or in USD without a price."""

from datetime import UTC, datetime

import pytest

from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.config.starting import check_start
from vllm_cost_meter.errors import SettingError
from vllm_cost_meter.prices.book import RunFacts

NOW_NS = int(datetime(2026, 11, 29, 12, 30, tzinfo=UTC).timestamp()) * 10**9
TENANT = '[[tenants]]\nname = "search"\n'
PRICE = """
[[prices]]
amount = 2
scope = "gpu"
kind = "on_demand"
source = "the contract"
effective_from = 2026-11-29T12:00:00Z
"""
IN_USD = TENANT + '[[budgets]]\nname = "b"\ntenant = "search"\nusd = 5\n'


def settings(text: str):
    return load_settings({"COST_METER_CONFIG": "meter.toml"}, text=text)


def budget_of(name: str) -> str:
    return f'[[budgets]]\nname = "b"\ntenant = "{name}"\ngpu_seconds = 5\n'


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("search", ""),
        ("unknown", ""),
        ("anybody", 'rule = "header"\nname = "x-tenant"\ntrust = "everyone"'),
        ("rest", 'rule = "constant"\ntenant = "rest"'),
        ("search/bob", 'rule = "user"'),
        ("bob", 'rule = "user"\ntrust_clients = true'),
    ],
)
def test_a_budget_may_be_of_whoever_is_declared_or_can_be_named_by_a_rule(name, rules):
    rules = f"[[tenant_rules]]\n{rules}\n" if rules else ""
    (budget,) = settings(TENANT + rules + budget_of(name)).budgets
    assert budget.tenant == name


@pytest.mark.parametrize(
    ("name", "rules", "hint"),
    [
        ("serach", "", ", perhaps 'search'"),
        ("others", 'rule = "constant"\ntenant = "rest"', ""),
        ("search/bob", "", ", perhaps 'search'"),
        ("search/bob", 'rule = "api_key"', ", perhaps 'search'"),
        ("other/bob", 'rule = "user"', ""),
    ],
)
def test_a_budget_of_whom_no_request_can_be_is_refused_by_name(name, rules, hint):
    rules = f"[[tenant_rules]]\n{rules}\n" if rules else ""
    with pytest.raises(SettingError) as caught:
        settings(TENANT + rules + budget_of("search").replace('"b"', '"a"') + budget_of(name))
    assert str(caught.value) == (
        "budgets[1].tenant (meter.toml): expected a declared tenant, or one that a rule can name"
        f"{hint}, got {name!r} of the budget 'b'"
    )


NOT_KNOWN = RunFacts()
KNOWN = RunFacts(1, "llama", "NVIDIA H100", "node-1", ())


def refused(text: str, run: RunFacts = NOT_KNOWN) -> str | None:
    try:
        check_start(settings(text), run, NOW_NS)
    except SettingError as error:
        return str(error)
    return None


def test_a_budget_in_usd_needs_a_price_that_is_in_force_at_the_start():
    assert refused(IN_USD + PRICE) is None
    assert refused(IN_USD + PRICE.replace("T12", "T13")) == (
        "budgets (meter.toml): expected a price that applies to this server now, for a budget in"
        " USD, or gpu_seconds, got 'b' in USD and no price: prices[0], the first for model"
        " 'unknown', GPU 'unknown', host 'unknown', is effective from 2026-11-29T13Z"
    )
    assert refused(PRICE.replace("T12", "T13") + TENANT + budget_of("search")) is None
    assert refused("gpu_hour_usd = 1\n" + IN_USD + PRICE.replace("T12", "T13")) is None


@pytest.mark.parametrize("match", ["host", "model", "gpu_name"])
def test_a_match_that_matches_nothing_stops_the_start_once_the_server_is_known(match):
    text = IN_USD + PRICE + f'{match} = "other*"\n'
    assert refused(text) is None
    assert refused(text, KNOWN).endswith(
        "no entry matches model 'llama', GPU 'NVIDIA H100', host 'node-1'"
    )
    assert refused(text.replace("other", "*"), KNOWN) is None


def test_what_is_not_known_of_a_server_is_no_reason_to_refuse_it():
    text = IN_USD + PRICE + 'host = "node-*"\nmodel = "llama"\n'
    several_machines = RunFacts(8, "llama", None, None)
    assert refused(text, several_machines) is None
    assert "no entry matches" in refused(text, RunFacts(8, "qwen", None, None))


def test_two_prices_that_contradict_each_other_are_none():
    text = IN_USD + PRICE + 'host = "node-1"\n' + PRICE + 'model = "llama"\n'
    assert "equally specific" in refused(text, KNOWN)
