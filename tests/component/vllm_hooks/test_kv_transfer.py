"""What a scheduler and a request say of a KV connector, and what is unknown where they do not."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.metrics.stats import PrefillStats

from vllm_cost_meter.records.requests import KV_CONSUMER, KV_PRODUCER
from vllm_cost_meter.vllm_hooks import canary, kv_transfer
from vllm_cost_meter.vllm_hooks.kv_transfer import (
    ExternalTokens,
    role_of_request,
    role_of_server,
)


def scheduler(local_tokens: int = 0, external_tokens: int = 0, **changes: Any) -> Any:
    stats = PrefillStats()
    stats.set(400, local_tokens, external_tokens)
    request = SimpleNamespace(prefill_stats=changes.pop("stats", stats))
    return SimpleNamespace(**{"connector": object(), "requests": {"a": request}, **changes})


@pytest.mark.parametrize(
    ("local_tokens", "external_tokens", "computed_tokens", "found"),
    [
        (0, 384, 384, 384),
        (128, 256, 384, 256),
        (384, 0, 384, 0),
        # All came, and the last token is computed here nevertheless.
        (0, 400, 399, 399),
        # A part of the transfer failed.
        (128, 256, 192, 64),
        (128, 256, 64, 0),
        (0, 0, 0, 0),
    ],
)
def test_what_is_not_of_the_own_cache_came_over_the_connector(
    local_tokens, external_tokens, computed_tokens, found
):
    made = scheduler(local_tokens, external_tokens)
    assert ExternalTokens(made).of_first_step(made, "a", computed_tokens) == found


def test_without_a_connector_nothing_came_over_one():
    made = scheduler(connector=None, requests={})
    assert ExternalTokens(made).of_first_step(made, "a", 384) == 0


def test_a_scheduler_that_has_no_word_for_a_connector_is_asked_all_the_same():
    made = scheduler(0, 384)
    del made.connector
    assert ExternalTokens(made).of_first_step(made, "a", 384) == 384


def test_after_a_requests_first_output_it_is_unknown():
    made = scheduler(stats=None)
    reader = ExternalTokens(made)
    assert reader.of_first_step(made, "a", 384) is None
    made.requests["a"].prefill_stats = PrefillStats()
    assert reader.of_first_step(made, "a", 384) == 384


@pytest.mark.parametrize("stats", [SimpleNamespace(), SimpleNamespace(num_local_cached_tokens=-1)])
def test_what_cannot_be_read_is_unknown_from_then_on_with_one_warning(stats, caplog):
    made = scheduler(stats=stats)
    reader = ExternalTokens(made)
    with caplog.at_level(logging.WARNING):
        assert [reader.of_first_step(made, "a", 384) for _ in range(2)] == [None, None]
    assert len([line for line in caplog.messages if "KV connector is unknown" in line]) == 1
    assert reader.of_first_step(made, "a", 0) == 0


def test_this_vllm_counts_them_and_one_that_does_not_leaves_them_unknown(monkeypatch, caplog):
    assert canary.missing_external_tokens() == ""
    monkeypatch.setattr(canary, "EXTERNAL_TOKENS_FIELDS", ("num_tokens_of_another_vllm",))
    made = scheduler(0, 384)
    assert ExternalTokens(made).of_first_step(made, "a", 384) is None
    assert "num_tokens_of_another_vllm" in caplog.text


# ---- halves


def request(**params: Any) -> Any:
    extra = {"kv_transfer_params": params} if params else None
    return SimpleNamespace(sampling_params=SamplingParams(extra_args=extra))


@pytest.mark.parametrize(
    ("params", "role"),
    [
        ({"do_remote_decode": True, "do_remote_prefill": False}, KV_PRODUCER),
        ({"do_remote_decode": False, "do_remote_prefill": True}, KV_CONSUMER),
        ({"do_remote_decode": True, "do_remote_prefill": True}, None),
        ({"remote_host": "10.0.0.1"}, None),
        ({}, None),
    ],
)
def test_a_router_says_which_half_a_request_is(params, role):
    assert role_of_request(request(**params)) == role


@pytest.mark.parametrize("params", ["do_remote_decode", 7, ["do_remote_decode"]])
def test_what_a_client_wrote_there_otherwise_says_nothing(params):
    sampling = SimpleNamespace(extra_args={"kv_transfer_params": params})
    assert role_of_request(SimpleNamespace(sampling_params=sampling)) is None


def test_a_request_without_sampling_is_no_half_and_another_vllms_is_unknown(caplog):
    assert role_of_request(SimpleNamespace(sampling_params=None)) is None
    kv_transfer._warn_of_roles.cache_clear()
    assert [role_of_request(SimpleNamespace()) for _ in range(2)] == [None, None]
    assert len([line for line in caplog.messages if "which half" in line]) == 1


@pytest.mark.parametrize(
    ("role", "found"),
    [("kv_producer", KV_PRODUCER), ("kv_consumer", KV_CONSUMER), ("kv_both", None), (None, None)],
)
def test_a_server_may_be_configured_for_one_half(role, found):
    config = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_role=role))
    assert role_of_server(config) == found
    assert role_of_server(SimpleNamespace(kv_transfer_config=None)) is None
