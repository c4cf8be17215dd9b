"""The ledger: bills, HTTP requests and engine totals in SQLite or PostgreSQL.

`store` opens it, `writer` commits to it in groups, `reader` answers questions from it. Only the
API side and the command line import this package; the engine side never does.
"""
