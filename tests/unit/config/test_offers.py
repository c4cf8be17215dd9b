"""What the same requests would cost at APIs: priced one by one, at their own time and size."""

import json
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from tests.component.cli.test_cli import no_settings, run
from tests.component.ledger.test_economics import write
from tests.component.ledger.test_reader import Ledger
from vllm_cost_meter.config.offers import offers_of_file, offers_of_package
from vllm_cost_meter.economics import Mix, Offer, Sent, compare, volumes_of
from vllm_cost_meter.economics.comparison import FORMULA

__all__ = ["no_settings"]

AT = datetime(2027, 1, 15, 8, tzinfo=UTC)
ALL_TIME = ("--window", "2026-01-01T00:00:00Z,2028-01-01T00:00:00Z")
PRICES = """
[[api_prices]]
provider = "here"
model = "small"
input_usd_per_m = 1
cached_usd_per_m = 0.1
output_usd_per_m = 4
source = "their page"

[[api_prices]]
provider = "there"
model = "large"
label = "frontier"
input_usd_per_m = 5000
output_usd_per_m = 30_000
source = "contract 7"
effective_from = 2026-06-01
"""


def sent(prompt: int, cached: int, output: int, at: datetime = AT) -> Sent:
    return Sent(at, prompt, cached, output)


def offer(usd: str, name: str = "m") -> Offer:
    return Offer("p", name, "l", "s", None, lambda _: Decimal(usd))


@pytest.fixture
def price_file(tmp_path):
    path = tmp_path / "prices.toml"
    path.write_text(PRICES)
    return path


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "ledger.db"
    ledger = Ledger(f"sqlite:///{path}")
    write(ledger)  # four requests of 10 + 5 tokens, 2 of them cached; 0.60 USD
    ledger.close()
    return path


# ---- arithmetic


def test_a_request_costs_its_computed_cached_and_output_tokens(price_file):
    small, large = offers_of_file(price_file)
    assert small.usd(sent(1_000, 200, 50)) == Decimal("0.00102")
    # Without a price of their own cached tokens cost what all input does.
    assert large.usd(sent(1_000, 200, 50)) == Decimal("6.5")
    assert (large.label, large.source, large.as_of) == ("frontier", "contract 7", "2026-06-01")


def test_every_request_is_priced_by_itself_and_the_cheapest_offer_comes_first():
    requests = [sent(10, 0, 5), sent(20, 5, 5)]
    found = compare(requests, Decimal(3), [offer("2", "dear"), offer("1.5", "even"), offer("1")])
    assert [(one.usd, one.cheaper) for one in found] == [
        (2, "api"), (3, "equal"), (4, "self-hosted"),
    ]  # fmt: skip
    assert found[0].times == Decimal(2) / 3
    mix = Mix.of(requests)
    assert mix == Mix(2, 30, 5, 10)
    assert mix.usd_per_m_output_tokens(Decimal(2)) == 200_000
    assert mix.usd_per_m_total_tokens(Decimal(2)) == 50_000


def test_without_requests_or_a_price_nothing_is_judged():
    (nothing,) = compare([], None, [offer("1")])
    assert (nothing.usd, nothing.times, nothing.cheaper) == (0, None, None)
    assert Mix.of([]).usd_per_m_output_tokens(Decimal(1)) is None
    assert compare([sent(1, 0, 1)], Decimal(0), [offer("1")])[0].times is None


def test_a_request_in_a_long_tier_costs_that_tier_and_is_summed_after():
    (gemini,) = offers_of_package(["google/gemini-2.5-pro"], [])
    # Per million: up to 200k input tokens 1.25 and 10 USD, cached 0.125; beyond 2.50, 15 and 0.25.
    short, long = sent(150_000, 50_000, 1_000), sent(300_000, 100_000, 1_000)
    assert gemini.usd(short) == Decimal("0.14125")  # 0.125 + 0.00625 + 0.01
    assert gemini.usd(long) == Decimal("0.54")  # 0.5 + 0.025 + 0.015
    (both,) = compare([short, short, long], None, [gemini])
    assert both.usd == Decimal("0.8225")
    # The sum of their tokens would be in the long tier as a whole.
    assert gemini.usd(sent(600_000, 200_000, 3_000)) == Decimal("1.095")


def test_a_model_without_a_price_per_token_is_no_offer_rather_than_a_free_one():
    # In its list, and paid by a subscription.
    with pytest.raises(ValueError, match="got none that matches and has a price per token"):
        list(offers_of_package(["github-copilot/gpt-4o"], []))
    million = sent(10**6, 0, 10**6)
    prices = {f"{o.provider}/{o.model}": o.usd(million) for o in offers_of_package([], ["openai"])}
    assert len(prices) > 20
    assert [name for name, usd in prices.items() if not usd] == []


def test_the_date_of_a_packages_price_is_the_day_from_which_it_holds():
    dates = [one.as_of for one in offers_of_package([], [])]
    known = [datetime.fromisoformat(each).date() for each in dates if each is not None]
    assert known
    assert max(known) <= datetime.now(UTC).date()


def test_a_price_holds_from_its_date_on(tmp_path):
    path = tmp_path / "prices.toml"
    entry = '[[api_prices]]\nprovider = "p"\nmodel = "m"\nsource = "s"\ninput_usd_per_m = 0\n'
    path.write_text(
        f"{entry}output_usd_per_m = 1\neffective_from = 2026-01-01\n"
        f"{entry}output_usd_per_m = 3\neffective_from = 2027-01-15T08:00:00Z\n"
    )
    (one,) = offers_of_file(path)
    before = datetime(2027, 1, 15, 7, 59, tzinfo=UTC)
    assert [one.usd(sent(0, 0, 10**6, at)) for at in (before, AT)] == [1, 3]
    with pytest.raises(ValueError, match="no price of p/m at 2025-12-31"):
        one.usd(sent(1, 0, 1, datetime(2025, 12, 31, tzinfo=UTC)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected [[api_prices]] entries and nothing else"),
        ("x = 1\n" + PRICES, "expected [[api_prices]] entries and nothing else"),
        ("[[api_prices]]\n", "api_prices[0].provider"),
        (PRICES.replace("= 4", "= -4"), "api_prices[0].output_usd_per_m"),
        (PRICES.replace("= 4", "= nan"), "api_prices[0].output_usd_per_m"),
        (PRICES.replace("= 4", '= "x"'), "api_prices[0].output_usd_per_m"),
        (PRICES.replace("source", "sauce"), "api_prices[0]"),
        (PRICES + PRICES, "expected one price of here/small at a time, got two from the beginning"),
        ("[[", "wrong.toml: expected TOML: "),
    ],
)
def test_a_file_of_no_prices_is_one_line(tmp_path, path, text, said):
    prices = tmp_path / "wrong.toml"
    prices.write_text(text)
    result = run("compare", "--ledger", path, "--prices", prices)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert said in result.stderr


# ---- the command


def test_the_same_requests_are_compared_with_what_they_cost_here(path, price_file):
    result = run("compare", "--ledger", path, *ALL_TIME, "--prices", price_file)
    assert (result.exit_code, result.stderr) == (0, "")
    head, own, small, large, mix, note = result.stdout.splitlines()
    assert head.split()[:3] == ["provider", "model", "usd"]
    assert own.split()[0] == "self-hosted"
    assert "0.60" in own.split()
    # 32 computed, 8 cached, 20 output tokens.
    assert small.split()[2] == "0.0001128"
    assert large.split()[2] == "0.80"
    assert ("api" in small.split(), "self-hosted" in large.split()) == (True, True)
    assert mix.startswith("the same 4 requests each: 40 prompt tokens, of which 8 cached, and 20 ")
    assert note.startswith("note: an API's price promises no latency")


def test_the_note_may_be_accepted_and_offers_filtered(path, price_file):
    ask = ("compare", "--ledger", path, *ALL_TIME, "--prices", price_file, "--json")
    answer = json.loads(run(*ask, "--accept-no-latency-promise").stdout)
    assert answer["note"] is None
    assert answer["mix"]["cached_tokens"] == 8
    assert [row["usd"] for row in answer["offers"]] == ["0.0001128", "0.8"]
    assert answer["offers"][1]["usd_per_m_output_tokens"] == "40000.0"
    for words, left in (
        (("--label", "frontier"), ["there"]),
        (("--provider", "here"), ["here"]),
        (("--max-usd-per-m-output", 100), ["here"]),
    ):
        rows = json.loads(run(*ask, *words).stdout)["offers"]
        assert [row["provider"] for row in rows] == left


def test_an_answer_echoes_its_inputs_and_names_its_formula(path, price_file):
    words = ("--ratio", "2:1", "--volume", "1M", "--label", "frontier", "--label", "file")
    ask = ("compare", "--ledger", path, *ALL_TIME, "--prices", price_file, "--json", *words)
    answer = json.loads(run(*ask).stdout)
    assert answer["inputs"] == {
        "window": ALL_TIME[1],
        "model": None,
        "provider": None,
        "prices": str(price_file),
        "label": ["frontier", "file"],
        "max_usd_per_m_output": None,
        "ratio": "2:1",
        "volume": ["1M"],
        "filter": None,
        "accept_no_latency_promise": False,
    }
    assert answer["formula"] == FORMULA
    named = set(answer["self_hosted"]) | set(answer["offers"][0]) | set(answer["what_if"])
    assert all(name in FORMULA for name in named if "usd" in name or name == "times")


def test_numbers_are_not_rounded(tmp_path, path):
    prices = tmp_path / "thirds.toml"
    prices.write_text(PRICES.replace("= 4", "= 3.3333333333333"))
    ask = ("compare", "--ledger", path, *ALL_TIME, "--prices", prices)
    (small, _) = json.loads(run(*ask, "--json").stdout)["offers"]
    assert small["usd"] == "0.0000994666666666660"  # 32 x 1 + 8 x 0.1 + 20 x 3.3333333333333
    row = run(*ask).stdout.splitlines()[2].split()
    assert "0.000099467" in row, "to the nano-USD, and not in scientific notation"
    assert "4.97333" in row, "USD per million output tokens"


def test_the_settings_may_name_the_price_file(path, price_file):
    ask = ("compare", "--ledger", path, *ALL_TIME, "--json")
    named = {"COST_METER_API_PRICES": str(price_file)}
    answer = json.loads(run(*ask, **named).stdout)
    assert [row["provider"] for row in answer["offers"]] == ["here", "there"]
    assert answer["inputs"]["prices"] == str(price_file)
    other = price_file.with_name("other.toml")
    other.write_text(PRICES.replace('"here"', '"elsewhere"'))
    rows = json.loads(run(*ask, "--prices", other, **named).stdout)["offers"]
    assert rows[0]["provider"] == "elsewhere"
    # A provider that the file does not have is one of the package's.
    for provider, expected in (("THER?", {"there"}), ("openai", {"openai"})):
        rows = json.loads(run(*ask, "--provider", provider, **named).stdout)["offers"]
        assert {row["provider"] for row in rows} == expected


def test_an_offer_that_costs_too_much_is_in_no_table(path, price_file):
    ask = ("compare", "--ledger", path, *ALL_TIME, "--prices", price_file, "--json")
    words = ("--ratio", "1:1", "--volume", "1M", "--max-usd-per-m-output", "5.64")
    answer = json.loads(run(*ask, *words).stdout)
    assert [row["usd_per_m_output_tokens"] for row in answer["offers"]] == ["5.6400000"]
    assert [row["provider"] for row in answer["what_if"]["offers"]] == ["here"]


@pytest.mark.parametrize("limit", ["nan", "inf", "-1"])
def test_a_limit_that_is_no_price_is_one_line(path, price_file, limit):
    ask = ("compare", "--ledger", path, "--prices", price_file, "--max-usd-per-m-output", limit)
    result = run(*ask)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "max_usd_per_m_output: expected 0 or a number above it" in result.stderr


def test_volumes_that_nobody_sent_are_supposed_in_a_ratio(path, price_file):
    ask = ("compare", "--ledger", path, *ALL_TIME, "--prices", price_file)
    what_if = ("--ratio", "2:1", "--volume", "1M..50M")
    supposed = json.loads(run(*ask, *what_if, "--json").stdout)["what_if"]
    # Mean requests of 15 tokens: 10 of input, 5 of output. 0.60 USD in 30 s, so much a month.
    assert supposed["tokens_per_request"] == 15
    month = 0.60 / 30 * 3600 * 730
    assert float(supposed["self_hosted_usd_per_month"]) == pytest.approx(month)
    small = [row for row in supposed["offers"] if row["provider"] == "here"]
    assert [row["tokens_per_month"] for row in small] == [10**6, 10**7, 5 * 10**7]
    assert float(small[0]["usd"]) == pytest.approx(2)  # a million tokens at 1, 1 and 4 USD
    large = [row for row in supposed["offers"] if row["provider"] == "there"]
    assert [row["cheaper"] for row in large] == ["api", "self-hosted", "self-hosted"]
    shown = run(*ask, *what_if).stdout
    assert f"a month here, at any volume: {month:.2f} USD" in shown


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("250k", [250_000]), ("1.5M", [1_500_000]), ("7", [7]), ("5M..5M", [5 * 10**6]),
        ("1M..1B", [10**6, 10**7, 10**8, 10**9]),
    ],
)  # fmt: skip
def test_a_volume_is_a_number_of_tokens_or_a_range(text, tokens):
    assert volumes_of(text) == tokens


@pytest.mark.parametrize("text", ["", "x", "-1M", "0", "1M..", "2M..1M", "1e9", "9999T", "nan"])
def test_what_is_no_volume_is_one_line(path, price_file, text):
    result = run(
        "compare", "--ledger", path, "--prices", price_file, "--ratio", "1:1", "--volume", text
    )
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_more_volumes_than_anybody_reads_are_one_line(path, price_file):
    volumes = [word for n in range(1, 5_002) for word in ("--volume", n)]
    ask = ("compare", "--ledger", path, "--prices", price_file, "--ratio", "1:1", *volumes)
    assert "at most 10000 offers x volumes, got 2 x 5001" in run(*ask).stderr
    assert run(*ask[:-2], "--json").exit_code == 0


@pytest.mark.parametrize("words", [("--ratio", "1:1"), ("--volume", "1M")])
def test_ratio_and_volume_go_together(path, price_file, words):
    result = run("compare", "--ledger", path, "--prices", price_file, *words)
    assert "ratio: expected it and volume together" in result.stderr


def test_offers_of_the_package_are_named_with_their_source(path):
    ask = ("compare", "--ledger", path, *ALL_TIME, "--model", "openai/gpt-4o-mini", "--json")
    (row,) = json.loads(run(*ask).stdout)["offers"]
    assert (row["provider"], row["model"]) == ("openai", "gpt-4o-mini")
    assert row["source"].startswith("genai-prices ")
    assert "https://" in row["source"]


@pytest.mark.parametrize("words", [(), ("--model", "nobody/nothing"), ("--provider", "nobody")])
def test_no_offer_is_one_line(path, words):
    result = run("compare", "--ledger", path, *words)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
