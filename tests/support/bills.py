"""What stretches of a provider's bill say was spent in a time, without rounding."""

from collections.abc import Iterable
from fractions import Fraction

from vllm_cost_meter.invoices.timeline import Stretch


def spend(found: Iterable[Stretch], from_ns: int, to_ns: int) -> Fraction:
    """Return what stretches say was spent in [from_ns, to_ns), in nano-USD, exact."""
    return sum((one.before(to_ns) - one.before(from_ns) for one in found), Fraction(0))
