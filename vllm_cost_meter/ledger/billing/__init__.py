"""A provider's bills in the ledger: import them, and hold them against what was metered."""
