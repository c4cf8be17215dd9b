"""Tables of the ledger, by what they are for; `ledger/schema.py` has them all."""
