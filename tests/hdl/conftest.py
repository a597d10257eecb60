"""What tests of single components share."""

import pytest
from tests.hdl import compiled


@pytest.fixture(params=["compiled", "amaranth"])
def each_simulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test on the compiled component, and then in Amaranth's own simulator."""
    monkeypatch.setattr(compiled, "use_amaranth", request.param == "amaranth")
    return str(request.param)
