"""Shapes of everything that passes between the blocks of the engine.

A *slot* is the place of a job in flight (`Config.jobs_in_flight` of them, used in turn).  A *place* is the number of a
codeword among those of its job and kind on its own channel.  An *epoch* tells two jobs that used the same slot apart.
A lane keeps a *list* of its stripes for each slot, in the order of their tokens; only the job's last stripe can be
partial, so a place tells the stripe.

Sparse modes have a *first pass*, which scores all tokens (or units) of a job approximately, and a *selection*; see
docs/sparse.md.  A *group* is the tokens (`Config.group_tokens`) of a codeword of the feature layout: one stripe.
"""

from amaranth.hdl import Const, Shape, Value, signed, unsigned
from amaranth.lib import data, enum
from amaranth.utils import bits_for, ceil_log2

from kvattic.spec.commands import (
    COMMAND,
    DIRECTION_BITS,
    DOMAINS,
    IDENTIFY_BYTES,
    LINE_BYTES,
    STATUS_BITS,
    TREE_BITS,
    Opcode,
)
from kvattic.spec.config import PAGE_NUMBER_BITS, Config
from kvattic.spec.formats import (
    ALPHA_FRACTION,
    MASS_BITS,
    SCALE_BITS,
    SCORE_BITS,
    WEIGHT_BITS,
    WEIGHT_EXPONENT_BITS,
)
from kvattic.spec.layout import TOKEN_BITS
from kvattic.spec.registers import QUEUES

EPOCH_BITS = 4
OPCODE_BITS = 3
"""Bits of an opcode above its direction, which tell the flash commands apart."""
PAGE_BITS = PAGE_NUMBER_BITS
SWEEP_BITS = 2
K_OFFSET_BITS = 10
MISSING_BITS = 15
"""Bits of a count of missing codewords; it saturates in a completion."""
QUEUE_BITS = ceil_log2(QUEUES)
KIND_BITS, MODE_BITS = 2, 3
RANK_BITS = MASS_BITS + TOKEN_BITS
"""A unit's rank: Cat(~number of its first token, its mass)."""
LENGTH_FORCED = MASS_BITS + 1
"""In the histogram of the masses' lengths in bits (0 to MASS_BITS): units that must be taken, whatever their mass."""
FAULTS = ("unreadable_sketch", "unreadable_key", "unreadable_value", "nan_key", "nan_value")
"""What makes a lane's share of a job invalid, the one first that is reported first."""
FAULT_BITS = 3
"""Bits of a fault's place in `FAULTS`; `len(FAULTS)`: none."""



def operation_code(opcode: Opcode) -> int:
    """What tells a flash command from the others in `Shapes.operation`."""
    return int(opcode) >> DIRECTION_BITS & (1 << OPCODE_BITS) - 1


GRANT = data.StructLayout({"kind": 2, "first": 24, "count": 24, "domain": ceil_log2(DOMAINS)})
"""A valid `commands.GRANT_COMMAND`."""


class Shapes:
    """All data shapes for one configuration.

    Parameters
    ----------
    config:
        The configuration.

    Attributes
    ----------
    slot, row, place, channel : Shape
        Unsigned numbers of a job slot, query row, codeword on its lane, channel, lane.
    tag : StructLayout
        Names a codeword: slot, epoch, kind (`commands.Kind`), place.  The place of a FEATURE is its stripe's first one
        and the number of the feature; that of an octet, a FEATURE, too, its stripe's first one, `octet_place` and its
        number; that of a centroid its stripe's first place and its number in the stripe's
        centroid codewords.
    request : StructLayout
        A codeword wanted: tag, page, codeword (number inside of its page), dram (1: of device DRAM, 0: of the channel);
        of_lane: which of the lane's channels, if it has several.
    channel_word : StructLayout
        A word of a codeword on its way from a channel: as a beat.
    beat : StructLayout
        One beat of a codeword: tag (the same for all its beats), data, last, error (the same for all its beats: the
        codeword cannot be read, its data mean nothing).
    operation : StructLayout
        A flash command for a channel: opcode (`operation_code`), page, block (of MAP), identity.
    outcome : StructLayout
        Its end: identity, page, status (`commands.Status`).
    page_word : StructLayout
        A word of page data on its way into flash: data, page (its page number, for the check value).
    flash_events : StructLayout
        What a flash channel did in this cycle: counts and strobes for the counters.
    media_error : StructLayout
        A codeword that could not be read: page, codeword, cause (`commands.MediaCause`).
    flash_command : StructLayout
        What the loader hands over of PROGRAM, ERASE, PROBE, MAP: channel, operation, dram_page (of PROGRAM).
    admin_command : StructLayout
        What the loader hands over of IDENTIFY, COUNTERS, CREATE_QUEUE, DELETE_QUEUE, GRANT: opcode, queue it came from,
        identifier, and the records' fields: number is CREATE_QUEUE's `queue` and GRANT's `kind`; submission also the
        `result` of `commands.DATA_COMMAND`, and bad_address says that this one is not aligned or not in the window.
    ended : StructLayout
        How a command other than ATTEND ended, for its completion: queue, identifier, status, where; lines of a block
        that must be written before, to the address result (0: no block).
    stripe_bits : Shape
        log2 of the pages of a stripe.
    list_bits : int
        log2 of the stripes that a lane's list holds for each slot.
    load : StructLayout
        Written to all lanes before a job starts: a row record, q (`beat` elements of one row), or a table entry, which
        the lane of its channel appends to the slot's list.  A row record makes that list empty.
    approximate : StructLayout
        A row's scale of the first pass.
    sweep : StructLayout
        A sweep of all lanes: slot, op (`Sweep`), bits, prefix.
    unit_count : Shape
        A number of units of one lane.
    alpha : Shape
        Share of the approximate mass, `formats.ALPHA_FRACTION` fractional bits.
    mean : StructLayout
        Two fp32 of a job's mean of V: slot, index (of the pair), data.
    start : StructLayout
        The job's parameters, given to all lanes when its q, rows and table are loaded.
    score : Shape
        A score, signed (`formats.SCORE_BITS`).
    accumulator, denominator : Shape
        Signed sum of weight*v; unsigned sum of weights.
    partial : StructLayout
        One word of the chain that drains the accumulators: slot, address, data[rows][elements].
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.slot = unsigned(ceil_log2(config.jobs_in_flight))
        self.row = unsigned(max(1, ceil_log2(config.rows)))
        self.place = unsigned(max(1, ceil_log2(config.ring_codewords)))
        self.channel = unsigned(max(1, ceil_log2(config.channels)))
        self.lane = unsigned(max(1, ceil_log2(config.lanes)))
        self.beat_index = unsigned(max(1, ceil_log2(config.beats_per_token)))
        self.score: Shape = signed(SCORE_BITS)
        self.accumulator: Shape = signed(config.accumulator_bits)
        self.denominator = unsigned(config.denominator_bits)
        beat_bits = config.beat_bytes * 8
        # Behind the places of K of the sinks, which is read in the same pass.
        self.octet_place = config.group_codewords // 2 if config.codes else 0

        self.tag = data.StructLayout({"place": self.place, "kind": KIND_BITS, "slot": self.slot, "epoch": EPOCH_BITS})
        # A lane with one channel has no such field.
        self.of_lane = {"of_lane": ceil_log2(config.lane_channels)} if config.lane_channels > 1 else {}
        self.request = data.StructLayout({
            "tag": self.tag,
            "page": PAGE_BITS,
            "codeword": unsigned(max(1, ceil_log2(config.codewords_per_page))),
            "dram": 1,
        } | self.of_lane)
        self.beat = data.StructLayout({"tag": self.tag, "data": beat_bits, "last": 1, "error": 1})
        self.channel_word = data.StructLayout({"tag": self.tag, "data": config.word_bytes * 8, "last": 1, "error": 1})
        self._define_commands(config)
        self._define_load(config)
        self._define_lane(config)
        self._define_selection(config)
        self._define_jobs(config)

    def _define_commands(self, config: Config) -> None:
        """Commands on their way to flash and to `Admin`, and how they end."""
        self.identity = unsigned(32)    # Cat(queue, of 16 bits, identifier): handed through
        self.operation = data.StructLayout({
            "opcode": OPCODE_BITS, "page": PAGE_BITS, "block": unsigned(max(1, ceil_log2(config.part.blocks))),
            "identity": self.identity})
        self.outcome = data.StructLayout({"identity": self.identity, "page": PAGE_BITS, "status": STATUS_BITS})
        self.page_word = data.StructLayout({"data": config.word_bytes * 8, "page": PAGE_BITS})
        self.flash_command = data.StructLayout({
            "channel": self.channel, "operation": self.operation, "dram_page": PAGE_BITS})
        self.admin_command = data.StructLayout({
            "opcode": 8, "queue": QUEUE_BITS, "identifier": 16, "number": 8, "entries": 16, "first": 24, "count": 24,
            "domain": 32, "submission": 64, "completion": 64, "bad_address": 1})
        self.ended = data.StructLayout({
            "queue": QUEUE_BITS, "identifier": 16, "status": STATUS_BITS, "where": 32,
            "lines": unsigned(bits_for(IDENTIFY_BYTES // LINE_BYTES)), "result": 64})
        self.media_error = data.StructLayout({
            "page": PAGE_BITS, "codeword": unsigned(max(1, ceil_log2(config.codewords_per_page))), "cause": 2})
        self.flash_events = data.StructLayout({
            "word": 1,            # a beat moved on the bus
            "command": 1,         # a command or address cycle began
            "dies_busy": unsigned(bits_for(config.dies)),
            "codeword": 1,        # a codeword came from the bus
            "corrected": 1,       # a codeword was corrected
            "bit_errors": unsigned(bits_for(config.ecc_t)),   # bits of it
            "retry": 1,           # a codeword is read again
            "unreadable": 1,      # a codeword is given up; `media_error` says which
            "page_reads": unsigned(bits_for(config.part.planes)),
            "page_programs": unsigned(bits_for(config.part.planes)),
            "block_erases": unsigned(bits_for(config.part.planes)),
        })

    def _define_load(self, config: Config) -> None:
        """What the loader tells the lanes."""
        beat_bits = config.query_beat_bytes * 8
        lane_stripes = config.ring_codewords // config.codewords_per_page
        self.list_bits = ceil_log2(lane_stripes)
        self.stripe_bits = unsigned(bits_for(self.list_bits))
        self.load = data.StructLayout({
            "query": 1,          # data holds elements [beat] of q of this row
            "record": 1,         # start, end, tree hold the row's mask
            "scale": 1,          # data holds this row's scale of the first pass, an `approximate`
            "chosen": 1,         # data holds Cat(number of a feature of the first pass (8 bits), its index (8 bits))
            "stripe": 1,         # data holds a `commands.TABLE_ENTRY`, start the stripe's first token
            "sketch": 1,         # data holds the `commands.SKETCH_ENTRY` of the stripe loaded last
            "last": 1,           # the stripe is the job's last one
            "slot": self.slot,
            "row": self.row,
            "beat": self.beat_index,
            "data": beat_bits,
            "start": TOKEN_BITS,  # first token attended, or of the stripe
            "end": TOKEN_BITS,    # one past the last token attended; never above the job's end_token
            "tree": TREE_BITS,
        })
        self.approximate = data.StructLayout({
            "scale": SCALE_BITS,                 # as in `start`
            "k_offset": signed(K_OFFSET_BITS),   # likewise
        })
        self.start = data.StructLayout({
            "slot": self.slot,
            "epoch": EPOCH_BITS,
            "mode": MODE_BITS,                   # `commands.Mode`
            "read": 1,                           # a READ: a job without rows, whose K and V are copied
            "unit_bits": unsigned(bits_for(config.codewords_per_page.bit_length())),
            "features": unsigned(bits_for(config.head_dim)),   # how many are chosen
            "local_token": TOKEN_BITS,           # first token of the local window; end_token where there is none
            "sinks": COMMAND["sinks"].size * 8,  # tokens below this one are attended in any case
            "stripe_bits": self.stripe_bits,
            "last_token": TOKEN_BITS,            # first token of the last stripe
            "end_token": TOKEN_BITS,
            "tree_token": TOKEN_BITS,
            "k_offset": signed(K_OFFSET_BITS),   # scale's exponent field - 127 + 28 - 2*offset (docs/numerics.md)
            "scale": SCALE_BITS,                 # scale's significand, leading one included
        })

    def _define_lane(self, config: Config) -> None:
        """What passes inside a lane, and from it to the finisher."""
        lane_stripes = config.ring_codewords // config.codewords_per_page
        # Accumulators of one slot: `copies` sets of beats_per_token words, summed when they are drained
        # (see lane.py: copies keep a word's next use behind its last one).
        self.copies = -(-ACCUMULATE_CYCLES // config.beats_per_token)
        self.copy_words = 1 << ceil_log2(config.beats_per_token)    # from a word to that of the next copy
        self.drain_words = self.copies * config.beats_per_token
        self.drain_address = unsigned(bits_for(self.copies * self.copy_words - 1))
        self.partial_data = data.ArrayLayout(
            data.ArrayLayout(self.accumulator, config.elements_per_beat), config.rows)
        self.partial = data.StructLayout({
            "slot": self.slot,
            "address": self.drain_address,   # copy * copy_words + beat
            "data": self.partial_data,
        })
        # What a lane reports of a finished job; all of it is order-free: a minimum of Cat(token, fault), an or.
        self.report = data.StructLayout({
            "token": TOKEN_BITS,   # the lowest with that fault; of an unreadable codeword its first
            "fault": FAULT_BITS,   # the first of FAULTS that happened
            "score_overflow": 1,
            "value_overflow": 1,
            "duplicate": 1,
        })
        # A job as a lane's walker needs it.
        self.walk = data.StructLayout({
            "stripes": unsigned(bits_for(lane_stripes)),   # in the lane's list
            "tail": 1,                                     # the job's last stripe is among them
            "last_token": TOKEN_BITS,
            "end_token": TOKEN_BITS,
            "stripe_bits": self.stripe_bits,
            "epoch": EPOCH_BITS,
        })
        # A stripe as a walker needs it: its first page of K or of V.
        self.stripe = data.StructLayout({"page": PAGE_BITS, "dram": 1} | self.of_lane)
        # A token's place: where its scores are kept, and which token it is.
        self.ring = unsigned(self.place.width)
        self.lane_token = data.StructLayout({
            "slot": self.slot,
            "ring": self.ring,                          # codeword's place in the score ring
            "index": unsigned(max(1, config.slot_bits_per_codeword)),   # token inside of the codeword
            "token": TOKEN_BITS,
            "last": 1,                                  # the codeword's last token
        })
        self.weight = data.StructLayout({
            "significand": WEIGHT_BITS,
            "exponent": WEIGHT_EXPONENT_BITS,
        })

    def _define_selection(self, config: Config) -> None:
        """What passes between the lanes and the selection."""
        # A lane's part in the selection: what to sweep through the job's units for.
        self.sweep = data.StructLayout({
            "slot": self.slot,
            "op": SWEEP_BITS,                      # `Sweep`
            "bits": unsigned(bits_for(RANK_BITS)),   # of `prefix` that count, from the top
            "prefix": RANK_BITS,                   # below these bits zero
        })
        self.unit_count = unsigned(bits_for(config.ring_codewords * config.tokens_per_codeword))
        self.alpha = unsigned(ALPHA_FRACTION + 1)
        # Words of the mean of V on their way to the finisher.
        self.mean = data.StructLayout({
            "slot": self.slot, "index": unsigned(ceil_log2(config.head_dim // 2)), "data": 64})

    def _define_jobs(self, config: Config) -> None:
        """Jobs on their way through the engine, and what lanes count of them."""
        # A job as it passes from stage to stage, in order.
        self.job = data.StructLayout({
            "slot": self.slot,
            "lanes": 1,          # the lanes work on it; 0: it failed before, only its completion is written
            "queue": QUEUE_BITS,
            "identifier": 16,
            "mode": MODE_BITS,
            "read": 1,           # it has no results; its K and V are copied
            "units": COMMAND["top_units"].size * 8,
            "rows": unsigned(bits_for(config.rows)),
            "result": 64,
            "status": STATUS_BITS,
            "where": 32,
        })
        # What a lane did in this cycle: exactly one of the first six; the others are single events.
        self.events = data.StructLayout({
            "beat": 1,
            "starved": 1,
            "barrier": 1,
            "weights": 1,
            "scores": 1,
            "idle": 1,
            "duplicate": 1,
            "stale": 1,
            "bad_tag": 1,
        })

    def lane_of(self, channel: Value) -> Value:
        """The lane of a channel."""
        lane = channel if self.config.lane_channels == 1 else channel[: ceil_log2(self.config.lanes)]
        return Value.cast(lane) if len(lane) else Const(0, self.lane)

    def number_of_lane(self, channel: Value) -> Value:
        """Which of its lane's channels it is; no bits if there is but one."""
        return channel[ceil_log2(self.config.lanes) :][: ceil_log2(self.config.lane_channels)]

    @property
    def row_words(self) -> int:
        """Depth of a memory with one word for each row of each slot, addressed by Cat(row, slot)."""
        return self.config.jobs_in_flight << self.row.width

    @property
    def score_words(self) -> int:
        """Depth of a lane's score memory, addressed by Cat(row, index, ring)."""
        index = self.config.slot_bits_per_codeword
        return self.config.ring_codewords << (index + (self.row.width if self.config.rows > 1 else 0))


class Sweep(enum.Enum, shape=SWEEP_BITS, view_class=None):
    """What a lane sweeps through a job's units for; `p` is 2**(score - reference) of a row and token (or centroid)."""

    SUM = 0
    """Each row's sum of p over all scored tokens."""
    MASS = 1
    """Each unit's mass and rank, kept; histogram of the masses' lengths in bits, LENGTH_FORCED for units that must be
    taken."""
    DIGIT = 2
    """Histogram of the DIGIT_BITS bits of the rank that follow `prefix`, over the units whose rank begins with it."""
    MARK = 3
    """Units whose rank's first bits are at least `prefix` are selected; each row's sum of p over their tokens."""


ACCUMULATE_CYCLES = 4
"""Cycles from reading an accumulator word to the earliest read that sees the new value."""
