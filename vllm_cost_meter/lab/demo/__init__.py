"""The demo (`make demo`): a real server, three tenants, and the bill."""
