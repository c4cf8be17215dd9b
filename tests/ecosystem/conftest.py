"""What the meter meets beside vLLM: a PostgreSQL server, one for all tests."""

from collections.abc import Iterator

import pytest

from tests.ecosystem.postgresql import Server, postgresql


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with postgresql() as server:
        yield server


@pytest.fixture
def url(server: Server) -> str:
    """Return the URL of a database of this test's own, still empty."""
    return server.new_database()
