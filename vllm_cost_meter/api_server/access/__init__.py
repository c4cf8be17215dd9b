"""Access to vLLM's port: its own key check, requests that no rule names, and its `/metrics`."""
