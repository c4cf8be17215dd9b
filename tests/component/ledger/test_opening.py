"""A ledger is opened by its URL, its file or by default, and asked by ids and words."""

import os
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from tests.support.ledger_writer import LedgerWriter
from tests.support.small_ledger import HTTP, small_ledger
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.opening import open_ledger
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import PriceBook, PriceEntry
from vllm_cost_meter.reports.grammar import question


@pytest.fixture
def path(tmp_path: Path) -> Path:
    small_ledger(tmp_path).close()
    return tmp_path / "ledger.db"


def requests_of(reader: LedgerReader) -> list[str]:
    return [row["http_request_id"] for row in reader.requests()["requests"]]


def test_a_ledger_is_opened_by_its_url_its_path_or_its_name(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    for name in (f"sqlite:///{path}", path, str(path), "ledger.db"):
        with open_ledger(name) as reader:
            assert requests_of(reader) == ["cost-1"]


def test_without_a_name_the_ledger_of_this_user_is_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(LedgerError, match="vllm-cost-meter/ledger.db: no such file"):
        open_ledger()
    (tmp_path / "vllm-cost-meter").mkdir()
    small_ledger(tmp_path / "vllm-cost-meter").close()
    with open_ledger() as reader:
        assert requests_of(reader) == ["cost-1"]


def test_opening_makes_no_ledger(tmp_path):
    with pytest.raises(LedgerError, match="no such file"):
        open_ledger(tmp_path / "other.db")
    assert list(tmp_path.iterdir()) == []


def test_a_book_or_what_returns_one_prices_what_is_read(path):
    def usd(**options):
        with open_ledger(path, **options) as reader:
            return reader.report()["series"][0]["cost_nanousd"]

    book = PriceBook([PriceEntry("prices[0]", Decimal(7200), "the lease", None)])
    assert usd() == 1  # 1,350 ns at the 2.50 USD that the ledger recorded: 0.9375 nano-USD
    assert usd(book=book) == usd(book=lambda: book) == 2 * 1_350


def test_a_request_is_found_by_any_of_its_ids(path):
    with open_ledger(path) as reader:
        for id in ("cost-1", "chatcmpl-1", "mine", "chatcmpl-1-internal"):
            request = reader.request(id)
            assert request["http_request_id"] == "cost-1"
            assert request == reader.look_up(id)[0]
        assert reader.request("nobody's") is None


def test_an_id_of_several_requests_is_refused_and_told_with_theirs(path):
    writer = LedgerWriter(f"sqlite:///{path}", price_of=lambda _: None)
    writer.start()
    writer.commit(replace(HTTP, http_request_id="cost-2", response_id="chatcmpl-2")).result(10)
    writer.close()
    with open_ledger(path) as reader:
        with pytest.raises(ValueError, match=r"^id 'mine': expected .* one request, got that of "):
            reader.request("mine")
        assert len(reader.look_up("mine")) == 2
        assert reader.request("cost-2")["http_request_id"] == "cost-2"


def test_a_report_is_asked_by_words_or_by_the_question_that_they_ask(path):
    words = {"window": "2027-01", "aggregate": "tenant,model", "filter": "tenant:search"}
    with open_ledger(path) as reader:
        assert reader.report(**words) == reader.report(question(**words))
        assert reader.report() == reader.report(question())
        with pytest.raises(ValueError, match="aggregate: expected"):
            reader.report(aggregate="colour")
        with pytest.raises(TypeError, match="expected a question or words, got both: tz"):
            reader.report(question(), tz="Europe/Berlin")


def test_the_file_is_closed_at_the_end_of_the_block_also_by_an_error(path):
    def is_open():
        return str(path) in {os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()}

    def fail():
        with open_ledger(path) as reader, reader.transaction():
            assert is_open()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not is_open()
