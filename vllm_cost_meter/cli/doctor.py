"""The command `doctor`: check the installation, vLLM, the ledger, the books, prices and energy.

Each check reports in one line what it found. A check that raises has failed, and its detail is the
error.

Invariant: it changes nothing, except that it creates the ledger's file if there is none, and closes
its files to other users.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import typer
from sqlalchemy import make_url, update

from vllm_cost_meter.activation import NAME
from vllm_cost_meter.cli.options import Config, Json, Ledger, ledger_url, one_line_errors
from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.console import print_lines
from vllm_cost_meter.endpoint.answers import MeterHealth
from vllm_cost_meter.engine.energy.nvml import EnergyCounter
from vllm_cost_meter.ledger.database import check_location, open_database, writing
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.schema import schema_version
from vllm_cost_meter.prices.book import NO_PRICES, PriceBook, RunFacts, described
from vllm_cost_meter.units.time import NS_PER_HOUR
from vllm_cost_meter.version import __version__

# Servers hold the ledger for milliseconds at a time.
LEDGER_TIMEOUT_S = 2.0
SERVER_TIMEOUT_S = 5.0
# No server answers at the port of these.
UNASKED = Settings(port="off")
GROUPS = ("vllm.general_plugins", "vllm.stat_logger_plugins", "vllm.endpoint_plugins")


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check."""

    name: str
    ok: bool
    detail: str


def doctor_(ledger: Ledger = None, config: Config = None, as_json: Json = False) -> None:
    """Is the meter installed, and does it work?

    Each check says in one line what it found. Exit status 1 if one fails.

    Example: vllm-cost-meter doctor --ledger ledger.db
    """
    with one_line_errors():
        settings = load_settings(config=config)
    findings = examine(ledger_url(ledger, config), settings.price_book, settings)
    if as_json:
        print(json.dumps({"ok": all(f.ok for f in findings), "findings": _dicts(findings)}))
    else:
        for finding in findings:
            print_lines([f"{'ok  ' if finding.ok else 'FAIL'} {finding.name}: {finding.detail}"])
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def examine(
    ledger_url: str,
    book: PriceBook = NO_PRICES,
    settings: Settings = UNASKED,
    *,
    ledger_timeout_s: float = LEDGER_TIMEOUT_S,
) -> list[Finding]:
    """Run all checks; `book` is the price book in the settings, which name the server's port.

    A ledger that another process holds for longer than `ledger_timeout_s` cannot be written.
    """
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("entry points", _entry_points),
        ("named", _named),
        ("native", _native),
        ("vllm", _vllm),
        ("ledger", lambda: _ledger(ledger_url, ledger_timeout_s)),
        ("books", lambda: _books(ledger_url)),
        ("server", lambda: _server(settings)),
        ("cost model", lambda: _cost_model(ledger_url)),
        ("price", lambda: _price(ledger_url, book)),
        ("energy", _energy),
        ("access", lambda: _access(settings)),
    ]
    return [_contained(name, check) for name, check in checks]


def _contained(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - a doctor reports what it meets
        cause = getattr(error, "orig", None) or error
        return Finding(name, False, f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}")


def _entry_points() -> Finding:
    missing = [g for g in GROUPS if NAME not in {e.name for e in entry_points(group=g)}]
    if missing:
        return Finding("entry points", False, f"{NAME} is missing in {', '.join(missing)}")
    return Finding("entry points", True, f"{NAME} {__version__} is found in all three groups")


def _named() -> Finding:
    names = os.environ.get("VLLM_PLUGINS")
    if names is not None and NAME not in names.split(","):
        detail = f"VLLM_PLUGINS={names} leaves {NAME} out: it is never loaded, nor is --plugins"
        return Finding("named", False, detail)
    if names is None:
        return Finding("named", True, f"VLLM_PLUGINS is unset: start with --plugins {NAME}")
    return Finding("named", True, f"VLLM_PLUGINS={names}")


def _native() -> Finding:
    from vllm_cost_meter import attribution  # fails where it is not built

    if attribution.NATIVE:
        return Finding("native", True, "the native attribution is loaded")
    return Finding("native", False, "the slow Python twin is loaded (COST_METER_PURE_PYTHON=1)")


def _vllm() -> Finding:
    from vllm_cost_meter.vllm_hooks.canary import check_all  # takes seconds

    return Finding("vllm", True, f"vLLM {check_all()} looks as the meter expects")


def _ledger(url: str, timeout_s: float) -> Finding:
    check_location(url)
    engine = open_database(url, busy_timeout_s=timeout_s)
    try:
        with writing(engine).begin() as connection:
            # This changes nothing, and fails where a bill would: locked, read-only or full.
            connection.execute(update(schema_version).values(version=schema_version.c.version))
    finally:
        engine.dispose()
    shown = make_url(url).render_as_string(hide_password=True)
    return Finding("ledger", True, f"{shown} can be written")


def _books(url: str) -> Finding:
    reader = LedgerReader(url)
    try:
        answer = reader.audit()
    finally:
        reader.close()
    runs = answer["runs"]
    if answer["balanced"] is False:
        return Finding("books", False, "they do not balance: vllm-cost-meter audit says where")
    engines_off = [run["run_id"][:8] for run in runs if run["alive"] and run["state"] == "off"]
    if engines_off:
        detail = f"the meter switched itself off in run {', '.join(engines_off)}: see the log"
        return Finding("books", False, detail)
    known = f"{len(runs)} engine runs balance"
    if bare := len(answer["without_totals"]):
        return Finding("books", True, f"{known}; of {bare} more no totals are known")
    return Finding("books", True, known if runs else "no engine run is in the ledger yet")


def _server(settings: Settings) -> Finding:
    """Ask the server that these settings name, if one answers, how its meter does."""
    if not settings.port:
        return Finding("server", True, "not asked: COST_METER_PORT names no port of its endpoint")
    if settings.admin_token is None and settings.admin_token_sha256 is not None:
        detail = "not asked: of the token that it wants, the settings have the SHA-256 only"
        return Finding("server", True, detail)
    # Whoever listens on all addresses answers on loopback.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104
    url = f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"
    request = urllib.request.Request(f"{url}/cost/health")  # noqa: S310 - always http
    if settings.admin_token is not None:
        token = settings.admin_token.get_secret_value()
        request.add_header("Authorization", f"Bearer {token}")
    try:
        # The server is asked itself, whatever proxy the environment names.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=SERVER_TIMEOUT_S) as answer:
            health: MeterHealth = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        why = "set COST_METER_ADMIN_TOKEN" if error.code == 401 else "is it another program?"
        return Finding("server", False, f"{url} answers {error.code} to /cost/health; {why}")
    except urllib.error.URLError as error:
        return Finding("server", True, f"none answers at {url}: {error.reason}")
    broken = [loop for loop in health["loops"] if loop["state"] != "ok"]
    said = [
        f"{loop['loop']} fails for {loop['failing_for_s']:.0f} s ({loop['last_error']})"
        for loop in broken
    ]
    if health["status"] == "off":
        said.append("the meter switched itself off: see the log, and restart the server")
    if health["ledger_error"] is not None:
        said.append(f"the ledger cannot be written: {health['ledger_error']}")
    said += [
        f"the process of the {each['process']} ended {each['restarts']} times, the last time it"
        f" {each['last_end']}"
        for each in health["side_processes"]
        if each["restarts"]
    ]
    if not said:
        names = ", ".join(loop["loop"] for loop in health["loops"])
        said = [f"{names} work"] if names else []
    return Finding(
        "server", health["status"] == "ok", f"{url} says {health['status']}; " + "; ".join(said)
    )


def _cost_model(url: str) -> Finding:
    reader = LedgerReader(url)
    try:
        found = reader.cost_models()
    finally:
        reader.close()
    if not found:
        return Finding("cost model", True, "no engine has run with this ledger yet")
    latest = found[0]
    if not latest["steps"]:
        return Finding("cost model", True, f"no step learnt from yet; prior: {latest['prior']}")
    return Finding(
        "cost model",
        True,
        f"{latest['form']}, version {latest['version']}, {latest['steps']} steps of"
        f" {latest['model']}: mean error {latest['error']:.1%},"
        f" {latest['explained']:.1%} of the variance explained",
    )


def _price(url: str, book: PriceBook) -> Finding:
    """Find the present price for the latest run.

    Without any price the check passes, because prices are optional. It also passes if all prices
    are for certain runs only and no run is known yet.
    """
    reader = LedgerReader(url)
    try:
        run = reader.latest_run()
    finally:
        reader.close()
    hour = time.time_ns() // NS_PER_HOUR
    facts = RunFacts() if run is None else run
    price = book.price_at(facts, hour)
    if price is not None:
        return Finding("price", True, f"now {described(price.as_dict())}, by {price.key}")
    is_meant = run is None or not book.listed()["prices"]
    detail = f"none now, so cost is null: {book.why_no_price(facts, hour)}"
    return Finding("price", is_meant, detail)


def _energy() -> Finding:
    """Read the energy of the first GPU that a server here would see; passes without a GPU."""
    counter = EnergyCounter([0])
    reading = counter.read(time.monotonic_ns())
    code, _, detail = (reading.reason or "").partition(": ")
    if code != "first":  # "first" is the first reading of a counter that works.
        # Only a missing binding is a fault, because it is installed with the meter.
        return Finding("energy", code != "no_binding", f"not measured: {detail}")
    device = counter.devices[0]
    return Finding("energy", True, f"the counter of {device.name} ({device.uuid}) can be read")


def _access(settings: Settings) -> Finding:
    """Recommend what keeps out those whom no rule names, once somebody is named."""
    if settings.unnamed_requests == "refuse":
        return Finding("access", True, "requests that no rule names are refused")
    if not settings.leaves_some_unnamed:
        return Finding("access", True, "every request has the same right to be served")
    detail = (
        "requests that no rule names are served and billed to unknown, and vLLM's API keys do not"
        " guard all routes; recommended: COST_METER_UNNAMED_REQUESTS=refuse"
    )
    return Finding("access", True, detail)


def _dicts(findings: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"name": f.name, "ok": f.ok, "detail": f.detail} for f in findings]
