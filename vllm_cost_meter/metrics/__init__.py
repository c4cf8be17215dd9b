"""Prometheus metrics, in the default registry, so vLLM's /metrics shows them."""
