"""The books of one engine: where each GPU-nanosecond goes, and what is told of it."""
