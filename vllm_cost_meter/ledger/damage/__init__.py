"""Damage of a ledger's file while servers use it: how it is noticed, and what is done then."""
