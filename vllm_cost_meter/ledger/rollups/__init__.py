"""Sums over bills and exchanges by hour and day, which reports read instead of the rows."""
