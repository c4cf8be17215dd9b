"""The API side of the meter: joins requests with bills, tenants and prices in vLLM's API server."""
