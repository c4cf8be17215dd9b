"""Children, tags, and whom trusted clients name, by body and header; and what was not read."""

import pytest

from tests.support.builders import make_owner
from tests.unit.tenants.test_rules import (
    ALICE,
    ALICE_KEY,
    BY_GATEWAY,
    BY_KEY,
    DECLARED,
    FROM_GATEWAY,
    HEADER,
    PROOF,
    PROVEN,
    SECRET,
    TRUSTING,
    bearer,
    digest,
)
from vllm_cost_meter.records.owner import CONTRADICTION, NOBODY
from vllm_cost_meter.tenants.rules import (
    Believed,
    BodyClaims,
    ChildRule,
    ConstantRule,
    HeaderChildRule,
    HeaderTagRule,
    Resolver,
)

# ---- children

BY_USER = ChildRule("user")
WITH_USERS = Resolver([BY_KEY, BY_USER], DECLARED)


def user(text: str) -> BodyClaims:
    return BodyClaims(user=text)


def test_a_user_chooses_a_child_of_the_tenant_found_which_has_its_tags():
    resolved = WITH_USERS.resolve([bearer(ALICE_KEY)], user("carol"))
    assert resolved == make_owner("alice/carol", "api_key+user", "alice", '{"kind":"cogs"}')


def test_a_child_that_is_declared_has_what_was_declared_of_it():
    resolver = Resolver([ConstantRule("corp"), BY_USER], DECLARED)
    assert resolver.resolve([], user("web")) == make_owner(
        "corp/web", "constant+user", "corp", '{"kind":"web"}'
    )


def test_a_child_of_nobody_is_nobody():
    for said in ([], [bearer(b"sk-mallory")], [(HEADER, b"alice")]):
        assert WITH_USERS.resolve(said, user("carol")) == NOBODY


@pytest.mark.parametrize(
    "text",
    [
        "",
        " carol",
        "carol ",
        "../bob",
        "/bob",
        "x/y",
        "carol,bob",
        "carol\n",
        "carol\x00",
        "carol\x1b[2J",
        "c\u0430rol",
        "carol\u200b",
        "\u202elorac",
        "\uff43arol",
        "unknown",
        "other",
        "__idle__",
        "\ud800",
        "a" * 123,
        "a" * 1_000_000,
    ],
)
def test_a_bad_child_leaves_the_cost_with_the_parent(text):
    assert WITH_USERS.resolve([bearer(ALICE_KEY)], user(text)) == ALICE


def test_a_child_and_its_parent_have_128_characters_together():
    resolved = WITH_USERS.resolve([bearer(ALICE_KEY)], user("a" * 122))
    assert (len(resolved.tenant), resolved.rule_text) == (128, "api_key+user")


@pytest.mark.parametrize("value", [5, None, True, ["carol"], {"carol": 1}])
def test_metadata_that_is_no_text_chooses_nothing(value):
    resolver = Resolver([BY_KEY, ChildRule("metadata", "team")], DECLARED)
    said = BodyClaims(metadata={"team": value, "other": "carol"})
    assert resolver.resolve([bearer(ALICE_KEY)], said) == ALICE


def test_the_first_child_rule_that_answers_wins_wherever_it_stands():
    rules = [ChildRule("metadata", "team"), BY_USER, BY_KEY, ChildRule("model"), ChildRule("lora")]
    resolver = Resolver(rules, {})
    said = BodyClaims(user="carol", metadata={"team": "web"}, lora="org/sql", model="org/llama")

    def chosen(**left_out: object) -> tuple[str, str]:
        values = {name: getattr(said, name) for name in ("user", "metadata", "lora", "model")}
        resolved = resolver.resolve([bearer(ALICE_KEY)], BodyClaims(**{**values, **left_out}))
        return resolved.tenant, resolved.rule_text

    assert chosen() == ("alice/web", "api_key+metadata:team")
    assert chosen(metadata={}) == ("alice/carol", "api_key+user")
    assert chosen(metadata={}, user=None) == ("alice/org--llama", "api_key+model")
    assert chosen(metadata={}, user=None, model=None) == ("alice/org--sql", "api_key+lora")


# ---- children and tags by header

WORKLOAD = b"x-llm-d-workload-id"
TEAM_HEADER = Believed("x-llm-d-workload-id", digest(SECRET))
BY_WORKLOAD = HeaderChildRule(TEAM_HEADER)
TAGGING = HeaderTagRule(TEAM_HEADER, "workload")


def test_a_header_of_the_gateway_chooses_a_child_as_the_body_does():
    resolver = Resolver([BY_KEY, BY_WORKLOAD, BY_USER], DECLARED)
    said = [bearer(ALICE_KEY), FROM_GATEWAY, (WORKLOAD, b"batch")]
    expected = make_owner(
        "alice/batch", "api_key+header:x-llm-d-workload-id", "alice", '{"kind":"cogs"}'
    )
    assert resolver.resolve(said, user("carol")) == expected
    assert resolver.resolve(said[:1], user("carol")).tenant == "alice/carol"


@pytest.mark.parametrize("proof", [[], [(PROOF, b"a guess")]])
def test_a_childs_header_without_a_proof_chooses_nothing(proof):
    resolver = Resolver([BY_KEY, BY_WORKLOAD], DECLARED)
    assert resolver.resolve([bearer(ALICE_KEY), *proof, (WORKLOAD, b"batch")]) == ALICE


@pytest.mark.parametrize("claim", [b"", b"x/y", b"../bob", b"unknown", b"__x", b"a" * 123, b"\xff"])
def test_a_childs_header_that_is_no_name_leaves_the_cost_with_the_parent(claim):
    resolver = Resolver([BY_KEY, BY_WORKLOAD], DECLARED)
    assert resolver.resolve([bearer(ALICE_KEY), FROM_GATEWAY, (WORKLOAD, claim)]) == ALICE


def test_a_childs_header_names_no_tenant():
    assert Resolver([BY_WORKLOAD], DECLARED).resolve([FROM_GATEWAY, (WORKLOAD, b"bob")]) == NOBODY


def test_two_children_by_header_contradict_each_other():
    resolver = Resolver([BY_KEY, BY_WORKLOAD], DECLARED)
    said = [bearer(ALICE_KEY), FROM_GATEWAY, (WORKLOAD, b"batch"), (WORKLOAD, b"chat")]
    assert resolver.resolve(said) == resolver.resolve(said[::-1]) == CONTRADICTION
    assert resolver.resolve([said[0], *said[2:]]) == ALICE


def test_a_header_of_the_gateway_adds_a_tag_beside_the_declared_ones():
    resolver = Resolver([BY_KEY, TAGGING], DECLARED)
    said = [bearer(ALICE_KEY), FROM_GATEWAY, (WORKLOAD, b"nightly/batch")]
    expected = make_owner("alice", "api_key", None, '{"kind":"cogs","workload":"nightly/batch"}')
    assert resolver.resolve(said) == expected
    assert resolver.resolve([said[0], said[2]]) == ALICE
    tags = '{"workload":"nightly/batch"}'
    assert resolver.resolve(said[1:]) == make_owner("unknown", "none", None, tags)


def test_a_declared_tag_stays_whatever_the_header_says():
    resolver = Resolver([BY_KEY, HeaderTagRule(TEAM_HEADER, "kind")], DECLARED)
    assert resolver.resolve([bearer(ALICE_KEY), FROM_GATEWAY, (WORKLOAD, b"r-d")]) == ALICE


def test_two_values_of_a_tag_contradict_each_other():
    resolver = Resolver([BY_KEY, TAGGING], DECLARED)
    said = [bearer(ALICE_KEY), FROM_GATEWAY, (WORKLOAD, b"batch, chat")]
    assert resolver.resolve(said) == CONTRADICTION


# ---- what was not read


@pytest.mark.parametrize("kind", ["user", "metadata", "lora", "model"])
def test_a_child_that_was_not_read_may_be_every_child(kind):
    resolver = Resolver([BY_KEY, ChildRule(kind, "team" if kind == "metadata" else "")], DECLARED)
    owner = resolver.resolve([bearer(ALICE_KEY)], BodyClaims(unread=(kind,)))
    assert (owner.tenant, owner.parent) == ("alice/__unread__", "alice")
    assert owner.tags == {"kind": "cogs"}
    assert owner.may_be("alice/web")
    assert not any(map(owner.may_be, ("alice", "alicia", "bob/web", "corp")))


def test_a_field_that_no_rule_reads_may_stay_unread():
    assert WITH_USERS.resolve([bearer(ALICE_KEY)], BodyClaims(unread=("model",))) == ALICE


def test_a_child_that_was_read_goes_before_one_that_was_not():
    resolver = Resolver([BY_KEY, BY_USER, ChildRule("model")], DECLARED)
    said = BodyClaims(user="carol", unread=("model",))
    assert resolver.resolve([bearer(ALICE_KEY)], said).tenant == "alice/carol"


# ---- trusted clients

TRUSTED_USERS = Resolver(
    [BY_KEY, BY_GATEWAY, ChildRule("user", trusts_clients=True), ChildRule("model")], DECLARED
)


def test_a_trusted_client_names_a_tenant_below_unknown_where_no_rule_before_found_one():
    assert TRUSTED_USERS.resolve([], user("carol")) == make_owner(
        "unknown/carol", "user", "unknown"
    )
    assert TRUSTED_USERS.resolve([bearer(ALICE_KEY)], user("carol")).tenant == "alice/carol"


@pytest.mark.parametrize("text", ["alice", "Alice", "BOB", "corp", "acme", "web"])
def test_a_trusted_client_never_becomes_a_tenant_that_others_name(text):
    of_gateway = TRUSTED_USERS.resolve([FROM_GATEWAY, (HEADER, text.encode())])
    owner = TRUSTED_USERS.resolve([], user(text))
    assert (of_gateway.tenant, owner.tenant) == (text, f"unknown/{text}")


@pytest.mark.parametrize("text", ["corp/web", "münchen", "x/y", "unknown", "a" * 121, ""])
def test_what_is_no_name_leaves_a_trusted_client_unknown(text):
    assert TRUSTED_USERS.resolve([], user(text)) == NOBODY


def test_nobody_but_a_trusted_client_is_named_below_unknown():
    said = [FROM_GATEWAY, (HEADER, b"unknown/carol")]
    assert PROVEN.resolve(said) == TRUSTING.resolve(said) == NOBODY


def test_the_rule_that_named_a_tenant_chooses_no_child_of_it_and_others_may():
    said = BodyClaims(user="carol", model="llama")
    assert TRUSTED_USERS.resolve([], said) == make_owner(
        "unknown/carol/llama", "user+model", "unknown/carol"
    )


def test_a_trusted_clients_unread_name_may_be_each_below_unknown():
    owner = TRUSTED_USERS.resolve([], BodyClaims(unread=("user", "model")))
    assert (owner.tenant, owner.parent) == ("unknown/__unread__", "unknown")
    assert owner.may_be("unknown/carol")


def test_what_stands_for_every_child_already_is_not_voided_by_a_childs_header():
    rules = [ChildRule("lora", trusts_clients=True), BY_WORKLOAD]
    said = [FROM_GATEWAY, (WORKLOAD, b"batch"), (WORKLOAD, b"chat")]
    owner = Resolver(rules, DECLARED).resolve(said, BodyClaims(unread=("lora",)))
    assert owner == make_owner("unknown/__unread__", "lora", "unknown")
