"""A bill can be recomputed by hand from its explanation: the books make it, the ledger explains."""

from dataclasses import replace
from decimal import ROUND_HALF_EVEN, Decimal

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from tests.support.builders import ENGINE, ENGINE_STATE, HOUR, make_bill, make_part, make_snapshot
from tests.support.ledger_writer import LedgerWriter
from vllm_cost_meter.attribution.cost_model import (
    CURVE,
    DECODE_COMPUTE,
    EARLIER_CURVE,
    EXPERTS,
    FIT_TERMS,
    FIXED,
    LORA,
    PAIRS,
    RAMPS,
    SEQUENCE,
    SLOPES,
)
from vllm_cost_meter.cli.commands import app
from vllm_cost_meter.endpoint.app import make_app
from vllm_cost_meter.engine.books import EngineBooks, RequestFacts
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.cost import cost_nanousd
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.requests import Price
from vllm_cost_meter.records.snapshot import CostModel
from vllm_cost_meter.reports.charges import within

USD = Decimal("2.5")
# In GPU-ns: a step, a request, a token, a pair of query and key, a token of a decode's context.
FIXED_NS, SEQUENCE_NS, TOKEN_NS, PAIR_NS, CONTEXT_NS = 4e6, 2e5, 3e5, 1e3, 5e3
COEFFICIENTS = tuple(
    {FIXED: FIXED_NS, SEQUENCE: SEQUENCE_NS, PAIRS: PAIR_NS, DECODE_COMPUTE: CONTEXT_NS}.get(
        term, TOKEN_NS if SLOPES <= term < EXPERTS else 0.0
    )
    for term in range(FIT_TERMS)
)
# Who is in each step, with the tokens computed for them; and where their contexts end.
STEPS = [
    {"alice-1": (64, 96)},
    {"alice-1": (1, 97), "bob-1": (32, 32)},
    {"alice-1": (1, 98), "bob-1": (1, 33)},
]

# How much of their time may belong to others; bob's meter does not know it.
ERRORS_NS = {"alice-1": 1_000_000, "bob-1": None}


def predicted_ns(step: dict[str, tuple[int, int]]) -> int:
    """Return what the model says a step takes."""
    return int(FIXED_NS + sum(own_ns(*each) for each in step.values()))


def own_ns(tokens: int, end: int) -> float:
    """Return what a request takes by itself; it is a prefill if it has several tokens."""
    pairs = sum(range(end - tokens + 1, end + 1))
    attention = CONTEXT_NS * end if tokens == 1 else PAIR_NS * pairs
    return SEQUENCE_NS + TOKEN_NS * tokens + attention


def as_earlier(model: CostModel) -> CostModel:
    """Return a model as a version wrote it whose curve had no features."""
    coefficients = (*model.curve.coefficients[:LORA], *model.curve.coefficients[SLOPES:])
    curve = replace(model.curve, coefficients=coefficients, form=EARLIER_CURVE)
    return replace(model, form=EARLIER_CURVE, curve=curve)


@pytest.fixture
def ledger(tmp_path, request):
    """Return the URL of a ledger with two requests that shared steps as the model predicts."""
    now_ns = 10**12
    unix_ns = 1_800_000_000 * 10**9
    books = EngineBooks(
        run_id="run", engine=replace(ENGINE, method="shapley"), created_ns=now_ns, now_ns=now_ns,
        unix_ns=unix_ns,
    )  # fmt: skip
    books.adopt(((0.0,) * 5, (0.0,) * 5), COEFFICIENTS, False)
    for name, prompt in (("alice-1", 96), ("bob-1", 32)):
        books.open(name, prompt, now_ns)
    books.meter.position("alice-1", 32, False)
    for step in STEPS:
        key = object()
        books.begin_step(key, {name: tokens for name, (tokens, _) in step.items()}, now_ns)
        now_ns += predicted_ns(step)
        books.end_step(key, now_ns)
    parts = []
    for name, prompt, cached in (("alice-1", 96, 32), ("bob-1", 32, 0)):
        facts = RequestFacts(
            engine_status="stopped", prompt_tokens=prompt, cached_tokens=cached, output_tokens=2,
            preemptions=0,
        )  # fmt: skip
        bill = books.bill(name, facts, now_ns)
        (piece,) = bill.pieces
        bill = bill._replace(pieces=(piece._replace(charge_error_ns=ERRORS_NS[name]),))
        cost = cost_nanousd(bill.gpu_time_ns, USD)
        parts.append(make_part(bill, tenant=name[:-2], cost_nanousd=cost, external_id=name))
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    price = Price("p", str(USD), "the invoice", 0)
    writer = LedgerWriter(url, price_of=lambda _: price)
    writer.start()
    snapshot = books.snapshot(now_ns, unix_ns + 10**9, 0, ENGINE_STATE)
    models = snapshot.cost_models
    if getattr(request, "param", CURVE) == EARLIER_CURVE:
        models = tuple(as_earlier(model) for model in models)
    writer.commit(*parts, replace(snapshot, cost_models=models)).result(10)
    writer.close()
    return url


@pytest.fixture
def explain(ledger):
    reader = LedgerReader(ledger)
    client = TestClient(make_app(reader), base_url="http://localhost")
    yield lambda id: client.get(f"/cost/requests/{id}/explain")
    reader.close()


@pytest.mark.parametrize("name", ["alice-1", "bob-1"])
def test_the_figures_of_an_explanation_follow_from_each_other(explain, name):
    explanation = explain(name).json()
    (part,) = explanation["parts"]
    phases = part["phases"]
    assert phases["prefill"]["gpu_time_ns"] + phases["decode"]["gpu_time_ns"] == part["gpu_time_ns"]
    assert part["share"] * part["step_ns"] == pytest.approx(part["gpu_time_ns"])
    assert part["average_batch"] * part["steps"] == part["batch"]
    assert part["marginal_ns"] + part["common_ns"] == part["gpu_time_ns"]
    cost = Decimal(part["gpu_time_ns"]) * Decimal(part["usd_per_gpu_hour"]) / 3600
    assert int(cost.quantize(Decimal(1), ROUND_HALF_EVEN)) == part["cost_nanousd"]
    assert part["told_nanousd"] == part["cost_nanousd"] == explanation["cost_nanousd"]


def test_a_bill_says_how_far_it_may_be_off(explain):
    explanation = explain("alice-1").json()
    (part,) = explanation["parts"]
    assert part["charge_error_ns"] == 1_000_000
    assert part["charge_error"] == 1_000_000 / part["gpu_time_ns"]
    assert f"  split known to within {within(part['charge_error'])}" in explanation["text"]


def test_where_that_is_unknown_a_bill_does_not_say_0(explain):
    explanation = explain("bob-1").json()
    (part,) = explanation["parts"]
    assert part["charge_error_ns"] is part["charge_error"] is None
    assert not any("split known" in line for line in explanation["text"])


@pytest.mark.parametrize("name", ["alice-1", "bob-1"])
@pytest.mark.parametrize(
    ("ledger", "form"), [(CURVE, CURVE), (EARLIER_CURVE, EARLIER_CURVE)], indirect=["ledger"]
)
def test_a_bill_is_recomputed_by_hand_from_the_method_and_the_coefficients(explain, name, form):
    (part,) = explain(name).json()["parts"]
    (model,) = part["cost_models"]
    assert (part["method"], model["form"], model["curve"]["form"]) == ("shapley", form, form)
    per, token_ns = model["curve"]["terms"], model["curve"]["token_ns"]
    assert ("lora_ns" in per) == (form == CURVE)
    assert list(token_ns) == [str(begin) for begin in RAMPS]
    assert set(token_ns.values()) == {TOKEN_NS}, "a token costs the same whatever the batch"
    assert per["read_ns"] == 0, "so attention is its arithmetic, which adds up"
    mine = [(len(step), *step[name]) for step in STEPS if name in step]
    # Each pays for its own work, and as much as the others for what a step takes anyway.
    common_ns = sum(per["fixed_ns"] / batch for batch, _, _ in mine)
    # Each token of a prefill meets itself and those before it; a decode meets its context.
    pairs = sum(sum(range(end - n + 1, end + 1)) for _, n, end in mine if n > 1)
    own = (
        token_ns["0"] * sum(phase["tokens"] for phase in part["phases"].values())
        + per["sequence_ns"] * part["steps"]
        + per["pair_ns"] * pairs
        + per["decode_compute_ns"] * sum(end for _, n, end in mine if n == 1)
    )
    assert part["gpu_time_ns"] == pytest.approx(common_ns + own, rel=1e-6)


def test_what_caching_saved_is_told_with_the_coefficients_to_check_it(explain):
    (part,) = explain("alice-1").json()["parts"]
    curve = part["cost_models"][0]["curve"]
    saved_ns = 32 * curve["token_ns"]["1024"] + 32 * 33 / 2 * curve["terms"]["pair_ns"]
    assert part["cached"] == {"tokens": 32, "saved_estimate_ns": int(saved_ns)}
    assert "(an estimate)" in " ".join(explain("alice-1").json()["text"])
    assert explain("bob-1").json()["parts"][0]["cached"] == {"tokens": 0, "saved_estimate_ns": 0}


def test_the_command_says_it_in_sentences(ledger):
    told = CliRunner().invoke(app, ["explain", "alice-1", "--ledger", ledger])
    assert told.exit_code == 0
    assert "tenant alice" in told.output
    invoice = (
        "x 2.5 USD per GPU-hour (gpu, the invoice (recorded when the run began)) = 0.000023266 USD"
    )
    assert invoice in told.output
    assert "cost model 1: curve with features, what it began with" in told.output
    assert "off by 0.0%" not in told.output


def test_an_id_that_is_not_there_is_404_and_one_line(explain, ledger):
    assert explain("nobody").status_code == 404
    told = CliRunner().invoke(app, ["explain", "nobody", "--ledger", ledger])
    assert (told.exit_code, told.output.count("\n")) == (2, 1)


def test_what_was_wasted_and_a_missing_price_are_told(tmp_path):
    url = f"sqlite:///{tmp_path / 'other.db'}"
    pieces = (UsagePiece(HOUR, 100, 200, 8, 5, 50, 30, 3, 20, 2, 10, 1, 6, 900),)
    writer = LedgerWriter(url)
    writer.start()
    part = make_part(make_bill(preemptions=1, pieces=pieces))
    writer.commit(part, make_snapshot(last_seq=1, billed_ns=300)).result(10)
    writer.close()
    reader = LedgerReader(url)
    (row,) = reader.look_up("internal-1")
    explanation = reader.explain(row)
    reader.close()
    (told,) = explanation["parts"]
    assert told["preempted"] == {
        "preemptions": 1, "recomputed_tokens": 3, "recomputed_ns": 30, "paid_by": "victim",
    }  # fmt: skip
    assert told["drafts"] == {"rejected_tokens": 2, "rejected_ns": 20}
    assert told["cut_off"] == {"cut_tokens": 1, "cut_ns": 10}
    assert (told["usd_per_gpu_hour"], told["cost_nanousd"]) == (None, None)
    text = " ".join(explanation["text"])
    assert "no price for run run at 2027-01-15T08Z: none is set by COST_METER_GPU_HOUR_USD" in text
    assert told["cost_reason"] in text
    assert "preempted 1 times: 3 tokens were computed again" in text
    assert "2 draft tokens were rejected" in text
    assert "1 tokens were computed that are not in the output" in text
