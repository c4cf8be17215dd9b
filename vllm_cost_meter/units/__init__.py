"""Numbers and words without a domain: time, money, calendar, rounding, text.

Invariant: nothing here knows of requests, ledgers or vLLM.
"""
