"""The pages on reports have every word, field, policy and class of reports and statements."""

import re

import pytest
from fastapi.testclient import TestClient

from tests.support.pages import DOCS, names, section
from tests.support.small_ledger import small_ledger
from vllm_cost_meter.cli.report import Format
from vllm_cost_meter.endpoint.app import make_app
from vllm_cost_meter.prices.run_prices import Cost
from vllm_cost_meter.reports.grammar import DIMENSIONS, LABEL, STEPS, TAG, TIMES, question
from vllm_cost_meter.reports.idle import SHARED_CLASSES, IdlePolicy
from vllm_cost_meter.reports.statement import CLASS, OVERHEAD, USAGE
from vllm_cost_meter.reports.tenant_details import TenantFacts, tenant_details
from vllm_cost_meter.units.calendar import hours_of_window

PAGE = DOCS / "reference" / "reports.md"
HOWTO = DOCS / "howto" / "month-statement.md"
EXPLANATION = DOCS / "explanation" / "reports.md"


@pytest.fixture
def reader(tmp_path):
    reader = small_ledger(tmp_path)
    yield reader
    reader.close()


def first_names(text: str) -> list[str]:
    return re.findall(r"^\| `(.*?)`", text, re.MULTILINE)


def values(word: str) -> list[str]:
    """The values that the table of words names for one."""
    row = re.search(rf"^\| `{word}` \| (.*?) \| ", section(PAGE, "Words"), re.MULTILINE)
    return re.findall("`(.*?)`", row[1])


def test_the_words_are_the_parameters_of_the_endpoint(reader):
    client = TestClient(make_app(reader), base_url="http://localhost")
    described = client.get("/openapi.json").json()["paths"]["/cost/report"]["get"]["parameters"]
    query = [each["name"] for each in described if each["in"] == "query"]
    assert first_names(section(PAGE, "Words")) == query


def test_the_values_of_the_words_are_those_of_the_code():
    for window in values("window"):
        hours_of_window(window)
    assert values("aggregate") == [*DIMENSIONS, *TIMES, f"{TAG}NAME", f"{LABEL}NAME"]
    assert values("step") == list(STEPS)
    question(filter=values("filter")[0])
    question(tz=values("tz")[0])


def test_every_field_of_an_answer_is_documented_and_no_other(reader):
    answer = reader.report(question())
    before_pieces = section(PAGE, "The answer").partition("### Pieces")[0]
    assert first_names(before_pieces) == list(answer)
    assert names(PAGE, "Pieces") == list(answer["series"][0])
    more = list(tenant_details(TenantFacts({}, None, {}, {}), lambda _: Cost(None))[""])
    for row in (answer["series"][0]["rows"][0], answer["series"][0]["rows"][-1]):
        assert [*first_names(section(PAGE, "Rows")), *more] == list(row)
    by_day = reader.report(question(aggregate="tenant,day"))["series"][0]["rows"][0]
    assert first_names(section(PAGE, "Rows")) == [name for name in by_day if name != "day"]
    assert set(answer["window"]) == {"from", "to", "from_hour", "to_hour", "tz"}


def test_every_field_of_a_line_is_documented_and_no_other(reader):
    month = "2027-01"
    for told in ({"tenant": "search"}, {}):
        answer = reader.statement(month, **told)
        text = section(PAGE, "Statements")
        assert first_names(text) == list(answer["lines"][0])
        said = re.findall("`([a-z_]+)`", text)
        assert set(answer) - {"tenant", "month", "currency"} <= set(said)
    assert {USAGE, OVERHEAD, CLASS} <= set(said)


def test_every_policy_is_documented_and_can_be_asked_for():
    text = section(PAGE, "Idle policies")
    policies = [IdlePolicy.parse(policy).name for policy in first_names(text)]
    assert policies == ["none", "proportional", "even", "reserved", "owner"]
    for said in (text, section(EXPLANATION, "How idle time is shared")):
        shared = re.findall("`([a-z_]+)`", said.partition("`in_flight`")[0])
        assert tuple(shared) == SHARED_CLASSES


def test_every_format_is_documented():
    said = re.search(r"`--format` is (.*?)\.", HOWTO.read_text())[1]
    assert re.findall("`(.*?)`", said) == [each.value for each in Format]
