"""Settings that all tests share."""

import os

from hypothesis import HealthCheck, settings

# The same examples in each run, so that a failure on one machine is a failure on all.
# To search for new ones: KVATTIC_HYPOTHESIS=search make test
settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.register_profile(
    "search", parent=settings.get_profile("ci"), derandomize=False, max_examples=1000
)
settings.load_profile(os.environ.get("KVATTIC_HYPOTHESIS", "ci"))
