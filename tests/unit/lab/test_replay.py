"""A recorded log through every method: each charges all of it, as it would have in the engine."""

from pathlib import Path

import pytest

from tests.unit.lab.test_compare import MACHINE, small_trace
from vllm_cost_meter.attribution import METHODS
from vllm_cost_meter.engine.step_log import MAX_BYTES_LEAST, LoggedPart, LoggedStep, StepLogWriter
from vllm_cost_meter.errors import StepLogError
from vllm_cost_meter.lab.validation.compare import MeterSplitter
from vllm_cost_meter.lab.validation.replay import LISTED_MAX, _Driver, read_log, replay


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "steps"


def recorded(
    path: Path, *steps: tuple[int, list[LoggedPart]], max_bytes: int = MAX_BYTES_LEAST
) -> Path:
    writer = StepLogWriter(
        path, model="tiny", vllm_version="0.32.0", run_id="run", gpus=1, max_bytes=max_bytes
    )
    for number, (gpu_time_ns, parts) in enumerate(steps):
        writer.write(parts, gpu_time_ns, number)
    writer.close()
    return path


def simulated(path: Path) -> Path:
    trace = small_trace()
    steps = [
        (
            step.gpu_time_ns,
            [
                LoggedPart(f"request-{number}", tokens, position, trace.prompt_tokens[number])
                for number, tokens, position in zip(
                    step.requests, step.tokens.tolist(), step.positions.tolist(), strict=True
                )
            ],
        )
        for step in trace.steps
    ]
    return recorded(path, *steps, max_bytes=100 * MAX_BYTES_LEAST)


def test_every_method_charges_the_whole_log(path):
    found = replay(simulated(path))
    assert found.steps == len(small_trace().steps)
    assert found.gpu_time_ns == sum(step.gpu_time_ns for step in small_trace().steps)
    assert found.charged_ns == dict.fromkeys(METHODS, found.gpu_time_ns)
    assert found.requests_seen == len({r for s in small_trace().steps for r in s.requests})


@pytest.mark.parametrize("method", METHODS)
def test_a_replay_charges_what_the_meter_charged(path, method):
    trace = small_trace()
    splitter = MeterSplitter(method, trace)
    charged: dict[str, int] = {}
    for step in trace.steps:
        shares = splitter.split(step, MACHINE.game(step.tokens, step.positions))
        for number, share in zip(step.requests, shares, strict=True):
            charged[f"request-{number}"] = charged.get(f"request-{number}", 0) + int(share)
    for request_id, by_method in replay(simulated(path)).requests.items():
        assert by_method[method] == charged[request_id]


def test_features_of_a_log_are_replayed(path):
    """Steps are longer where a request with LoRA is in them, by more than the same one adds."""
    charged = []
    for has_lora in (False, True):
        steps = []
        for number in range(600):
            plain, lora = LoggedPart("plain", 1, number + 8, 4), ("lora", 1, number // 2 + 8, 4)
            both = [plain, LoggedPart(*lora, has_lora, False, 0)]
            steps.append((9_000_000, both) if number % 2 else (6_000_000, [plain]))
        writer = StepLogWriter(path, model="tiny", vllm_version="0.32.0", run_id="run", gpus=1)
        for number, (gpu_time_ns, parts) in enumerate(steps):
            features = [(1, True, False, 0)] if has_lora and len(parts) == 2 else []
            writer.write([part[:4] for part in parts], gpu_time_ns, number, features)
        writer.close()
        assert [step.parts for step in read_log(path)] == [parts for _, parts in steps]
        charged.append(replay(path).requests["lora"]["shapley"])
        path.unlink()
    assert charged[0] != charged[1]


def test_methods_are_compared_with_each_other(path):
    parts = [LoggedPart("a", 30, 0, 30), LoggedPart("b", 10, 0, 10)]
    found = replay(recorded(path, (4_000, parts)))
    assert found.requests["a"]["tokens"] == 3_000
    assert found.requests["a"]["equal"] == 2_000
    difference = found.differences["tokens"]["equal"]
    assert difference.moved_share == 0.25
    assert difference.request_difference.max == 0.5
    assert set(found.differences) == set(METHODS)


def test_those_listed_are_the_ones_the_methods_differ_most_about(path):
    parts = [LoggedPart(f"r{tokens}", tokens, 0, tokens) for tokens in (*range(1, 40), 100)]
    found = replay(recorded(path, (40_000, parts))).requests
    assert len(found) == LISTED_MAX
    ranges = [max(by_method.values()) - min(by_method.values()) for by_method in found.values()]
    assert ranges == sorted(ranges, reverse=True)
    assert next(iter(found)) == "r100"


def driven(*steps: tuple[int, int, int]) -> tuple[int, int]:
    """Return a request's prefill and decode ns; steps of 100 ns: tokens, position, prompt."""
    driver = _Driver("tokens")
    for tokens, position, prompt in steps:
        driver.settle(LoggedStep(0, 100, [LoggedPart("a", tokens, position, prompt)]))
    return driver._meter.accrued("a", 0)[:2]


def test_what_is_computed_again_after_a_preemption_is_prefill():
    assert driven((8, 0, 8), (1, 8, 8), (1, 9, 8), (8, 0, 8), (2, 8, 8), (1, 10, 8)) == (300, 300)


def test_rejected_drafts_are_no_preemption():
    assert driven((8, 0, 8), (3, 8, 8), (3, 9, 8), (3, 12, 8)) == (100, 300)


def test_an_id_that_comes_again_with_another_prompt_is_added_up(path):
    found = replay(
        recorded(path, (100, [LoggedPart("a", 8, 0, 8)]), (50, [LoggedPart("a", 4, 0, 4)]))
    )
    assert found.requests["a"] == dict.fromkeys(METHODS, 150)


def test_both_files_of_a_log_are_read(path):
    parts = [LoggedPart(f"request-{number}", 1, 5, 5) for number in range(200)]
    recorded(path, *[(1_000, parts)] * 150, max_bytes=MAX_BYTES_LEAST)
    one_file = replay(path).steps
    assert path.with_name("steps.1").exists()
    path.with_name("steps.1").unlink()
    assert replay(path).steps < one_file


def test_a_log_without_steps_is_one_line(path):
    with pytest.raises(StepLogError, match="expected at least one step, got none"):
        replay(recorded(path))


def test_a_step_of_nobody_is_charged_to_nobody(path):
    found = replay(recorded(path, (100, []), (50, [LoggedPart("a", 1, 0, 1)])))
    assert found.gpu_time_ns == 150
    assert found.charged_ns == dict.fromkeys(METHODS, 50)
