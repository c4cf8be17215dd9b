"""How many examples a property test tries where a profile's own number is too many or too few."""

from hypothesis import settings


def examples(count: int) -> int:
    """Return how many examples to try where a profile with 100 would try `count`."""
    return max(1, count * settings.default.max_examples // 100)
