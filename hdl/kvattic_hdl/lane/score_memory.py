"""The scores of a lane's ring, side by side as the selection goes through them."""

from amaranth.hdl import Array, Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from kvattic.spec.config import Config
from kvattic_hdl.lib.shapes import Shapes

SLICE_BITS = 36
"""Bits of a score that are kept together: they fill block RAMs of 9 bits a word, which the others would half fill."""


class ScoreMemory(wiring.Component):
    """Keeps a score for each row of each token in the ring; `Config.sweep_tokens` tokens make a word.

    Addresses are Cat(row, index, ring); a word's is that of its first token without the zeros of index.  Reset does not
    clear it.

    Parameters
    ----------
    config : Config

    Members
    -------
    write : In(1), write_address, write_score : In
    score_ask : In(1), score_address : In, score : Out, two cycles later
        One score, which goes before the word.
    word_address : In, word : Out(array of score, by token), two cycles later
        A word, if no score was asked for.
    """

    def __init__(self, config: Config) -> None:
        self._shapes = shapes = Shapes(config)
        self._wide = config.sweep_tokens
        # The index follows the row, of which there are no bits if there is but one.
        self._row_bits = shapes.row.width if config.rows > 1 else 0
        self._words = shapes.score_words // self._wide
        address = ceil_log2(shapes.score_words)
        super().__init__({
            "write": In(1),
            "write_address": In(address),
            "write_score": In(shapes.score),
            "score_ask": In(1),
            "score_address": In(address),
            "score": Out(shapes.score),
            "word_address": In(ceil_log2(self._words)),
            "word": Out(data.ArrayLayout(shapes.score, self._wide)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        write_bank, write_word = self._place(self.write_address)
        read_bank, read_word = self._place(self.score_address)
        bank_1, bank_2 = Signal.like(read_bank), Signal.like(read_bank)
        m.d.sync += [bank_1.eq(read_bank), bank_2.eq(bank_1)]
        for i in range(self._wide):
            slices = []
            for low in range(0, len(self.write_score), SLICE_BITS):
                written = self.write_score[low : low + SLICE_BITS]
                m.submodules[f"bank_{i}_{low}"] = bank = Memory(
                    shape=len(written), depth=self._words, init=[], attrs={"ram_style": "block"})
                write, read = bank.write_port(domain="sync"), bank.read_port(domain="sync")
                m.d.comb += [
                    write.en.eq(self.write & (write_bank == i)),
                    write.addr.eq(write_word),
                    write.data.eq(written),
                    read.addr.eq(Mux(self.score_ask, read_word, self.word_address)),
                ]
                slices.append(read.data)
            m.d.sync += self.word[i].eq(Cat(slices))
        m.d.comb += self.score.eq(Array(self.word)[bank_2])
        return m

    def _place(self, address: Signal) -> tuple[Value, Value]:
        """(token of its word, address of its word)."""
        end = self._row_bits + ceil_log2(self._wide)
        return address[self._row_bits : end], Cat(address[: self._row_bits], address[end:])
