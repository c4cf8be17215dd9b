"""Who pays: every way to be named, and every way to try to be named as somebody else."""

import hashlib

import pytest

from tests.support.builders import make_owner
from vllm_cost_meter.records.owner import CONTRADICTION, NOBODY, Owner
from vllm_cost_meter.tenants.rules import (
    NO_CLAIMS,
    ApiKeyRule,
    Believed,
    ChildRule,
    ConstantRule,
    DeclaredTenant,
    HeaderRule,
    Resolver,
    name_problem,
)

ALICE_KEY, ALICE_OTHER_KEY, BOB_KEY = b"sk-alice", b"sk-alice-2", b"sk-bob"
SECRET = b"only the gateway knows"


def digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


KEYS = {digest(ALICE_KEY): "alice", digest(ALICE_OTHER_KEY): "alice", digest(BOB_KEY): "bob"}
DECLARED = {
    "alice": DeclaredTenant(tags={"kind": "cogs"}),
    "bob": DeclaredTenant(parent="corp"),
    "corp": DeclaredTenant(),
    "corp/web": DeclaredTenant(parent="corp", tags={"kind": "web"}),
    "münchen": DeclaredTenant(),
}
PATHS = frozenset({"corp/web"})
BY_KEY = ApiKeyRule(KEYS)
BY_GATEWAY = HeaderRule(Believed("x-llm-d-tenant-id", digest(SECRET)), PATHS)
BY_ANYONE = HeaderRule(Believed("x-llm-d-tenant-id", trusts_everyone=True), PATHS)
HEADER, PROOF = b"x-llm-d-tenant-id", b"x-cost-meter-gateway-secret"
FROM_GATEWAY = (PROOF, SECRET)
KEYS_ONLY = Resolver([BY_KEY], DECLARED)
PROVEN = Resolver([BY_KEY, BY_GATEWAY], DECLARED)
TRUSTING = Resolver([BY_KEY, BY_ANYONE], DECLARED)
ALICE = make_owner("alice", "api_key", None, '{"kind":"cogs"}')


def bearer(key: bytes) -> tuple[bytes, bytes]:
    return b"authorization", b"Bearer " + key


def by_header(name: str) -> Owner:
    return make_owner(name, "header:x-llm-d-tenant-id")


# ---- API keys


def test_a_bearer_key_names_its_tenant():
    assert KEYS_ONLY.resolve([(b"host", b"x"), bearer(ALICE_KEY)]) == ALICE


def test_an_x_api_key_names_its_tenant():
    assert KEYS_ONLY.resolve([(b"x-api-key", BOB_KEY)]) == make_owner("bob", "api_key", "corp")


@pytest.mark.parametrize(
    "header",
    [
        (b"Authorization", b"bearer sk-alice"),
        (b"AUTHORIZATION", b"BEARER  sk-alice "),
        (b"X-Api-Key", b" sk-alice "),
    ],
)
def test_case_and_outer_spaces_do_not_matter(header):
    assert KEYS_ONLY.resolve([header]) == ALICE


@pytest.mark.parametrize(
    "header",
    [
        (b"authorization", b"Bearer sk-mallory"),
        (b"authorization", b"Bearer "),
        (b"authorization", b"Bearer"),
        (b"authorization", b""),
        (b"authorization", b"Basic sk-alice"),
        (b"authorization", b"sk-alice"),
        (b"authorization", b"Bearer sk-alice\r\n sk-bob"),
        (b"authorization", b"Bearer sk-alice, Bearer sk-bob"),
        (b"authorization", b"Bearer " + digest(ALICE_KEY).encode()),
        (b"authorization\x00", b"Bearer sk-alice"),
        (b"x_api_key", b"sk-alice"),
        (b"x-api-key", b"\xff\xfe"),
        (b"x-api-key", "sk\u2010alice".encode()),
        (b"x-api-key", b"k" * 100_000),
        (HEADER, b"alice"),
    ],
)
def test_what_is_no_known_key_is_unknown(header):
    assert KEYS_ONLY.resolve([header]) == NOBODY


def test_no_headers_is_unknown():
    assert TRUSTING.resolve([]) == NOBODY


# ---- headers


def test_a_header_of_the_gateway_names_a_tenant_in_any_case():
    assert PROVEN.resolve([FROM_GATEWAY, (HEADER, b" team-a ")]) == by_header("team-a")
    assert PROVEN.resolve([(HEADER.upper(), b"team-a"), FROM_GATEWAY]) == by_header("team-a")


@pytest.mark.parametrize(
    "proof",
    [
        [],
        [(PROOF, b"")],
        [(PROOF, b"a guess")],
        [(PROOF, digest(SECRET).encode())],
        [(PROOF, SECRET + b"\r\n x")],
        [(PROOF, SECRET * 1_000)],
        [(PROOF, SECRET.upper())],
        [(b"x_cost_meter_gateway_secret", SECRET)],
        [(b"x-forwarded-for", b"127.0.0.1")],
        [bearer(SECRET)],
    ],
)
def test_a_header_from_a_peer_that_does_not_prove_to_be_the_gateway_is_nothing(proof):
    assert PROVEN.resolve([*proof, (HEADER, b"alice")]) == NOBODY


def test_a_rule_without_a_secret_believes_nobody():
    never = Resolver([HeaderRule(Believed("x-llm-d-tenant-id"))], {})
    for proof in ([], [(PROOF, b"")], [FROM_GATEWAY]):
        assert never.resolve([*proof, (HEADER, b"alice")]) == NOBODY


def test_whoever_trusts_everyone_believes_the_header_without_a_proof():
    assert TRUSTING.resolve([(HEADER, b"team-a")]) == by_header("team-a")


def test_a_gateways_own_key_leaves_the_word_to_the_next_rule():
    headers = [bearer(b"sk-gateway"), FROM_GATEWAY, (HEADER, b"team-a")]
    assert PROVEN.resolve(headers) == by_header("team-a")


def test_a_declared_tenant_named_by_the_gateway_has_what_was_declared():
    said = [FROM_GATEWAY, (HEADER, b"bob")]
    assert PROVEN.resolve(said) == make_owner("bob", "header:x-llm-d-tenant-id", "corp")


def test_a_slash_may_be_claimed_only_in_a_name_that_is_declared():
    said = [FROM_GATEWAY, (HEADER, b"corp/web")]
    expected = make_owner("corp/web", "header:x-llm-d-tenant-id", "corp", '{"kind":"web"}')
    assert PROVEN.resolve(said) == expected
    for claim in (b"corp/sales", b"alice/x", b"/corp", b"corp/", b"/", b"x/y", b"corp/web/x"):
        assert PROVEN.resolve([FROM_GATEWAY, (HEADER, claim)]) == NOBODY


@pytest.mark.parametrize(
    "claim",
    [
        b"",
        b"   ",
        b"unknown",
        b"Unknown",
        b"other",
        b"__idle__",
        b"__",
        b"a" * 129,
        b"a" * 1_000_000,
        b"team\x00a",
        b"team\r\nx-evil: 1",
        b"team\r\n\ta",
        b"team\x1b[2Ja",
        b"team\x7f",
        b"team\ta",
        "münchen".encode(),
        "münchen".encode("latin-1"),
        "\u0430lice".encode(),
        "bob\u200b".encode(),
        "\u202ebob".encode(),
        b"\xff\xff",
    ],
)
def test_a_bad_claim_is_unknown(claim):
    assert TRUSTING.resolve([(HEADER, claim)]) == NOBODY
    assert PROVEN.resolve([FROM_GATEWAY, (HEADER, claim)]) == NOBODY


def test_the_longest_claim_is_128_characters():
    assert TRUSTING.resolve([(HEADER, b"a" * 128)]) == by_header("a" * 128)


# ---- several credentials

OTHER_KEY = b"sk-of-no-tenant"


@pytest.mark.parametrize(
    "others",
    [
        [(b"authorization", b"x")],
        [(b"authorization", b"")],
        [(b"AUTHORIZATION", b"Basic abc")],
        [bearer(BOB_KEY)],
        [(b"x-api-key", BOB_KEY)],
        [(b"x-api-key", b"sk-mallory"), (b"x-api-key", BOB_KEY)],
        [(HEADER, b"team-a"), (HEADER, b"team-b")],
        [bearer(BOB_KEY), (b"x-api-key", BOB_KEY), (HEADER, b"team-a"), (PROOF, b"guess")],
    ],
)
@pytest.mark.parametrize("resolver", [KEYS_ONLY, PROVEN, TRUSTING])
def test_the_key_by_which_vllm_admitted_a_request_pays_whatever_else_it_says(resolver, others):
    said = [bearer(ALICE_KEY), *others]
    assert resolver.resolve(said, keys_checked=True) == ALICE


@pytest.mark.parametrize(
    "said",
    [
        [bearer(OTHER_KEY), (b"x-api-key", ALICE_KEY)],
        [bearer(OTHER_KEY), bearer(ALICE_KEY)],
        [bearer(OTHER_KEY), (b"x-api-key", ALICE_KEY), (b"x-api-key", b"x")],
    ],
)
def test_a_key_that_vllm_admits_and_no_tenant_has_leaves_the_word_to_the_others(said):
    assert KEYS_ONLY.resolve(said, keys_checked=True) == ALICE


def test_vllm_decides_by_the_first_authorization_only():
    said = [bearer(BOB_KEY), bearer(ALICE_KEY)]
    assert KEYS_ONLY.resolve(said, keys_checked=True).tenant == "bob"
    assert KEYS_ONLY.resolve(said[::-1], keys_checked=True) == ALICE
    undecided = [bearer(OTHER_KEY), bearer(ALICE_KEY), (b"x-api-key", BOB_KEY)]
    assert KEYS_ONLY.resolve(undecided, keys_checked=True) == CONTRADICTION


@pytest.mark.parametrize(
    "headers",
    [
        [bearer(ALICE_KEY), bearer(BOB_KEY)],
        [bearer(ALICE_KEY), (b"x-api-key", BOB_KEY)],
        [(b"x-api-key", ALICE_KEY), (b"X-API-Key", BOB_KEY)],
        [bearer(ALICE_KEY), bearer(BOB_KEY), (HEADER, b"team-a")],
        [(HEADER, b"team-a"), (HEADER, b"team-b")],
        [(HEADER, b"team-a, team-b")],
        [(HEADER, b"team-a"), (HEADER, b""), (HEADER.upper(), b"team-b,")],
    ],
)
def test_credentials_of_two_tenants_contradict_each_other_where_vllm_does_not_decide(headers):
    rules = [BY_KEY, BY_ANYONE, ConstantRule("alice")]
    for resolver in (TRUSTING, Resolver(rules, DECLARED)):
        assert resolver.resolve(headers) == CONTRADICTION
        assert resolver.resolve(headers[::-1]) == CONTRADICTION


@pytest.mark.parametrize(
    "headers",
    [
        [bearer(ALICE_KEY), (b"authorization", b"x")],
        [bearer(ALICE_KEY), (b"authorization", b"")],
        [bearer(b"sk-mallory"), bearer(ALICE_KEY)],
        [(b"x-api-key", ALICE_KEY), (b"X-API-Key", b"sk-mallory")],
        [bearer(ALICE_KEY), (HEADER, b"team-a"), (HEADER, b"team-b")],
        [bearer(ALICE_KEY), (PROOF, b"a guess"), (PROOF, b"another")],
        [bearer(ALICE_KEY), bearer(ALICE_KEY)],
        [bearer(ALICE_KEY), (b"x-api-key", ALICE_KEY)],
        [bearer(ALICE_KEY), (b"x-api-key", ALICE_OTHER_KEY)],
        [bearer(b"sk-server"), (b"x-api-key", ALICE_KEY)],
    ],
)
def test_what_names_no_tenant_or_could_not_have_answered_voids_nothing(headers):
    for resolver in (KEYS_ONLY, PROVEN, TRUSTING):
        assert resolver.resolve(headers) == resolver.resolve(headers[::-1]) == ALICE


@pytest.mark.parametrize(
    "headers",
    [
        [(HEADER, b"team-a"), (HEADER, b"team-b")],
        [(HEADER, b"team-a"), (PROOF, b"a guess"), (PROOF, b"another")],
        [bearer(OTHER_KEY), (b"authorization", b"")],
        [(b"x-api-key", b"x"), (b"x-api-key", b"y")],
    ],
)
def test_a_constant_at_the_end_is_reached_whatever_names_nobody(headers):
    resolver = Resolver([BY_KEY, BY_GATEWAY, ConstantRule("corp")], DECLARED)
    assert resolver.resolve(headers) == make_owner("corp", "constant")


@pytest.mark.parametrize(
    "said",
    [
        [(PROOF, b"a client's guess"), (HEADER, b"team-a")],
        [(HEADER, b"team-a"), (HEADER, b"team-a")],
        [(HEADER, b"team-a"), (HEADER, b"")],
        [(HEADER, b"team-a, team-a")],
        [(HEADER, b", team-a")],
        [(HEADER, b"__idle__"), (HEADER, b"team-a")],
    ],
)
def test_what_a_client_adds_to_the_gateways_headers_voids_nothing(said):
    for headers in ([FROM_GATEWAY, *said], [*said, FROM_GATEWAY]):
        assert PROVEN.resolve(headers) == by_header("team-a")


def test_a_secret_that_a_proxy_joined_with_a_guess_is_still_the_secret():
    for proof in (b"guess, " + SECRET, SECRET + b",guess", SECRET + b", " + SECRET):
        assert PROVEN.resolve([(PROOF, proof), (HEADER, b"team-a")]) == by_header("team-a")


def test_a_key_that_is_not_ascii_is_known_in_both_of_its_forms():
    """vLLM decodes a header as Latin-1 and hashes it as UTF-8; other servers hash its bytes."""
    key = "sk-älice"
    resolver = Resolver([ApiKeyRule({digest(key.encode()): "alice"})], DECLARED)
    for form in (key.encode(), key.encode("latin-1")):
        for checked in (True, False):
            assert resolver.resolve([bearer(form)], keys_checked=checked) == ALICE


# ---- order


def test_the_first_rule_that_answers_wins():
    said = [bearer(ALICE_KEY), FROM_GATEWAY, (HEADER, b"team-a")]
    assert PROVEN.resolve(said) == ALICE
    assert Resolver([BY_GATEWAY, BY_KEY], DECLARED).resolve(said) == by_header("team-a")
    assert Resolver([BY_GATEWAY, BY_KEY], DECLARED).resolve(said[:1]) == ALICE


def test_two_gateways_each_prove_themselves_by_their_own_secret():
    other = HeaderRule(Believed("x-tenant-id", digest(b"another secret"), "x-proof"))
    resolver = Resolver([BY_GATEWAY, other], {})
    said = [(b"x-tenant-id", b"team-b"), (HEADER, b"team-a")]
    assert resolver.resolve([*said, FROM_GATEWAY]) == by_header("team-a")
    assert resolver.resolve([*said, (b"x-proof", b"another secret")]) == make_owner(
        "team-b", "header:x-tenant-id"
    )
    assert resolver.resolve([*said, (b"x-proof", SECRET)]) == NOBODY


def test_a_constant_answers_for_whoever_is_left():
    resolver = Resolver([BY_KEY, ConstantRule("corp")], DECLARED)
    assert resolver.resolve([bearer(ALICE_KEY)]) == ALICE
    assert resolver.resolve([bearer(b"sk-mallory")]) == make_owner("corp", "constant")


# ---- what a rule is called


def test_rules_that_chose_a_clients_word_are_told_from_others():
    for text in ("user", "api_key+user", "constant+metadata:team", "metadata:api_key", "user+lora"):
        assert make_owner("carol", text).is_clients_choice
    for text in ("api_key", "header:user", "constant", "none", "contradiction"):
        assert not make_owner("carol", text).is_clients_choice


def test_only_an_api_key_proves_who_asks_whatever_child_the_client_chose():
    for text in ("api_key", "api_key+user", "api_key+metadata:team"):
        assert make_owner("alice", text).by_api_key
    for text in ("header:api_key", "constant+user", "metadata:api_key", "none", "contradiction"):
        assert not make_owner("alice", text).by_api_key


def test_the_rule_is_told_with_its_key_and_the_childs_rule_behind_a_plus():
    for text in ("api_key", "header:x-tenant+metadata:team", "constant+lora", "user+model", "none"):
        assert make_owner("alice", text).rule_text == text


def test_the_body_is_wanted_only_by_rules_that_read_it():
    assert not PROVEN.body_fields
    with_users = Resolver([BY_KEY, ChildRule("user")], DECLARED)
    assert with_users.body_fields == {"user"}
    assert with_users.resolve([bearer(ALICE_KEY)], NO_CLAIMS) == ALICE


# ---- names


@pytest.mark.parametrize("name", ["a", "münchen", "team a", "a" * 128, "a,b", "_x", "others"])
def test_good_names(name):
    assert name_problem(name) is None


@pytest.mark.parametrize(
    "name",
    ["", "a" * 129, "a\nb", " a", "a ", "__x", "unknown", "UNKNOWN", "Other", "\ud800", "a\u202eb"],
)
def test_bad_names(name):
    assert name_problem(name)
