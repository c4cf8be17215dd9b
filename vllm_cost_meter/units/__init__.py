"""Helpers for time, money, calendars, rounding and text; no domain knowledge.

Invariant: nothing here knows of requests, ledgers or vLLM.
"""
