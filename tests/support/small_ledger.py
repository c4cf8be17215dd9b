"""A small real ledger: one run, one HTTP request with its bill, one snapshot, one price."""

import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

from tests.support.builders import COST_MODEL, ENGINE
from tests.support.ledger_writer import LedgerWriter
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import EnergyPrice, PriceBook
from vllm_cost_meter.prices.overheads import Overhead
from vllm_cost_meter.records.bill import Bill, UsagePiece
from vllm_cost_meter.records.energy import ENERGY_CLASSES, RequestEnergy, RunEnergy
from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest, Latencies, Price, Usage
from vllm_cost_meter.records.snapshot import ClassTotals, Snapshot
from vllm_cost_meter.units.time import NS_PER_HOUR, rfc3339

HOUR = 500_000
START_NS = HOUR * NS_PER_HOUR
BILL = Bill(
    run_id="run",
    seq=1,
    request_id="chatcmpl-1-internal",
    engine_status="length_capped",
    method="shapley",
    prompt_tokens=10,
    cached_tokens=2,
    output_tokens=5,
    preemptions=0,
    steps=6,
    batch=12,
    first_model=1,
    last_model=3,
    pieces=(UsagePiece(HOUR, 100, 200, 8, 4, 150, 10, 1, 20, 2, 30, 3, 6, 900, 40),),
)
PART = EngineRequest(
    bill=BILL,
    http_request_id="cost-1",
    response_id="chatcmpl-1",
    external_id="chatcmpl-1",
    prompt_group="chatcmpl-1-internal",
    owner=Owner("search"),
    model="m",
    lora=None,
    route="/v1/chat/completions",
    cost_nanousd=7,
    marginal_cost_nanousd=3,
    started_at_ns=START_NS,
    finished_at_ns=START_NS + 10**9,
    latencies=Latencies(1.0, 2.0, 3.0, 4.0),
)
HTTP = HttpRequest(
    http_request_id="cost-1",
    response_id="chatcmpl-1",
    x_request_id="mine",
    owner=Owner("search"),
    model="m",
    route="/v1/chat/completions",
    status=200,
    streamed=False,
    usage=Usage(10, 2, 5),
    gpu_time_ns=300,
    cost_nanousd=7,
    started_at_ns=START_NS,
    finished_at_ns=START_NS + 10**9,
)
ENERGY = dict.fromkeys(ENERGY_CLASSES, 0) | {"requests": 30, "idle": 10}
TOTALS = ClassTotals(requests=300, idle=1_000, host=50)
SNAPSHOT = Snapshot(
    run_id="run",
    number=1,
    taken_at_ns=START_NS + 2 * 10**9,
    started_at_ns=START_NS,
    wall_ns=TOTALS.total(),
    totals=TOTALS,
    last_seq=1,
    billed_ns=300,
    running=0,
    waiting=0,
    kv_cache_usage=0.0,
    steps=6,
    busy_ns=300,
    own_ns=3,
    errors=0,
    state="on",
    engine=replace(ENGINE, method="shapley", hardware="NVIDIA H100 80GB HBM3"),
    prior="ModelMetrics",
    cost_models=(COST_MODEL,),
    hours={HOUR: TOTALS},
    energy=RunEnergy(40, None, 0, ENERGY, (), {HOUR: ENERGY}, (RequestEnergy(1, HOUR, 30, None),)),
)


def live_now(path: Path) -> None:
    """Let the engines of a ledger live: their last snapshots are of this moment."""
    with closing(sqlite3.connect(path)) as connection, connection:
        taken_at = rfc3339(time.time_ns())
        connection.execute("UPDATE snapshots SET taken_at = ?", (taken_at,))


def small_ledger(folder: Path) -> LedgerReader:
    """Write the ledger into a folder and return a reader of it."""
    url = f"sqlite:///{folder / 'ledger.db'}"
    price = Price("settings:2.5", "2.5", "COST_METER_GPU_HOUR_USD", 0)
    writer = LedgerWriter(url, price_of=lambda _: price)
    writer.start()
    writer.commit(PART, HTTP, SNAPSHOT).result(10)
    writer.close()
    book = PriceBook(
        energy_prices=[EnergyPrice("energy_prices[0]", Decimal("0.3"), "the bill", HOUR)],
        overheads=[Overhead("overheads[0]", "rent", "the lease", usd_per_month=Decimal(744))],
    )
    return LedgerReader(url, book=book)
