"""Servers of an older version beside this one: what they sent is read here, whatever made it.

Method: the sources of a commit send in processes of their own. One ledger of this version has the
same records. The fleet must give its answers.
"""

from pathlib import Path

import pytest

from tests.ecosystem.test_fleet import records_of, write
from tests.ecosystem.test_postgresql import _figures, rows
from tests.support.fleet import sent
from tests.support.older_version import OldSender, old_senders, sources_of
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.fleet.schema import FLEET_VERSION
from vllm_cost_meter.ledger.fleet.upkeep import migrate_fleet

# The last one in which every server of a fleet had to be of the same version.
ONE_VERSION = "58d24a7"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources_of(ONE_VERSION, tmp_path_factory.mktemp("old"))


def migrated(url: str) -> None:
    assert migrate_fleet(url)[1] == FLEET_VERSION


def test_what_servers_of_an_older_version_sent_is_read_once_the_tables_are_migrated(
    tmp_path: Path, url: str, old: Path
) -> None:
    alone = f"sqlite:///{tmp_path}/alone.db"
    write(alone, *records_of("one"), *records_of("two"))
    with old_senders(old, tmp_path, url, "one", "two") as senders:
        for begin, end in ((0, 20), (20, 80)):
            for name, sender in zip(("one", "two"), senders, strict=True):
                sender.write(name, begin, end)
                assert sender.send() is None
        for sender in senders:
            assert sender.end() is None
    with pytest.raises(LedgerError, match="vllm-cost-meter fleet migrate"):
        _figures(url)
    migrated(url)
    assert _figures(url) == _figures(alone)
    assert rows(url, "SELECT count(*) FROM sender_ends") == [(2,)]


def test_servers_are_upgraded_one_by_one_and_nothing_is_lost(
    tmp_path: Path, url: str, old: Path
) -> None:
    """One is upgraded before the tables are migrated, the other one after that."""
    alone = f"sqlite:///{tmp_path}/alone.db"
    write(alone, *records_of("one"), *records_of("two"))
    first, second = (f"sqlite:///{tmp_path}/{name}.db" for name in ("first", "second"))
    with OldSender(old, first, url) as sender:
        sender.write("one", 0, 25)
        assert sender.send() is None
        sender.write("one", 25, 50)  # and is stopped before it has sent that
    with OldSender(old, second, url) as beside:
        beside.write("two", 0, 30)
        assert beside.send() is None
        write(first, *records_of("one")[50:])
        with pytest.raises(LedgerError, match="vllm-cost-meter fleet migrate"):
            sent(first, url)
        beside.write("two", 30, 50)
        assert beside.send() is None
        migrated(url)
        sent(first, url, stops=True)
        beside.write("two", 50, 80)
        assert beside.send() is not None  # it keeps that
    sent(second, url, stops=True)
    assert _figures(url) == _figures(alone)
    assert rows(url, "SELECT count(*) FROM senders") == [(2,)]
