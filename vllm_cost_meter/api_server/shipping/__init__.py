"""The process that sends the ledger to the fleet's database, and the API server's end of it."""
