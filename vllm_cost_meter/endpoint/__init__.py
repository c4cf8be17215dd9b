"""The side endpoint: an HTTP server for the ledger's figures, on its own port."""
