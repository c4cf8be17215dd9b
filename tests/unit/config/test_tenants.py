"""The settings of tenants and of the rules that find them: what is refused, what is inherited."""

import hashlib
import json
import re
from typing import Any

import pytest

from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.config.tenants import RuleSetting
from vllm_cost_meter.errors import SettingError
from vllm_cost_meter.tenants.rules import (
    ApiKeyRule,
    Believed,
    BodyClaims,
    ChildRule,
    ConstantRule,
    DeclaredTenant,
    HeaderChildRule,
    HeaderRule,
    HeaderTagRule,
)

HASH_A = hashlib.sha256(b"sk-a").hexdigest()
HEADER = {"rule": "header", "name": "x-tenant-id"}


def settings_of(*rules: Any, tenants: Any = (), **more: str) -> Settings:
    """Settings with these entries, as the environment has them."""
    given = {"COST_METER_TENANTS": json.dumps(tenants), **more}
    if rules:
        given["COST_METER_TENANT_RULES"] = json.dumps(rules)
    return load_settings(given)


def complaint(*rules: Any, tenants: Any = ()) -> str:
    with pytest.raises(SettingError) as caught:
        settings_of(*rules, tenants=tenants)
    message = str(caught.value)
    assert message.isprintable()
    return message


# ---- tenants


@pytest.mark.parametrize(
    "name",
    ["", "a" * 129, "__idle__", "unknown", "Unknown", "other", " a", "a\nb", "a\u0000"],
)
def test_a_bad_tenant_name_is_an_error(name):
    message = complaint(tenants=[{"name": name}])
    assert message.startswith("COST_METER_TENANTS[0].name (environment): expected ")


def test_a_tenants_name_is_unique():
    message = complaint(tenants=[{"name": "a"}, {"name": "a"}])
    assert message.endswith("expected each tenant's name once, got 'a' twice")


def test_a_key_belongs_to_one_tenant_only():
    tenants = [
        {"name": "a", "api_key_sha256": [HASH_A]},
        {"name": "b", "api_key_sha256": [HASH_A.upper()]},
    ]
    message = complaint(tenants=tenants)
    assert message.endswith(f"got {HASH_A[:8]}... at 'a' and 'b'")
    assert HASH_A[:9] not in message


def test_the_hash_of_nothing_is_no_key():
    nothing = hashlib.sha256(b"").hexdigest()
    tenants = [{"name": "a", "api_key_sha256": [nothing]}]
    assert "the SHA-256 of an empty text" in complaint(tenants=tenants)


@pytest.mark.parametrize(
    ("tenants", "end"),
    [
        ([{"name": "a", "parent": "b"}], "each parent to be a declared tenant, got 'b' of 'a'"),
        ([{"name": "a", "parent": "a"}], "parents without a circle, got 'a' above itself"),
        (
            [{"name": "a", "parent": "b"}, {"name": "b", "parent": "c"}]
            + [{"name": "c", "parent": "b"}],
            "parents without a circle, got 'b' above itself",
        ),
        ([{"name": "a/b"}], "a slash only in PARENT/CHILD of a declared parent, got 'a/b'"),
        ([{"name": "a"}, {"name": "a/"}], "of a declared parent, got 'a/'"),
        ([{"name": "a"}, {"name": "a/ b"}], "of a declared parent, got 'a/ b'"),
        ([{"name": "/a"}], "of a declared parent, got '/a'"),
        (
            [{"name": "a"}, {"name": "c"}, {"name": "a/b", "parent": "c"}],
            "the same parent as in the name PARENT/CHILD, got 'c' of 'a/b'",
        ),
    ],
)
def test_parents_are_declared_and_no_circle_and_as_the_name_says(tenants, end):
    message = complaint(tenants=tenants)
    assert message.startswith("COST_METER_TENANTS (environment): expected ")
    assert message.endswith(end)


@pytest.mark.parametrize(
    ("tags", "got"),
    [
        ({"Cost Centre": "1"}, "got the key 'Cost Centre'"),
        ({"": "1"}, "got the key ''"),
        ({"k" * 65: "1"}, f"got the key {'k' * 60!r}"),
        ({"k": ""}, "got '' at 'k'"),
        ({"k": "v" * 129}, f"got {'v' * 60!r} at 'k'"),
        ({"k": "a\nb"}, "got 'a\\nb' at 'k'"),
        ({"k": "\u202e"}, "got '\\u202e' at 'k'"),
    ],
)
def test_a_bad_tag_is_an_error(tags, got):
    message = complaint(tenants=[{"name": "a", "tags": tags}])
    assert message.startswith("COST_METER_TENANTS[0].tags (environment): expected a table of texts")
    assert message.endswith(got)


def test_a_tag_that_is_no_text_is_an_error():
    message = complaint(tenants=[{"name": "a", "tags": {"k": 5}}])
    assert message.startswith("COST_METER_TENANTS[0].tags.k (environment): expected a table of")


FAMILY = [
    {"name": "corp", "tags": {"kind": "cogs", "cost_centre": "ü-1"}, "reply": "none"},
    {"name": "sales", "parent": "corp", "tags": {"kind": "r-d"}},
    {"name": "sales/web", "tags": {"site": "shop"}, "reply": "headers"},
    {"name": "alone"},
]


def test_a_tenant_has_the_tags_of_its_parents_and_its_own_go_before():
    assert settings_of(tenants=FAMILY).resolver.declared == {
        "corp": DeclaredTenant(None, {"cost_centre": "ü-1", "kind": "cogs"}),
        "sales": DeclaredTenant("corp", {"cost_centre": "ü-1", "kind": "r-d"}),
        "sales/web": DeclaredTenant(
            "sales", {"cost_centre": "ü-1", "kind": "r-d", "site": "shop"}, ("corp",)
        ),
        "alone": DeclaredTenant(None, {}),
    }


def test_what_a_tenants_clients_are_told_is_said_by_it_or_its_parents_or_by_the_setting():
    settings = settings_of(tenants=FAMILY, COST_METER_REPLY="headers")
    told = {name: settings.reply_for(name) for name in ("corp", "sales", "sales/x", "corp/web")}
    assert told == dict.fromkeys(told, "none")
    assert settings.reply_for("sales/web") == "headers"
    assert settings.reply_for("alone") == settings.reply_for("alone/x") == "headers"
    assert settings.reply_for("unknown") == settings.reply_for("x/y") == "headers"


# ---- rules


def test_without_rules_the_api_key_alone_names_tenants():
    assert settings_of().resolver.rules == (ApiKeyRule({}),)


def test_rules_keep_the_order_they_are_listed_in():
    settings = settings_of(
        {"rule": "constant", "tenant": "x"},
        {"rule": "metadata", "key": "team"},
        {**HEADER, "trust": "everyone"},
        {"rule": "user", "trust_clients": True},
        {"rule": "lora"},
        {"rule": "model"},
        {"rule": "api_key"},
        tenants=[{"name": "Corp", "api_key_sha256": [HASH_A]}, {"name": "Corp/web"}],
    )
    assert settings.resolver.rules[0:2] == (ConstantRule("x"), ChildRule("metadata", "team"))
    by_header, by_user, *others = settings.resolver.rules[2:]
    assert by_header.header.name == "x-tenant-id"
    assert by_header.header.trusts_everyone
    assert by_header.paths == {"Corp/web"}
    assert by_user == ChildRule("user", trusts_clients=True)
    assert others == [ChildRule("lora"), ChildRule("model"), ApiKeyRule({HASH_A: "Corp"})]


def test_a_rules_own_proof_goes_before_the_secret_of_the_environment():
    secret = {"COST_METER_GATEWAY_SECRET": "s3cret-of-the-gateway"}
    by_secret = hashlib.sha256(b"s3cret-of-the-gateway").hexdigest()
    rules = settings_of(HEADER, {**HEADER, "proof_sha256": HASH_A.upper()}, **secret).resolver.rules
    assert rules == (
        HeaderRule(Believed("x-tenant-id", by_secret)),
        HeaderRule(Believed("x-tenant-id", HASH_A)),
    )


def test_a_header_names_a_tenant_a_child_or_a_tag():
    proven = {**HEADER, "proof_sha256": HASH_A}
    header = Believed("x-tenant-id", HASH_A)
    rules = settings_of(
        {**proven, "names": "tenant"},
        {**proven, "names": "child"},
        {**proven, "names": "tag", "tag": "workload"},
    ).resolver.rules
    expected = HeaderRule(header), HeaderChildRule(header), HeaderTagRule(header, "workload")
    assert rules == expected


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {**HEADER, "trust": "everyone", "names": "tag"},
            'expected `tag` where `names = "tag"`, and only there',
        ),
        (
            {**HEADER, "trust": "everyone", "tag": "workload"},
            'expected `tag` where `names = "tag"`, and only there',
        ),
        ({**HEADER, "names": "group"}, "[0].names (environment): expected tenant, child or tag"),
        ({**HEADER, "names": "tag", "tag": "Work"}, "[0].tag (environment): expected 1 to 64 sm"),
        ({**HEADER, "names": "child"}, '`trust = "everyone"` or COST_METER_GATEWAY_SECRET for'),
        ({"rule": "user", "names": "child"}, "no `names` in a rule 'user'"),
        ({"rule": "ip"}, "[0].rule (environment): expected api_key, header, user, metadata, lora"),
        ({}, "[0].rule (environment): expected api_key, header, user, metadata, lora, model or"),
        (HEADER, '`trust = "everyone"` or COST_METER_GATEWAY_SECRET for the header'),
        ({"rule": "header", "trust": "everyone"}, "`name` in a rule 'header', got nothing"),
        ({**HEADER, "trust": "loopback"}, "[0].trust (environment): expected everyone"),
        ({**HEADER, "trust": "everyone", "proof_sha256": HASH_A}, "got both"),
        ({**HEADER, "proof_sha256": "abc"}, "[0].proof_sha256 (environment): expected 64 hexa"),
        ({**HEADER, "proof_sha256": hashlib.sha256().hexdigest()}, "the SHA-256 of an empty text"),
        ({**HEADER, "name": "x tenant"}, "[0].name (environment): expected the name of an HTTP"),
        ({**HEADER, "name": "x\n" * 100}, "[0].name (environment): expected the name of an HTTP"),
        ({**HEADER, "name": "Authorization"}, "expected a header that does not carry a secret"),
        ({**HEADER, "name": "X-API-Key"}, "expected a header that does not carry a secret"),
        (
            {**HEADER, "proof_sha256": HASH_A, "proof_header": "X-Tenant-Id"},
            "one header for the tenant, another for the proof",
        ),
        (
            {"rule": "header", "name": "x-cost-meter-gateway-secret", "proof_sha256": HASH_A},
            "one header for the tenant, another for the proof",
        ),
        ({"rule": "metadata"}, "`key` in a rule 'metadata', got nothing"),
        ({"rule": "metadata", "key": "a b"}, "[0].key (environment): expected 1 to 64 letters"),
        ({"rule": "constant"}, "`tenant` in a rule 'constant', got nothing"),
        ({"rule": "constant", "tenant": "unknown"}, "[0].tenant (environment): expected a name"),
        (
            {"rule": "constant", "tenant": "a/b"},
            "declared tenant, because the name has a slash, got",
        ),
        ({"rule": "user", "trust_clients": 1}, "[0].trust_clients (environment): expected true or"),
        ({"rule": "user", "key": "x"}, "no `key` in a rule 'user', got a value"),
        ({"rule": "api_key", "trust_clients": True}, "no `trust_clients` in a rule"),
        ({"rule": "user", "trsut": True}, "[0].trsut (environment): expected one of rule, name"),
    ],
)
def test_a_rule_that_cannot_be_asked_is_an_error(rule, message):
    said = complaint(rule)
    assert said.startswith("COST_METER_TENANT_RULES")
    assert message in said


def test_a_constant_may_name_a_declared_child():
    tenants = [{"name": "a"}, {"name": "a/b"}]
    settings = settings_of({"rule": "constant", "tenant": "a/b"}, tenants=tenants)
    assert settings.resolver.resolve([]).parent == "a"


def test_every_rule_kind_of_the_settings_can_be_asked():
    kinds = re.findall(r"\w+", str(RuleSetting.model_fields["rule"].annotation).split("[")[1])
    needed = {"header": {"name": "x", "trust": "everyone"}, "metadata": {"key": "k"}}
    needed["constant"] = {"tenant": "t"}
    for kind in kinds:
        settings = settings_of({"rule": kind, **needed.get(kind, {})})
        settings.resolver.resolve([(b"x", b"t")], BodyClaims("u", {"k": "v"}, "l", "m"))
    assert len(kinds) == 7
