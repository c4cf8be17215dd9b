"""The fleet: the books of many servers in one PostgreSQL, each sent from its server's ledger."""
