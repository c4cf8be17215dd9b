"""Settings: what may be set, where it is read from, and what a mistake says."""
