"""The engine side of the meter: books of GPU time and energy for one engine, and their reports."""
