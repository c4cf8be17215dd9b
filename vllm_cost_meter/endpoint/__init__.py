"""The side endpoint: figures of the ledger over HTTP, on a port of their own."""
