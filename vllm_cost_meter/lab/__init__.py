"""What starts or drives a real server: the demo, the sweep, the validation, the tiny model."""
