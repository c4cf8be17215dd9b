"""Energy of an engine's GPUs: read through NVML, divided by GPU time."""
