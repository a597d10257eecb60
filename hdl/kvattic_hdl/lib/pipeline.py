"""Pieces of a pipeline that never stalls: delays, and a number that is shifted up until its top bit is set.

Registers go without reset: whoever uses them resets what says that they are valid, so that synthesis may make delays
of the others.
"""

from amaranth.hdl import Array, Cat, Module, Shape, Signal, Value
from amaranth.lib import data

COARSE, MEDIUM = 16, 4
"""Steps of `shift_up`: multiples of 16, then of 4, then of 1."""


def later(m: Module, value: Value, name: str, stages: int = 1) -> Value:
    """The value so many cycles later."""
    for stage in range(stages):
        register = Signal(value.shape(), name=f"{name}_{stage}", reset_less=True)
        m.d.sync += register.eq(value)
        value = register
    return value


def tag_later(m: Module, tag: data.View | Value, shape: Shape | data.Layout, stages: int) -> data.View | Value:
    """What accompanies a value, so many cycles later."""
    for stage in range(stages):
        following = Signal(shape, name=f"tag{stage}", reset_less=True)
        m.d.sync += following.eq(tag)
        tag = following
    return tag


def shift_up(m: Module, value: Value, name: str) -> tuple[Value, Value]:
    """Shift a number up until its top bit is set.

    Returns
    -------
    (zeros, normal)
        By how many places, three cycles later; the number shifted, four cycles later.  Of zero the places mean nothing.
    """
    bits = len(value)
    # 1: which 16 bits are the first that are not all zero; 2: by whole groups of them.
    groups = -(-bits // COARSE)
    coarse = Signal(range(groups), name=f"{name}_coarse", reset_less=True)
    m.d.sync += coarse.eq(groups - 1)
    for group in reversed(range(groups - 1)):
        top = bits - group * COARSE
        with m.If(value[top - COARSE : top].any()):
            m.d.sync += coarse.eq(group)
    waiting = later(m, value, f"{name}_waiting")
    shifted = Signal(bits, name=f"{name}_shifted")
    with m.Switch(coarse):
        for group in range(groups):
            with m.Case(group):
                m.d.comb += shifted.eq(waiting << (group * COARSE))
    by_groups = later(m, shifted, f"{name}_by_groups")

    # 3: by 0, 4, 8 or 12; 4: by 0 to 3.
    def step(value: Value, unit: int, part: str) -> tuple[Value, Value]:
        count = Signal(2, name=f"{name}_{part}_count")
        # The number first: with it four bits make one, with its conditions they would take two LUTs.
        m.d.comb += count.eq(3)
        for places in reversed(range(3)):
            with m.If(value[bits - (places + 1) * unit : bits - places * unit].any()):
                m.d.comb += count.eq(places)
        result = Array((value << (places * unit))[:bits] for places in range(4))[count]
        return count, later(m, Value.cast(result), f"{name}_{part}")

    medium, by_fours = step(by_groups, MEDIUM, "medium")
    fine, normal = step(by_fours, 1, "fine")
    return Cat(fine, later(m, medium, f"{name}_medium_later"), later(m, coarse, f"{name}_coarse_later", 2)), normal
