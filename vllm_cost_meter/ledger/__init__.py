"""The ledger: bills, HTTP requests and engine totals in SQLite or PostgreSQL.

`database` opens it, `writer` commits to it in groups, `reader` answers questions from it. Only the
API server and the command line import this package; the engine process never does.
"""
