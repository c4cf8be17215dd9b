"""Ids of exchanges: unique, and in the order in which their requests came."""

import re
import time

from vllm_cost_meter.exchange import new_http_request_id
from vllm_cost_meter.units.time import NS_PER_MS


def test_an_id_begins_with_the_time_in_ms_and_no_two_are_the_same(monkeypatch):
    now_ns = 1_800_000_000_000 * NS_PER_MS + 999_999
    monkeypatch.setattr(time, "time_ns", lambda: now_ns)
    ids = {new_http_request_id() for _ in range(1_000)}
    assert len(ids) == 1_000
    assert all(re.fullmatch(r"cost-01a3185c5000[0-9a-f]{20}", id) for id in ids)


def test_ids_stand_in_the_order_of_time(monkeypatch):
    at_ms = [1, 15, 16, 1_800_000_000_000, 1_800_000_000_001, 2**47]
    ids = []
    for ms in at_ms:
        monkeypatch.setattr(time, "time_ns", lambda ms=ms: ms * NS_PER_MS)
        ids.append(new_http_request_id())
    assert ids == sorted(ids)
