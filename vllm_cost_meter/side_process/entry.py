"""The beginning of every side process: its end of the channel, its priority, and its end.

A side process is started with its end of the channel as standard input. When the API server ends,
however it ends, that socket is closed by the kernel and the side process exits at once. Should its
interpreter be too busy to notice, Linux kills it by a signal. Lines of its log go to the API
server, which logs them as its own.

Invariant: a side process neither outlives its API server nor reads its settings itself.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from vllm_cost_meter.errors import CostMeterError
from vllm_cost_meter.logs import meter_logger, send_all_to
from vllm_cost_meter.side_process.channel import Answerer, Channel, NewsTaker, decoded

H = TypeVar("H")

LOWEST_PRIORITY = 19
# Of 1000: where memory is short it is ended before the server, and after what it started.
OOM_SCORE = 500
_PR_SET_PDEATHSIG = 1

# The names of the news that every side process sends or gets.
HELLO, READY, LOG, FAILED = "hello", "ready", "log", "failed"


class Line(msgspec.Struct, frozen=True, array_like=True):
    """A line of a side process's log."""

    level: int
    text: str


class ToServer(Channel):
    """A side process's end of the channel."""

    def ready(self, about: object = None) -> None:
        """Say that this process does its work from now on; `about` is what it has to say of it."""
        self.tell(READY, about)


class _Handler(logging.Handler):
    """Sends the lines of the log to the API server."""

    def __init__(self, server: ToServer, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._server, self._loop = server, loop
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        line = Line(record.levelno, self.format(record))
        # Lines come from any thread; the channel belongs to one loop.
        if threading.get_ident() == self._thread:
            self._server.tell(LOG, line)
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
            self._loop.call_soon_threadsafe(self._server.tell, LOG, line)


def run(
    hello: type[H],
    main: Callable[[ToServer, H], Awaitable[None]],
    answer: Answerer,
    take: NewsTaker,
    *,
    priority: int = LOWEST_PRIORITY,
) -> None:
    """Run a side process until its API server is gone.

    `main` gets what the API server said first, as this type; `answer` and `take` get all else. What
    is slow to import is imported before, at the priority of the server, or a busy machine would
    take minutes for it.
    """
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the API server decides when it ends
    hold_back(priority, OOM_SCORE)
    asyncio.run(_run(_own_end(), hello, main, answer, take))


async def _run(
    end: socket.socket,
    hello: type[H],
    main: Callable[[ToServer, H], Awaitable[None]],
    answer: Answerer,
    take: NewsTaker,
) -> None:
    loop = asyncio.get_running_loop()
    greeted: asyncio.Future[H] = loop.create_future()

    def take_first(name: str, value: msgspec.Raw) -> None:
        if name == HELLO:
            greeted.set_result(decoded(value, hello))
        else:
            take(name, value)

    server = ToServer(*await asyncio.open_unix_connection(sock=end), answer, take_first)
    send_all_to(_Handler(server, loop))
    until_gone = asyncio.create_task(_exit_with(server))
    try:
        await main(server, await greeted)
    except CostMeterError as error:
        server.tell(FAILED, str(error))
    except Exception as error:
        meter_logger().exception("cost meter: a side process failed")
        server.tell(FAILED, f"{type(error).__name__}: {error}")
    else:
        await until_gone
    os._exit(1)


async def _exit_with(server: ToServer) -> None:
    await server.run()
    # At once: threads may be in the middle of a long question, and nobody waits for its answer.
    os._exit(0)


def _own_end() -> socket.socket:
    if sys.stdin is None or not _is_socket(0):
        sys.exit("cost meter: a side process is started by the API server, not by hand")
    end = socket.socket(fileno=os.dup(0))
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    return end


def _is_socket(descriptor: int) -> bool:
    try:
        with socket.socket(fileno=os.dup(descriptor)):
            return True
    except OSError:
        return False


def end_with_parent() -> None:
    """Have this process killed when the thread that started it ends. Linux only."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def hold_back(priority: int, oom_score: int) -> None:
    """Give way to everything else: for the processor, and where memory is short."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, priority)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(oom_score), encoding="ascii")
