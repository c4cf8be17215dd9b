"""Servers of an older version beside this one: what they sent is read here, whatever made it.

Method: the sources of a commit send in processes of their own. One ledger of this version has the
same records. The fleet must give its answers.
"""

from pathlib import Path

import pytest

from tests.ecosystem.test_fleet import records_of, write
from tests.ecosystem.test_postgresql import _figures, rows
from tests.support.older_version import OldSender, old_senders, sources_of

# The last one in which every server of a fleet had to be of the same version.
ONE_VERSION = "58d24a7"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources_of(ONE_VERSION, tmp_path_factory.mktemp("old"))


def test_what_servers_of_an_older_version_sent_is_read_by_this_one(
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
    assert _figures(url) == _figures(alone)
    assert rows(url, "SELECT count(*) FROM sender_ends") == [(2,)]


def test_a_server_of_an_older_version_that_is_killed_goes_on_where_the_fleet_is(
    tmp_path: Path, url: str, old: Path
) -> None:
    alone, own = f"sqlite:///{tmp_path}/alone.db", f"sqlite:///{tmp_path}/own.db"
    write(alone, *records_of("one"))
    with OldSender(old, own, url) as sender:
        sender.write("one", 0, 30)
        assert sender.send() is None
        sender.write("one", 30, 80)
    with OldSender(old, own, url) as sender:
        assert sender.send() is None
    assert _figures(url) == _figures(alone)
    assert rows(url, "SELECT count(*) FROM senders") == [(1,)]
