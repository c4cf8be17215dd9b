"""Whatever the side endpoint is asked by its own description, it never fails with a 500.

Goal: bad input is the asker's error, told as such. Method: schemathesis makes requests from the
OpenAPI document, right ones and wrong ones, over a real ledger, as an operator and as a tenant.
"""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from tests.support.examples import examples
from tests.support.small_ledger import small_ledger
from vllm_cost_meter.endpoint.access import Access, sha256
from vllm_cost_meter.endpoint.app import make_app

OPERATOR = {"authorization": "Bearer admin-token"}
TENANT = {"authorization": "Bearer key-of-search"}
BY_HASH = {sha256("key-of-search"): "search"}
# Few, for each of thirty routes: they are enough to go through every parameter.
FEW = settings(max_examples=examples(12), suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def operations(tmp_path_factory):
    """Return every operation that the endpoint describes, over a real ledger."""
    reader = small_ledger(tmp_path_factory.mktemp("side"))
    # A tenant's answers are made coarse on top of what an operator is shown.
    access = Access(sha256("admin-token"), lambda: BY_HASH, lambda: True)
    app = make_app(reader, metrics=bytes, access=access)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=OPERATOR)
    yield [found.ok() for found in schema.get_all_operations()]
    reader.close()


@pytest.mark.parametrize("headers", [OPERATOR, TENANT], ids=["operator", "tenant"])
def test_no_question_is_answered_by_a_500(operations, headers):
    assert len(operations) > 8
    for operation in operations:

        @FEW
        @given(case=operation.as_strategy())
        def ask(case):
            status = case.call(headers=headers, timeout=60).status_code
            # Busy, with a comparison that takes longer than its asker waited, is an answer.
            assert status < 500 or status == 503

        ask()
