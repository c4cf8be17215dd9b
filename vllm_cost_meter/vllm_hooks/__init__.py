"""The only folder that imports vLLM: hooks on its scheduler, engine and API server."""
