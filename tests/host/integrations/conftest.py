"""Drives for models."""

from dataclasses import replace

import pytest

import kvattic
from kvattic import TINY

ROOMY = replace(TINY, dies=8)
"""TINY with room for several sequences."""


@pytest.fixture
def drive():
    """Opens drives for a model."""
    # Only tests that need torch come here.
    from kvattic.integrations.transformers import config_for

    devices = []

    def opened(model, base=ROOMY, **changes):
        devices.append(kvattic.open("model", config_for(model, base, **changes)))
        return devices[-1]

    yield opened
    for device in devices:
        device.close()
