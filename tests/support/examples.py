"""How many examples a property test tries where 100 are too many or too few."""

from hypothesis import settings


def examples(count: int) -> int:
    """Return `count`, or as many times more as the loaded profile tries more than 100."""
    return count * settings.default.max_examples // 100
