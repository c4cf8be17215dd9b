"""Who pays for a request: a model of docs/howto/tenants-from-keys.md that shares no code with it.

A fuzzer compares the meter with this model. So it is written from the page, not from the rules'
code: sentence by sentence, slowly, with Python's own json as the reader of bodies.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CONTRADICTION = "contradiction"
BODY_RULES = ("user", "metadata", "lora", "model")


@dataclass(frozen=True)
class Situation:
    """A server as its operator set it up."""

    # As [[tenant_rules]] lists them, but with `proof`, the secret itself, where a rule needs one.
    rules: Sequence[Mapping[str, Any]]
    keys: Mapping[str, str]  # a tenant's name by its API key
    parents: Mapping[str, str | None]  # of each declared tenant
    tags: Mapping[str, Mapping[str, str]]  # of each declared tenant, those of its parents included
    served: Sequence[str]


@dataclass(frozen=True)
class Request:
    headers: Sequence[tuple[str, bytes]]
    body: bytes = b""
    is_guarded: bool = False  # vLLM has checked the first Authorization


@dataclass(frozen=True)
class Payer:
    tenant: str
    rule: str
    parent: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


def payer(situation: Situation, request: Request) -> Payer | str:
    """Return who pays for a request, or CONTRADICTION."""
    try:
        return _payer(situation, request)
    except ValueError:
        return CONTRADICTION


def values(request: Request, header: str) -> list[bytes]:
    return [value for name, value in request.headers if name.lower() == header]


def one(names: Sequence[str | None]) -> str | None:
    different = sorted({name for name in names if name is not None})
    if len(different) > 1:
        raise ValueError(different)
    return different[0] if different else None


def _payer(situation: Situation, request: Request) -> Payer:
    tenant, rule = _tenant(situation, request)
    given = {}
    for each in situation.rules:
        if each.get("names") == "tag" and (value := one(claims(request, each, text))) is not None:
            given[each["tag"]] = value
    if tenant is None:
        return Payer("unknown", "none", None, given)
    child, child_rule = _child(situation, request, tenant, rule)
    if child is None or child_rule is None:
        whole = tenant
        parent = situation.parents.get(tenant, tenant.rpartition("/")[0] or None)
    else:
        whole, rule = f"{tenant}/{child}", f"{rule}+{child_rule}"
        parent = situation.parents.get(whole, tenant)
    declared = situation.tags.get(whole, situation.tags.get(parent or "", {}))
    return Payer(whole, rule, parent, {**given, **declared})


def _tenant(situation: Situation, request: Request) -> tuple[str | None, str]:
    """The first three rules are asked in their order; the first that answers names the tenant."""
    for each in situation.rules:
        kind, name, called = each["rule"], None, each["rule"]
        if kind == "api_key":
            name = of_keys(situation, request)
        elif kind == "header" and each.get("names", "tenant") == "tenant":
            called = f"header:{each['name']}"
            found = [said for said in claims(request, each, text) if said and is_free(said)]
            name = one([said for said in found if "/" not in said or said in situation.parents])
        elif kind == "constant":
            name = each["tenant"]
        elif each.get("trust_clients"):
            said = of_body(situation, request, each)
            called = body_rule(each)
            if said is not None and (said == "__unread__" or len(f"unknown/{said}") <= 128):
                name = f"unknown/{said}"
        if name is not None:
            return name, called
    return None, "none"


def of_keys(situation: Situation, request: Request) -> str | None:
    bearers = []
    for value in values(request, "authorization"):
        words = value.split(b" ", 1)
        is_bearer = len(words) == 2 and words[0].lower() == b"bearer"
        key = words[1].strip().decode("latin-1") if is_bearer else ""
        bearers.append(situation.keys.get(key))
    if request.is_guarded and bearers[0] is not None:
        return bearers[0]
    others = [situation.keys.get(key.decode("latin-1")) for key in values(request, "x-api-key")]
    return one([*bearers, *others])


def claims(request: Request, rule: Mapping[str, Any], read: Any) -> list[str | None]:
    if "proof" in rule:
        shown = values(request, "x-cost-meter-gateway-secret")
        parts = [part.strip() for value in shown for part in value.split(b",")]
        if rule["proof"].encode() not in [*shown, *parts]:
            return []
    said = [part.strip() for value in values(request, rule["name"]) for part in value.split(b",")]
    return [read(part) for part in said]


def text(value: bytes) -> str | None:
    is_plain = all(0x20 <= byte <= 0x7E for byte in value)
    return value.decode() if is_plain and 1 <= len(value) <= 128 else None


def is_free(name: str) -> bool:
    """Nobody can be named `unknown`, `other` or `__...`."""
    return name.lower() not in ("unknown", "other") and not name.startswith("__")


def own_name(said: object) -> str | None:
    """A child's own name; None if this is none."""
    if not isinstance(said, str) or "," in said or "/" in said or said != said.strip():
        return None
    try:
        name = text(said.encode("ascii"))
    except UnicodeEncodeError:
        return None
    return name if name is not None and is_free(name) else None


def _child(
    situation: Situation, request: Request, tenant: str, named_by: str
) -> tuple[str | None, str | None]:
    """The first child rule that answers; what named the tenant chooses no child of it."""
    if tenant.endswith("/__unread__"):
        return None, None
    for each in situation.rules:
        if each["rule"] in BODY_RULES:
            child, called = of_body(situation, request, each), body_rule(each)
        elif each.get("names") == "child":
            if f"header:{each['name']}" == named_by:
                continue
            child = one([own_name(said) for said in claims(request, each, text)])
            called = f"header:{each['name']}"
        else:
            continue
        if called == named_by or child is None:
            continue
        if child == "__unread__" or len(f"{tenant}/{child}") <= 128:
            return child, called
    return None, None


def body_rule(rule: Mapping[str, Any]) -> str:
    return f"metadata:{rule['key']}" if rule["rule"] == "metadata" else str(rule["rule"])


def of_body(situation: Situation, request: Request, rule: Mapping[str, Any]) -> str | None:
    """The child that a body names; `__unread__` where vLLM may find one that we do not read."""
    kinds = values(request, "content-type")
    kind = kinds[0].split(b";")[0].strip().lower() if kinds else b""
    if kind == b"multipart/form-data":
        return "__unread__" if rule["rule"] in ("lora", "model") else None
    if kind != b"application/json":
        return None
    try:
        body = json.loads(request.body)
    except ValueError:
        return None
    if not isinstance(body, dict):
        return None
    if rule["rule"] == "user":
        return own_name(body.get("user"))
    if rule["rule"] == "metadata":
        metadata = body.get("metadata")
        return own_name(metadata.get(rule["key"])) if isinstance(metadata, dict) else None
    model = body.get("model") or situation.served[0]
    if body.get("model") not in (None, "") and not isinstance(body["model"], str):
        return None
    if (model in situation.served) is not (rule["rule"] == "model"):
        return None
    return own_name(model.replace("/", "--"))
