"""Rows of requests in a fleet: kept at their servers or in files, by day, and not for ever."""
