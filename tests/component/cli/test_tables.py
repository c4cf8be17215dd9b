"""Tables fit the terminal: what is shown at 80 and 120 columns, with --wide, and in a pipe."""

import io
import json
import re
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import takewhile
from pathlib import Path

import pytest

from tests.component.cli.test_cli import no_settings
from tests.component.ledger.test_economics import write
from tests.component.ledger.test_reader import Ledger
from tests.support.small_ledger import live_now
from tests.support.upkeep import sums_again
from tests.unit.lab.test_sweep import SHAPE, curve, swept
from vllm_cost_meter.cli import budgets
from vllm_cost_meter.cli import sweep as sweeping
from vllm_cost_meter.cli.commands import app
from vllm_cost_meter.console import TEXT_CHARS_MAX, print_lines, print_rows
from vllm_cost_meter.lab.sweep.run import Plan
from vllm_cost_meter.ledger.tables.packed import pack_id
from vllm_cost_meter.units.money import figure_text

__all__ = ["no_settings"]

TENANT = "customer-success-of-emea-production"
MODEL = "meta-llama/Llama-3.1-405B-Instruct-FP8"
ALL_TIME = "2026-01-01T00:00:00Z,2028-01-01T00:00:00Z"
SETTINGS = f"""
[[tenants]]
name = "{TENANT}"
parent = "the-holding-of-them-all-and-more"
tags = {{ team = "search-and-recommendation", cost_center = "4711-0815-1234-5678" }}
api_key_sha256 = ["{"a1" * 32}"]

[[tenants]]
name = "the-holding-of-them-all-and-more"

[[budgets]]
name = "the-first-quarter-of-{TENANT}"
tenant = "{TENANT}"
gpu_seconds = 1000
period = "month"

[[prices]]
amount = 98.32
currency = "USD"
scope = "node"
gpus = 8
kind = "on_demand"
effective_from = 2026-01-01T00:00:00Z
source = "the invoice of November, page 9"
"""
READINGS = (
    "resource,timestamp,cumulative_usd\n"
    "projects/a-long-name/instances/gpu-1,2027-01-15T08:00:00Z,1\n"
    "projects/a-long-name/instances/gpu-1,2027-01-15T09:00:00Z,1.5\n"
    "projects/a-long-name/instances/gpu-1,2027-01-15T10:00:00Z,0.1\n"
)
# Each table of the command line, on long names.
COMMANDS: dict[str, tuple[str, ...]] = {
    "report": ("report",),
    "report requests": ("report", "requests"),
    "report --aggregate": ("report", "--aggregate", "tenant,model,route", "--idle", "proportional"),
    "statement": ("statement", "--month", "2027-01", "--tenant", TENANT),
    "statement --all": ("statement", "--month", "2027-01", "--all"),
    "budgets": ("budgets",),
    "prices": ("prices",),
    "audit": ("audit",),
    "doctor": ("doctor",),
    "economics": ("economics", "--window", ALL_TIME),
    "compare": ("compare", "--window", ALL_TIME, "--model", "openai/gpt-4o*"),
    "invoice list": ("invoice", "list"),
    "invoice days": ("invoice", "days"),
    "saturation list": ("saturation", "list"),
    "tenants list": ("tenants", "list"),
    "calc c-eff": ("calc", "c-eff", "--usd-per-hour", "2.49", "--output-tokens-per-s", "2500"),
    "calc penalty": ("calc", "penalty", "--curve", "CURVE", "--usd-per-hour", "2.49"),
    "break-even": (
        *("break-even", "--tokens-per-hour", "9e6", "--api-usd-per-m", "0.6"),
        *("--usd-per-hour", "2.49", "--spot-usd-per-hour", "1", "--volume", "1,1000000"),
    ),
    "validate": (
        *("validate", "--roofline", "--gpu", "l4", "--model", "llama-3.1-8b"),
        *("--batch", "60", "--steps", "200"),
    ),
}  # fmt: skip
# They have more columns than 80 characters can show.
MANY_COLUMNS = [
    "report requests", "report --aggregate", "statement", "statement --all", "prices", "compare",
    "invoice list", "invoice days", "saturation list", "validate",
]  # fmt: skip


# What a reader of 80 columns must see of each table.
KEY_COLUMNS = {
    "report": ("tenant", "requests", "gpu_seconds", "cost_usd"),
    "report requests": ("http_request_id", "tenant", "cost_usd"),
    "report --aggregate": ("tenant", "model", "gpu_seconds", "cost_usd"),
    "statement": ("day", "item", "amount_usd"),
    "statement --all": ("tenant", "day", "item", "amount_usd"),
    "budgets": ("budget", "state", "used", "limit", "unit"),
    "prices": ("key", "effective_from", "usd_per_gpu_hour"),
    "economics": ("figure", "value", "unit", "meaning"),
    "compare": ("model", "usd", "usd_per_m_output_tokens", "times"),
    "invoice list": ("resource", "kind", "billed_usd"),
    "invoice days": ("day", "metered_usd", "billed_gpu_usd", "difference_usd"),
    "saturation list": ("measured_at", "model", "hardware", "output_tokens_per_s"),
    "tenants list": ("tenant", "parent", "keys"),
    "calc c-eff": ("figure", "value"),
    "calc penalty": ("requests_per_s", "output_tokens_per_s", "usd_per_m_output_tokens", "penalty"),
    "break-even": ("kind", "usd_per_hour", "break_even_m_tokens_per_month"),
}


class Terminal(io.StringIO):
    """What a command takes for a terminal; how wide it is says COLUMNS."""

    def isatty(self) -> bool:
        return True


Show = Callable[..., list[str]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ledger of long names, the settings, a curve and a provider's readings."""
    folder = tmp_path_factory.mktemp("tables")
    url = f"sqlite:///{folder / 'ledger.db'}"
    ledger = Ledger(url)
    write(ledger)
    ledger.close()
    with closing(sqlite3.connect(folder / "ledger.db")) as connection, connection:
        connection.create_function("pack_id", 1, pack_id)
        for table in ("http_requests", "requests", "usage_pieces"):
            connection.execute(f"UPDATE {table} SET tenant = ?", (TENANT,))
            columns = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
            if "model" in columns:
                connection.execute(f"UPDATE {table} SET model = ?", (MODEL,))
        connection.execute("UPDATE runs SET model = ?, host = 'gpu-node-7.eu-west-1'", (MODEL,))
        # Ids as long as the meter makes them, and a request of 12345.678901234 USD.
        for table in ("http_requests", "requests", "usage_pieces", "open_requests"):
            columns = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
            if "http_request_id" in columns:
                connection.execute(
                    f"UPDATE {table} SET http_request_id = pack_id('cost-' ||"
                    " substr('00000000000000000000000000000000' || http_request_id, -32))"
                )
        for table in ("http_requests", "requests"):
            connection.execute(f"UPDATE {table} SET cost_nanousd = 12345678901234")
    sums_again(folder / "ledger.db")
    (folder / "meter.toml").write_text(SETTINGS)
    (folder / "readings.csv").write_text(READINGS)
    found = curve(swept(Plan(SHAPE, window_s=100, warmup_s=10)))
    (folder / "curve.json").write_text(json.dumps(found))
    book = ("--ledger", str(folder / "ledger.db"))
    for words in (
        ("invoice", "import", str(folder / "readings.csv"), "--format", "snapshots", *book),
        ("saturation", "import", str(folder / "curve.json"), *book),
    ):
        assert not app(args=list(words), standalone_mode=False)
    return folder


@pytest.fixture
def show(files: Path, monkeypatch: pytest.MonkeyPatch) -> Show:
    """Return what runs a command and returns the lines that it printed."""

    def run(words: Sequence[str], width: int | None) -> list[str]:
        out = io.StringIO() if width is None else Terminal()
        monkeypatch.setenv("COLUMNS", str(width or 80))
        monkeypatch.setenv("TERM", "dumb")
        monkeypatch.setenv("COST_METER_CONFIG", str(files / "meter.toml"))
        monkeypatch.setenv("COST_METER_LEDGER", f"sqlite:///{files / 'ledger.db'}")
        monkeypatch.setattr("sys.stdout", out)
        given = [str(files / "curve.json") if word == "CURVE" else word for word in words]
        status = app(args=given, standalone_mode=False)
        monkeypatch.undo()
        assert status != 2, f"{words} were refused"  # 1: the made-up books do not add up
        return [line.rstrip() for line in out.getvalue().splitlines()]

    return run


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_line_is_wider_than_the_terminal(show: Show, name: str, width: int) -> None:
    lines = show(COMMANDS[name], width)
    assert len(lines) > 1
    assert [line for line in lines if len(line) > width] == []


@pytest.mark.parametrize("name", MANY_COLUMNS)
def test_a_wider_terminal_shows_more_and_wide_shows_all(show: Show, name: str) -> None:
    narrow, wider, wide, piped = (
        set(" ".join(show((*COMMANDS[name], *more), width)).split())
        for more, width in (((), 80), ((), 120), (("--wide",), 80), ((), None))
    )
    assert "--wide" in narrow
    heads = piped - narrow
    assert heads & wider, "what 80 columns leave out and 120 show"
    assert wide == piped


@pytest.mark.parametrize("name", KEY_COLUMNS)
def test_80_columns_keep_the_columns_that_matter_with_a_row_on_each_line(
    show: Show, name: str
) -> None:
    narrow, wide = show(COMMANDS[name], 80), show((*COMMANDS[name], "--wide"), 80)
    (head,) = (line for line in narrow if set(KEY_COLUMNS[name]) <= set(line.split()))
    start = narrow.index(head) + 1
    (wide_head,) = (line for line in wide if set(KEY_COLUMNS[name]) <= set(line.split()))
    last = re.compile(
        "left out: |each row is |long texts are shortened|DOES NOT ADD UP|priced at |the same "
        "|formula: |taxes: |from |$"
    )
    rows = list(takewhile(lambda line: not last.match(line), narrow[start:]))
    all_rows = list(takewhile(lambda line: not last.match(line), wide[wide.index(wide_head) + 1 :]))
    assert rows
    assert len(rows) == len(all_rows)


def test_a_budget_never_loses_its_limit(show: Show) -> None:
    head, row, *_ = show(("budgets",), 80)
    assert head.split() == ["budget", "of", "state", "used", "limit", "unit"]
    assert row.split()[2:] == ["within", "0.00", "1000.00", "GPU-s"]


def test_a_budget_of_billions_shows_all_that_matters_at_80_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    amounts = {"used": "999999999999.99", "limit": "1000000000000.00", "over": "-"}
    row = {"budget": TENANT, "of": TENANT, "state": "unknown", "unit": "GPU-s", **amounts}
    print_rows([row], budgets.COLUMNS, first=budgets.FIRST, file=out)
    head, shown, *_ = out.getvalue().splitlines()
    assert head.split() == ["budget", "state", "used", "limit", "unit"]
    assert shown.split()[1:] == ["unknown", "999999999999.99", "1000000000000.00", "GPU-s"]


def test_what_is_left_out_is_named_below_the_table(show: Show, files: Path) -> None:
    live_now(files / "ledger.db")
    head, *rows, note, rest = show(("report", "requests"), 80)
    assert len(rows) == 5
    assert head.split() == ["http_request_id", "tenant", "cost_usd"]
    assert rows[-1].split()[1:] == ["customer-su...production", "12345.678901234"]
    assert len(rows[-1].split()[0]) == len("cost-") + 32, "an id is never cut"
    assert note == "left out: finished_at, route, state, status, engine_status, prompt_tokens,"
    assert rest == "output_tokens, gpu_seconds; --wide shows all"


def test_the_sweeps_table_fits() -> None:
    points = curve(swept(Plan(SHAPE, window_s=100, warmup_s=10)))["points"]
    rows = [
        {"shape": "100x10", **{key: figure_text(key, value) for key, value in point.items()}}
        for point in points
    ]
    out = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        patch.setenv("TERM", "dumb")
        print_rows(rows, sweeping.COLUMNS, first=sweeping.FIRST, file=out)
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert out.getvalue().split()[:2] == ["shape", "requests_per_s"]


def test_a_long_text_keeps_its_two_ends_and_no_figure_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    row = {"tenant": TENANT, "output_tokens": 10**30, "at": "2027-01-15T08:00:00.123456Z"}
    print_rows([row], ("at", "tenant", "output_tokens"), first=("output_tokens", "at"), file=out)
    shown = out.getvalue()
    assert str(10**30) in shown
    assert "left out: at, tenant; --wide shows all" in shown
    monkeypatch.setenv("COLUMNS", "79")
    print_rows([row], ("at", "tenant", "output_tokens"), first=("output_tokens", "at"), file=out)
    last = out.getvalue().splitlines()[-2].split()
    assert last == ["2027-01-15T08:00:00Z", "customer-su...production", str(10**30)]
    assert len(last[1]) == TEXT_CHARS_MAX
    assert out.getvalue().splitlines()[-1] == "long texts are shortened; --wide shows all"


def test_a_line_below_a_table_wraps_between_words_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    terminal, pipe = Terminal(), io.StringIO()
    for out in (terminal, pipe):
        print_lines(["twelve words of a line", "short"], out)
    assert terminal.getvalue() == "twelve words of a\n  line\nshort\n"
    assert pipe.getvalue() == "twelve words of a line\nshort\n"
