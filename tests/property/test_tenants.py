"""Whatever a client sends, it is nobody, itself, or a child of itself.

Goal: nobody can have another tenant billed. Method: a client that has the key of alice, and neither
bob's nor the gateway's secret, sends headers and bodies made of what names tenants, of what looks
like it, and of garbage; all kinds of rules are configured, in every order.
"""

import hashlib
import json

from hypothesis import given
from hypothesis import strategies as st

from vllm_cost_meter.api_server.request_body import claims_of
from vllm_cost_meter.config.tenants import RuleSetting, TenantSetting, check_tenants, resolver_of
from vllm_cost_meter.records.owner import CONTRADICTION, NOBODY, UNKNOWN
from vllm_cost_meter.tenants.rules import (
    PROOF_HEADER,
    Resolver,
    name_problem,
)

ALICE_KEY, BOB_KEY, SECRET = b"sk-alice", b"sk-bob", b"only the gateway knows"


def digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


TENANTS = [
    TenantSetting(name="alice", api_key_sha256=[digest(ALICE_KEY)], tags={"kind": "cogs"}),
    TenantSetting(name="alice/web", tags={"site": "shop"}),
    TenantSetting(name="bob", api_key_sha256=[digest(BOB_KEY)]),
    TenantSetting(name="bob/web"),
    TenantSetting(name="alicë"),
]
check_tenants(TENANTS)
SERVED = ("llama", "org/llama", "bob")
RULES = [
    RuleSetting(rule="api_key"),
    RuleSetting(rule="header", name="x-tenant-id", proof_sha256=digest(SECRET)),
    RuleSetting(rule="header", name="x-team", names="child", proof_sha256=digest(SECRET)),
    RuleSetting(rule="user"),
    RuleSetting(rule="metadata", key="team"),
    RuleSetting(rule="lora"),
    RuleSetting(rule="model"),
]

names = st.sampled_from(
    ["alice", "bob", "bob/web", "alice/web", "../bob", "Bob", "b\u043eb", "bob\u200b", "bob\x00"]
    + ["unknown", "other", "__idle__", "alice,bob", "alice\r\n bob", "a" * 124, "a" * 100_000, ""]
)
texts = st.sampled_from(["alice", "bob", "carol", "web", "llama"]) | names | st.text(max_size=8)
secrets = st.sampled_from(
    [ALICE_KEY, ALICE_KEY.upper(), ALICE_KEY + b"\x00", b"sk-", b"", digest(BOB_KEY).encode()]
    + [digest(SECRET).encode(), digest(ALICE_KEY).encode(), b"k" * 10_000]
)
header_names = st.sampled_from(
    [b"authorization", b"Authorization", b"x-api-key", b"X-API-KEY", b"x_api_key"]
    + [b"x-tenant-id", b"X-Tenant-Id", b"x-tenant-id ", b"x_tenant_id", b"x-forwarded-for"]
    + [b"x-team"]
    + [PROOF_HEADER.encode(), PROOF_HEADER.upper().encode()]
)
values = (
    secrets
    | secrets.map(lambda key: b"Bearer " + key)
    | texts.map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.binary(max_size=8)
)
own = st.sampled_from([[], [(b"authorization", b"Bearer sk-alice")], [(b"x-api-key", ALICE_KEY)]])
header_lists = st.builds(
    lambda own, others, at: others[:at] + own + others[at:],
    own,
    st.lists(st.tuples(header_names, values), max_size=4),
    st.integers(0, 4),
)
jsons = st.sampled_from([None, 5, ["bob"], {"user": "bob"}, *["alice", "bob", "carol"] * 3]) | texts
pairs = st.dictionaries(st.sampled_from(["team", "Team", "user"]), jsons, max_size=2)
fields = st.fixed_dictionaries({"user": jsons, "model": jsons, "metadata": pairs | jsons})
bodies = st.one_of(
    fields.map(lambda said: json.dumps(said).encode()),
    st.builds(lambda said, end: json.dumps(said).encode()[:end], fields, st.integers(0, 60)),
    st.binary(max_size=40) | st.none(),
)
orders = st.permutations(RULES)


def resolved(rules, headers, body):
    resolver: Resolver = resolver_of(rules, TENANTS, None)
    return resolver.resolve(headers, claims_of(body, SERVED))


@given(orders, header_lists, bodies)
def test_a_client_is_nobody_itself_or_a_child_of_itself(rules, headers, body):
    found = resolved(rules, headers, body)
    if found.tenant == UNKNOWN:
        assert found in (NOBODY, CONTRADICTION)
    elif found.tenant == "alice":
        assert (found.rule_text, found.parent, found.tags) == ("api_key", None, {"kind": "cogs"})
    else:
        parent, _, child = found.tenant.partition("/")
        assert (parent, found.parent) == ("alice", "alice")
        assert "/" not in child
        assert found.tenant.isascii()
        assert found.by_api_key
        assert found.is_clients_choice
        assert found.tags["kind"] == "cogs"
    is_unread = found.tenant == "alice/__unread__"
    assert found.tenant == UNKNOWN or is_unread or name_problem(found.tenant) is None
    carries_the_key = any(ALICE_KEY in value for _, value in headers)
    assert found.tenant == UNKNOWN or carries_the_key


@given(orders, header_lists, bodies)
def test_a_client_without_a_key_is_at_most_a_child_of_the_constant(rules, headers, body):
    keyless = [(name, value.replace(ALICE_KEY, b"")) for name, value in headers]
    found = resolved([*rules, RuleSetting(rule="constant", tenant="guests")], keyless, body)
    assert found.tenant.partition("/")[0] in ("guests", UNKNOWN)


@given(orders, header_lists, bodies)
def test_a_trusted_client_is_unknown_or_below_it(rules, headers, body):
    trusting = [
        rule.model_copy(update={"trust_clients": True}) if rule.rule in _CHILDREN else rule
        for rule in rules
    ]
    keyless = [(name, value.replace(ALICE_KEY, b"")) for name, value in headers]
    found = resolved(trusting, keyless, body)
    assert found.tenant.partition("/")[0] == UNKNOWN


_CHILDREN = ("user", "metadata", "lora", "model")


@given(header_lists, bodies)
def test_the_gateway_names_whom_it_wants_whatever_else_stands_there(headers, body):
    ours = {PROOF_HEADER, "x-tenant-id"}
    others = [(n, v) for n, v in headers if n.lower().strip().decode() not in ours]
    said = [(PROOF_HEADER.encode(), SECRET), (b"x-tenant-id", b"bob")]
    found = resolved(RULES[1:2] + RULES[:1], [*others, *said], body)
    assert (found.tenant, found.rule_text) == ("bob", "header:x-tenant-id")


@given(orders, header_lists, bodies, st.sampled_from([b"Bearer ", b"bearer ", b"BEARER  "]))
def test_whom_vllm_admitted_by_its_key_pays_whatever_else_stands_there(
    rules, headers, body, scheme
):
    by_key_first = sorted(rules, key=lambda rule: rule.rule != "api_key")
    resolver = resolver_of(by_key_first, TENANTS, None)
    said = [(b"authorization", scheme + BOB_KEY), *headers]
    found = resolver.resolve(said, claims_of(body, SERVED), keys_checked=True)
    assert found.tenant.partition("/")[0] == "bob"
    assert found.by_api_key
