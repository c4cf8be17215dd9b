"""What GPU time and energy cost: the price book, declared overheads, costs of amounts."""
