"""READ in the engine's RTL, against the golden device: equal bytes and completions, beside ATTENDs whose bits stay.

The functions without `test_` run inside of a simulator process (see kvattic_sim.rtl.jobs) and on the golden device.
"""

from typing import Any

import numpy as np
import pytest
from tests.cosim.test_engine import (
    BLOCKS,
    CASES,
    NAN,
    ODD,
    PAGE,
    RING_STRIPES,
    SHUFFLED,
    WINDOW,
    OwnQueues,
    attend_case,
    check_counters,
    differences,
    ended,
    model,
    normal,
    observed,
    run_by_hand,
    simulate,
)
from tests.host.golden.queue_host import DOMAIN

from kvattic.driver.device import Device
from kvattic.driver.jobs import FlashOperation
from kvattic.errors import DeviceStatusError
from kvattic.spec.commands import COMMAND, READ_COMMAND, Opcode, Status, read_token_bytes
from kvattic.spec.config import TINY
from kvattic.spec.layout import pack_entries, page_place
from kvattic.spec.registers import StatusBit
from kvattic_sim.rtl.transport import AxiStalls, Fault, FaultKind, FlashSettings, Stall

TARGET = 0x2000
"""Of READs by hand, behind BLOCKS."""


def patterns(config: Any, seed: int, *shape: int) -> Any:
    """Any bits, NaN and infinity among them."""
    return np.random.default_rng(seed).integers(0, 1 << 16, (*shape, config.head_dim), np.uint16)


def ranges(device: Device, tokens: int, places: list[tuple[int, int]]) -> dict[str, Any]:
    """Tokens in flash and in DRAM, appended in pieces; what is read of them, and what is attended between."""
    config, found = device.config, {}
    key, value = (patterns(config, i, 2, tokens) for i in (1, 2))
    good = normal(config, 3, 2, tokens)
    with device.create_sequence(2, capacity_tokens=tokens) as odd, \
            device.create_sequence(2, capacity_tokens=tokens, isolated=True) as plain:
        for begin, end in ((0, 5), (5, tokens // 2), (tokens // 2, tokens)):
            odd.append(key[:, begin:end], value[:, begin:end])
            plain.append(good[:, begin:end], good[:, begin:end])
        for first, last in places:
            waiting = plain.attend_async(normal(config, 4, 2, 2)), plain.attend_async(normal(config, 5, 4, 1))
            read = odd.read_bits(0, first, last)
            assert (read[0] == key[:, first:last]).all() and (read[1] == value[:, first:last]).all(), (first, last)
            attended = [future.result() for future in waiting]
            for each in attended:
                check_counters(each.completions, config.channels)
            found[f"{first} to {last}"] = [*read, *(observed(each) for each in attended)]
    return found


@pytest.mark.parametrize(("config", "tokens"), [(TINY, 150), (ODD, 90)], ids=["tiny", "odd"])
def test_reads_what_was_written(config: Any, tokens: int) -> None:
    places = [(0, tokens), (1, 2), (tokens - 1, tokens), (7, 71), (tokens - 25, tokens - 3)]
    for stalls in (AxiStalls(), AxiStalls.everywhere(Stall.RANDOM, seed=3)):
        found = simulate(config, ranges, flash=SHUFFLED, stalls=stalls, tokens=tokens, places=places)
        assert not differences(found, model(config, ranges, tokens=tokens, places=places))
