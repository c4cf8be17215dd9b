"""The demo: a real vLLM server with the meter inside, three tenants, and the bill.

Everything it writes goes into one folder below the cache beside the tiny model: the ledger, the
settings, the logs. The API keys are made for this run and exist in memory; the settings file holds
their SHA-256. vLLM must be told them, and on its command line every user of the machine could read
them: so it gets them in a file that only this user can read and that is removed once vLLM serves.

Invariant: the exit status is 0 only if what the clients sent and were told, the bill and the books
agree; and unless asked to keep it, no server outlives the demo.
"""

import asyncio
import hashlib
import json
import os
import secrets
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table

from vllm_cost_meter.config import OTHER_NAMES, PREFIX, load_settings
from vllm_cost_meter.demo_checks import Figures, problems
from vllm_cost_meter.demo_sweep import sweep_demo
from vllm_cost_meter.demo_traffic import (
    BATCH,
    CHAT,
    SEARCH,
    TENANTS,
    Sightings,
    Traffic,
)
from vllm_cost_meter.errors import CostMeterError, SettingError
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.pricing import format_usd
from vllm_cost_meter.serving import (
    CPU_ARGUMENTS,
    Server,
    environment_of,
    is_cpu_build,
)
from vllm_cost_meter.statement_text import print_statement
from vllm_cost_meter.terminal import interruptible
from vllm_cost_meter.text import plain
from vllm_cost_meter.tiny_model import default_path, make_tiny_model

ASSUMED_GPU_HOUR_USD = "2.50"
# How long the last bill may take to reach the ledger.
QUIET_TIMEOUT_S = 15
PAGE = 1000
SETTINGS = "meter.toml"
# By which the demo's statement charges idle time.
IDLE_POLICY = "proportional"
# Of what does not add up; the rest is in the ledger.
PROBLEMS_SHOWN = 10
# A pipe has no width.
PIPE_WIDTH = 100
# Settings of the user's that the demo keeps; all others are its own.
KEPT_SETTINGS = OTHER_NAMES | {f"{PREFIX}GPU_HOUR_USD", f"{PREFIX}METHOD"}

DONE, FAILED, WRONG_SETTING, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True, slots=True)
class Setting:
    """What this run of the demo serves, where, and for whom."""

    # What vLLM loads, and the name clients call it by.
    model: str
    name: str
    folder: Path
    keys: Mapping[str, str]
    environment: Mapping[str, str]
    arguments: Sequence[str]


def run_demo(model: str | None, *, keep: bool, sweep: bool = False) -> int:
    """Serve `model` (the tiny one if None), let the tenants use it, print the bill.

    Returns the exit status: 0 if everything adds up. With `keep` the server goes on. With `sweep`
    it is driven through loads instead, and the end is a curve of cost against load.
    """
    tty = sys.stdout.isatty()
    console = Console(markup=False, highlight=False, width=None if tty else PIPE_WIDTH)
    try:
        with interruptible(), served(console, model) as (server, setting):
            if sweep:
                key = setting.keys[BATCH]
                status = sweep_demo(console, server, setting.environment, key)
            else:
                status = _demo(console, server, setting)
            if keep:
                _tell_how_to_use(console, server, setting)
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
def served(console: Console, model: str | None) -> Iterator[tuple[Server, Setting]]:
    """Serve a model with the meter inside; the server ends with the block unless told otherwise.

    Whoever wants it to go on calls `Server.keep`.
    """
    setting = _prepare(console, model)
    keys_file = setting.folder / "keys.yaml"
    server = Server(
        setting.model,
        [*setting.arguments, "--config", str(keys_file)],
        setting.environment,
        setting.folder / "vllm.log",
    )
    try:
        try:
            write_private(keys_file, f"api-key: {json.dumps(list(setting.keys.values()))}\n")
            _serve(console, server, setting)
        finally:
            keys_file.unlink(missing_ok=True)
        yield server, setting
    finally:
        server.stop()


def _demo(console: Console, server: Server, setting: Setting) -> int:
    seen = _traffic(console, server, setting)
    figures = _quiet_figures(server, setting, seen)
    _show(console, server, setting, seen, figures)
    return _verdict(console, problems(seen, figures), seen)


# -- setting up ---------------------------------------------------------------------------------


def _prepare(console: Console, model: str | None) -> Setting:
    """Make the folder, the keys, the settings file and, if no model was named, the tiny one."""
    on_cpu = is_cpu_build()
    tiny = default_path()
    arguments = ["--plugins", "cost_meter", "--enable-prompt-tokens-details"]
    if model is None:
        if not tiny.exists():
            console.print("making a tiny random model (10 s)")
        make_tiny_model(tiny)
        arguments += ["--served-model-name", tiny.name]
        arguments += CPU_ARGUMENTS if on_cpu else ()
    folder = tiny.parent / "demo" / datetime.now().astimezone().strftime("%Y%m%d-%H%M%S-%f")
    folder.mkdir(parents=True, mode=0o700)
    keys = {tenant: f"sk-demo-{secrets.token_hex(24)}" for tenant in TENANTS}
    config = folder / SETTINGS
    write_private(config, settings_file(keys))
    environment = {
        name: value
        for name, value in environment_of(tiny.parent, offline=model is None).items()
        if not name.upper().startswith(PREFIX) or name.upper() in KEPT_SETTINGS
    }
    environment[f"{PREFIX}LEDGER"] = f"sqlite:///{folder / 'ledger.db'}"
    _say_price(console, environment, on_cpu=on_cpu)
    load_settings(environment, config)  # a wrong one is told now, not in half a minute
    return Setting(
        model=model or str(tiny),
        name=model or tiny.name,
        folder=folder,
        keys=keys,
        environment=environment,
        arguments=[*arguments, "--cost-meter-config", str(config)],
    )


def _say_price(console: Console, environment: dict[str, str], *, on_cpu: bool) -> None:
    name = f"{PREFIX}GPU_HOUR_USD"
    whose = "as set" if name in environment else f"assumed; set {name} to yours"
    price = environment.setdefault(name, ASSUMED_GPU_HOUR_USD)
    cpu = "; this vLLM runs on the CPU, which counts as one GPU" if on_cpu else ""
    console.print(f"price: {price} USD per GPU-hour ({whose}){cpu}", soft_wrap=True)


def settings_file(keys: Mapping[str, str]) -> str:
    """Return the TOML that names the tenants by the SHA-256 of their keys."""
    return "\n".join(
        f'[[tenants]]\nname = "{tenant}"\n'
        f'api_key_sha256 = ["{hashlib.sha256(key.encode()).hexdigest()}"]\n'
        for tenant, key in keys.items()
    )


def write_private(path: Path, text: str) -> None:
    """Write a new file that only this user can read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


class Progress:
    """Says what is being done: on one line of a terminal, or a line each where there is none."""

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


def _serve(console: Console, server: Server, setting: Setting) -> None:
    console.print(f"vllm serve {_short(setting.model)} --plugins cost_meter", soft_wrap=True)
    started_s = time.monotonic()
    server.launch()
    with _progress(console, "importing vLLM") as progress:
        server.wait(progress)
    console.print(f"{time.monotonic() - started_s:4.0f} s  serving at {server.url}")


# -- traffic ------------------------------------------------------------------------------------


def _traffic(console: Console, server: Server, setting: Setting) -> Sightings:
    async def run() -> Sightings:
        traffic = Traffic(server.url, setting.name, setting.model, setting.keys)
        running = asyncio.create_task(traffic.run(setting.folder, setting.environment))
        while not running.done():
            sent = traffic.seen.sent
            so_far = f": {CHAT} sent {sent[CHAT]}, {SEARCH} {sent[SEARCH]}"
            progress(f"{doing}{so_far if console.is_terminal else ''}")
            await asyncio.wait([running], timeout=0.5)
        return await running

    doing = "three tenants at once: openai clients, one of which leaves, and vllm bench serve"
    with _progress(console, doing) as progress:
        return asyncio.run(run())


def _quiet_figures(server: Server, setting: Setting, seen: Sightings) -> Figures:
    """Return the figures once nothing is in flight and all is written, or as they are then.

    They are asked for one after the other, and what is written in between is in some of them only.
    """
    deadline = time.monotonic() + QUIET_TIMEOUT_S
    while True:
        figures = Figures(
            server.cost("tenants"),
            server.cost("audit"),
            _all_requests(server),
            _statement(setting),
        )
        in_flight = any(run["in_flight_ns"] for run in figures.audit["runs"])
        if time.monotonic() > deadline or not (in_flight or problems(seen, figures)):
            return figures
        time.sleep(0.3)


def _statement(setting: Setting) -> dict[str, Any]:
    settings = load_settings(setting.environment, setting.folder / SETTINGS)
    reader = LedgerReader(str(settings.ledger), book=settings.price_book)
    try:
        return reader.statement(f"{datetime.now(UTC):%Y-%m}", idle=IDLE_POLICY)
    finally:
        reader.close()


def _all_requests(server: Server) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    page = server.cost(f"requests?limit={PAGE}")
    rows += page["requests"]
    while page["next"]:
        page = server.cost(f"requests?limit={PAGE}&next={page['next']}")
        rows += page["requests"]
    return rows


# -- what it shows ------------------------------------------------------------------------------


def _show(
    console: Console, server: Server, setting: Setting, seen: Sightings, figures: Figures
) -> None:
    console.print("\nthe headers of one reply")
    for name, value in seen.headers:
        console.print(f"  {name}: {plain(value)}", soft_wrap=True)
    console.print("\nthe last chunk of one stream")
    console.print(f"  {plain(seen.last_chunk)}", soft_wrap=True)
    console.print("\nthe bill")
    console.print(bill_table(figures.tenants["tenants"]))
    console.print(sum_line(figures.tenants), soft_wrap=True)
    for run in figures.audit["runs"]:
        console.print(audit_line(run), soft_wrap=True)
    ask = f"statement --all --month {figures.statement['month']} --idle {IDLE_POLICY}"
    console.print(f"\nvllm-cost-meter {ask}")
    print_statement(figures.statement, console.file)
    console.print()
    for name, what in (
        ("one request", f"curl {server.side_url}/cost/requests/{seen.reply_id}"),
        ("endpoint", f"{server.side_url}/cost/summary (also /cost/tenants, /cost/audit, /metrics)"),
        ("ledger", _short(str(setting.folder / "ledger.db"))),
        ("vLLM's log", _short(str(server.log))),
    ):
        console.print(f"{name:<12} {plain(what)}", soft_wrap=True)


def bill_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the bill: tenants, the classes of engine time that are not zero, the total."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("  tenant")
    for column in ("requests", "prompt", "cached", "output", "GPU seconds", "USD"):
        table.add_column(column, justify="right", no_wrap=True)
    names = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")
    shown = [row for row in rows if row["gpu_time_ns"] or row["requests"]]
    for row in shown:
        counts = ("" if is_class(row) else str(row[name]) for name in names)
        table.add_row(f"  {plain(row['tenant'])}", *counts, *_money(row))
    total = {name: sum(row[name] or 0 for row in shown) for name in (*names, "gpu_time_ns")}
    costs = [row["cost_nanousd"] for row in shown]
    cost = None if None in costs else format_usd(sum(costs))
    counts = (str(total[name]) for name in names)
    table.add_row("  total", *counts, *_money({**total, "cost_usd": cost}))
    return table


def is_class(row: Mapping[str, Any]) -> bool:
    """Tell a class of engine time, such as `__idle__`, from a tenant."""
    return str(row["tenant"]).startswith("__")


def _money(row: Mapping[str, Any]) -> tuple[str, str]:
    return f"{row['gpu_time_ns'] / 1e9:.9f}", row["cost_usd"] or "-"


def sum_line(tenants: Mapping[str, Any]) -> str:
    """Return the line under the bill: whether its rows are all of the time there was."""
    rows_ns = sum(row["gpu_time_ns"] for row in tenants["tenants"])
    missing_ns = tenants["wall_gpu_ns"] - rows_ns
    verdict = "the rows are all of" if not missing_ns else f"{missing_ns} ns are missing of"
    return f"sum: {verdict} {tenants['wall_gpu_ns'] / 1e9:.9f} s wall x GPUs"


def audit_line(run: Mapping[str, Any]) -> str:
    """Return one engine run of the audit as a line."""
    verdict = "balanced" if not run["difference_ns"] else f"{run['difference_ns']} ns are missing"
    missing = f", {len(run['missing_bills'])} bills missing" if run["missing_bills"] else ""
    return (
        f"audit, a moment later: engine {run['engine_index']} ran {run['wall_ns'] / 1e9:.9f} s "
        f"on {run['gpus']} GPU; {run['last_seq']} bills; "
        f"difference {run['difference_ns']} ns: {verdict}{missing}"
    )


def _verdict(console: Console, wrong: Sequence[str], seen: Sightings) -> int:
    untold = sum(reply.cost_usd is None for reply in seen.told)
    if untold:
        console.print(f"{untold} of {len(seen.told)} replies left before their bill was committed")
    if not wrong:
        console.print(
            f"checked: {seen.sent.total()} requests sent and billed, the tokens and costs of "
            f"{len(seen.told)} replies, {BATCH}'s totals, the client that left: all add up",
            soft_wrap=True,
        )
        return DONE
    more = f" (and {len(wrong) - PROBLEMS_SHOWN} more)" if len(wrong) > PROBLEMS_SHOWN else ""
    return _failed(f"does not add up: {'; '.join(wrong[:PROBLEMS_SHOWN])}{more}", FAILED)


def _tell_how_to_use(console: Console, server: Server, setting: Setting) -> None:
    console.print(f"\nthe server goes on; stop it with: kill {server.pid}")
    console.print(f"use it as {CHAT}, from this shell only (the key is written nowhere):")
    console.print(f"  export OPENAI_BASE_URL={server.url}/v1", soft_wrap=True)
    console.print(f"  export OPENAI_API_KEY={setting.keys[CHAT]}", soft_wrap=True)
    body = json.dumps({"model": setting.name, "prompt": "Once upon a time", "max_tokens": 16})
    console.print(
        f'  curl -si $OPENAI_BASE_URL/completions -H "Authorization: Bearer $OPENAI_API_KEY" '
        f"-H 'Content-Type: application/json' -d {shlex.quote(body)}",
        soft_wrap=True,
    )


def _short(path: str) -> str:
    """Return a path relative to where the user is, if it is below that."""
    here = f"{Path.cwd()}{os.sep}"
    return plain(path.removeprefix(here))
