"""How Hypothesis looks for counterexamples: the same way each time, or far and at random.

`ci`, the profile of `make test`, tries the same examples each time: a failure belongs to the change
that is tested. `fuzz`, that of `make fuzz`, tries twenty times as many, new ones each time, and
remembers in `.hypothesis` what failed.
"""

from hypothesis import HealthCheck, settings

# Machines are busy at times: that an example takes long says nothing.
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)

settings.register_profile("ci", UNTIMED, max_examples=100, derandomize=True)
settings.register_profile("fuzz", UNTIMED, max_examples=2_000)
settings.load_profile("ci")
