"""What holds while the ledger, or the journal's first place, does not take what is billed."""

import asyncio
import shutil

from tests.component.api_server.test_admission import TENANTS, as_tenant, ask, held, used
from tests.support.world import BODY, JSON, full_disk, replying
from vllm_cost_meter.journal.places import folder_of_ledger
from vllm_cost_meter.metrics import series


def test_figures_are_stale_once_a_bill_waits_for_the_ledger_for_more_than_five_seconds(make_world):
    world = make_world(tenants=TENANTS)
    held(world.runtime)
    used(world, 0)
    lag_ns = [5 * 10**9]
    world.runtime.admission._lag_ns = lambda: lag_ns[0]
    assert ask(world, as_tenant("strict")).status == 200
    lag_ns[0] += 1
    client = ask(world, as_tenant("strict"))
    assert client.status == 503
    assert b"bills of the last 5 s are not in the ledger yet" in client.body
    assert ask(world).status == 200


def test_a_bill_is_pending_for_budgets_from_its_hand_over_to_the_journal_on(make_world):
    world = make_world(
        tenants=[{"name": "acme"}],
        budgets=[{"name": "b", "tenant": "acme", "gpu_seconds": 1}],
        bill_timeout_ms=50,
    )

    async def hold() -> None:
        world.runtime._hold_to_budgets(None)
        world.runtime._tasks["budgets"].cancel()

    asyncio.run(hold())
    pending = world.runtime.follower.pending
    with full_disk():
        world.run(replying(JSON, [BODY], lambda: world.engine.generate("r1")))
        assert [bill.request_id for bill in pending.sent()] == ["r1"]
        assert pending.lag_ns > 0


def test_costs_are_told_from_the_second_place_while_the_first_refuses(make_world, tmp_path):
    world = make_world(second_journal=str(tmp_path / "other disk"))
    first = folder_of_ledger(world.path)
    shutil.rmtree(first)
    first.write_text("no folder any more")
    app = replying(JSON, [BODY], lambda: world.engine.generate("r1"))
    client = world.run(app)
    assert dict(client.headers)[b"x-cost-meter-cost-usd"] == b"0.000000030"
    asyncio.run(world.runtime._announce())
    assert series.JOURNAL_IN_SECOND_PLACE._value.get() == 1
    assert series.JOURNAL_WITHOUT_RESERVE._value.get() == 0
    assert world.runtime.health()["ledger_error"] is None
    first.unlink()
    world.runtime.writer._places._try_first_at_s = 0  # ten seconds later
    world.run(replying(JSON, [BODY], lambda: world.engine.generate("r2")))
    assert world.rows("SELECT request_id FROM requests ORDER BY seq") == [("r1",), ("r2",)]
    assert not world.runtime.writer.is_in_second_place
