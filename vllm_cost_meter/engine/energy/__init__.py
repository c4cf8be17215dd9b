"""Energy of an engine's GPUs: read it through NVML, and divide it in proportion to GPU time."""
