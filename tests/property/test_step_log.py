"""A step log gives back whatever steps it got; cut anywhere, those that came before the cut."""

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from vllm_cost_meter.engine.step_log import (
    NO_FEATURES,
    LoggedPart,
    LoggedStep,
    StepLogWriter,
    read_header,
    read_steps,
)

COUNT = st.integers(0, 2**31 - 1)
NS = st.integers(0, 2**63 - 1)
# Any other id is logged in the form in which the ledger stores it.
PRINTABLE = st.characters(exclude_categories=["C", "Z"], include_characters=" ")
ID = st.text(PRINTABLE, min_size=1, max_size=8)
FEATURES = st.just(NO_FEATURES) | st.tuples(st.booleans(), st.booleans(), COUNT)
PARTS = st.lists(
    st.builds(
        lambda *plain, features: LoggedPart(*plain, *features),
        *(ID, COUNT, COUNT, st.integers(0, 3)),
        features=FEATURES,
    ),
    max_size=5,
)
STEPS = st.lists(st.builds(LoggedStep, NS, NS, PARTS), max_size=8)


def write(path: Path, steps: list[LoggedStep]) -> None:
    writer = StepLogWriter(path, model="m", vllm_version="v", run_id="r", gpus=1)
    for step in steps:
        features = [
            (place, *part[4:]) for place, part in enumerate(step.parts) if part[4:] != NO_FEATURES
        ]
        plain = [part[:4] for part in step.parts]
        writer.write(plain, step.gpu_time_ns, step.unix_ns, features)
    writer.close()


@given(STEPS)
def test_steps_are_read_as_they_were_written(steps):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "steps"
        write(path, steps)
        assert list(read_steps(path)) == steps


@given(STEPS, st.integers(0, 1_000))
def test_a_log_cut_anywhere_gives_the_steps_before_the_cut(steps, cut):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "steps"
        write(path, [])
        head = path.stat().st_size
        path.unlink()
        write(path, steps)
        content = path.read_bytes()
        path.write_bytes(content[: max(head, len(content) - cut)])
        whole = path.read_bytes().count(b"\n") - 1
        assert list(read_steps(path)) == steps[:whole]
        assert read_header(path).run_id == "r"
