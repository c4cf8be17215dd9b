"""SQL queries on the ledger, one module for each question; each runs inside one transaction."""
