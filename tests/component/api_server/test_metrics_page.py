"""vLLM's own page of metrics without tenants and money, through the real middleware.

Method: the page is the one of prometheus_client's ASGI application that vLLM mounts, over the
default registry and over the files that several API servers share.
"""

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter, generate_latest, make_asgi_app
from prometheus_client.multiprocess import MultiProcessCollector

from tests.support.world import BODY, JSON, World, replying, scope_of
from vllm_cost_meter.api_server.access.metrics_page import without_private
from vllm_cost_meter.metrics import owners, series


def page(world: World, path: str = "/metrics", registry=None, **headers: str) -> httpx.Response:
    app = FastAPI()
    served = make_asgi_app() if registry is None else make_asgi_app(registry)
    app.mount("/metrics", served)

    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(world.metered(app))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://vllm", follow_redirects=True
        ) as client:
            return await client.get(path, headers=headers)

    return asyncio.run(get())


@pytest.fixture
def billed(make_world):
    def make(**settings: str) -> World:
        world = make_world(
            tenant_rules=[{"rule": "constant", "tenant": "tenant-on-a-page"}], **settings
        )
        world.run(replying(JSON, [BODY], world.engine.generate), scope_of())
        series.count_refused("blocked", "budget-on-a-page")
        return world

    return make


def test_by_default_vllms_page_shows_tenants_and_money(billed):
    text = page(billed()).text
    cost = r'^cost_meter_cost_usd_total\{[^}]*tenant="tenant-on-a-page"\} '
    assert re.search(cost, text, re.MULTILINE)
    assert 'budget="budget-on-a-page"' in text


@pytest.mark.parametrize("path", ["/metrics", "/metrics/", "/metrics?name[]=cost_meter_bills"])
@pytest.mark.parametrize("accept", ["*/*", "application/openmetrics-text; version=1.0.0"])
@pytest.mark.parametrize("encoding", ["gzip", "identity"])
def test_with_side_port_it_shows_neither_and_all_else(billed, path, accept, encoding):
    headers = {"accept": accept, "accept-encoding": encoding}
    shown = page(billed(tenant_metrics="side_port"), path, **headers)
    assert shown.status_code == 200
    assert "on-a-page" not in shown.text
    assert "cost_usd" not in shown.text
    if "name" not in path:
        assert "cost_meter_reply_misses_total" in shown.text
        assert "process_cpu_seconds_total" in shown.text


def test_the_files_of_several_api_servers_are_left_out_too(billed, tmp_path: Path):
    code = (
        "from vllm_cost_meter.metrics import owners, series\n"
        "owners.COST_USD.labels('tenant-on-a-page', 'm', '').inc()\n"
        "series.MISSES.inc()\n"
    )
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    assert "tenant-on-a-page" in generate_latest(registry).decode(), "the side endpoint's page"
    text = page(billed(tenant_metrics="side_port"), registry=registry).text
    assert "tenant-on-a-page" not in text
    assert "cost_meter_reply_misses_total 1.0" in text


def test_every_metric_with_a_tenant_a_budget_or_money_is_private():
    both = (*vars(owners).values(), *vars(series).values())
    ours = [value for value in both if hasattr(value, "_labelnames")]
    named = {
        metric._name
        for metric in ours
        if {"tenant", "budget"} & set(metric._labelnames) or "usd" in metric._name
    }
    assert named == set(series.PRIVATE_NAMES)


def test_a_metric_whose_name_only_begins_like_a_private_one_stays():
    registry = CollectorRegistry()
    Counter("cost_meter_bills_of_another", "not ours", registry=registry).inc()
    text = generate_latest(registry)
    assert without_private(text) == text


def test_text_that_is_no_metric_passes():
    assert without_private(b"") == b""
    assert without_private(b"# a comment\r\nx 1") == b"# a comment\r\nx 1"
