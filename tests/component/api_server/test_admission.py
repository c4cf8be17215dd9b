"""What a client sees of budgets, and when figures are read anew: the middleware with a real ledger.

The figures are put where a look would put them; test_spending.py says how they come about.
"""

import asyncio
import hashlib
import json
import time

import pytest

from tests.component.api_server.test_poller import Engines
from tests.support.builders import make_open, make_snapshot
from tests.support.world import BODY, DONE, JSON, SSE, TOKEN, Client, journal, replying, scope_of
from vllm_cost_meter.api_server.admission import Admission, Rules, fails_closed
from vllm_cost_meter.api_server.budgets.looks import BudgetLooks
from vllm_cost_meter.api_server.poller import Poller
from vllm_cost_meter.api_server.runtime import NoRuntime, Runtime
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.exchange import Exchange
from vllm_cost_meter.guard import Guard
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.queries.cut import DEAD_AFTER_NS
from vllm_cost_meter.ledger.queries.spending import Spending
from vllm_cost_meter.prices.book import NO_PRICES
from vllm_cost_meter.records.accrued import Accrued
from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.tenants.budgets import Budget, BudgetFigures, Standing

TENANTS = [
    {"name": name, "api_key_sha256": [hashlib.sha256(name.encode()).hexdigest()], **more}
    for name, more in (("acme", {}), ("strict", {"fail_closed": True}), ("rival", {}))
]


def as_tenant(name: str, path: str = "/v1/completions", **more) -> dict:
    return scope_of(path, [(b"authorization", f"Bearer {name}".encode())], **more)


def budget(**changes) -> Budget:
    values = {"name": "b", "limit": 10**9, "unit": "usd", "period": "month", "tenant": "acme"}
    return Budget(**{**values, **changes})


async def nothing_new(_budgets, _book) -> None:
    """Stand for a ledger without news: a test puts the figures where a look would put them."""


def held(runtime: Runtime, first_figures_s: float = 0) -> None:
    """Hold the requests of this API server to its budgets."""
    runtime.admission = Admission(
        nothing_new,
        runtime.budget_rules,
        runtime.guard,
        interval_s=1.0,
        first_figures_s=first_figures_s,
    )


@pytest.fixture
def world(make_world):
    world = make_world(tenants=TENANTS, budget_throttle_s=0.1)
    held(world.runtime)
    return world


def figures_of(*standings: Standing, age_s: float = 0) -> BudgetFigures:
    """Return the figures of a look that heard of an engine so long ago."""
    age_ns = round(age_s * 10**9)
    return BudgetFigures(standings, time.time_ns() - age_ns, heard_ns=time.monotonic_ns() - age_ns)


def standing_at(budget: Budget, amount: int | None, unknown: str | None = None) -> Standing:
    now_ns = time.time_ns()
    hours = None if amount is None else {now_ns // (3600 * 10**9): amount}
    return Standing(budget, hours, now_ns, unknown)


def used(
    world, amount: int | None, age_s: float = 0, unknown: str | None = None, **changes
) -> Standing:
    """Let a budget stand at an amount; return where it does."""
    standing = standing_at(budget(**changes), amount, unknown)
    world.runtime.admission.figures = figures_of(standing, age_s=age_s)
    return standing


def ask(world, scope: dict | None = None) -> Client:
    app = replying(JSON, [BODY], world.engine.generate)
    return world.run(app, scope or as_tenant("acme"))


def test_a_spent_budget_answers_429_as_openai_does_and_says_when_it_resets(world):
    standing = used(world, 1_500_000_000)
    client = ask(world)
    assert client.status == 429
    headers = dict(client.headers)
    assert headers[b"x-should-retry"] == b"false"
    assert headers[b"x-cost-meter-budget"] == b"b"
    assert headers[b"x-cost-meter-budget-reset"].decode() == standing.resets_at().isoformat()
    assert int(headers[b"content-length"]) == len(client.body)
    error = json.loads(client.body)["error"]
    message = error.pop("message")
    assert error == {"type": "insufficient_quota", "param": None, "code": "budget_exceeded"}
    assert "1.50 USD of 1.00 USD in its period (the month)" in message
    assert message.endswith(f"resets at {standing.resets_at().isoformat()} (UTC)")
    assert world.rows("SELECT * FROM requests") == world.rows("SELECT * FROM replies") == []


def test_anthropics_messages_are_refused_in_their_own_frame(world):
    used(world, 10**9)
    content = json.loads(ask(world, as_tenant("acme", "/v1/messages")).body)
    assert (content["type"], content["error"]["type"]) == ("error", "rate_limit_error")


def test_only_who_is_covered_and_only_what_reaches_an_engine_is_refused(world):
    used(world, 10**9)
    assert ask(world, as_tenant("rival")).status == 200
    assert ask(world, as_tenant("acme", "/v1/models", method="GET")).status == 200
    assert ask(world).status == 429


def test_a_websocket_is_closed_before_it_is_accepted(world):
    used(world, 10**9)
    client = ask(world, as_tenant("acme", "/v1/realtime", type="websocket"))
    assert client.messages == [{"type": "websocket.close", "code": 1008}]


def test_a_soft_limit_is_told_in_a_header_of_every_reply(world):
    used(world, 800_000_000, soft_limit=800_000_000)
    warning = dict(ask(world).headers)[b"x-cost-meter-budget-warning"].decode()
    assert warning.startswith("b: 0.80 USD of 1.00 USD used; resets ")
    stream = world.run(replying(SSE, [TOKEN, DONE], world.engine.generate), as_tenant("acme"))
    assert b"x-cost-meter-budget-warning" in dict(stream.headers)
    used(world, 799_999_999, soft_limit=800_000_000)
    assert b"x-cost-meter-budget-warning" not in dict(ask(world).headers)


def test_a_throttled_request_waits_and_is_served(world):
    used(world, 10**9, over="throttle")
    client = ask(world)
    assert client.status == 200
    assert client.waited_s >= 0.1


def test_stale_figures_refuse_only_who_asked_to_fail_closed(world):
    used(world, 10**9, age_s=60)
    assert ask(world).status == 200
    client = ask(world, as_tenant("strict"))
    assert client.status == 503
    assert dict(client.headers)[b"retry-after"] == b"5"
    error = json.loads(client.body)["error"]
    assert (error["type"], error["code"]) == ("service_unavailable", "cost_meter_stale")
    assert "the latest figures are 60 s old" in error["message"]


def asking_as_user(world, tenant: str, user: str) -> Client:
    body = json.dumps({"user": user}).encode()
    coming = iter([{"type": "http.request", "body": body}])

    async def receive():
        return next(coming)

    headers = [(b"authorization", f"Bearer {tenant}".encode()), (b"content-type", JSON)]
    app = replying(JSON, [BODY], world.engine.generate)
    return world.run(app, scope_of(headers=headers), receive=receive)


def test_a_client_that_names_a_user_escapes_neither_budget_nor_fail_closed(make_world):
    """What clients choose is a child that is declared nowhere, below a tenant that is."""
    keys = [hashlib.sha256(b"key").hexdigest()]
    world = make_world(
        tenants=[
            {"name": "acme", "fail_closed": True},
            {"name": "lab", "parent": "acme"},
            {"name": "bench", "parent": "lab", "api_key_sha256": keys},
        ],
        tenant_rules=[{"rule": "api_key"}, {"rule": "user"}],
        budgets=[{"name": "b", "tenant": "acme", "usd": 1}],
    )
    runtime = world.runtime
    held(runtime)
    assert asking_as_user(world, "key", "bob").status == 503
    (declared,) = runtime.budget_rules().budgets

    def stand_at(amount: int) -> None:
        runtime.admission.figures = figures_of(standing_at(declared, amount))

    stand_at(10**9)
    assert asking_as_user(world, "key", "bob").status == 429
    stand_at(10**9 - 1)
    assert asking_as_user(world, "key", "bob").ours[b"x-cost-meter-tenant"] == b"bench/bob"


def test_those_whom_no_rule_names_can_have_a_budget_too(make_world):
    budgets = [{"name": "strangers", "tenant": "unknown", "gpu_seconds": 1}]
    world = make_world(tenants=TENANTS, budgets=budgets)
    held(world.runtime)
    (declared,) = world.runtime.settings.declared_budgets
    world.runtime.admission.figures = figures_of(standing_at(declared, 10**9))
    assert ask(world, scope_of()).status == ask(world, as_tenant("stranger")).status == 429
    assert ask(world).status == 200


def test_a_healthy_idle_meter_admits_those_who_fail_closed(world):
    used(world, 0)
    assert ask(world, as_tenant("strict")).status == 200


def test_before_any_engine_was_heard_of_only_fail_closed_is_refused(world):
    assert ask(world).status == 200
    assert ask(world, as_tenant("strict")).status == 503


def test_a_meter_that_switched_itself_off_fails_as_stale(world):
    used(world, 0)
    for _ in range(10):
        world.runtime.guard.failed("test", RuntimeError("broken"))
    verdict = world.runtime.admission.admit(Exchange("/v1/completions", Owner("strict"), None, 0))
    assert (verdict.kind, verdict.stale) == (
        "unavailable",
        "the meter switched itself off after errors",
    )
    assert_only_who_fails_closed_is_refused(world)


def assert_only_who_fails_closed_is_refused(world) -> None:
    client = ask(world, as_tenant("strict"))
    assert client.status == 503
    assert "the meter of this server is off" in json.loads(client.body)["error"]["message"]
    assert ask(world).status == 200
    assert ask(world, as_tenant("strict", "/v1/models", method="GET")).status == 200


def test_where_judging_fails_only_who_fails_closed_is_refused(world, monkeypatch):
    monkeypatch.setattr(Admission, "admit", lambda *_: 1 / 0)
    assert_only_who_fails_closed_is_refused(world)


def test_where_no_meter_could_be_made_only_who_fails_closed_is_refused(world):
    world.found = NoRuntime(world.runtime.settings)
    assert_only_who_fails_closed_is_refused(world)


BOTH = [(b"authorization", b"Bearer acme"), (b"x-api-key", b"strict")]


def test_credentials_of_two_tenants_are_refused_whether_or_not_there_are_budgets(world):
    for admission in (world.runtime.admission, None):
        world.runtime.admission = admission
        client = ask(world, scope_of(headers=BOTH))
        assert client.status == 400
        error = json.loads(client.body)["error"]
        assert error["type"] == "invalid_request_error"
        assert error["code"] == "contradicting_credentials"
    # What reaches no engine costs nothing.
    assert ask(world, scope_of("/v1/models", headers=BOTH, method="GET")).status == 200
    assert world.rows("SELECT COUNT(*) FROM requests WHERE tenant <> 'unknown'") == [(0,)]


def test_a_second_credential_of_nobody_leads_past_no_budget(world):
    used(world, 10**9)
    for other in (b"Bearer nobody", b"x", b""):
        twice = [(b"authorization", b"Bearer acme"), (b"authorization", other)]
        assert ask(world, scope_of(headers=twice)).status == 429
        assert ask(world, scope_of(headers=twice[::-1])).status == 429


def verdict_of(world, owner: Owner) -> str:
    exchange = Exchange("/v1/completions", owner, None, 0)
    return world.runtime.admission.admit(exchange).kind


def test_a_child_that_was_not_read_is_held_to_each_childs_budget(world):
    used(world, 10**9, tenant="acme/web")
    owner = Owner("acme/__unread__", parent="acme")
    assert verdict_of(world, owner) == "blocked"
    for other in (Owner("acme"), Owner("acme/app", parent="acme"), Owner("ac/__unread__")):
        assert verdict_of(world, other) == "admitted"
    assert fails_closed(owner, {"acme/web"})
    assert not fails_closed(owner, {"other/web"})


def test_without_a_meter_no_body_is_read_and_whoever_may_be_a_child_that_fails_closed_is_refused(
    make_world,
):
    child = {"name": "acme/web", "fail_closed": True}
    rules = [{"rule": "api_key"}, {"rule": "user"}]
    world = make_world(tenants=[*TENANTS, child], tenant_rules=rules)
    world.found = NoRuntime(world.runtime.settings)
    assert ask(world).status == 503
    assert ask(world, as_tenant("other")).status == 200


def test_tenants_that_fail_closed_are_held_to_it_without_any_budget(make_world):
    world = make_world(tenants=TENANTS)

    async def hold() -> None:
        world.runtime._hold_to_budgets(None)
        world.runtime._tasks["budgets"].cancel()

    asyncio.run(hold())
    assert ask(world, as_tenant("strict")).status == 503
    assert ask(world).status == 200


def test_the_first_api_server_counts_what_runs_in_an_engine_that_is_silent_but_lives(make_world):
    declared = [{"name": "b", "tenant": "acme", "gpu_seconds": 1}]
    runtime = make_world(tenants=TENANTS, budgets=declared).runtime
    now_ns = time.time_ns()
    live = (("r1", Accrued(decode_ns=70)),)
    taken = make_snapshot(taken_at_ns=now_ns, totals=ClassTotals(in_flight=70), live=live)

    async def hold_and_poll() -> None:
        runtime._hold_to_budgets(None)
        runtime._tasks["budgets"].cancel()
        opened = make_open(request_id="r1", tenant="acme", started_at_ns=now_ns)
        await asyncio.to_thread(journal, runtime, opened)
        poller = Poller(Engines(lambda _: taken), runtime.writer, runtime.loops, 1.0)
        await poller.refresh()
        await asyncio.to_thread(journal, runtime)
        # As in the first API server; others have none.
        runtime.poller = poller

    def used_ns(at_ns: int) -> int | None:
        figures = spending.look(
            runtime.settings.declared_budgets, NO_PRICES, now_ns + at_ns, monotonic_ns=at_ns
        )
        return figures.standings[0].total

    spending = Spending(runtime.ledger_url, alive=runtime.alive)
    assert used_ns(0) == 0
    asyncio.run(hold_and_poll())
    assert used_ns(10**9) == used_ns(2 * DEAD_AFTER_NS) == 70
    runtime.poller = None
    assert used_ns(2 * DEAD_AFTER_NS + 1) == 0
    spending.close()


def test_figures_are_read_anew_with_each_new_snapshot_and_not_before(world):
    looks = BudgetLooks(world.runtime.ledger_url)
    journal(world.runtime, make_snapshot(taken_at_ns=time.time_ns()))
    figures = looks.look((budget(),), NO_PRICES)
    assert figures.stale(time.monotonic_ns(), 5 * 10**9) is None
    assert looks.look((budget(),), NO_PRICES) is None
    later = make_snapshot(number=2, taken_at_ns=time.time_ns())
    journal(world.runtime, later)
    assert looks.look((budget(),), NO_PRICES).heard_ns > figures.heard_ns
    # So they are where the settings changed.
    assert looks.look((budget(), budget(name="c")), NO_PRICES) is not None
    looks.close()


def test_a_ledger_that_cannot_be_opened_at_the_start_is_tried_again(tmp_path):
    path = tmp_path / "ledger.db"
    path.write_text("no database, but a text")
    looks = BudgetLooks(f"sqlite:///{path}")
    with pytest.raises(LedgerError):
        looks.look((), NO_PRICES)
    path.unlink()
    open_database(f"sqlite:///{path}").dispose()
    assert list(looks.look((), NO_PRICES).standings) == []
    looks.close()


def test_what_runs_for_a_spent_budget_is_ended_if_it_says_so(world):
    ended = []

    async def stop(ids) -> None:
        ended.extend(ids)

    async def spent(budgets, _book) -> BudgetFigures:
        """Stand for a ledger in which every budget is spent."""
        return figures_of(*(standing_at(each, each.limit) for each in budgets))

    owners = {"r1": Owner("acme"), "r2": Owner("rival"), "r3": Owner("acme/bob")}

    def running_of(covers):
        return [name for name, owner in owners.items() if covers(owner)]

    def follow(**changes) -> list[str]:
        ended.clear()
        rules = Rules((budget(**changes),), (), NO_PRICES)
        admission = Admission(
            spent, lambda: rules, Guard("test"), 1.0, running_of=running_of, stop=stop
        )
        asyncio.run(admission.follow())
        return list(ended)

    assert follow(stop_running=True) == ["r1", "r3"]
    assert follow() == []
    assert follow(stop_running=True, hard=False) == []


# ---- what is not known


def test_an_amount_that_is_unknown_refuses_only_who_fails_closed(world):
    used(world, None, unknown="no price for run r at 2026-11-29T00Z: none", tenant="strict")
    client = ask(world, as_tenant("strict"))
    assert client.status == 503
    message = json.loads(client.body)["error"]["message"]
    assert "(a budget in USD has time without a price)" in message
    used(world, 0, unknown="no price for run r at 2026-11-29T00Z: none", tenant="strict")
    assert ask(world, as_tenant("strict")).status == 503
    assert ask(world).status == 200
    used(world, None, unknown="no price for run r at 2026-11-29T00Z: none")
    assert ask(world).status == 200
    # Another tenant's budget says nothing of this one.
    assert ask(world, as_tenant("strict")).status == 200


def test_a_budget_that_is_known_to_be_spent_refuses_whatever_another_is(world):
    spent = standing_at(budget(name="in time", tenant="strict"), 10**9)
    unknown = standing_at(budget(tenant="strict"), None, "no price")
    world.runtime.admission.figures = figures_of(unknown, spent)
    assert ask(world, as_tenant("strict")).status == 429


def test_a_budget_that_becomes_unknown_is_warned_of_once_by_its_name(caplog):
    known, unknown = standing_at(budget(), 5), standing_at(budget(), 5, "no price for run r")
    coming = iter([known, unknown, unknown, known, unknown])

    async def follow(_budgets, _book) -> BudgetFigures:
        return figures_of(next(coming))

    admission = Admission(follow, lambda: Rules((), (), NO_PRICES), Guard("test"), 1.0)
    said = []
    for _ in range(5):
        with caplog.at_level("INFO", "vllm.cost_meter"):
            asyncio.run(admission.follow())
        said.append([record.levelname for record in caplog.records])
        caplog.clear()
    assert said == [[], ["WARNING"], [], ["INFO"], ["WARNING"]]


# ---- the first figures after a start

LIMITED = [{"name": "b", "tenant": "acme", "gpu_seconds": 1}]


def test_an_error_before_the_first_figures_stops_no_serving(make_world, monkeypatch):
    world = make_world(tenants=TENANTS, budgets=LIMITED)
    held(world.runtime)
    monkeypatch.setattr(Budget, "covers", lambda *_: 1 / 0)
    assert ask(world).status == 200


def test_until_the_first_figures_nobody_passes_a_hard_budget(make_world):
    world = make_world(
        tenants=TENANTS,
        budgets=[*LIMITED, {"name": "soft", "tenant": "rival", "gpu_seconds": 1, "hard": False}],
    )
    held(world.runtime)
    client = ask(world)
    assert client.status == 503
    assert dict(client.headers)[b"retry-after"] == b"5"
    assert "have not been counted yet" in json.loads(client.body)["error"]["message"]
    # Neither does a look help that took so long that its figures are stale.
    world.runtime.admission.figures = figures_of(standing_at(budget(), 0), age_s=60)
    assert ask(world).status == 503
    # A look that heard of no engine does not know what runs.
    world.runtime.admission.figures = BudgetFigures([standing_at(budget(), 0)])
    assert ask(world).status == 503
    assert ask(world, as_tenant("rival")).status == 200
    assert ask(world, as_tenant("acme", "/v1/models", method="GET")).status == 200
    world.runtime.admission.figures = figures_of(standing_at(budget(), 0))
    assert ask(world).status == 200
    # From then on stale figures refuse whom they always did.
    world.runtime.admission.figures = figures_of(standing_at(budget(), 0), age_s=60)
    assert ask(world).status == 200


@pytest.mark.parametrize(("amount", "status"), [(10**9, 429), (0, 200)])
def test_a_request_that_comes_before_the_first_figures_waits_for_them(make_world, amount, status):
    world = make_world(tenants=TENANTS, budgets=LIMITED)
    held(world.runtime, first_figures_s=60)
    (declared,) = world.runtime.settings.declared_budgets

    async def ask_and_look() -> Client:
        app = replying(JSON, [BODY], world.engine.generate)
        asking = asyncio.create_task(world.ask(app, as_tenant("acme")))
        other = await world.ask(app, as_tenant("rival"))
        assert (other.status, asking.done()) == (200, False)
        world.runtime.admission.figures = figures_of(standing_at(declared, amount))
        return await asking

    assert asyncio.run(ask_and_look()).status == status


def test_a_meter_that_is_off_holds_nobody_for_figures_that_never_come(make_world):
    world = make_world(tenants=TENANTS, budgets=LIMITED)
    held(world.runtime, first_figures_s=60)
    for _ in range(10):
        world.runtime.guard.failed("test", RuntimeError("broken"))
    assert ask(world).status == 200
