"""The page on tenants names every rule and every bound as the code has them."""

from typing import get_args

import typer.main

from tests.support.pages import DOCS, names, section
from vllm_cost_meter.api_server import request_body
from vllm_cost_meter.cli.tenants import app
from vllm_cost_meter.config.tenants import RuleSetting
from vllm_cost_meter.metrics import owners
from vllm_cost_meter.records.owner import CHILD_KINDS
from vllm_cost_meter.tenants.rules import NAME_CHARS_MAX, PROOF_HEADER

PAGE = DOCS / "howto" / "tenants-from-keys.md"


def test_every_rule_is_explained_and_no_other():
    kinds = set(get_args(RuleSetting.model_fields["rule"].annotation))
    rules = names(PAGE, "Whose a request is")
    assert set(rules) == kinds
    assert set(rules[-4:]) == set(CHILD_KINDS)


def test_the_bounds_are_as_documented():
    assert f"1 to {NAME_CHARS_MAX} printable ASCII" in section(PAGE, "Whose a request is")
    assert f"`{PROOF_HEADER}`" in section(PAGE, "What a client can do")
    assert f"longer than {request_body.BODY_BYTES_MAX >> 20} MiB" in section(PAGE, "The body")
    many = section(PAGE, "Many tenants")
    assert f"first {owners.TENANT_LABELS_MAX:,} names" in many.replace("\n", " ")
    assert f"at most {owners.CLIENTS_LABELS_MAX} of them" in many


def test_every_command_is_explained_and_no_other():
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert [name.partition(" ")[0] for name in names(PAGE, "Changing them")] == list(commands)
