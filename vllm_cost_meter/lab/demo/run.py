"""Run the demo: a real vLLM server with the meter inside, three tenants, and the bill.

The demo writes into one folder beside the tiny model: the ledger, the settings, the logs. It makes
API keys for this run and keeps them in memory; the settings file holds their SHA-256. Every user of
the machine could read keys on vLLM's command line. So vLLM gets them in a file that only this user
can read, and that is removed once vLLM serves.

Invariant: the exit status is 0 only if the clients' requests and replies, the bill and the books
agree. No server outlives the demo unless the user asks to keep it.
"""

import asyncio
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.status import Status

from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.console import interruptible
from vllm_cost_meter.errors import CostMeterError, SettingError
from vllm_cost_meter.lab.demo.checks import DemoFigures, problems
from vllm_cost_meter.lab.demo.setup import SETTINGS, Setup, prepare, write_private
from vllm_cost_meter.lab.demo.show import IDLE_POLICY, short_path, show, show_how_to_use
from vllm_cost_meter.lab.demo.sweep import sweep_demo
from vllm_cost_meter.lab.demo.traffic import BATCH, CHAT, SEARCH, Sightings, Traffic
from vllm_cost_meter.lab.server import Server
from vllm_cost_meter.ledger.opening import open_ledger
from vllm_cost_meter.units.text import plain

# The bill of an aborted request may take so long to reach the ledger.
QUIET_TIMEOUT_S = 15
PAGE = 1000
# So many problems are shown; the rest is in the ledger.
PROBLEMS_SHOWN = 10
# The width for a pipe, which has none itself.
PIPE_WIDTH = 100

DONE, FAILED, WRONG_SETTING, INTERRUPTED = 0, 1, 2, 130


def run_demo(model: str | None, *, keep: bool, sweep: bool = False) -> int:
    """Serve `model` (the tiny one if None), let the tenants use it, print the bill.

    Returns the exit status: 0 if everything adds up. With `keep` the server goes on running. With
    `sweep` a load sweep replaces the tenants, and the result is a curve of cost against load.
    """
    tty = sys.stdout.isatty()
    console = Console(markup=False, highlight=False, width=None if tty else PIPE_WIDTH)
    try:
        with interruptible(), served(console, model, keep=keep) as (server, setup):
            if sweep:
                key = setup.keys[BATCH]
                status = sweep_demo(console, server, setup.environment, key)
            else:
                status = _demo(console, server, setup)
            if keep:
                show_how_to_use(console, server, setup)
                server.keep()
            return status
    except KeyboardInterrupt:
        return _failed("interrupted; the server was stopped", INTERRUPTED)
    except SettingError as error:
        return _failed(str(error), WRONG_SETTING)
    except (CostMeterError, OSError) as error:
        return _failed(str(error), FAILED)


def _failed(why: str, status: int) -> int:
    shown = "\n".join(plain(line) for line in why.splitlines())
    print(f"vllm-cost-meter demo: {shown}", file=sys.stderr)
    return status


@contextmanager
def served(
    console: Console, model: str | None, *, keep: bool = False
) -> Iterator[tuple[Server, Setup]]:
    """Serve a model with the meter inside. The server ends with the block, unless it is kept.

    `Server.keep` lets it go on. Without `keep` it also ends if this process is killed.
    """
    setup = prepare(console, model)
    keys_file = setup.folder / "keys.yaml"
    server = Server(
        setup.model,
        [*setup.arguments, "--config", str(keys_file)],
        setup.environment,
        setup.folder / "vllm.log",
        ends_with_us=not keep,
    )
    try:
        try:
            write_private(keys_file, f"api-key: {json.dumps(list(setup.keys.values()))}\n")
            _serve(console, server, setup)
        finally:
            keys_file.unlink(missing_ok=True)
        yield server, setup
    finally:
        server.stop()


def _demo(console: Console, server: Server, setup: Setup) -> int:
    seen = _traffic(console, server, setup)
    figures = _quiet_figures(server, setup, seen)
    show(console, server, setup, seen, figures)
    return _verdict(console, problems(seen, figures), seen)


class Progress:
    """Shows the current activity: on one line of a terminal, otherwise on a line each."""

    def __init__(self, console: Console, status: Status) -> None:
        self._console, self._status = console, status
        self._started_s = time.monotonic()
        self._last = ""

    def __call__(self, doing: str) -> None:
        elapsed_s = round(time.monotonic() - self._started_s)
        if self._console.is_terminal:
            self._status.update(f"{elapsed_s:4d} s  {doing}")
        elif doing != self._last:
            self._console.print(f"{elapsed_s:4d} s  {doing}")
        self._last = doing


@contextmanager
def _progress(console: Console, doing: str) -> Iterator[Progress]:
    with console.status("") as status:
        progress = Progress(console, status)
        progress(doing)
        yield progress


def _serve(console: Console, server: Server, setup: Setup) -> None:
    console.print(f"vllm serve {short_path(setup.model)} --plugins cost_meter", soft_wrap=True)
    started_s = time.monotonic()
    server.launch()
    with _progress(console, "importing vLLM") as progress:
        server.wait(progress)
    console.print(f"{time.monotonic() - started_s:4.0f} s  serving at {server.url}")


def _traffic(console: Console, server: Server, setup: Setup) -> Sightings:
    async def run() -> Sightings:
        traffic = Traffic(server.url, setup.name, setup.model, setup.keys)
        running = asyncio.create_task(traffic.run(setup.folder, setup.environment))
        while not running.done():
            sent = traffic.seen.sent
            so_far = f": {CHAT} sent {sent[CHAT]}, {SEARCH} {sent[SEARCH]}"
            progress(f"{doing}{so_far if console.is_terminal else ''}")
            await asyncio.wait([running], timeout=0.5)
        return await running

    doing = "three tenants at once: openai clients, one of which leaves, and vllm bench serve"
    with _progress(console, doing) as progress:
        return asyncio.run(run())


def _quiet_figures(server: Server, setup: Setup, seen: Sightings) -> DemoFigures:
    """Return the figures once nothing is in flight and they agree with what the clients saw.

    They are asked for one after the other, so a bill that is written in between is in some of them
    only. After QUIET_TIMEOUT_S they are returned as they are.
    """
    deadline = time.monotonic() + QUIET_TIMEOUT_S
    while True:
        asked_s = time.monotonic()
        tenants = server.cost("tenants")
        report_s = time.monotonic() - asked_s
        figures = DemoFigures(
            tenants,
            server.cost("audit"),
            _all_requests(server),
            _statement(setup),
            sum(file.stat().st_size for file in setup.folder.glob("ledger.db*") if file.is_file()),
            report_s,
        )
        in_flight = any(run["in_flight_ns"] for run in figures.audit["runs"])
        if time.monotonic() > deadline or not (in_flight or problems(seen, figures)):
            return figures
        time.sleep(0.3)


def _statement(setup: Setup) -> Mapping[str, Any]:
    settings = load_settings(setup.environment, setup.folder / SETTINGS)
    with open_ledger(settings.ledger, book=settings.price_book) as reader:
        return reader.statement(f"{datetime.now(UTC):%Y-%m}", idle=IDLE_POLICY)


def _all_requests(server: Server) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    page = server.cost(f"requests?limit={PAGE}")
    rows += page["requests"]
    while page["next"]:
        page = server.cost(f"requests?limit={PAGE}&next={page['next']}")
        rows += page["requests"]
    return rows


def _verdict(console: Console, wrong: Sequence[str], seen: Sightings) -> int:
    without = sum(reply.cost_usd is None for reply in seen.told)
    if without:
        console.print(f"{without} of {len(seen.told)} replies left before their bill was committed")
    if not wrong:
        console.print(
            f"checked: {seen.sent.total()} requests sent and billed, the tokens and costs of "
            f"{len(seen.told)} replies, {BATCH}'s totals, the client that left: all add up",
            soft_wrap=True,
        )
        return DONE
    more = f" (and {len(wrong) - PROBLEMS_SHOWN} more)" if len(wrong) > PROBLEMS_SHOWN else ""
    return _failed(f"does not add up: {'; '.join(wrong[:PROBLEMS_SHOWN])}{more}", FAILED)
