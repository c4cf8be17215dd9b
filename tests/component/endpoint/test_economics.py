"""`/cost/economics` for operators, for tenants, and for anybody where the setting says so."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.component.endpoint.test_app import Side, error_of
from tests.component.ledger.test_reader import http, part
from vllm_cost_meter.endpoint.access import Access, sha256
from vllm_cost_meter.endpoint.economics import PUBLIC_FIGURES
from vllm_cost_meter.ledger.economics.answers import PublicEconomics
from vllm_cost_meter.ledger.economics.figures import FIGURES

TOKEN = "the-admin-token"
KEY = "key-of-alice"
PATHS = ("/cost/economics", "/cost/economics/method")
ADMIN = {"authorization": f"Bearer {TOKEN}"}
ALICE = {"authorization": f"Bearer {KEY}"}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Any]:
    made: list[Side] = []

    def make(is_public: bool = True) -> Side:
        access = Access(sha256(TOKEN), lambda: {sha256(KEY): "alice"})
        made.append(Side(tmp_path, access=access, public_economics=lambda: is_public))
        return made[-1]

    yield make
    for side in made:
        side.reader.close()


@pytest.mark.parametrize("path", PATHS)
def test_without_the_setting_nobody_but_the_operator_sees_them(make, path):
    side = make(is_public=False)
    assert side.get(path).status_code == 401
    assert side.get(path, **ALICE).status_code == 403
    assert side.get(path, **ADMIN).status_code == 200
    assert side.get(path, authorization="Bearer wrong").status_code == 401


def test_with_it_anybody_sees_costs_per_token_and_no_amount(make):
    side = make()
    for headers in ({}, ALICE):
        reply = side.get(PATHS[0], **headers)
        answer = reply.json()
        assert reply.headers["access-control-allow-origin"] == "*"
        assert list(answer["figures"]) == list(PUBLIC_FIGURES)
        assert set(answer) == set(PublicEconomics.__annotations__)
        assert "alice" not in reply.text
    all_of_it = side.get(PATHS[0], **ADMIN)
    assert "access-control-allow-origin" not in all_of_it.headers
    figures = all_of_it.json()["figures"]
    assert {"cost_usd", "requests", "arrivals"} <= set(figures)
    assert {name: figures[name] for name in PUBLIC_FIGURES} == answer["figures"]


def test_the_public_method_has_the_sql_of_the_public_figures(make):
    side = make()
    steps = side.get(PATHS[1]).json()["figures"]
    assert sorted(step["figure"] for step in steps) == sorted(PUBLIC_FIGURES)
    told = {step["figure"]: step["sql"] for step in side.get(PATHS[1], **ADMIN).json()["figures"]}
    assert all(step["sql"] == told[step["figure"]] for step in steps)
    assert "alice" not in str(steps)


@pytest.mark.parametrize("path", PATHS)
def test_another_window_is_the_operators(make, path):
    side = make()
    reply = side.get(f"{path}?window=1h")
    assert (reply.status_code, error_of(reply)["type"]) == (403, "invalid_request")
    assert side.get(f"{path}?window=1h", **ADMIN).status_code == 200


def test_a_wrong_token_is_refused_though_none_is_needed(make):
    assert make().get(PATHS[0], authorization="Bearer wrong").status_code == 401


@pytest.mark.parametrize("path", ["/cost/summary", "/cost/economics/", "/cost/report", "/metrics"])
def test_nothing_else_is_public(make, path):
    assert make().get(path).status_code in (401, 307, 404)


def test_however_many_ask_the_ledger_is_read_once(make):
    side = make()
    first = side.get(PATHS[0]).json()
    refreshed = side.refreshed
    side.write(part(9, "h9"), http("h9", at=5))
    assert all(side.get(PATHS[0]).json() == first for _ in range(20))
    assert side.refreshed == refreshed == 1


def test_public_figures_are_figures_and_no_amounts():
    assert set(PUBLIC_FIGURES) <= set(FIGURES)
    assert not [n for n in PUBLIC_FIGURES if n.endswith(("_usd", "requests", "_tokens_per_s"))]


@pytest.mark.parametrize("path", PATHS)
def test_only_the_operator_may_choose_engines(make, path):
    side = make()
    asked = f"{path}?filter=label:pool%3Dspot"
    for headers in ({}, ALICE):
        assert side.get(asked, **headers).status_code == 403
    assert side.get(asked, **ADMIN).status_code == 200
    wrong = side.get(f"{path}?filter=tenant:alice", **ADMIN)
    assert (wrong.status_code, error_of(wrong)["type"]) == (422, "invalid_request")


def test_the_operator_may_choose_engines_by_their_labels(make):
    side = make()
    answers = {
        words: side.get(f"{PATHS[0]}?window=2027-01{words}", **ADMIN).json()
        for words in ("", "&filter=label:pool%3Dspot", "&filter=label:pool%3Dbig")
    }
    assert [(one["engines"], one["figures"]["requests"]) for one in answers.values()] == [
        (None, 3), ("label:pool=spot", 3), ("label:pool=big", 0),
    ]  # fmt: skip
