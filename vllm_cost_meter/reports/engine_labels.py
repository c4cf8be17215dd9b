"""Labels of engines in answers: which engines one is about, and the labels of its rows.

A label is a fact of a run and not of a request. So engine time without a request has labels, too,
and labels choose engines as a window chooses hours: an answer about some engines has their time,
idle time included, their cost and their rates, and adds up by itself. Core: standard library only.

Invariant: of all values of one label, the missing one included, each run fits exactly one. So the
answers for each of them add up to the answer for all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_cost_meter.reports.facts import UNALLOCATED, Key
from vllm_cost_meter.units.text import as_field


@dataclass(frozen=True, slots=True)
class EngineFilter:
    """The allowed values by label; without any label all engines are meant.

    A run without the label has the value UNALLOCATED.
    """

    allowed: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def is_all(self) -> bool:
        """Whether all engines are meant."""
        return not self.allowed

    @property
    def text(self) -> str | None:
        """The filter as users write it; None for all engines."""
        terms = (
            f"label:{name}={','.join(as_field(value) for value in sorted(values))}"
            for name, values in sorted(self.allowed.items())
        )
        return "+".join(terms) or None

    def fits(self, labels: Mapping[str, str]) -> bool:
        """Return whether a run with these labels is meant."""
        return all(labels.get(name, UNALLOCATED) in values for name, values in self.allowed.items())


ALL_ENGINES = EngineFilter()


class LabelColumns:
    """The places of labels among the dimensions of a report."""

    def __init__(self, dimensions: Sequence[str], labels: Sequence[str]) -> None:
        """`labels` are those of the dimensions that are labels, in the same order."""
        self._places = [place for place, name in enumerate(dimensions) if name in labels]
        self._width = len(dimensions)
        self._of_classes: dict[tuple[str, Key], Key] = {}

    def of(self, values: Key) -> Key:
        """Return the labels among values of the dimensions."""
        return tuple(values[place] for place in self._places)

    def put_into(self, values: Key, labels: Key) -> Key:
        """Return values of the dimensions with these labels in their places."""
        found = list(values)
        for place, label in zip(self._places, labels, strict=True):
            found[place] = label
        return tuple(found)

    def of_class(self, name: str, labels: Key) -> Key:
        """Return the dimensions of a class of engine time: its name, and labels of its own."""
        # Each hour of each run asks for the same few.
        if (known := self._of_classes.get((name, labels))) is None:
            known = self.put_into((f"__{name}__",) * self._width, labels)
            self._of_classes[name, labels] = known
        return known

    def unlabelled(self) -> Key:
        """Return the labels of an engine that has none."""
        return (UNALLOCATED,) * len(self._places)
