"""A budget that covers nobody so far is warned of, by name: what settings cannot refuse."""

import asyncio

import pytest

from tests.support.world import BODY, JSON, journal, make_runtime, replying, scope_of
from vllm_cost_meter.api_server import runtime as runtime_module
from vllm_cost_meter.api_server.budgets.names import BudgetNames
from vllm_cost_meter.ledger.database import open_database

HEADER = {"rule": "header", "trust": "everyone"}
RULES = [
    {**HEADER, "name": "x-tenant"},
    {**HEADER, "name": "x-team", "names": "tag", "tag": "team"},
    {"rule": "user"},
]
TENANTS = [{"name": "search", "tags": {"team": "a"}}, {"name": "idle one"}]


def budget(name: str, **of: str) -> dict:
    return {"name": name, "gpu_seconds": 1, **of}


@pytest.fixture
def warned(make_world, caplog):
    """Return what makes a world with budgets, has tenants ask, and returns the warnings."""

    def look(*budgets: dict, asking: tuple[str, ...] = (), team: bytes = b"") -> list[str]:
        world = make_world(tenants=TENANTS, tenant_rules=RULES, budgets=budgets)
        for number, name in enumerate(asking):
            headers = [(b"x-tenant", name.encode()), (b"x-team", team)]
            app = replying(JSON, [BODY], lambda number=number: world.engine.generate(f"r{number}"))
            assert world.run(app, scope_of(headers=headers)).status == 200
        journal(world.runtime)
        names = BudgetNames(world.runtime.ledger_url)
        for _ in range(2):  # the second time nothing is new
            names.look(world.runtime.settings)
        return [record.getMessage() for record in caplog.records if "budget" in record.msg]

    return look


def test_a_name_that_never_came_in_a_header_is_warned_of_once(warned):
    (line,) = warned(budget("b", tenant="serach"), asking=("search", "serach2", "serac"))
    assert line == (
        "cost meter: budget 'b' covers nobody so far: tenant 'serach' is not declared, and the"
        " ledger has no request of it"
    )


def test_who_is_declared_or_was_seen_is_not_warned_of(warned):
    budgets = [budget("b1", tenant="idle one"), budget("b2", tenant="team-x")]
    budgets += [budget("b3", tenant="unknown"), budget("b4", tag="team=a")]
    assert warned(*budgets, asking=("team-x",)) == []


def test_a_tag_that_nobody_has_is_warned_of(warned):
    (line,) = warned(budget("b", tag="team=b"), budget("c", tag="team=a"))
    assert line == (
        "cost meter: budget 'b' covers nobody so far: no declared tenant has the tag 'team=b', and"
        " the ledger has no request with it"
    )


def test_a_tag_that_a_header_once_brought_is_not_warned_of(warned):
    budgets = [budget("b", tag="team=b_c"), budget("c", tag="team=b"), budget("d", tag="team=bxc")]
    asked = warned(*budgets, asking=("any",), team=b"b_c")
    assert [line.split("'")[1] for line in asked] == ["c", "d"]


def test_a_tag_is_compared_letter_by_letter(warned):
    (line,) = warned(budget("b", tag="team=B"), asking=("any",), team=b"b")
    assert "'team=B'" in line


def test_a_ledger_that_is_away_at_the_start_is_looked_at_once_it_is_there(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(runtime_module, "NAMES_PAUSE_FIRST_S", 0.01)
    settings = {"tenants": TENANTS, "tenant_rules": RULES}
    runtime = make_runtime(
        tmp_path, opens=False, budgets=[budget("b", tenant="serach")], **settings
    )
    path = tmp_path / "ledger.db"
    path.write_text("what was put there by mistake")

    async def look() -> None:
        looking = asyncio.create_task(runtime._look_at_names())
        await asyncio.sleep(0.1)
        assert not looking.done()
        path.unlink()
        open_database(f"sqlite:///{path}").dispose()
        await asyncio.wait_for(looking, 60)

    asyncio.run(look())
    runtime.writer.close()
    assert [r.getMessage() for r in caplog.records if "covers nobody" in r.getMessage()] != []
