"""Starts a side process, watches it, and starts it again: the API server's end.

A fresh interpreter runs a module of ours: no fork, which would copy vLLM's threads and locks. Its
end of a socket pair is its standard input. That socket has no name, so there is no path, mode or
link that somebody else could use. What it must know, secrets too, comes over that socket.

The process has a group of its own, so that a terminal's Ctrl-C reaches the server only. It has no
session of its own: Linux may schedule sessions as equals, whatever the priority of a process
within.

Only the start of the process and the wait for its end block, and they have a thread. It lives as
long as the side process may, because Linux takes the end of the thread that started a process for
the end of its parent.

Invariant: what becomes of the side process neither ends nor holds up the API server. Its end is
logged, and so is its return.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

import msgspec

from vllm_cost_meter.errors import AwayError
from vllm_cost_meter.logs import Outage, meter_logger
from vllm_cost_meter.side_process.channel import PING, Answerer, Channel, NewsTaker, decoded
from vllm_cost_meter.side_process.entry import FAILED, HELLO, LOG, READY, Line

logger = meter_logger()

T = TypeVar("T")

# The names of our settings begin so; a side process has them from the API server alone.
SETTINGS_PREFIX = "COST_METER_"
STOP_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Pauses:
    """How long a side process is away, in seconds.

    It is started again after `first`, then after twice as long each time, up to `longest`. If it
    worked for `longest`, the next pause is the first again. One that answers nothing for `silent`
    is ended: long, as a busy machine leaves the lowest priority little.
    """

    first: float = 0.5
    longest: float = 60.0
    silent: float = 300.0


State = Literal["off", "starting", "ok", "ended"]


class SideProcess:
    """One side process of an API server. Used by one event loop only."""

    def __init__(
        self,
        name: str,
        module: str,
        *,
        hello: Callable[[], object],
        answer: Answerer,
        take: NewsTaker = lambda _name, _value: None,
        ready: Callable[[msgspec.Raw], None] = lambda _about: None,
        pauses: Pauses = Pauses(),  # noqa: B008 - it never changes
        environment: Callable[[], Mapping[str, str]] = lambda: os.environ,
    ) -> None:
        """`name` is what the log calls it, `module` what it runs.

        `hello` gives what it is told first, at each start; `ready` gets what it says when it begins
        to work. `answer` and `take` get what it asks and its news.
        """
        self.state: State = "off"
        self.pid: int | None = None
        # How often it was started again after it had ended.
        self.restarts = 0
        # Why it ended the last time; None if it never did.
        self.last_end: str | None = None
        self._name = name
        self._module = module
        self._hello = hello
        self._answer = answer
        self._take = take
        self._ready = ready
        self.pauses = pauses
        self._environment = environment
        self._task: asyncio.Task[None] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._works = asyncio.Event()
        self._outage = Outage()
        self._why_ended: str | None = None

    # -- life -------------------------------------------------------------------------------

    def start(self) -> None:
        """Start it, and start it again whenever it ends, until `stop`. Idempotent."""
        if self._task is None:
            self.state = "starting"
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="cost-meter-side")
            self._task = asyncio.create_task(self._run())

    async def wait(self, timeout_s: float) -> bool:
        """Wait until it works; False if it does not within that time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._works.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """End it for good. Idempotent."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
        # It may have been cancelled while the thread was starting a process, or ending one.
        await self._in_thread(self._end)
        self.state = "off"
        if self._thread is not None:
            self._thread.shutdown(wait=False)

    async def _run(self) -> None:
        pause_s = self.pauses.first
        while True:
            began_s = time.monotonic()
            try:
                end = await self._live()
            except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
                end = f"cannot be started: {error}"
            if time.monotonic() - began_s >= self.pauses.longest:
                pause_s = self.pauses.first
            self._note_end(end, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, self.pauses.longest)
            self.restarts += 1
            self.state = "starting"

    async def _live(self) -> str:
        """Start the process and stay with it to its end. Returns how it ended."""
        ours, theirs = socket.socketpair()
        try:
            pid = await self._in_thread(self._spawn, theirs)
        except BaseException:
            ours.close()
            raise
        self.pid, self._why_ended = pid, None
        watch: asyncio.Task[None] | None = None
        try:
            streams = await asyncio.open_unix_connection(sock=ours)
            self._channel = Channel(*streams, self._answer, self._take_news)
            self._channel.tell(HELLO, self._hello())
            watch = asyncio.create_task(self._watch(self._channel, pid))
            await self._channel.run()
        finally:
            if watch is not None:
                watch.cancel()
            self._works.clear()
            if self._channel is not None:
                self._channel.close()
            self.pid = self._channel = None
            code = await self._in_thread(self._end)
        return self._why_ended or _how(code)

    async def _watch(self, channel: Channel, pid: int) -> None:
        """End a process that does not answer any more."""
        silent_s = self.pauses.silent
        while True:
            try:
                await channel.ask(PING, None, bool, silent_s)
            except TimeoutError:
                self._why_ended = f"did not answer for {silent_s:g} s and was ended"
                os.kill(pid, signal.SIGKILL)  # its number is its own until the thread waits for it
                return
            except AwayError:
                return
            await asyncio.sleep(silent_s / 10)

    async def _in_thread(self, body: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, body, *args)

    def _spawn(self, end: socket.socket) -> int:
        """Start the process with its end of the channel, and return its number. Blocks."""
        environment = {
            name: value
            for name, value in self._environment().items()
            if not name.upper().startswith(SETTINGS_PREFIX)
        }
        with end:
            self._process = subprocess.Popen(  # noqa: S603 - our own module, and no shell
                # Without -P the folder that the server was started in could replace any module.
                [sys.executable, "-P", "-m", self._module],
                env=environment,
                stdin=end.fileno(),
                process_group=0,
            )
        return self._process.pid

    def _end(self) -> int:
        """Make sure that the process ends, and return its exit status. Blocks. Idempotent."""
        process = self._process
        if process is None:
            return 0
        process.terminate()
        try:
            return process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    # -- what it says -----------------------------------------------------------------------

    def _take_news(self, name: str, value: msgspec.Raw) -> None:
        if name == LOG:
            line = decoded(value, Line)
            logger.log(line.level, "%s", line.text)
        elif name == READY:
            self._note_ready(value)
        elif name == FAILED:
            self._why_ended = f"ended: {decoded(value, str)}"
        else:
            self._take(name, value)

    def _note_ready(self, about: msgspec.Raw) -> None:
        self._ready(about)
        self.state = "ok"
        self._works.set()
        if (ended := self._outage.ended()) is not None:
            logger.warning(
                "cost meter: %s works again after %.1f s (pid %s)", self._name, ended[0], self.pid
            )
            # Each end is news: the pauses already keep it from filling the log.
            self._outage = Outage()

    def _note_end(self, how: str, pause_s: float) -> None:
        self.state = "ended"
        self.last_end = how
        if self._outage.failed():
            logger.warning(
                "cost meter: %s %s%s. Serving and metering go on; it is started again in %g s, and"
                " the log says when it works.",
                *(self._name, how, self._outage.so_far, pause_s),
            )

    # -- asking -----------------------------------------------------------------------------

    async def ask(self, name: str, given: object, type: type[T], timeout_s: float) -> T:
        """Return its answer to a question. One that only just starts is waited for.

        Raises AwayError where it is not there or gives no answer in time, RefusedError where it
        could not answer.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._works.wait()
                channel = self._channel
                if channel is None:
                    raise AwayError(f"{self._name} has ended")
                return await channel.ask(name, given, type, timeout_s)
        except TimeoutError:
            raise AwayError(f"{self._name} gave no answer within {timeout_s:g} s") from None

    def tell(self, name: str, value: object) -> None:
        """Send it news; nothing happens where it is not there, as it gets a hello first."""
        if self._channel is not None:
            self._channel.tell(name, value)


def _how(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
    return f"ended with status {code}"
