"""Provider bills in the ledger: import them, and compare them with the metered cost."""
