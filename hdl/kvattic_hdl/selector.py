"""A lane's part in the selection: sweeps through the scores of a job's first pass for sums, masses and marks."""

from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from kvattic.config import Config
from kvattic.formats import DIGIT_BITS
from kvattic_hdl.interfaces import MODE_BITS, TOKEN_BITS, Shapes


class Selector(wiring.Component):
    """Sweeps through the tokens (or units) of a job's stripes in this lane's list, for the central `Selection`.

    Parameters
    ----------
    config : Config
        One with `sparse`.

    Members
    -------
    sweep_valid, sweep : In(1), In(Shapes.sweep)
        Strobe: begin this sweep.  Not before `done`.
    done : Out(1)
        Low from the cycle after `sweep_valid` until the sweep's results can be read.
    slot : Out(slot)
        The sweep's job; from the cycle after `sweep_valid` on.  The six members below are its parameters, in the same
        cycle, constant during the sweep.
    mode : In(2)
    unit_bits : In
    end_token, local_token : In(24)
    stripes : In
        Number of stripes in the lane's list.
    ring_base : In(ring)
        Place of the list's first codeword in the score ring; the others follow, `Config.group_codewords` a stripe.
    stripe_address : Out
        Cat(number in the list, slot) of a stripe.
    stripe_token, stripe_dram : In(24), In(1)
        Its first token, and whether it is in device DRAM; one cycle later.
    score_address : Out
        Read address of the score memory: Cat(row, index, ring).
    score_ask, score_grant : Out(1), In(1)
        The address is wanted; it is taken in this cycle.
    score : In(score)
        Two cycles after a granted address.
    mark_valid, mark_ring, mark_bits : Out(1), Out(ring), Out(tokens_per_codeword)
        Strobe, in a MARK sweep once for each place of the job's stripes, also of those beyond `end_token`: which tokens
        of the codeword at `mark_ring` are selected.  Bits of tokens from `end_token` on mean nothing.
    mark_room : In(1), 1 where it is not driven
        Marks may come.  Up to `MARKS_UNDER_WAY` of them still come after it has fallen.
    reference_write, reference_row, reference : In(1), In(row), In(score)
        Strobe: what the row's scores are compared with, from the next sweep on.  No score is above it.
    sum_row : In(row)
    sum : Out(denominator)
        That row's sum of the last SUM or MARK sweep, two cycles later.
    bin : In(DIGIT_BITS)
    count : Out(unit_count)
        Units with that digit in the last MASS or DIGIT sweep, two cycles later.
    unmarked : Out(1)
        The last MARK sweep left a unit unselected.
    """

    MARKS_UNDER_WAY = 4

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        self.address_bits = (shapes.score_words - 1).bit_length()
        super().__init__({
            "sweep_valid": In(1),
            "sweep": In(shapes.sweep),
            "done": Out(1, init=1),
            "slot": Out(shapes.slot),
            "mode": In(MODE_BITS),
            "unit_bits": In(shapes.start["unit_bits"].shape),
            "end_token": In(TOKEN_BITS),
            "local_token": In(TOKEN_BITS),
            "stripes": In(shapes.walk["stripes"].shape),
            "ring_base": In(shapes.ring),
            "stripe_address": Out(shapes.list_bits + shapes.slot.width),
            "stripe_token": In(TOKEN_BITS),
            "stripe_dram": In(1),
            "score_address": Out(self.address_bits),
            "score_ask": Out(1),
            "score_grant": In(1),
            "score": In(shapes.score),
            "mark_valid": Out(1),
            "mark_ring": Out(shapes.ring),
            "mark_bits": Out(config.tokens_per_codeword),
            "mark_room": In(1, init=1),
            "reference_write": In(1),
            "reference_row": In(shapes.row),
            "reference": In(shapes.score),
            "sum_row": In(shapes.row),
            "sum": Out(shapes.denominator),
            "bin": In(DIGIT_BITS),
            "count": Out(shapes.unit_count),
            "unmarked": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        return Module()
