"""Tools that start or drive a real server: the demo, the sweep, the validation, the tiny model."""
