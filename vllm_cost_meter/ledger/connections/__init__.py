"""How connections to the databases of ledgers and fleets are made."""
