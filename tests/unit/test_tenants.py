"""Who pays: every way to be named, and every way to try to be named as somebody else."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cost_meter.tenants import (
    NOBODY,
    Resolved,
    TenantRules,
    is_reserved,
    name_problem,
    resolve,
)

ALICE_KEY, ALICE_OTHER_KEY, BOB_KEY = b"sk-alice", b"sk-alice-2", b"sk-bob"


def digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


KEYS = {digest(ALICE_KEY): "alice", digest(ALICE_OTHER_KEY): "alice", digest(BOB_KEY): "bob"}
KEYS_ONLY = TenantRules(KEYS)
TRUSTING = TenantRules(KEYS, tenant_header="X-LLM-D-Tenant-Id")
HEADER = b"x-llm-d-tenant-id"
ALICE = Resolved("alice", "api_key")


def bearer(key: bytes) -> tuple[bytes, bytes]:
    return b"authorization", b"Bearer " + key


def test_a_bearer_key_names_its_tenant():
    assert resolve([(b"host", b"x"), bearer(ALICE_KEY)], KEYS_ONLY) == ALICE


def test_an_x_api_key_names_its_tenant():
    assert resolve([(b"x-api-key", BOB_KEY)], KEYS_ONLY) == Resolved("bob", "api_key")


@pytest.mark.parametrize(
    "header",
    [
        (b"Authorization", b"bearer sk-alice"),
        (b"AUTHORIZATION", b"BEARER  sk-alice "),
        (b"X-Api-Key", b" sk-alice "),
    ],
)
def test_case_and_outer_spaces_do_not_matter(header):
    assert resolve([header], KEYS_ONLY) == ALICE


@pytest.mark.parametrize(
    "header",
    [
        (b"authorization", b"Bearer sk-mallory"),
        (b"authorization", b"Bearer "),
        (b"authorization", b"Bearer"),
        (b"authorization", b""),
        (b"authorization", b"Basic sk-alice"),
        (b"authorization", b"sk-alice"),
        (b"authorization", b"Bearer " + digest(ALICE_KEY).encode()),
        (b"x-api-key", b"\xff\xfe"),
        (b"x-api-key", b"k" * 100_000),
        (HEADER, b"alice"),
    ],
)
def test_what_is_no_known_key_is_unknown(header):
    assert resolve([header], KEYS_ONLY) == NOBODY


def test_no_headers_is_unknown():
    assert resolve([], TRUSTING) == NOBODY


def test_the_trusted_header_names_a_tenant_in_any_case():
    assert resolve([(HEADER, b" team-a ")], TRUSTING) == Resolved("team-a", "header")
    assert resolve([(HEADER.upper(), b"team-a")], TRUSTING) == Resolved("team-a", "header")


def test_a_known_key_beats_the_trusted_header():
    assert resolve([(HEADER, b"bob"), bearer(ALICE_KEY)], TRUSTING) == ALICE


def test_a_gateways_own_key_leaves_the_word_to_the_trusted_header():
    headers = [bearer(b"sk-gateway"), (HEADER, b"team-a")]
    assert resolve(headers, TRUSTING) == Resolved("team-a", "header")


@pytest.mark.parametrize(
    "headers",
    [
        [bearer(ALICE_KEY), bearer(BOB_KEY)],
        [bearer(b"sk-mallory"), bearer(ALICE_KEY)],
        [bearer(ALICE_KEY), (b"AUTHORIZATION", b"Basic abc")],
        [(b"x-api-key", ALICE_KEY), (b"X-API-Key", b"sk-mallory")],
        [bearer(ALICE_KEY), (b"x-api-key", BOB_KEY)],
        [(HEADER, b"team-a"), (HEADER, b"team-b")],
        [(HEADER, b"team-a"), (HEADER.upper(), b"")],
        [bearer(ALICE_KEY), (HEADER, b"team-a"), (HEADER, b"team-b")],
        [bearer(ALICE_KEY), bearer(BOB_KEY), (HEADER, b"team-a")],
    ],
)
def test_contradicting_headers_are_nobodys(headers):
    assert resolve(headers, TRUSTING) == NOBODY
    assert resolve(headers[::-1], TRUSTING) == NOBODY


@pytest.mark.parametrize(
    "headers",
    [
        [bearer(ALICE_KEY), bearer(ALICE_KEY)],
        [bearer(ALICE_KEY), (b"x-api-key", ALICE_KEY)],
        [bearer(ALICE_KEY), (b"x-api-key", ALICE_OTHER_KEY)],
        [bearer(b"sk-server"), (b"x-api-key", ALICE_KEY)],
    ],
)
def test_agreeing_headers_are_one(headers):
    assert resolve(headers, TRUSTING) == ALICE


@pytest.mark.parametrize(
    "claim",
    [
        b"",
        b"   ",
        b"unknown",
        b"Unknown",
        b"__idle__",
        b"__",
        b"a" * 129,
        b"team-a, team-b",
        b"team\x00a",
        b"team\r\nx-evil: 1",
        b"team\x7f",
        b"team\ta",
        "münchen".encode(),
        b"\xff\xff",
    ],
)
def test_a_bad_claim_is_unknown(claim):
    assert resolve([(HEADER, claim)], TRUSTING) == NOBODY


def test_the_longest_claim_is_128_characters():
    assert resolve([(HEADER, b"a" * 128)], TRUSTING) == Resolved("a" * 128, "header")


@given(st.lists(st.tuples(st.sampled_from([b"authorization", b"X-API-KEY", HEADER]), st.binary())))
def test_garbage_never_raises_and_never_gains_a_reserved_name(headers):
    resolved = resolve(headers, TRUSTING)
    assert (resolved.rule == "none") == is_reserved(resolved.tenant)
    assert name_problem(resolved.tenant) is None or resolved == NOBODY


@pytest.mark.parametrize("name", ["a", "münchen", "team a", "a" * 128, "a,b", "_x"])
def test_good_names(name):
    assert name_problem(name) is None


@pytest.mark.parametrize(
    "name", ["", "a" * 129, "a\nb", " a", "a ", "__x", "unknown", "UNKNOWN", "\ud800", "a\u202eb"]
)
def test_bad_names(name):
    assert name_problem(name)
