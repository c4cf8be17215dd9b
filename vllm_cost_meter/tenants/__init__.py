"""Whose a request is, and what a tenant may spend."""
