"""The calculators at the command line and at the side endpoint: the functions, and nothing else."""

import inspect
import json
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from typer.testing import CliRunner, Result

from vllm_cost_meter import economics
from vllm_cost_meter.cli.commands import app
from vllm_cost_meter.economics.calculators import CALCULATORS, INPUTS, calculate
from vllm_cost_meter.endpoint.calc import add_calculators

CURVE = [
    {"requests_per_s": 1, "output_tokens_per_s": 100, "ttft_p99_ms": 50, "tpot_ms": 20},
    {"requests_per_s": 8, "output_tokens_per_s": 800, "ttft_p99_ms": 90, "tpot_ms": 40},
]
# A call of each, as the function is given it.
GIVEN = {
    "c-eff": {"usd_per_hour": 3.6, "output_tokens_per_s": 1000.0},
    "arrival": {"usd_per_hour": 3.6, "requests_per_s": 1.0, "output_tokens_per_request": 100.0},
    "request": {"usd_per_hour": 3.6, "requests_per_s": 1.0, "failure_share": 0.1},
    "blended": {"input_usd_per_m": 1.0, "output_usd_per_m": 4.0, "ratio": "3:1"},
    "penalty": {"usd_per_hour": 2.88, "curve": CURVE},
    "slo": {"usd_per_hour": 2.88, "curve": CURVE, "ttft_p99_ms": 60.0, "tpot_ms": 30.0},
    "crossover": {
        "usd_per_hour": 2.88,
        "api_usd_per_m_output": 2.0,
        "output_tokens_per_request": 100.0,
        "curve": CURVE,
    },
    "break-even": {
        "usd_per_hour": 2.0,
        "tokens_per_hour": 3.6e6,
        "api_usd_per_m": 1.0,
        "reserved_usd_per_hour": 1.25,
        "spot_usd_per_hour": 0.5,
        "utilization": [0.25, 0.5],
        "volume": [100.0],
    },
    "serverless": {"gpu_usd_per_s": 0.001, "run_s": 2.0, "calls": 1000.0},
}


def answer_of(name: str) -> dict:
    given = dict(GIVEN[name])
    if "curve" in given:
        given["curve"] = economics.curve_of(given["curve"])
    return json.loads(json.dumps(calculate(name, given)))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def options(given: dict, folder: Path) -> list[str]:
    found = []
    for name, value in given.items():
        shown = value
        if name == "curve":
            shown = folder / "curve.json"
            shown.write_text(json.dumps(value))
        elif isinstance(value, list):
            shown = ",".join(map(str, value))
        found += [f"--{name.replace('_', '-')}", str(shown)]
    return found


@pytest.fixture
def side() -> TestClient:
    side = FastAPI()
    add_calculators(side)
    return TestClient(side)


def command(name: str) -> list[str]:
    return [name] if name == "break-even" else ["calc", name]


@pytest.mark.parametrize("name", CALCULATORS)
def test_command_endpoint_and_function_give_the_same(name, tmp_path, side):
    result = run(*command(name), *options(GIVEN[name], tmp_path), "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == answer_of(name)
    reply = side.post(f"/cost/calc/{name}", json=GIVEN[name])
    assert reply.status_code == 200
    assert reply.json() == answer_of(name)


@pytest.mark.parametrize("name", CALCULATORS)
def test_an_answer_echoes_its_inputs_and_names_its_formula(name):
    answer = answer_of(name)
    inputs = inspect.signature(CALCULATORS[name]).parameters
    assert list(answer["inputs"]) == list(inputs)
    results = set(answer) - {"calculator", "inputs", "formula"}
    assert any(result in answer["formula"] for result in results)
    shown = run(*command(name), "--help").stdout
    assert all(f"--{each.replace('_', '-')[:18]}" in shown for each in inputs)


@pytest.mark.parametrize("name", CALCULATORS)
def test_every_function_and_input_is_documented(name):
    function = CALCULATORS[name]
    assert function.__doc__
    assert set(inspect.signature(function).parameters) <= set(INPUTS)
    assert function.__name__ in economics.__all__


def test_numbers_are_not_rounded():
    result = run("calc", "c-eff", "--usd-per-hour", 1, "--output-tokens-per-s", 7, "--json")
    assert json.loads(result.stdout)["usd_per_m_output_tokens"] == 1e6 / (3600 * 7)
    assert "39.6825" in run(
        "calc", "c-eff", "--usd-per-hour", 1, "--output-tokens-per-s", 7
    ).stdout  # fmt: skip


def test_utilizations_may_follow_their_option_one_by_one():
    given = ("--usd-per-hour", 2, "--tokens-per-hour", 1e6, "--api-usd-per-m", 1)
    forms = (
        ("--utilization", 0.25, 0.5),
        ("--utilization", "0.25,0.5"),
        ("--utilization", 0.25, "--utilization", 0.5),
    )
    answers = [run("break-even", *given, *form, "--json").stdout for form in forms]
    assert answers[0] == answers[1] == answers[2]
    assert list(json.loads(answers[0])["effective_usd_per_m"]) == ["0.25", "0.5"]


def test_a_curve_may_be_a_csv_file(tmp_path):
    path = tmp_path / "curve.csv"
    path.write_text("rps,output_tokens_per_s,ttft_p99_ms\n1,100,\n8,800,90\n")
    result = run("calc", "penalty", "--curve", path, "--usd-per-hour", 2.88, "--json")
    answer = json.loads(result.stdout)
    assert (answer["theta_max"], answer["points"][0]["penalty"]) == (800, 8)
    assert answer["inputs"]["curve"]["points"][0]["ttft_p99_ms"] is None
    assert " 8" in run("calc", "penalty", "--curve", path, "--usd-per-hour", 2.88).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["calc", "c-eff", "--usd-per-hour", "nan"], "usd_per_hour: expected a number above 0"),
        (["calc", "c-eff", "--usd-per-hour", "-1"], "usd_per_hour: expected a number above 0"),
        (["calc", "c-eff"], "usd_per_hour: expected either it or usd_per_gpu_hour, got neither"),
        (["calc", "penalty", "--curve", "none.json"], "none.json cannot be read"),
        (
            ["break-even", "--usd-per-hour", 1, "--tokens-per-hour", 1, "--api-usd-per-m", 1]
            + ["--utilization", "x"],
            "utilization: expected numbers, got 'x'",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, said):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("vllm-cost-meter: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("text", ["{", "[1", '{"points": []}', "", "a,b\n1,2\n", "[" * 100_000])
def test_a_file_that_is_no_curve_is_one_line_and_status_2(tmp_path, text):
    path = tmp_path / "curve"
    path.write_text(text)
    result = run("calc", "penalty", "--curve", path, "--usd-per-hour", 1)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_the_endpoint_refuses_what_the_function_refuses_and_names_it_does_not_know(side):
    wrong = side.post("/cost/calc/c-eff", json={"usd_per_hour": 0})
    assert wrong.status_code == 422
    assert wrong.json()["detail"].startswith("usd_per_hour: expected a number above 0")
    assert side.post("/cost/calc/c-eff", json={"usd": 1}).status_code == 422
    assert (
        side.post("/cost/calc/penalty", json={"curve": [7], "usd_per_hour": 1}).status_code == 422
    )
    assert side.post("/cost/calc/none", json={}).status_code == 404
