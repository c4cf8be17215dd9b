"""A provider's bills: read from files, and spread over hours."""
