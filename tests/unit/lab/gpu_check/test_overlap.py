"""The test of the cost model's form, on machines whose steps follow a formula stated here."""

import random

import pytest

from vllm_cost_meter.attribution.cost_model import (
    CURVE,
    EARLIER_CURVE,
    PAIRS,
    RAMPS,
    READ,
    TWO_PLANES,
)
from vllm_cost_meter.attribution.features_py import StepPart
from vllm_cost_meter.engine.step_log import LoggedPart, LoggedStep
from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.lab.gpu_check.overlap import (
    LONG,
    SHORT,
    Spread,
    answer,
    chunk_steps,
    fitted,
    forms_of,
    predicted_ns,
)
from vllm_cost_meter.lab.gpu_check.plan import ON_CPU, ON_GPU
from vllm_cost_meter.lab.gpu_check.sections import _says
from vllm_cost_meter.ledger.queries.cost_models import CURVE_NAMES, TERM_NAMES

CHUNK = 2048
# GPU-ns of a machine: what each step takes, a token, a pair of query and key, a token of context.
FIXED_NS, TOKEN_NS, PAIR_NS, CONTEXT_NS = 6e6, 20_000.0, 0.5, 40.0
PAIRS_OF_CHUNK = CHUNK * (CHUNK + 1) / 2


def step_ns(decodes: int, context: int, chunk: int, *, overlaps: bool) -> float:
    arithmetic = PAIR_NS * chunk * (chunk + 1) / 2
    reading = CONTEXT_NS * (decodes * context + chunk)
    attention = max(arithmetic, reading) if overlaps else arithmetic + reading
    return FIXED_NS + TOKEN_NS * (decodes + chunk) + attention


def logged(parts: list[tuple[int, int, int]], ns: float) -> LoggedStep:
    named = [LoggedPart(f"r{n}", *part) for n, part in enumerate(parts)]
    return LoggedStep(0, round(ns), named)


def steps_of(decodes: int, context: int, *, overlaps: bool, noise: float = 0.0, chunks: int = 8):
    rng = random.Random(f"{decodes} {overlaps}")
    steps = []
    for number in range(chunks * 6):
        position = context + number - 1
        parts = [(1, position, 300)] * decodes
        chunk = CHUNK if number % 6 == 3 else 0
        if chunk:
            parts.append((CHUNK, 0, CHUNK))
        ns = step_ns(decodes, position + 1, chunk, overlaps=overlaps)
        steps.append(logged(parts, ns * (1 + noise * rng.random())))
    return steps


def model(**terms: float):
    coefficients = dict.fromkeys(CURVE_NAMES[CURVE], 0.0) | terms
    plane = dict.fromkeys(TERM_NAMES, 0.0)
    return {
        "form": CURVE,
        "version": 3,
        "curve": {
            "form": CURVE,
            "terms": coefficients,
            "token_ns": {str(begin): TOKEN_NS for begin in RAMPS},
            "expert_ns": 0.0,
            "experts": {"number": 0, "per_token": 0},
            "layers": {"whole": 1, "windowed": 0, "window": 0},
            "captured": [],
        },
        "planes": {
            "compute": {**plane, "fixed_ns": FIXED_NS, "token_ns": TOKEN_NS},
            "memory": {**plane, "fixed_ns": FIXED_NS, "context_ns": CONTEXT_NS},
        },
    }


OVERLAPPING = model(fixed_ns=FIXED_NS, pair_ns=PAIR_NS, read_ns=CONTEXT_NS)


def both(*, overlaps: bool, noise: float = 0.0):
    return {
        SHORT: chunk_steps(steps_of(32, 500, overlaps=overlaps, noise=noise), 32, CHUNK),
        LONG: chunk_steps(steps_of(4, 60_000, overlaps=overlaps, noise=noise), 4, CHUNK),
    }


def test_a_machine_that_overlaps_shows_it_and_the_curve_predicts_all_four_steps():
    found = answer(both(overlaps=True), OVERLAPPING, OVERLAPPING)
    # Beside short contexts the chunk's arithmetic is the larger of the two, beside long ones their
    # reading: there the chunk adds its tokens and the reading of its own context only.
    expected_ns = PAIR_NS * PAIRS_OF_CHUNK - CONTEXT_NS * (32 * 524) - CONTEXT_NS * CHUNK
    assert found["less_ns"] == pytest.approx(expected_ns, rel=0.02)
    assert found["less_ns"] > found["less_noise_ns"]
    assert _says(found).startswith("Yes")
    curve = found["predicted"]["before"]["forms"][CURVE]
    assert curve["mean_error"] < 1e-3
    assert curve["less_ns"] == pytest.approx(found["less_ns"], rel=0.02)
    # Whole steps as one maximum hide the chunk's tokens behind the reading.
    planes = found["predicted"]["before"]["forms"][TWO_PLANES]
    assert planes["less_ns"] > 5 * found["less_ns"]
    assert planes["mean_error"] > 0.05


def test_a_machine_that_does_not_overlap_adds_the_same_to_both():
    found = answer(both(overlaps=False, noise=0.002), OVERLAPPING, OVERLAPPING)
    assert abs(found["less_ns"]) < found["less_noise_ns"]
    assert _says(found).startswith("Not seen")
    assert found["predicted"]["after"]["forms"][CURVE]["less_ns"] > 2 * found["less_noise_ns"]


def test_steps_with_others_in_them_do_not_count():
    steps = steps_of(4, 1000, overlaps=True)
    whole = chunk_steps(steps, 4, CHUNK)
    decode, late = (1, 2000, 300), (1, 2000, 5000)
    foreign = [
        logged([decode] * 5, 9e9),  # one more decode
        logged([decode] * 3 + [late], 9e9),  # a prompt's last token
        logged([decode] * 4 + [(CHUNK, CHUNK, 2 * CHUNK)], 9e9),  # the second half of a prompt
        logged([decode] * 4 + [(CHUNK, 0, CHUNK)] * 2, 9e9),  # two chunks
        logged([decode] * 4 + [(100, 0, 100)], 9e9),  # another prompt
    ]
    with_others = chunk_steps([*steps[:20], *foreign, *steps[20:]], 4, CHUNK)
    assert with_others.with_ns == whole.with_ns
    assert max(with_others.without_ns) < 1e9


@pytest.mark.parametrize("other", [(1, 2000, 5000), (2, 2000, 300)])
def test_a_step_in_which_one_computes_a_prompt_or_several_tokens_is_none_of_decodes(other):
    chunk = logged([(1, 2000, 300)] * 4 + [(CHUNK, 0, CHUNK)], 2e7)
    around = [logged([(1, 2000, 300)] * 3 + [other], 1e7)] * 3
    with pytest.raises(ServerError, match="got 0 in 70 steps"):
        chunk_steps([*around, chunk, *around] * 10, 4, CHUNK)


def test_a_chunk_is_compared_with_the_steps_around_it():
    steps = steps_of(4, 1000, overlaps=True)
    # The machine becomes twice as slow in the middle.
    slower = [
        step._replace(gpu_time_ns=step.gpu_time_ns * (1 + (number >= 24)))
        for number, step in enumerate(steps)
    ]
    found = chunk_steps(slower, 4, CHUNK)
    assert found.without_ns[0] * 2 == pytest.approx(found.without_ns[-1], rel=0.01)


def test_too_few_steps_with_a_chunk_are_an_error_that_says_what_to_do():
    with pytest.raises(ServerError, match=r"got 3 in 18 steps.*--max-num-batched-tokens"):
        chunk_steps(steps_of(4, 1000, overlaps=True, chunks=3), 4, CHUNK)


@pytest.mark.parametrize(
    ("count", "left_out"), [(4, 0), (5, 0), (6, 0), (8, 0), (9, 1), (12, 2), (20, 5)]
)
def test_the_interval_of_a_median_is_that_of_the_sign_test(count: int, left_out: int):
    """The ranks are those of tables of the sign test, two-sided at 5 %."""
    found = Spread.of([float(n) for n in random.Random(1).sample(range(count), count)])
    assert found == ((count - 1) / 2, left_out, count - 1 - left_out, count)


def test_a_prediction_is_the_formula_of_its_form():
    forms = forms_of(OVERLAPPING)
    parts = [StepPart(1, 60_000, False)] * 4
    assert predicted_ns(forms[CURVE], parts) == pytest.approx(
        step_ns(4, 60_000, 0, overlaps=True), rel=1e-9
    )
    assert predicted_ns(forms[TWO_PLANES], parts) == pytest.approx(FIXED_NS + CONTEXT_NS * 240_000)
    assert [CURVE_NAMES[CURVE].index(name) for name in ("pair_ns", "read_ns")] == [PAIRS, READ]


def test_a_model_without_a_curve_has_one_form():
    earlier = {**OVERLAPPING, "curve": {**OVERLAPPING["curve"], "form": EARLIER_CURVE}}
    assert list(forms_of({**OVERLAPPING, "curve": None})) == [TWO_PLANES]
    assert list(forms_of(earlier)) == [TWO_PLANES]


def test_without_room_for_longer_contexts_nothing_is_said_of_reading_them():
    assert fitted(ON_GPU.overlap, 65_536, 42_000).long == (4, 8_067)
    with pytest.raises(ServerError, match="contexts of 8000 tokens or more, got 5367: give the KV"):
        fitted(ON_GPU.overlap, 65_536, 30_000)
    assert fitted(ON_CPU.overlap, 8192, None) == ON_CPU.overlap
