"""Two real vLLM servers and one database, disturbed: what the fleet has in the end, and said on the
way.

Method: one story for all tests, because a start of a server is what takes long. A server is killed
with bills that the fleet lacks, and started again; the database is killed, its disk fills, lines
are cut and held. A router halves a request between both servers. At last one server is stopped, and
the other one killed again, and not started. Its disk is then found.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tests.ecosystem.books import audited, told_otherwise
from tests.ecosystem.fleet_world import AHEAD_S, DISK_MIB, Fleet, runs_of
from tests.ecosystem.line import Cut
from tests.ecosystem.postgresql import postgresql
from tests.support.waiting import wait_for
from vllm_cost_meter.ledger.queries.answers import Audit
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.units.time import unix_ns_of

# On a busy machine a start of two servers takes minutes.
pytestmark = pytest.mark.timeout(900)

BEGAN_S = time.monotonic()
LOOKS_S = 2
PAIR = "chosen by a router"


@dataclass
class Story:
    """What was seen. Runs are named by their ids."""

    fleet: Fleet
    first_run: str
    second_run: str
    # The fleet's audit at the end, before the disk of the dead server was found.
    audit: Audit
    lacked: list[str]
    # The two bills of one request.
    halves: list[str]
    wrong: list[str]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with ExitStack() as stack:
        server = stack.enter_context(postgresql(DISK_MIB))
        fleet = Fleet(tmp_path_factory.mktemp("fleet"), server, stack)
        say("launch")
        fleet.begin(stack)
        steady, ahead = fleet.steady, fleet.ahead
        with steady.asked(), ahead.asked():
            say("serve")
            for machine in fleet.machines:
                fleet.cut(machine, *Cut)
            say("cut")
            fleet.kill_database()
            say("database killed")
            fleet.fill_disk()
            say("disk filled")
            with fleet.unplugged(ahead):
                fleet.kill(ahead)
            (first_run,) = runs_of(ahead.ledger_url)
        say("killed")
        ahead.launch()
        with steady.asked(), steady.line.held():
            steady.wait_for_replies(8)
        ahead.wait()
        say("back")
        with steady.asked(), ahead.asked():
            fleet.cut(ahead, Cut.AFTER_COMMIT)
            fleet.wait_until_known(ahead)
            halves = fleet.ask_in_halves(PAIR)
            with fleet.unplugged(ahead):
                fleet.kill(ahead)
        fleet.stop(steady)
        say("over")
        (second_run,) = runs_of(ahead.ledger_url) - {first_run}
        # The fleet's audit is asked for a while after it can know that the server is silent.
        wait_for(lambda: time.monotonic() > fleet.silent_since_s[second_run] + LOOKS_S)
        fleet.beside.close()
        fleet.forget_when()
        with LedgerReader(fleet.url) as reader:
            audit = reader.audit()
        lacked = told_otherwise(ahead.told, fleet.url)
        fleet.bring_in(ahead)
        yield Story(fleet, first_run, second_run, audit, lacked, halves, fleet.wrong())


def say(what: str) -> None:
    print(f"[{time.monotonic() - BEGAN_S:5.1f}] {what}", flush=True)


def test_the_fleet_has_what_the_servers_have_to_the_nanosecond_and_nothing_twice(
    story: Story,
) -> None:
    assert story.wrong == []


def test_each_reply_is_in_the_fleet_with_the_cost_that_its_client_was_told(story: Story) -> None:
    for machine in story.fleet.machines:
        assert len(machine.told) > 20
        assert told_otherwise(machine.told, story.fleet.url) == []


def test_a_request_that_two_servers_halved_is_one_with_the_cost_of_both(story: Story) -> None:
    fleet = story.fleet
    told = [machine.told[id] for machine, id in zip(fleet.machines, story.halves, strict=True)]
    with LedgerReader(fleet.url) as reader:
        (row,) = reader.look_up(PAIR)
    assert row["cost_nanousd"] == sum(one.cost_nanousd for one in told)
    assert row["gpu_time_ns"] == sum(one.gpu_time_ns for one in told)
    prefill, decode = sorted(row["parts"], key=lambda part: part["external_tokens"])
    assert {prefill["run_id"]} == runs_of(fleet.steady.ledger_url)
    assert decode["run_id"] == story.second_run
    # What came over the connector was computed by the other one: nobody's cache has saved it.
    assert prefill["external_tokens"] == 0 < decode["external_tokens"]
    assert decode["prefill_tokens"] == decode["prompt_tokens"] - decode["external_tokens"]
    assert {row["cached_tokens"], row["saved_estimate_ns"]} == {0}


def test_lines_were_cut_at_every_place(story: Story) -> None:
    for machine in story.fleet.machines:
        assert all(machine.line.made(place) >= 2 for place in Cut)


def test_the_clock_of_one_server_was_ahead(story: Story) -> None:
    runs = audited(story.fleet.url)
    first = unix_ns_of(runs[story.first_run]["started_at"])
    (steady,) = runs_of(story.fleet.steady.ledger_url)
    others = unix_ns_of(runs[steady]["started_at"])
    assert first - others > (AHEAD_S - 60) * 10**9


def test_a_server_that_stopped_and_one_that_came_back_are_complete(story: Story) -> None:
    assert states_of(story.audit)[story.first_run] == "complete"
    (steady,) = runs_of(story.fleet.steady.ledger_url)
    assert states_of(story.audit)[steady] == "complete"


def test_a_server_that_died_with_bills_that_nobody_knows_is_never_called_complete(
    story: Story,
) -> None:
    assert story.lacked != []
    assert states_of(story.audit)[story.second_run] == "unknown"
    assert story.audit["balanced"] is None
    later = [
        seen
        for seen in story.fleet.beside.seen
        if seen.run_id == story.second_run
        and seen.at_s > story.fleet.silent_since_s[story.second_run]
    ]
    assert later
    assert "complete" not in {seen.state for seen in later}


def test_a_run_of_a_dead_server_is_complete_only_once_its_last_bill_is_here(story: Story) -> None:
    silent_since_s = story.fleet.silent_since_s[story.first_run]
    states = {
        seen.state
        for seen in story.fleet.beside.seen
        if seen.run_id == story.first_run and seen.at_s > silent_since_s
    }
    assert "unknown" in states
    assert story.fleet.called_complete_early() == []


def test_whoever_looked_meanwhile_had_an_answer(story: Story) -> None:
    assert story.fleet.beside.failures == []
    assert story.fleet.beside.looks > 10
    assert story.fleet.beside.commands > 3


def states_of(audit: Audit) -> dict[str, str]:
    assert audit["fleet"] is not None
    states = {run["run_id"]: "complete" for run in audit["runs"]}
    return states | {run["run_id"]: run["state"] for run in audit["fleet"]["incomplete"]}
