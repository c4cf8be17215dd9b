"""Whatever servers write, send and read, a budget has used what their bills add up to.

Method: a model of plain lists knows each bill that was written, and which of them each server has
sent. After each step a server that reads must have its own bills and those that others had sent,
each once: of all budgets, with shipments put together, senders killed and servers started again.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ecosystem.test_fleet import KilledError, Mortal
from tests.support.fleet_budgets import (
    NOW,
    THIS_HOUR,
    FleetServer,
    bill,
    budget,
    put_together,
)
from vllm_cost_meter.ledger.fleet_use.kept import figures_path, remove_kept
from vllm_cost_meter.tenants.budgets import Budget

STEPS = 40
TENANTS = ("acme", "acme/bob", "rival")
BUDGETS = (
    budget(days=2),
    budget(name="month", days=30),
    budget(name="bob", tenant="acme/bob", days=1),
    budget(name="rival", tenant="rival", period="month"),
    budget(name="each", each_server=True),
)

# A bill of the model: tenant, hour and GPU-ns.
Bill = tuple[str, int, int]


class Model:
    """What was written at each server, and how much of it was sent."""

    def __init__(self, names: list[str]) -> None:
        self.written: dict[str, list[Bill]] = {name: [] for name in names}
        self.sent: dict[str, int] = dict.fromkeys(names, 0)

    def used(self, name: str, of: Budget) -> int:
        """Return what a budget has used, as a server that has just read must see it."""
        bills = list(self.written[name])
        if not of.each_server:
            for other, sent in self.sent.items():
                bills += self.written[other][:sent] if other != name else []
        first, after = of.hours(NOW)
        return sum(
            ns
            for tenant, hour, ns in bills
            if (tenant == of.tenant or tenant.startswith(f"{of.tenant}/"))
            and first <= hour
            and (hour < after or of.period == "rolling")
        )


@pytest.fixture
def servers(tmp_path: Path, url: str) -> Iterator[dict[str, FleetServer]]:
    """Return three servers of one fleet, which have joined."""
    found = {name: FleetServer(tmp_path, name, url) for name in ("one", "two", "three")}
    for server in found.values():
        server.send()
    yield found
    for server in found.values():
        server.stop()


def killed_while_sending(server: FleetServer) -> None:
    """Send one shipment, and die before the ledger knows."""
    sender = Mortal(server.url, server.fleet)
    sender.dies = True
    try:
        sender.step()
    except KilledError:
        pass
    sender.close()


@pytest.mark.parametrize("seed", range(4))
def test_a_budget_has_used_what_all_bills_that_are_known_add_up_to(
    servers: dict[str, FleetServer], url: str, seed: int
) -> None:
    chance = random.Random(seed)
    model = Model(list(servers))
    runs = dict.fromkeys(servers, 0)
    numbers = dict.fromkeys(servers, 0)

    def written(name: str) -> Any:
        numbers[name] += 1
        tenant, hour = chance.choice(TENANTS), THIS_HOUR - chance.choice([0, 0, 0, 1, 30, 60, 900])
        ns = chance.randint(1, 10**6)
        model.written[name].append((tenant, hour, ns))
        return bill(f"{name}-{runs[name]}", numbers[name], ns, tenant, hour)

    for _ in range(STEPS):
        name = chance.choice(list(servers))
        server = servers[name]
        match chance.choice("wwwwssrrrkfbx"):
            case "w":
                server.write(*(written(name) for _ in range(chance.randint(1, 3))))
            case "s":
                server.send()
                model.sent[name] = len(model.written[name])
            case "k":
                killed_while_sending(server)
                model.sent[name] = len(model.written[name])
            case "f":
                put_together(url, chance.choice([0, 1, 2]))
            case "b":  # another engine
                runs[name] += 1
                numbers[name] = 0
            case "x":
                server.stop()
                if chance.random() < 0.5:
                    remove_kept(figures_path(server.path, 0))
                server.start()
            case _:
                some = chance.sample(BUDGETS, chance.randint(1, len(BUDGETS)))
                over_all = [of for of in some if not of.each_server] or [budget(days=30)]
                server.read(*over_all, now_ns=NOW)
                found = server.standings(*some, now_ns=NOW)
                assert [each.total for each in found] == [model.used(name, of) for of in some]
    for name, server in servers.items():
        server.send()
        model.sent[name] = len(model.written[name])
    for name, server in servers.items():
        expected = [model.used(name, of) for of in BUDGETS]
        over_all = [of for of in BUDGETS if not of.each_server]
        server.read(*over_all, now_ns=NOW)
        assert [each.total for each in server.standings(*BUDGETS, now_ns=NOW)] == expected
