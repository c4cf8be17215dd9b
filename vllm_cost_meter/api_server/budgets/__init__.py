"""Counts what budgets have used, in a process beside the API server: its ends and its messages."""
