"""A budget that covers nobody so far is warned of, by name: what settings cannot refuse."""

import pytest

from tests.support.world import BODY, JSON, replying, scope_of
from vllm_cost_meter.api_server.budgets.names import BudgetNames

RULES = [{"rule": "header", "name": "x-tenant", "trust": "everyone"}, {"rule": "user"}]
TENANTS = [{"name": "search", "tags": {"team": "a"}}, {"name": "idle one"}]


def budget(name: str, **of: str) -> dict:
    return {"name": name, "gpu_seconds": 1, **of}


@pytest.fixture
def warned(make_world, caplog):
    """Return what makes a world with budgets, has tenants ask, and returns the warnings."""

    def look(*budgets: dict, asking: tuple[str, ...] = ()) -> list[str]:
        world = make_world(tenants=TENANTS, tenant_rules=RULES, budgets=budgets)
        for number, name in enumerate(asking):
            app = replying(JSON, [BODY], lambda number=number: world.engine.generate(f"r{number}"))
            assert world.run(app, scope_of(headers=[(b"x-tenant", name.encode())])).status == 200
        world.runtime.writer.commit().result(10)
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
    assert line.endswith("budget 'b' covers nobody so far: no declared tenant has the tag 'team=b'")
