"""A side process for tests: it echoes, asks back, fails, hangs and dies as it is asked to."""

import asyncio
import logging
import os
import signal
import threading
import time
from pathlib import Path

import msgspec

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.side_process.channel import decoded
from vllm_cost_meter.side_process.entry import ToServer, run

server: list[ToServer] = []


class Hello(msgspec.Struct):
    """What the test says first."""

    secret: str
    fails: str | None = None


async def main(to_server: ToServer, hello: Hello) -> None:
    """Begin to work, or fail as the test wants."""
    server.append(to_server)
    if hello.fails:
        raise LedgerError(hello.fails)
    to_server.ready(
        {
            "pid": os.getpid(),
            "secret": hello.secret,
            "nice": os.getpriority(os.PRIO_PROCESS, 0),
            "group": os.getpgrp(),
            "session": os.getsid(0),
            "settings": [name for name in os.environ if name.startswith("COST_METER_")],
            "arguments": Path("/proc/self/cmdline").read_text().split("\0")[1:],
        }
    )


async def answer(name: str, given: msgspec.Raw) -> object:
    """Answer what a test asks."""
    value = decoded(given, object)
    if name == "echo":
        return value
    if name == "ask back":
        return await server[0].ask("from the side", value, object, 5)
    if name == "log":
        threading.Thread(target=logging.getLogger("x").warning, args=(value,)).start()
    if name == "fail":
        raise ValueError(value)
    if name == "sleep":
        await asyncio.sleep(float(str(value)))
    if name == "hang":
        time.sleep(float(str(value)))
    if name == "busy":  # as deaf as a process can be: no thread of it runs
        end = time.monotonic() + float(str(value))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        while time.monotonic() < end:
            pass
    if name == "die":
        os._exit(int(str(value)))
    return None


def take(name: str, value: msgspec.Raw) -> None:
    """Send news back as news."""
    server[0].tell("news came", [name, decoded(value, object)])


if __name__ == "__main__":
    run(Hello, main, answer, take)
