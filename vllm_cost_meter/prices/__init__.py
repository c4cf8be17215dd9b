"""Prices for GPU time and energy: the price book, declared overheads, and costs."""
