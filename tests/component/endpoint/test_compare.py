"""`/cost/compare`: the command in a child process, held back, and whatever may become of it."""

import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.component.cli.test_cli import no_settings, run
from tests.component.ledger.test_economics import write
from tests.component.ledger.test_reader import Ledger
from tests.unit.config.test_offers import ALL_TIME, PRICES
from vllm_cost_meter.endpoint.access import Access, sha256
from vllm_cost_meter.endpoint.app import make_app
from vllm_cost_meter.endpoint.compare import MEMORY_BYTES_MAX, Comparer, ComparingError
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.economics.api_comparison import ComparisonQuestion
from vllm_cost_meter.ledger.reader import LedgerReader

__all__ = ["no_settings"]

WINDOW = ALL_TIME[1]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.db"
    ledger = Ledger(f"sqlite:///{path}")
    write(ledger)
    ledger.close()
    return path


@pytest.fixture
def reader(path: Path):
    reader = LedgerReader(f"sqlite:///{path}")
    yield reader
    reader.close()


@pytest.fixture
def side(reader: LedgerReader) -> TestClient:
    return TestClient(make_app(reader), base_url="http://localhost")


@pytest.fixture
def prices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Our price file, which the settings name."""
    path = tmp_path / "prices.toml"
    path.write_text(PRICES)
    monkeypatch.setenv("COST_METER_API_PRICES", str(path))
    return path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a module of this source in the place of genai-prices, for child processes."""

    def put(source: str) -> None:
        folder = tmp_path / "modules"
        folder.mkdir()
        (folder / "genai_prices.py").write_text(source)
        found = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(found))

    return put


def error_of(reply: Any) -> tuple[int, str, str]:
    error = reply.json()["error"]
    assert error["code"] == reply.status_code
    return reply.status_code, error["type"], error["message"]


def ask(side: TestClient, **words: Any) -> Any:
    return side.get("/cost/compare", params={"window": WINDOW, **words})


# ---- answers


def test_the_answer_is_that_of_the_command(side, path, prices):
    words = {"ratio": "2:1", "volume": ["1M", "5M..50M"], "max_usd_per_m_output": 1000.0}
    reply = ask(side, **words)
    assert reply.status_code == 200
    options = ("--ratio", "2:1", "--volume", "1M", "--volume", "5M..50M")
    same = run(
        *("compare", "--ledger", path, *ALL_TIME, "--json"),
        *(*options, "--max-usd-per-m-output", 1000, "--prices", prices),
    )
    assert reply.json() == json.loads(same.stdout)
    assert reply.json()["inputs"] == {
        "window": WINDOW,
        "model": None,
        "provider": None,
        "prices": str(prices),
        "label": None,
        **words,
        "filter": None,
        "accept_no_latency_promise": False,
    }
    assert reply.json()["note"].startswith("note: an API's price promises no latency")


def test_words_are_never_options_and_offers_are_those_that_were_asked_for(side, prices):
    reply = ask(side, provider=["here", "--json"], label=["file", "--ledger=/none"])
    assert [row["provider"] for row in reply.json()["offers"]] == ["here"]


def test_the_ledger_is_the_servers_own_whatever_else_the_environment_names(
    side, prices, monkeypatch
):
    monkeypatch.setenv("COST_METER_LEDGER", "sqlite:////none/ledger.db")
    monkeypatch.setenv("cost_meter_ledger", "sqlite:////none/ledger.db")
    assert ask(side).json()["mix"]["requests"] == 4


def test_the_ledger_is_brought_up_to_now_before(reader, prices):
    refreshed = []
    side = TestClient(
        make_app(reader, refresh=lambda: refreshed.append(1)), base_url="http://localhost"
    )
    ask(side, window="x")
    assert refreshed == []
    ask(side)
    assert refreshed == [1]


def test_only_the_operator_may_ask(reader):
    access = Access(sha256("admin"), lambda: {sha256("key"): "search"})
    side = TestClient(make_app(reader, access=access))
    reply = side.get("/cost/compare", headers={"authorization": "Bearer key"})
    assert reply.status_code == 403


# ---- what is asked wrongly


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"window": "x"}, "window: expected today"),
        ({"model": "a\0b"}, "model: expected text without control characters"),
        ({"max_usd_per_m_output": "x"}, "max_usd_per_m_output"),
        ({"prices": "/etc/passwd"}, "query: expected one of window, model"),
    ],
)
def test_what_is_wrong_by_itself_is_refused_without_a_child(side, words, said, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *command, **_: started.append(command))
    status, kind, message = error_of(ask(side, **words))
    assert (status, kind) == (422, "invalid_request")
    assert said in message
    assert started == []


def test_what_the_command_refuses_is_refused_with_its_line(side, prices):
    for words, said in (
        ({"ratio": "1:1"}, "ratio: expected it and volume together, got one of them"),
        ({"label": "none"}, "offers: expected some, by model, provider or prices, got none"),
    ):
        assert error_of(ask(side, **words)) == (422, "invalid_request", said)


def test_without_the_extra_the_line_says_how_to_have_it(side, package):
    package("raise ImportError")
    status, _, message = error_of(ask(side, model="openai/*"))
    assert status == 422
    assert message == ("model: expected genai-prices to be installed: pip install genai-prices")


# ---- what goes wrong


def test_a_child_that_fails_is_a_503_with_one_line(side, package):
    package("raise RuntimeError('boom')")
    assert error_of(ask(side, model="m")) == (
        503, "unavailable", "compare: expected an answer, got RuntimeError: boom",
    )  # fmt: skip


def test_a_child_that_takes_too_much_memory_ends_by_itself(side, package):
    package(f"bytearray({MEMORY_BYTES_MAX})")
    status, _, message = error_of(ask(side, model="m"))
    assert (status, message.endswith("MemoryError")) == (503, True)


def test_a_ledger_that_cannot_be_read_is_a_503_that_hides_its_password():
    comparer = Comparer("postgresql+psycopg://user:secret@127.0.0.1:1/database")
    with pytest.raises(LedgerError, match=r"^ledger postgresql\+psycopg://user:\*\*\*@127") as told:
        comparer(ComparisonQuestion(model=("m",)))
    assert "secret" not in str(told.value)


def test_a_child_that_is_killed_is_a_503(side, package):
    package("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert error_of(ask(side, model="m"))[2] == "compare: expected an answer, got exit status -9"


def children() -> list[Path]:
    """The processes that this one has started and that run."""
    tasks = Path("/proc/self/task").glob("*/children")
    return [Path("/proc") / pid for task in tasks for pid in task.read_text().split()]


def is_held_back(child: Path) -> bool:
    """Tell whether a child is the last to get a core and the first to lose its memory."""
    priority = os.getpriority(os.PRIO_PROCESS, int(child.name))
    return (priority, (child / "oom_score_adj").read_text().strip()) == (19, "1000")


def test_one_child_at_a_time_is_held_back_ended_in_time_and_told_no_secret(reader, package):
    package("import time\ntime.sleep(60)")
    before = set(children())
    url = f"{reader.url}?timeout=7"  # stands for a password
    comparer = Comparer(url, timeout_s=6)
    failed: list[Exception] = []

    def compare() -> None:
        try:
            comparer(ComparisonQuestion(model=("m",)))
        except ComparingError as error:
            failed.append(error)

    asker = threading.Thread(target=compare)
    asker.start()
    deadline = time.monotonic() + 5
    while not any(map(is_held_back, set(children()) - before)):  # it does that first of all
        assert time.monotonic() < deadline, "no child that is held back"
        time.sleep(0.02)
    (child,) = set(children()) - before
    while not (child / "environ").read_bytes():  # the kernel is about to start its program
        assert time.monotonic() < deadline, "a child that never started its program"
    assert f"COST_METER_LEDGER={url}".encode() in (child / "environ").read_bytes().split(b"\0")
    assert b"timeout=7" not in (child / "cmdline").read_bytes()
    with pytest.raises(ComparingError, match="another comparison is running"):
        comparer(ComparisonQuestion(model=("m",)))
    asker.join(30)
    assert [str(error) for error in failed] == [
        "compare: expected an answer within 6 s, got none;"
        " ask for a shorter window or fewer offers"
    ]  # fmt: skip
    assert set(children()) == before
