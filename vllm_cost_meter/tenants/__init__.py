"""Tenant rules and budgets: find the owner of a request, and limit what a tenant may use."""
