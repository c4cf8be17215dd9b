"""The audit of a ledger: hold what the engines counted against what the ledger has."""
