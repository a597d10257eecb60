"""The commonest case of a correction: a single wrong bit, whose place a table tells."""

from amaranth.hdl import Module, Mux, Signal, unsigned
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import CRC_BITS, Config
from kvattic.spec.ecc import Division, Field, code
from kvattic_hdl.flash.division import product


def places(field: Field) -> list[int]:
    """Place of the wrong bit by the first syndrome, 2**-place; for 0, which is none, the field's order."""
    found = [field.order]
    found += [int(-logarithm % field.order) for logarithm in field.logarithms[1:]]
    return found


def squares(division: Division) -> list[int]:
    """The square of each bit of a state, modulo the divisor: bit i of a state stands for x**(degree - 1 - i)."""
    top = division.degree - 1
    columns = []
    for bit in range(division.degree):
        ahead = top - 2 * bit                   # from x**top to x**(2 * (top - bit))
        columns.append(division.shift(1, ahead) if ahead >= 0 else division.unshift(1, -ahead))
    return columns


def root(division: Division, times: int) -> int:
    """The state whose square of so many times is 1, the state before a wrong bit is taken in.

    Squaring it `degree - 1` times changes no power of x, as the order of x is 2**(degree - 1) - 1.
    """
    columns, state = squares(division), 1
    for _ in range(-times % (division.degree - 1)):
        state = sum_of(columns, state)
    return state


def sum_of(columns: list[int], vector: int) -> int:
    """Sum over GF(2) of the columns whose bit of the vector is set."""
    total = 0
    for bit, column in enumerate(columns):
        total ^= column if vector >> bit & 1 else 0
    return total


class SingleError(wiring.Component):
    """Where the wrong bit is if there is only one, and whether the check value agrees.

    The check value that a wrong bit leaves, taken back over the bits before it, is a power of x: it is made by
    squaring, a bit of the place a cycle.

    Parameters
    ----------
    config : Config

    Members
    -------
    begin : In(1), syndrome : In
        Strobe: a codeword's first syndrome.
    check : In(CRC_BITS)
        Its check value, taken back over the whole data; from the cycle after `begin` until `ready`.
    ready : Out(1)
        What follows is found: ``m + 3`` cycles after `begin`, for elements of m bits, until the next one.
    place : Out
        Which bit it is.
    possible : Out(1)
        It is one of the codeword's.
    right : Out(1)
        The check value agrees with it.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        m = code(config).field.m
        super().__init__({
            "begin": In(1),
            "syndrome": In(m),
            "check": In(CRC_BITS),
            "place": Out(m),
            "possible": Out(1),
            "ready": Out(1),
            "right": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        code_ = code(self.config)
        field, crc = code_.field, code_.crc
        m.submodules.places = table = Memory(shape=unsigned(field.m), depth=1 << field.m, init=places(field))
        port = table.read_port()
        read, left = Signal(), Signal(range(field.m + 1))
        bits = Signal(field.m, reset_less=True)          # of the place, the next one first
        power = Signal(CRC_BITS, reset_less=True)
        squared, before = Signal(CRC_BITS), Signal(CRC_BITS)
        m.d.comb += [
            port.addr.eq(self.syndrome),
            port.en.eq(self.begin),
            squared.eq(product(m, "square", power, squares(crc), CRC_BITS)),
            before.eq(product(m, "before", squared, [crc.unshift(1 << i) for i in range(CRC_BITS)], CRC_BITS)),
        ]
        m.d.sync += read.eq(self.begin)
        with m.If(self.begin):
            m.d.sync += self.ready.eq(0)
        with m.If(read):
            m.d.sync += [
                self.place.eq(port.data), bits.eq(port.data), power.eq(root(crc, field.m)), left.eq(field.m)]
        with m.Elif(left != 0):
            m.d.sync += [left.eq(left - 1), bits.eq(bits << 1), power.eq(Mux(bits[-1], before, squared))]
        ended, match, none, in_message = (Signal(name=name) for name in ("ended", "match", "none", "in_message"))
        m.d.sync += [
            ended.eq(left == 1),
            in_message.eq(self.place < code_.message_bits),
            self.possible.eq(self.place < code_.code_bits),
        ]
        with m.If(ended):
            m.d.sync += [match.eq(power == self.check), none.eq(self.check == 0), self.ready.eq(1)]
        m.d.comb += self.right.eq(Mux(in_message, match, none))
        return m
