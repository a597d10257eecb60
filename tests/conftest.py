"""Settings that all tests share."""

import os
from collections.abc import Callable

import pytest
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--campaign", action="store_true",
                     help="run campaigns whole (make campaign); without it, a slice of each")


@pytest.fixture
def campaign(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """The size of a campaign: ``campaign(10_000, 1_500)`` is all by `make campaign`, and a slice in `make test`.

    Mark the test with ``campaign``, so that `make campaign` finds it.
    """
    whole = request.config.getoption("campaign")
    return lambda everything, some: everything if whole else some

