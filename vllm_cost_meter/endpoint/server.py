"""Serves the side endpoint's application on its port.

The port is bound before anything is served, so that a taken port is one warning and nothing else.

Invariant: whoever can connect is answered.
"""

import os
import socket

import uvicorn
from fastapi import FastAPI
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_cost_meter.logs import meter_logger

logger = meter_logger()

# Where vLLM's processes share their metrics, if there are several API servers.
SHARED_METRICS = "PROMETHEUS_MULTIPROC_DIR"


def bind(host: str, port: int) -> socket.socket | None:
    """Return a socket that listens; None, with a warning, where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol, or answers wait for TCP to gather them.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen()
    except OSError as error:
        listening.close()
        logger.warning(
            "cost meter: the side endpoint could not listen on %s port %s (%s); serving goes on "
            "without it. Set COST_METER_PORT to another port, 0 for any, or off.",
            *(host, port, error.strerror),
        )
        return None
    return listening


def address_of(listening: socket.socket) -> str:
    """Return the address where a socket listens, as a URL has it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(app: FastAPI, listening: socket.socket) -> None:
    """Serve an application for ever."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", log_config=None
    )
    await uvicorn.Server(config).serve(sockets=[listening])


def metrics_registry() -> CollectorRegistry:
    """Return the registry that covers all processes of this server."""
    if SHARED_METRICS not in os.environ:
        return REGISTRY
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry


def metrics_text() -> bytes:
    """Return all metrics of this server as Prometheus reads them."""
    return generate_latest(metrics_registry())
