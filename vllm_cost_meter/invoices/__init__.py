"""Provider bills (invoices): read from files, and spread over hours."""
