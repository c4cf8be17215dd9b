"""Settings that a fleet shares, for tests."""

import hashlib

from vllm_cost_meter.records.shared_settings import (
    SharedEntry,
    SharedSettings,
    canonical,
    in_order,
)


def key_sha256(key: str) -> str:
    """Return what settings have of an API key."""
    return hashlib.sha256(key.encode()).hexdigest()


KEYS = {"search": "sk-of-the-search-team", "web": "sk-of-the-web-team"}
FILE = f"""
[[tenants]]
name = "search"
api_key_sha256 = ["{key_sha256(KEYS["search"])}"]
tags = {{ team = "find" }}

[[tenants]]
name = "web"
api_key_sha256 = ["{key_sha256(KEYS["web"])}"]

[[tenant_rules]]
id = "by-key"
rule = "api_key"

[[tenant_rules]]
id = "by-user"
rule = "user"

[[prices]]
id = "gpu-2026"
amount = 2.10
scope = "gpu"
kind = "reserved"
effective_from = 2026-01-01T00:00:00Z
source = "contract 17"
"""


def tenant_entry(name: str, **more: object) -> SharedEntry:
    """Return a shared tenant."""
    return SharedEntry("tenants", name, canonical({"name": name, **more}))


def changed_to(before: SharedSettings, name: str, **more: object) -> SharedSettings:
    """Return the next version, in which a tenant is new or other than it was."""
    others = [one for one in before.entries if one.name != name]
    entries = in_order([*others, tenant_entry(name, **more)])
    return SharedSettings(before.version + 1, entries, before.restart_version)


def ended_to(before: SharedSettings, name: str) -> SharedSettings:
    """Return the next version, without a tenant."""
    entries = tuple(one for one in before.entries if one.name != name)
    return SharedSettings(before.version + 1, entries, before.restart_version)
