"""How Hypothesis looks for counterexamples: the same way each time, or far and at random.

`ci`, the profile of `make test`, tries the same examples each time: a failure belongs to the change
that is tested. `fuzz`, that of `make fuzz`, tries twenty times as many, new ones each time, and
remembers in `.hypothesis` what failed. Neither has a deadline, as machines are busy at times.
"""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci",
    max_examples=100,
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("fuzz", settings.get_profile("ci"), max_examples=2_000, derandomize=False)
settings.load_profile("ci")
