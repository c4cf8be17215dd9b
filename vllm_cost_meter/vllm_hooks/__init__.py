"""Hooks on vLLM's scheduler, engine and API server; the only folder that imports vLLM."""
