"""What the meter logged during a test, line by line."""

import contextlib
import logging
from collections.abc import Callable, Iterator

import pytest


@contextlib.contextmanager
def lines_of(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Catch the meter's log, whatever vLLM has made of the loggers; give the lines so far."""
    logger = logging.getLogger("vllm.cost_meter")
    level = logger.level
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    try:
        # With propagation each line would come twice.
        yield lambda: list(dict.fromkeys(record.getMessage() for record in caplog.records))
    finally:
        logger.setLevel(level)
        logger.removeHandler(caplog.handler)
