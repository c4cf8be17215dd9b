"""The step log: what is written is read, whatever the size, and nothing else passes for one."""

import json
import os
from pathlib import Path

import pytest

from vllm_cost_meter.engine.step_log import (
    MAX_BYTES_LEAST,
    LoggedPart,
    LoggedStep,
    StepLogWriter,
    files_of,
    read_header,
    read_steps,
    rotated,
)
from vllm_cost_meter.errors import StepLogError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "steps"


def writer_of(path: Path, run_id: str = "run", **options: int) -> StepLogWriter:
    return StepLogWriter(
        path, model="tiny", vllm_version="0.32.0", run_id=run_id, gpus=2, **options
    )


def written(path: Path, steps: list[LoggedStep], **options: int) -> StepLogWriter:
    writer = writer_of(path, **options)
    for step in steps:
        writer.write(step.parts, step.gpu_time_ns, step.unix_ns)
    writer.close()
    return writer


def step(number: int, requests: int = 2) -> LoggedStep:
    parts = [LoggedPart(f"request-{i}", 1 + i, 10 * number, 5) for i in range(requests)]
    return LoggedStep(1_000 + number, 2_000 + number, parts)


def test_what_was_written_is_read(path):
    steps = [step(0), step(1, requests=0), step(2, requests=3)]
    assert written(path, steps).steps == 3
    assert list(read_steps(path)) == steps
    header = read_header(path)
    assert (header.model, header.vllm_version, header.run_id, header.gpus) == (
        "tiny",
        "0.32.0",
        "run",
        2,
    )


def test_features_are_written_where_a_part_has_any_and_read_again(path):
    parts = [LoggedPart("a", 1, 8, 4), LoggedPart("b", 30, 0, 40, True, False, 20)]
    writer = writer_of(path)
    writer.write([part[:4] for part in parts], 5, 1, [(1, True, False, 20)])
    writer.write([part[:4] for part in parts[:1]], 5, 2)
    writer.close()
    assert list(read_steps(path)) == [LoggedStep(1, 5, parts), LoggedStep(2, 5, parts[:1])]
    with_features, without = path.read_text().splitlines()[1:]
    assert json.loads(with_features)["features"] == [[1, True, False, 20]]
    assert "features" not in json.loads(without), "as an earlier meter wrote it"


def test_an_id_is_written_once_in_a_file(path):
    written(path, [step(number) for number in range(50)])
    assert path.read_text().count("request-1") == 1


def test_an_id_with_another_prompt_is_another_request(path):
    steps = [LoggedStep(1, 1, [LoggedPart("a", 1, 0, prompt)]) for prompt in (3, 4)]
    written(path, steps)
    assert list(read_steps(path)) == steps


def test_only_the_owner_can_read_it(path):
    written(path, [])
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_log_never_takes_more_than_its_maximum_and_keeps_the_latest_half(path):
    steps = [step(number, requests=64) for number in range(1_000)]
    written(path, steps, max_bytes=MAX_BYTES_LEAST)
    sizes = [file.stat().st_size for file in files_of(path)]
    assert len(sizes) == 2
    assert sum(sizes) <= MAX_BYTES_LEAST
    assert sizes[0] > 0.4 * MAX_BYTES_LEAST
    assert sorted(path.parent.iterdir()) == [path, rotated(path)]
    kept = [step for file in files_of(path) for step in read_steps(file)]
    assert kept == steps[-len(kept) :]


def test_a_step_too_large_for_a_file_is_dropped_and_counted(path):
    huge = LoggedStep(1, 1, [LoggedPart("x" * 500 + str(i), 1, 0, 0) for i in range(500)])
    writer = written(path, [step(0), huge, step(1)], max_bytes=MAX_BYTES_LEAST)
    assert (writer.steps, writer.dropped) == (2, 1)
    assert list(read_steps(path)) == [step(1)]
    assert list(read_steps(rotated(path))) == [step(0)]


def test_names_are_forgotten_and_told_anew_when_there_are_too_many(path):
    steps = [LoggedStep(1, 1, [LoggedPart(f"r{i % 4}", 1, 0, 0)]) for i in range(40)]
    written(path, steps, names_max=3)
    assert list(read_steps(path)) == steps


def test_a_new_run_keeps_the_last_one_and_is_read_alone(path):
    written(path, [step(0)])
    writer_of(path, run_id="next").close()
    assert read_header(path).run_id == "next"
    assert list(read_steps(rotated(path))) == [step(0)]
    assert files_of(path) == [path]


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_torn_last_line_is_left_out(path, cut):
    written(path, [step(0), step(1)])
    path.write_bytes(path.read_bytes()[:-cut])
    assert list(read_steps(path)) == [step(0)]


@pytest.mark.parametrize("content", [b"", b"\x00\xff", b"{}\n", b"hello\n", b'{"format":"csv"}\n'])
def test_a_foreign_file_is_refused_with_one_line(path, content):
    path.write_bytes(content)
    with pytest.raises(StepLogError) as caught:
        next(read_steps(path))
    text = str(caught.value)
    assert str(path) in text
    assert "expected a first line with the format" in text
    assert "COST_METER_STEP_LOG" in text
    assert "\n" not in text


def test_a_file_that_is_not_there_is_one_line(path):
    with pytest.raises(StepLogError, match=r"cannot be read: No such file.*COST_METER_STEP_LOG"):
        read_header(path)


def test_another_version_is_refused(path):
    written(path, [])
    header = json.loads(path.read_text())
    path.write_text(json.dumps(header | {"version": 2}) + "\n")
    with pytest.raises(StepLogError, match=r"expected version 1, got 2"):
        read_header(path)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{}", "missing required field"),
        ('{"unix_ns":1,"gpu_time_ns":-1,"new":[],"parts":[]}', "Expected `int` >= 0"),
        ('{"unix_ns":1,"gpu_time_ns":1,"new":[],"parts":[[7,1,1]]}', "unknown request number 7"),
    ],
)
def test_a_damaged_line_within_is_named(path, line, why):
    written(path, [step(0)])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(StepLogError, match="line 3: expected a step") as caught:
        list(read_steps(path))
    assert why in str(caught.value)


@pytest.mark.parametrize("name", ["steps", "steps.1"])
def test_a_file_that_is_no_step_log_is_never_overwritten(path, name):
    (path.parent / name).write_text("precious\n")
    with pytest.raises(StepLogError, match="expected a first line"):
        writer_of(path)
    assert (path.parent / name).read_text() == "precious\n"


def test_a_maximum_that_holds_no_step_is_refused(path):
    with pytest.raises(StepLogError, match=r"at least 262144 bytes, got 1000"):
        writer_of(path, max_bytes=1000)


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(StepLogError, match="cannot be written"):
        writer_of(tmp_path / "nowhere" / "steps")


def test_a_full_disk_ends_the_log_and_nothing_else(path, caplog):
    writer = writer_of(path)
    os.dup2(full := os.open("/dev/full", os.O_WRONLY), writer._file.fileno())
    os.close(full)
    for number in range(5_000):
        writer.write(step(number).parts, 1, 1)
    writer.flush()
    assert writer.dropped > 0
    assert caplog.text.count("ends here: [Errno 28]") == 1


def test_a_flush_that_fails_ends_the_log_too(path, caplog):
    writer = writer_of(path)
    os.dup2(full := os.open("/dev/full", os.O_WRONLY), writer._file.fileno())
    os.close(full)
    writer.write(step(0).parts, 1, 1)
    writer.flush()
    assert "ends here: [Errno 28]" in caplog.text
    writer.write(step(1).parts, 1, 1)
    assert writer.dropped == 1


def test_steps_reach_the_disk_within_a_second(path):
    late, due = writer_of(path), writer_of(path.with_name("due"), flush_after_ns=0)
    for writer in (late, due):
        writer.write(step(0).parts, *step(0)[1::-1])
        writer.write(step(1).parts, *step(1)[1::-1])
    assert list(read_steps(path)) == []
    assert list(read_steps(path.with_name("due"))) == [step(0), step(1)]
    late.close()
    due.close()


def test_a_fifo_is_refused_and_holds_up_nobody(path):
    os.mkfifo(path)
    with pytest.raises(StepLogError, match=r"expected a file, got a folder, a FIFO or a device"):
        writer_of(path)
    assert sorted(path.parent.iterdir()) == [path]


def test_a_folder_that_nobody_may_look_into_is_refused(path, monkeypatch):
    def forbidden(self: Path, **_options: object) -> bool:  # root may look into everything
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", forbidden)
    with pytest.raises(StepLogError, match="cannot be written: .*Permission denied"):
        writer_of(path)
