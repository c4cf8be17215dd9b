"""How engine runs end in a ledger: with bills that no snapshot counts, and with lost requests."""
