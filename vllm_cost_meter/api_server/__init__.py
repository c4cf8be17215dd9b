"""The meter in vLLM's API process: requests meet their bills, tenants and prices here."""
