"""The process that applies journals to the ledger, and the API server's end of it."""
