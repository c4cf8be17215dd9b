"""A sweep against a simulated deployment, the file that it writes, and the full load in it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.component.ledger.test_economics import S, figures, write
from tests.component.ledger.test_reader import HOUR, Ledger, snapshot
from vllm_cost_meter import plots
from vllm_cost_meter.cli.commands import app
from vllm_cost_meter.economics import Declared, curve_of, saturation_of
from vllm_cost_meter.errors import LedgerError, ServerError
from vllm_cost_meter.lab.sweep.bench import Shape, Target, bench_command, replies_of
from vllm_cost_meter.lab.sweep.curve import Context, curve_file
from vllm_cost_meter.lab.sweep.plot import sweep_figure, title_of
from vllm_cost_meter.lab.sweep.run import Measured, Plan, Sweep
from vllm_cost_meter.lab.sweep.side_client import Deployment, Sample, busy_share, deployment_of
from vllm_cost_meter.lab.sweep.steady import Reply, steady
from vllm_cost_meter.ledger.economics import saturation
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.units.time import unix_ns_of

SHAPE = Shape(100, 10)
TARGET = Target("http://127.0.0.1:1", "m", "/models/m")
RUN: Mapping[str, Any] = {
    "run_id": "run", "engine_index": 0, "model": "m", "precision": "bf16", "vllm_version": "0.32.0",
    "hardware": "H100", "gpus": 2, "parallelism": "tp=2 pp=1 dp=1", "alive": True, "state": "on",
}  # fmt: skip
runner = CliRunner()


class Quiet:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.left_s: list[float] = []

    def plan(self, left_s: float) -> None:
        self.left_s.append(left_s)

    def doing(self, what: str) -> None:
        self.done.append(what)

    def tick(self) -> None:
        pass

    def measured(self, point: Measured) -> None:
        self.done.append(f"{point.requests_per_s:g}")


class Simulated(Sweep):
    """One server that takes the requests one after the other, so many in a second at most."""

    def __init__(
        self, plan: Plan, served_per_s: float, fails: bool = False, others: int = 0
    ) -> None:
        self.watched = Quiet()
        super().__init__(plan, TARGET, None, Path(), {}, self.watched)  # type: ignore[arg-type]
        self._served, self._fails, self._others = served_per_s, fails, others

    def _send(self, rate: float | None, requests: int) -> tuple[list[Reply], list[Sample]]:
        self._runs += 1
        replies, free_s = [], 0.0
        for n in range(requests):
            sent_s = 0.0 if rate is None else n / rate
            free_s = max(free_s, sent_s) + 1 / self._served
            took = free_s - sent_s
            gap = 0.1 / self._served
            reply = Reply.of(sent_s, (100, 10), took - 9 * gap, [gap] * 9)
            replies.append(Reply(sent_s, sent_s, 100, 0, ()) if self._fails else reply)
        busy = requests / self._served
        end = max(free_s, 1.0)
        return replies, [
            Sample(0.0, 0.0, 0.0, 5.0),
            Sample(end, end, busy, 5.0 + requests + self._others),
        ]


def swept(plan: Plan, served_per_s: float = 20.0) -> list[Measured]:
    return list(Simulated(plan, served_per_s).points())


def curve(measured: list[Measured], usd: float | None = 2.5, **deployment: Any) -> dict[str, Any]:
    about = {**RUN, **deployment}
    found = Deployment(deployment_of([about]).about, 1, ("run",))
    at_ns = unix_ns_of("2026-11-26T12:00:00Z")
    prices = [{"usd_per_gpu_hour": "2.5", "source": "contract"}]
    context = Context(Plan(SHAPE), found, usd, prices, at_ns, at_ns, interrupted=False)
    made: dict[str, Any] = json.loads(json.dumps(curve_file(context, measured)))
    return made


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield ledger
    ledger.close()


def test_without_rates_a_burst_finds_them_and_the_last_one_is_more_than_is_served():
    sweep = Simulated(Plan(SHAPE, window_s=100, warmup_s=10), served_per_s=20)
    points = list(sweep.points())
    assert sweep.served_per_s == pytest.approx(20, rel=0.05)
    assert [p.requests_per_s for p in points] == [2, 5, 10, 15, 18, 24]
    assert [p.steady.saturated for p in points] == [False] * 5 + [True]
    assert max(p.steady.output_tokens_per_s for p in points) == pytest.approx(200, rel=0.02)
    assert points[2].utilization == pytest.approx(0.5, rel=0.05)
    assert [p.other_requests for p in points] == [0] * 6
    assert sweep.watched.done[0] == "100:10: a burst, to find the rates"


def test_a_warm_up_is_as_long_as_a_few_requests_take_and_a_point_says_if_it_was():
    slow = Plan(SHAPE, rates=(0.1, 0.2, 3.0), window_s=200, warmup_s=1)
    first, second, third = swept(slow, served_per_s=0.5)
    assert first.warmup_s == 1
    assert not first.settled, "a request takes 2 s"
    assert second.warmup_s == pytest.approx(6, abs=0.5)
    assert second.settled
    assert third.steady.saturated
    assert not third.settled


def test_requests_of_others_are_counted():
    sweep = Simulated(Plan(SHAPE, rates=(5.0,), window_s=20, warmup_s=5), 20, others=7)
    assert [point.other_requests for point in sweep.points()] == [7]


def test_a_last_rate_that_is_served_is_raised_until_one_is_not():
    plan = Plan(SHAPE, window_s=100, warmup_s=10, parts=(0.5, 0.8))
    assert [p.requests_per_s for p in swept(plan)] == [10, 16, 22]


def test_rates_of_the_users_are_measured_as_they_are_and_no_other():
    plan = Plan(SHAPE, rates=(1.0, 3.0), window_s=20, warmup_s=5, repeats=2)
    points = swept(plan)
    assert [(p.requests_per_s, p.repeat) for p in points] == [(1, 0), (1, 1), (3, 0), (3, 1)]
    assert len({p.seed for p in points}) == 4, "the same prompts would come from the cache"
    assert all(p.steady.window_s == pytest.approx(20, abs=1.1) for p in points)


def test_requests_that_all_fail_end_the_sweep():
    sweep = Simulated(Plan(SHAPE, rates=(5.0,), window_s=5, warmup_s=1), 20, fails=True)
    with pytest.raises(ServerError, match="expected replies over 6 s at 5 requests/s, got 0 of 30"):
        list(sweep.points())
    with pytest.raises(ServerError, match="expected replies to a burst"):
        list(Simulated(Plan(SHAPE), 20, fails=True).points())


def test_a_curve_has_the_medians_of_its_repeats_and_what_tokens_cost():
    measured = swept(Plan(SHAPE, rates=(5.0, 30.0), window_s=50, warmup_s=10, repeats=3))
    file = curve(measured, usd=2.5)
    assert file["usd_per_hour"] == 5.0, "two GPUs"
    low, high = file["points"]
    assert (low["repeats"], low["saturated"], high["saturated"]) == (3, False, True)
    assert low["usd_per_m_output_tokens"] == pytest.approx(5.0 * 1e6 / 3600 / 50, rel=0.03)
    assert low["usd_per_m_total_tokens"] == pytest.approx(5.0 * 1e6 / 3600 / 550, rel=0.03)
    assert len(file["measurements"]) == 6
    assert [p.requests_per_s for p in curve_of(file).points] == [5, 30]


def test_without_a_price_a_curve_has_throughput_and_no_cost():
    file = curve(swept(Plan(SHAPE, rates=(5.0,), window_s=20, warmup_s=5)), usd=None)
    assert file["usd_per_hour"] is file["points"][0]["usd_per_m_output_tokens"] is None
    assert curve_of(file).usd_per_hour is None


def full_load(**deployment: Any) -> dict[str, Any]:
    return curve(swept(Plan(SHAPE, rates=(5.0, 30.0), window_s=50, warmup_s=10)), **deployment)


def test_full_load_is_the_largest_throughput_with_what_it_is_true_of():
    point = saturation_of(full_load())
    assert point.output_tokens_per_s == pytest.approx(200, rel=0.02)
    assert dict(point.about) == {name: RUN[name] for name in point.about}
    assert (point.input_tokens, point.output_tokens, point.engines) == (100, 10, 1)
    assert point.measured_at == "2026-11-26T12:00:00.000000Z"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda file: file.pop("protocol"), "expected the `protocol` by which it was measured"),
        (lambda file: file["protocol"].pop("plan"), "expected plan in its protocol"),
        (lambda file: file["protocol"]["deployment"].pop("model"), "expected 'model' in its"),
        (lambda file: file["protocol"]["deployment"].update(gpus=0), "gpus: expected a whole"),
        (lambda file: file["protocol"].update(finished_at="2026"), "finished_at|isoformat"),
        (lambda file: file["protocol"].update(plan=[]), "in its protocol"),
        (lambda file: file.update(saturated=False), "expected a rate that was more than"),
        (lambda file: file.update(points=[]), "expected a list of points"),
    ],
)
def test_a_curve_without_its_whole_protocol_is_refused(damage, expected, tmp_path, ledger):
    write(ledger)
    file = full_load()
    damage(file)
    with pytest.raises(ValueError, match=expected):
        saturation_of(file)
    path = tmp_path / "curve.json"
    path.write_text(json.dumps(file))
    result = runner.invoke(app, ["saturation", "import", str(path), "--ledger", ledger.url])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert saturation.kept(ledger.url) == []


def run_of(ledger: Ledger) -> dict[str, Any]:
    return dict(ledger.reader.summary(as_of=AsOf(settle_s=0))["runs"][0])


def full_load_of(ledger: Ledger) -> dict[str, Any]:
    """A curve of the deployment in a ledger that `write` wrote, with requests of its size."""
    run = run_of(ledger)
    file = full_load(**{name: run[name] for name in RUN if name not in ("alive", "state")})
    file["protocol"]["plan"].update(input_tokens=10, output_tokens=5)
    return file


def test_the_penalty_is_against_the_full_load_of_this_very_deployment(ledger):
    write(ledger)
    file = full_load_of(ledger)
    assert figures(ledger, declared=Declared())["penalty"] is None
    assert saturation.keep(ledger.url, [saturation_of(file)]) == 1
    found = figures(ledger, declared=Declared())
    assert found["saturation_output_tokens_per_s"] == pytest.approx(200, rel=0.02)
    assert found["penalty"] == pytest.approx(200 / (20 / 30), rel=0.02)
    declared = figures(ledger, declared=Declared(theta_max=20))
    assert declared["saturation_output_tokens_per_s"] == 20, "what was declared goes first"


@pytest.mark.parametrize(
    ("of", "change"),
    [
        ("deployment", {"model": "another"}),
        ("deployment", {"precision": "another"}),
        ("deployment", {"vllm_version": "another"}),
        ("deployment", {"hardware": "another"}),
        ("deployment", {"gpus": 7}),
        ("deployment", {"parallelism": "another"}),
        ("deployment", {"engines": 2}),
        ("plan", {"input_tokens": 20}),
        ("plan", {"output_tokens": 3}),
    ],
)
def test_another_deployment_or_shape_says_nothing_of_this_one(ledger, of, change):
    write(ledger)
    file = full_load_of(ledger)
    file["protocol"][of].update(change)
    saturation.keep(ledger.url, [saturation_of(file)])
    found = figures(ledger, declared=Declared())
    assert found["penalty"] is found["saturation_output_tokens_per_s"] is None


def test_a_window_of_two_deployments_has_no_penalty(ledger):
    write(ledger)
    file = full_load_of(ledger)
    saturation.keep(ledger.url, [saturation_of(file)])
    hours = {HOUR: ClassTotals(idle=S)}
    ledger.write(
        snapshot([], run_id="other", model="another", totals=hours[HOUR], hours=hours, wall_ns=S)
    )
    assert figures(ledger, declared=Declared())["penalty"] is None


def test_the_latest_sweep_counts_and_each_once(ledger):
    write(ledger)
    old, new = full_load_of(ledger), full_load_of(ledger)
    for file, day, tokens_per_s in ((old, "25", 300.0), (new, "27", 100.0)):
        file["protocol"]["finished_at"] = f"2026-11-{day}T00:00:00+00:00"
        file["points"][-1]["output_tokens_per_s"] = tokens_per_s
    points = [saturation_of(new), saturation_of(old), saturation_of(new)]
    assert saturation.keep(ledger.url, points) == 2
    assert saturation.keep(ledger.url, points) == 0
    found = figures(ledger, declared=Declared())
    assert found["saturation_output_tokens_per_s"] == 100
    assert [row["output_tokens_per_s"] for row in saturation.kept(ledger.url)] == [100, 300]


def test_a_ledger_knows_its_runs_and_no_others(ledger, tmp_path):
    write(ledger)
    assert saturation.knows_runs(ledger.url, [run_of(ledger)["run_id"]])
    assert not saturation.knows_runs(ledger.url, [run_of(ledger)["run_id"], "other"])
    assert not saturation.knows_runs(f"sqlite:///{tmp_path / 'none.db'}", ["run"])
    with pytest.raises(LedgerError):
        saturation.keep(f"sqlite:///{tmp_path / 'none.db'}", [saturation_of(full_load())])


def test_curves_are_imported_and_listed_at_the_command_line(ledger, tmp_path):
    write(ledger)
    path = tmp_path / "curve.json"
    path.write_text(json.dumps(full_load()))
    arguments = ["saturation", "import", str(path), "--ledger", ledger.url]
    assert runner.invoke(app, arguments).stdout == "1 new, 0 known before\n"
    assert runner.invoke(app, arguments).stdout == "0 new, 1 known before\n"
    told = runner.invoke(app, ["saturation", "list", "--json", "--ledger", ledger.url]).stdout
    (row,) = json.loads(told)["saturation_points"]
    assert row["protocol"]["client"] == "vllm bench serve"
    assert "H100" in runner.invoke(app, ["saturation", "list", "--ledger", ledger.url]).stdout


def test_what_is_measured_is_one_deployment():
    two = [RUN, {**RUN, "run_id": "r2", "engine_index": 1}]
    dead = {**RUN, "run_id": "old", "alive": False, "model": "another"}
    found = deployment_of([*two, dead])
    assert (found.gpus, found.engines, found.run_ids) == (4, 2, ("r2", "run"))
    for wrong, expected in (
        ([dead], "expected a metered engine that runs"),
        ([{**RUN, "state": "off"}], "expected a meter that is on"),
        ([RUN, {**RUN, "run_id": "r2", "engine_index": 1, "model": "b"}], "of one deployment"),
        ([RUN, {**RUN, "run_id": "r2"}], "of one deployment"),
    ):
        with pytest.raises(ServerError, match=expected):
            deployment_of(wrong)


def test_the_busy_share_is_that_between_two_instants():
    samples = [Sample(0, 0, 0, 0), Sample(10, 20, 4, 0), Sample(20, 40, 24, 0)]
    assert busy_share(samples, 10, 20) == pytest.approx(1.0)
    assert busy_share(samples, 5, 15) == pytest.approx((14 - 2) / 20)
    assert busy_share(samples[:1], 0, 10) is None


def test_what_the_client_saved_is_read_and_what_it_did_not_is_said(tmp_path):
    saved = {
        "start_times": [1.0, 2.0, 3.0], "ttfts": [0.4, 0.5, 0.0],
        "itls": [[0.3, 0.3], [], []], "input_lens": [9, 9, 9], "output_lens": [3, 1, 0],
        "errors": ["", "", "refused"],
    }  # fmt: skip
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(saved))
    first, second, third = replies_of(path)
    assert first.chunks_s == pytest.approx([1.4, 1.7, 2.0])
    assert (second.output_tokens, third.failed) == (1, True)
    del saved["start_times"]
    path.write_text(json.dumps(saved))
    with pytest.raises(ServerError, match="expected start_times in what"):
        replies_of(path)
    path.unlink()
    with pytest.raises(ServerError, match="expected what `vllm bench serve` saved"):
        replies_of(path)


def test_the_client_sends_poisson_arrivals_of_one_shape_with_a_seed_of_its_own(tmp_path):
    words = bench_command(
        TARGET, SHAPE, requests=30, requests_per_s=2.5, burstiness=1.0, seed=7,
        result=tmp_path / "r.json",
    )  # fmt: skip
    told = " ".join(words)
    assert "--request-rate 2.5 --burstiness 1.0" in told
    assert "--random-input-len 100 --random-output-len 10" in told
    assert "--seed 7" in told
    assert "--ignore-eos" in words


@pytest.mark.parametrize("words", ["512", "0:5", "5:-1", "a:b", "1:2:3", "1.5:2"])
def test_a_shape_that_is_none_is_refused(words):
    with pytest.raises(ValueError, match=r"--shape: expected INPUT:OUTPUT"):
        Shape.parse(words)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rates", "1,zero"], ["--rates", "0"], ["--rates", "1,nan"], ["--rates", "1,1"],
        ["--rates", "-3"], ["--measure-s", "0"], ["--measure-s", "nan"], ["--warmup", "-1"],
        ["--shape", "1"], ["--burstiness", "0"], ["--parts", ""], ["--slo-ttft-ms", "-1"],
        ["--url", "http://127.0.0.1:9"], ["--url", "nonsense"],
    ],
)  # fmt: skip
def test_wrong_words_are_one_line_and_status_2(arguments, tmp_path):
    folder = str(tmp_path / "out")
    result = runner.invoke(
        app, ["sweep", "--side-url", "http://127.0.0.1:9", "--folder", folder, *arguments]
    )
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1, result.stderr


def test_the_plot_has_a_line_for_each_shape_and_the_slo(tmp_path):
    plain, unpriced = full_load(), full_load(hardware="H100")
    figure = sweep_figure([plain, full_load()], slo_ttft_ms=300)
    cost, latency = figure.axes
    assert cost.get_ylabel() == "USD per million output tokens"
    assert latency.get_ylabel() == "TTFT p99 (ms)"
    assert any(text.get_text() == "SLO 300 ms" for text in latency.texts)
    plots.save(figure, [tmp_path / "p.svg"])
    assert "2 x H100" in title_of(plain)
    assert "windows of 120 s after 30 s" in title_of(plain)
    unpriced["usd_per_hour"] = None
    assert sweep_figure([unpriced]).axes[0].get_ylabel().startswith("GPU-seconds")


def test_steady_of_the_simulated_server_is_what_was_sent():
    (point,) = swept(Plan(SHAPE, rates=(4.0,), window_s=25, warmup_s=5))
    assert point.steady.arrivals_per_s == pytest.approx(4.0, rel=0.02)
    assert steady([], 0.0, 1.0).sent == 0
