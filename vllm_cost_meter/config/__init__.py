"""Settings: the values an operator may set, where they are read from, and their error messages."""
