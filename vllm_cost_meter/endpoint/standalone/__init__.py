"""The side endpoint without a vLLM server: what `vllm-cost-meter server` runs."""
