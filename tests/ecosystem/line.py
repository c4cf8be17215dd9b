"""A line between clients and PostgreSQL, by TCP, that a test cuts at a moment of its choice.

It knows PostgreSQL's protocol well enough to see that a transaction inserts, and that it commits.
The worst moment is the one between: the server has committed, and its client never learns that.

Invariant: a cut counts once it was made, at the place that was asked for.
"""

import select
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from pathlib import Path

from tests.support.waiting import wait_for

HOST = "127.0.0.1"
_BYTES = 1 << 16
_LOOK_EVERY_S = 0.05
_INSERTS = b"INSERT INTO"
# A simple query, and what the server says once it has committed and waits for the next one.
_COMMITS = b"Q\0\0\0\x0bCOMMIT\0"
_HAS_COMMITTED = b"C\0\0\0\x0bCOMMIT\0Z\0\0\0\x05I"


class Cut(Enum):
    """Where in a transaction that inserts the line breaks."""

    IN_BATCH = auto()
    BEFORE_COMMIT = auto()
    AFTER_COMMIT = auto()


class Line:
    """The line. Cuts that were asked for wait for transactions, one each, in their order."""

    def __init__(self, server: Path) -> None:
        """`server` is the socket on which PostgreSQL listens."""
        self._server = server
        self._asked: list[Cut] = []
        self._made: Counter[Cut] = Counter()
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._is_unplugged = threading.Event()
        self._is_held = threading.Event()
        self._listener = socket.create_server((HOST, 0))
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def by_line(self, url: str) -> str:
        """Return the URL of a database by this line."""
        return f"{url.partition('?')[0].replace('@/', f'@{HOST}:{self.port}/')}?sslmode=disable"

    def cut(self, *places: Cut) -> None:
        """Cut the next transactions that insert, one at each place."""
        with self._lock:
            self._asked += places

    def made(self, place: Cut) -> int:
        """Return how often it was cut there."""
        return self._made[place]

    def wait_until_cut(self, timeout_s: float = 240) -> None:
        """Wait until every cut that was asked for was made.

        Whoever sends has a low priority, so on a busy machine a shipment may take half a minute.
        """
        wait_for(lambda: not self._asked, timeout_s=timeout_s, what="the line was not cut")

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        """Let no connection live meanwhile."""
        self._is_unplugged.set()
        try:
            yield
        finally:
            self._is_unplugged.clear()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Pass nothing on meanwhile; connections stay."""
        self._is_held.set()
        try:
            yield
        finally:
            self._is_held.clear()

    def close(self) -> None:
        """End the line and its connections."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._is_over.is_set():
            if select.select([self._listener], [], [], _LOOK_EVERY_S)[0]:
                client, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._serve, args=(client,)))
                self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server, suppress(OSError):
            if not self._is_unplugged.is_set():
                server.connect(str(self._server))
                self._carry(client, server)

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        """Carry bytes both ways until one end closes, or the line is cut."""
        inserts = False
        while not self._is_over.is_set() and not self._is_unplugged.is_set():
            readable = select.select([client, server], [], [], _LOOK_EVERY_S)[0]
            if self._is_held.is_set():
                self._is_over.wait(_LOOK_EVERY_S)
                continue
            if server in readable:
                if not (answer := server.recv(_BYTES)):
                    return
                client.sendall(answer)
            if client in readable:
                if not (asked := client.recv(_BYTES)):
                    return
                if _INSERTS in asked:
                    inserts = True
                if inserts and (place := self._place_of(asked)) is not None:
                    _end(server, asked, place)
                    self._made[place] += 1
                    return
                server.sendall(asked)
                inserts = inserts and _COMMITS not in asked

    def _place_of(self, asked: bytes) -> Cut | None:
        """Take the next cut if this is its place."""
        is_commit = _COMMITS in asked
        with self._lock:
            if self._asked and (self._asked[0] is not Cut.IN_BATCH) == is_commit:
                return self._asked.pop(0)
        return None


def _end(server: socket.socket, asked: bytes, place: Cut) -> None:
    """Do the last that the server gets, or does, before the line breaks."""
    if place is Cut.IN_BATCH:
        server.sendall(asked[: len(asked) // 2])
    if place is Cut.AFTER_COMMIT:
        server.sendall(asked)
        answer = b""
        while _HAS_COMMITTED not in answer:
            more = server.recv(_BYTES)
            assert more, f"expected the server to commit, got {answer!r}"
            answer += more


@contextmanager
def line_to(server: Path) -> Iterator[Line]:
    """Lay a line to the socket of a server."""
    line = Line(server)
    try:
        yield line
    finally:
        line.close()
