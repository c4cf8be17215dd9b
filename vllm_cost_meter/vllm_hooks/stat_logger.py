"""The stat logger: feeds latencies and sleep state from vLLM to the meter's metrics.

vLLM finds it by the entry point `vllm.stat_logger_plugins`. It calls `record` once per batch of
outputs, on the event loop, and stops the server if a stat logger raises. So every method contains
its own errors. The logger sees no request ids; those come with the bills. Each of several API
servers sees only its own share of the iterations, and their histograms add up.

Invariant: no method raises.
"""

from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_cost_meter.guard import Guard


class CostStatLogger(AggregateStatLoggerBase):
    """Feeds each iteration's latencies to the meter's histograms."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        # This import is not at the top, because vLLM also loads this module where the meter is
        # inert, and importing our metrics would show them on vLLM's /metrics.
        from vllm_cost_meter.metrics import series

        self.guard = Guard("stat logger")
        self._metrics = series
        series.ENGINE_AWAKE.set(1)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
        **_newer: Any,
    ) -> None:
        """Count the latencies that one iteration completed."""
        if iteration_stats is None or self.guard.off:
            return
        try:
            for seconds in iteration_stats.time_to_first_tokens_iter:
                if seconds >= 0:  # vLLM takes it from the wall clock, which may be set back.
                    self._metrics.TTFT.observe(seconds)
            self._metrics.count_inter_token_latencies(iteration_stats.inter_token_latencies_iter)
            for request in iteration_stats.finished_requests:
                if request.e2e_latency >= 0:
                    self._metrics.END_TO_END.observe(request.e2e_latency)
            self.guard.succeeded("record")
        except Exception as error:  # noqa: BLE001 - an exception here stops the server
            self.guard.failed("record", error)

    def log_engine_initialized(self) -> None:
        """Log nothing, because the meter logs its own start line."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """Show whether the engines are awake; vLLM calls this after sleep and wake-up."""
        try:
            # vLLM passes is_awake=1 with the level when it goes to sleep, and 0, 0 after wake-up.
            self._metrics.ENGINE_AWAKE.set(0 if is_awake else 1)
        except Exception as error:  # noqa: BLE001 - an exception here fails the sleep request
            self.guard.failed("record_sleep_state", error)
