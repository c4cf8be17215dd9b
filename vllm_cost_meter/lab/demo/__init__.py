"""The demo: a real server, three tenants, and the bill."""
