"""What is asked of the ledger: one module a question, each inside one transaction."""
