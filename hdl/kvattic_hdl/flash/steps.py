"""A step of the code's two divisions, by the parity's generator and by the check value's: one network of XORs.

It is the larger part of an encoder, and of a decoder's checker.  A bus moves words in one direction at a time, so those
of a channel share one: the decoder, whose words cannot be held back, goes first.
"""

from functools import reduce
from operator import xor

from amaranth.hdl import Module, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from kvattic.spec.config import CRC_BITS, Config
from kvattic.spec.ecc import Division, code
from kvattic_hdl.flash.division import product


def steps_signature(config: Config) -> wiring.Signature:
    """The interface, seen from who divides; all of it within a cycle.

    busy : Out(1)
        A step may be made in this cycle; the last user need not say.
    waits : In(1)
        Another one makes a step, so none can be made; the products are of its vectors.
    parity, check : Out(word_bytes * 8)
        A word plus the first bits of a division's state; zeros while it is not busy, or waits.
    parity_product, check_product : In
        What becomes of the vector: add it to what is left of the state.
    """
    bits = config.word_bytes * 8
    return wiring.Signature({
        "busy": Out(1),
        "waits": In(1),
        "parity": Out(bits),
        "check": Out(bits),
        "parity_product": In(code(config).parity.degree),
        "check_product": In(CRC_BITS),
    })


def left_after(division: Division, state: Value, bits: int) -> Value:
    """What is left of a division's state after so many bits, without the product."""
    return (state >> bits)[: division.degree]


def vector_of(state: Value, word: Value, valid: Value) -> Value:
    """A word plus the first bits of a division's state, or zeros."""
    return (word ^ state[: len(word)]) & valid.replicate(len(word))


class CodeSteps(wiring.Component):
    """Makes the products of one user at a time, in the same cycle; the first one that is busy goes first.

    Parameters
    ----------
    config : Config
    users : int

    Members
    -------
    users : Array of In(steps_signature)
        The last one is served when no other one is busy.  As all the others' vectors are zeros, they are added.
    """

    def __init__(self, config: Config, users: int = 1) -> None:
        self.config = config
        self.count = users
        super().__init__({"users": In(steps_signature(config)).array(users)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        code_ = code(self.config)
        bits = self.config.word_bytes * 8
        vectors = Signal(bits, name="parity"), Signal(bits, name="check")
        m.d.comb += [
            vectors[0].eq(reduce(xor, (user.parity for user in self.users))),
            vectors[1].eq(reduce(xor, (user.check for user in self.users)))]
        products = [product(m, name, vector, division.columns(bits), division.degree) for name, vector, division in (
            ("parity", vectors[0], code_.parity), ("crc", vectors[1], code_.crc))]
        waits: Value | int = 0
        for user in self.users:
            m.d.comb += [
                user.waits.eq(waits), user.parity_product.eq(products[0]), user.check_product.eq(products[1])]
            waits = waits | user.busy
        return m
