"""Codes of K and V become the elements that `kvattic.spec.stored` says, for every code."""

import numpy as np
import pytest
from amaranth.hdl import Module, Signal
from amaranth.sim import Simulator

from kvattic.spec.formats import Element, KvFormat
from kvattic.spec.stored import widen as widened
from kvattic_hdl.lib.arithmetic import decode, widen


@pytest.mark.parametrize("element", Element)
@pytest.mark.parametrize("kv", KvFormat)
def test_every_code(kv, element):
    bits = 8 * kv.element_bytes
    code, found, special = Signal(bits), Signal(16), Signal()
    m = Module()
    m.d.comb += [found.eq(widen(code, kv, element.encoding)),
                 special.eq(decode(widen(code, kv, element.encoding), element.encoding).special)]
    codes = np.arange(1 << bits, dtype=f"u{kv.element_bytes}")[:: 1 if bits == 8 else 251]
    wanted = widened(codes, kv, element)
    ones = (1 << element.encoding.exponent_bits) - 1

    async def bench(context):
        for given, element_bits in zip(codes.tolist(), wanted.tolist(), strict=True):
            context.set(code, given)
            await context.delay(1e-9)
            field = element_bits >> element.encoding.fraction_bits & ones
            assert context.get(special) == (field == ones), hex(given)
            if field != ones:   # the lane looks at nothing else of a NaN or infinity
                assert context.get(found) == element_bits, hex(given)

    simulator = Simulator(m)
    simulator.add_testbench(bench)
    simulator.run()
