"""Loads a job into the lanes: its rows and q, its table, and what a first pass needs beside."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from kvattic.spec.commands import COMMAND, LINE_BYTES, ROW, Mode, Status
from kvattic.spec.config import ELEMENT_BYTES, Config
from kvattic.spec.formats import SCALE_BITS
from kvattic_hdl.frontend.checks import NanCheck, SketchCheck, TableCheck
from kvattic_hdl.frontend.fetch import all_stripes, command_fields, row_lines
from kvattic_hdl.frontend.validate import FP32_EXPONENT, FP32_FRACTION, JUDGEMENT
from kvattic_hdl.lib.axi import LINE_WORD, LINE_WORDS
from kvattic_hdl.lib.records import WORD_BYTES, field_of_word, word_of
from kvattic_hdl.lib.shapes import K_OFFSET_BITS, TOKEN_BITS, Shapes
from kvattic_hdl.sparse.ranker import Ranker

OWNER_CYCLES = 5
"""From the last entry of a table on, until the owners' judgement is there."""
WORD_ELEMENTS = WORD_BYTES // ELEMENT_BYTES
FP32_BITS = 32


class LoadJob(wiring.Component):
    """Writes a job's query block and table to all lanes while they come, and checks them.

    Latency: a cycle for each beat and record of rows that the job has not, for each word, and `OWNER_CYCLES` + 2; then
    the `Ranker`'s time in SPARF and FETCHED.  Throughput: one word a cycle, one job at a time.  Ordering: empty rows,
    the query block, the mean, the table, the chosen features and the rows' scales.  Reset: no job.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    clear : In(1)
        The next command is not there yet: forget what the checks found.
    prepare : In(1)
        The command is there; high for two cycles or more before `begin`.
    begin : In(1)
        Strobe: load the job.
    slot_free : In(1)
        Its slot is free.
    command : In(512)
        The command's line; this and the following are stable until `done`.
    slot, scale : In(Shapes.slot), In(24)
        The job's slot, and its scale as in `Shapes.start`.
    is_read, sparse, ranked, stripe_tokens, lane_limit, k_offset : In
        See `Validate`.
    broken : In(1)
        A word was not answered with OKAY.
    not_owned, not_owned_where : In(1), In(16)
        An entry of the table is not the domain's; the first.
    words : In(stream of LINE_WORD)
        The words of the query block, the mean and the table.
    load_valid, load : Out(1), Out(Shapes.load)
        Written to all lanes.
    entry_number : Out(16)
        Number of the stripe that is being loaded.
    mean_valid, mean : Out(1), Out(Shapes.mean)
        Words of the mean of V.
    refused : Out(1)
        Strobe: the job cannot be computed.
    judgement : Out(JUDGEMENT)
        Why, while `refused`.
    done : Out(1)
        Strobe: the job is loaded.
    """

    clear: Signal
    prepare: Signal
    begin: Signal
    slot_free: Signal
    command: Signal
    slot: Signal
    scale: Signal
    is_read: Signal
    sparse: Signal
    ranked: Signal
    stripe_tokens: Signal
    lane_limit: Signal
    k_offset: Signal
    broken: Signal
    not_owned: Signal
    not_owned_where: Signal
    words: stream.Interface
    load_valid: Signal
    load: data.View
    entry_number: Signal
    mean_valid: Signal
    mean: data.View
    refused: Signal
    judgement: data.View
    done: Signal

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shapes = shapes = Shapes(config)
        super().__init__({
            "clear": In(1),
            "prepare": In(1),
            "begin": In(1),
            "slot_free": In(1),
            "command": In(LINE_BYTES * 8),
            "slot": In(shapes.slot),
            "scale": In(SCALE_BITS),
            "is_read": In(1),
            "sparse": In(1),
            "ranked": In(1),
            "stripe_tokens": In(TOKEN_BITS),
            "lane_limit": In(bits_for(config.ring_codewords // config.codewords_per_page)),
            "k_offset": In(signed(K_OFFSET_BITS)),
            "broken": In(1),
            "not_owned": In(1),
            "not_owned_where": In(16),
            "words": In(stream.Signature(LINE_WORD)),
            "load_valid": Out(1),
            "load": Out(shapes.load),
            "entry_number": Out(16),
            "mean_valid": Out(1),
            "mean": Out(shapes.mean),
            "refused": Out(1),
            "judgement": Out(JUDGEMENT),
            "done": Out(1),
        })
        self._fields = command_fields(config, COMMAND, self.command)
        self._rows = self._fields["rows"][: bits_for(config.rows)]
        self._taken = Signal(name="taken")
        self._row = Signal(range(config.rows + 1), name="row")
        self._beat = Signal(shapes.beat_index, name="beat")
        beat_words = config.query_beat_bytes // WORD_BYTES
        self._part = Signal(range(max(2, beat_words)), name="part")  # word of the beat
        self._earlier = Signal(max(1, beat_words - 1) * 64, name="earlier")  # words of the beat before it
        self._index = Signal(range(config.head_dim // WORD_ELEMENTS), name="index")  # word of q
        self._in_query = Signal(name="in_query")  # the word that comes is one of q
        self._in_mean = Signal(name="in_mean")  # the word that comes is one of the mean
        self._mean_words = config.head_dim * FP32_BITS // 8 // WORD_BYTES  # whole lines, as all head_dim
        self._mean_index = Signal(range(self._mean_words), name="mean_index")
        self._next_number = Signal(16, name="next_number")  # of the stripe whose entry comes
        self._token = Signal(TOKEN_BITS, name="token")  # its first one
        self._in_sketch = Signal(name="in_sketch")  # its second entry comes
        self._entries_left = Signal(range(all_stripes(config) + 1), name="entries_left")

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.d.comb += self._taken.eq(self.words.valid & self.words.ready)
        self._default_load(m)
        faults, ranker = self._check(m)
        row_start, row_end, record = self._clamp(m)
        position = Signal(range(row_lines(self._config) * LINE_WORDS))
        settle = Signal(range(OWNER_CYCLES + 1))
        taking = Signal()    # in query, mean or table; what follows from it goes far
        m.d.comb += self.words.ready.eq(taking)

        with m.FSM(name="state"):
            with m.State("idle"):
                with m.If(self.prepare):
                    m.d.sync += [self._row.eq(self._rows), self._beat.eq(0)]
                with m.If(self.begin):
                    m.d.sync += [
                        self._entries_left.eq(self._fields["stripes"]), self._next_number.eq(0),
                        self._token.eq(self._fields["base_token"]), self._in_sketch.eq(0)]
                    m.next = "clear"
            with m.State("clear"):
                with m.If(self.slot_free & self._clear_row(m, position)):
                    m.d.sync += taking.eq(1)
                    m.next = "query"
                    with m.If(self.is_read):
                        m.next = "table"
            with m.State("query"):
                m.d.sync += [
                    self.load.start.eq(row_start), self.load.end.eq(row_end), self.load.tree.eq(record["tree"])]
                with m.If(self._taken):
                    self._load_row(m, position, record)
                    with m.If(position == row_lines(self._config) * LINE_WORDS - 1):
                        m.d.sync += [position.eq(0), self._row.eq(self._row + 1)]
                        with m.If(self._row == self._rows - 1):
                            m.next = "table"
                            if ranker is not None:
                                with m.If(self.ranked):
                                    m.next = "mean"
            with m.State("table"):
                # Until the checks are done an entry is loaded like a good one: without a `start` it does nothing.
                with m.If(self._taken):
                    self._load_entry(m)
                    with m.If(self.words.payload.last & (self._entries_left <= 1)):
                        m.d.sync += taking.eq(0)
                        m.next = "settle"
            if ranker is not None:
                with m.State("mean"):
                    m.d.comb += self._in_mean.eq(self._taken)
                    with m.If(self._taken):
                        m.d.sync += [self.mean_valid.eq(1), self._mean_index.eq(self._mean_index + 1)]
                        with m.If(self._mean_index == self._mean_words - 1):
                            m.d.sync += self._mean_index.eq(0)
                            m.next = "table"
            with m.State("settle"):
                # The last entry of the table is being checked.
                m.d.sync += settle.eq(settle + 1)
                with m.If(settle == OWNER_CYCLES):
                    m.d.sync += settle.eq(0)
                    m.next = "decide"
            with m.State("decide"):
                m.next = "idle"
                for number, (condition, status, where) in enumerate(faults):
                    with m.If(condition) if number == 0 else m.Elif(condition):
                        m.d.comb += [
                            self.refused.eq(1), self.judgement.status.eq(status), self.judgement.where.eq(where)]
                with m.Else():
                    m.d.comb += self.done.eq(~self.ranked)
                    if ranker is not None:
                        with m.If(self.ranked):
                            m.next = "rank"
            if ranker is not None:
                with m.State("rank"):
                    self._load_rank(m, ranker)
                    with m.If(ranker.done & ~self.load_valid):
                        m.d.comb += self.done.eq(1)
                        m.next = "idle"
        # Behind all states, so that the registers' resets do it: what the rows that the job has not hold.
        with m.If(self.prepare):
            m.d.sync += [self.load.data.eq(0), self.load.start.eq(0), self.load.end.eq(0)]
        return m

    def _default_load(self, m: Module) -> None:
        """What `load` holds unless a state says otherwise."""
        m.d.sync += [
            self.load_valid.eq(0),
            *(self.load[name].eq(0) for name in ("query", "record", "scale", "chosen", "stripe", "sketch")),
            self.load.slot.eq(self.slot),
            self.load.row.eq(self._row),
            self.mean_valid.eq(0),
        ]

    def _clear_row(self, m: Module, position: Signal) -> Value:
        """Makes the rows that this job has not empty while its query block is on the way; whether all are."""
        all_clear = self._row == self._config.rows
        with m.If(self.slot_free & all_clear):
            m.d.sync += [signal.eq(0) for signal in (self._row, self._beat, self._index, self._part, self._in_query)]
        with m.Elif(self.slot_free):
            # position 0: the record; 1: its q.
            m.d.sync += [self.load_valid.eq(1), self.load.beat.eq(self._beat), position.eq(1)]
            with m.If(position == 0):
                m.d.sync += [self.load.record.eq(1), self.load.tree.eq(0)]
            with m.Else():
                m.d.sync += [self.load.query.eq(1), self._beat.eq(self._beat + 1)]
                with m.If(self._beat == self._config.beats_per_token - 1):
                    m.d.sync += [self._beat.eq(0), self._row.eq(self._row + 1), position.eq(0)]
        return all_clear

    def _load_row(self, m: Module, position: Signal, record: dict[str, Signal]) -> None:
        """A word of a row of the query block."""
        word, load = self.words.payload, self.load
        beat_words = self._config.query_beat_bytes // WORD_BYTES
        m.d.sync += position.eq(position + 1)
        with m.Switch(position):
            for number in sorted({word_of(f) for f in ROW.fields}):
                with m.Case(number):
                    m.d.sync += [
                        record[f.name].eq(field_of_word(word.data, f)) for f in ROW.fields if word_of(f) == number]
            with m.Case(ROW.size // WORD_BYTES - 1):
                # The row's tokens have followed its first word long since.
                m.d.sync += [self.load_valid.eq(1), load.record.eq(1), self._in_query.eq(1)]
        with m.If(self._in_query):
            m.d.sync += [
                self._index.eq(self._index + 1),
                self._part.eq(self._part + 1),
                self._earlier.eq(Cat(self._earlier, word.data) >> 64),
                load.data.eq(word.data if beat_words == 1 else Cat(self._earlier, word.data)),
                load.beat.eq(self._beat),
            ]
            with m.If(self._part == beat_words - 1):
                m.d.sync += [
                    self.load_valid.eq(1), load.query.eq(1), self._part.eq(0), self._beat.eq(self._beat + 1)]
            with m.If(self._index == self._config.head_dim // WORD_ELEMENTS - 1):
                m.d.sync += [self._index.eq(0), self._beat.eq(0), self._in_query.eq(0)]

    def _load_entry(self, m: Module) -> None:
        """An entry of the table."""
        with m.If(self._entries_left.any()):
            m.d.sync += [
                self.load_valid.eq(1),
                self.load.stripe.eq(~self._in_sketch),
                self.load.sketch.eq(self._in_sketch),
                self.load.last.eq(self._entries_left == 1),
                self.load.data.eq(self.words.payload.data),
                self.load.start.eq(self._token),
                self._in_sketch.eq(~self._in_sketch & self.sparse),
            ]
            with m.If(self._in_sketch | ~self.sparse):
                m.d.sync += [
                    self._token.eq(self._token + self.stripe_tokens),
                    self._entries_left.eq(self._entries_left - 1),
                    self._next_number.eq(self._next_number + 1),
                ]

    def _load_rank(self, m: Module, ranker: Ranker) -> None:
        """The chosen features and the rows' scales."""
        m.d.comb += ranker.go.eq(1)
        with m.If(ranker.chosen_valid):
            m.d.sync += [
                self.load_valid.eq(1),
                self.load.chosen.eq(1),
                self.load.data.eq(Cat(ranker.chosen, ranker.chosen_index)),
            ]
        with m.If(ranker.scale_valid):
            m.d.sync += [
                self.load_valid.eq(1),
                self.load.scale.eq(1),
                self.load.row.eq(ranker.scale_row),
                self.load.data.eq(ranker.approximate),
            ]

    def _clamp(self, m: Module) -> tuple[Signal, Signal, dict[str, Signal]]:
        """The tokens of a row: (start, end, what the row's record holds)."""
        record = {f.name: Signal(f.size * 8, name=f"row_{f.name}") for f in ROW.fields}
        # Numbers of tokens are clamped to what the lanes take; end_token is below 2**24, so nothing is at the top one.
        top = (1 << TOKEN_BITS) - 1
        end_token = self._fields["end_token"]
        row_start, row_end = Signal(TOKEN_BITS), Signal(TOKEN_BITS)
        m.d.sync += [
            row_start.eq(Mux(record["start_token"][TOKEN_BITS:].any(), top, record["start_token"])),
            row_end.eq(Mux(record["end_token"] < end_token, record["end_token"], end_token)),
        ]
        return row_start, row_end, record

    def _check(self, m: Module) -> tuple[list[tuple[Value, Status, Value]], Ranker | None]:
        """The checks of what comes: ((found, its status, where) in order, the ranker of sparse jobs)."""
        config, word, load = self._config, self.words.payload, self.load
        form = config.element.encoding
        m.submodules.check = check = NanCheck(
            bits=ELEMENT_BYTES * 8, fraction_bits=form.fraction_bits, exponent_bits=form.exponent_bits,
            elements=config.head_dim, rows=config.rows)
        m.submodules.table_check = table_check = TableCheck(config)
        m.d.comb += [
            check.word.eq(word.data),
            check.row.eq(self._row),
            check.index.eq(self._index),
            check.valid.eq(self._taken & self._in_query),
            check.clear.eq(self.clear),
            # An entry stands in `load` while it is checked.  A stripe may have a second one.
            table_check.valid.eq(self.load_valid & load.stripe),
            table_check.entry.eq(load.data),
            table_check.limit.eq(self.lane_limit),
            table_check.sparse.eq(self.sparse),
            table_check.clear.eq(self.clear),
            self.entry_number.eq(table_check.number),
        ]
        m.d.sync += table_check.number.eq(self._next_number)
        faults = [
            (self.broken, Status.BUS_ERROR, Const(0)),
            (table_check.found, Status.INVALID_TABLE, table_check.where),
            (self.not_owned, Status.NOT_OWNED, self.not_owned_where),
            (check.found, Status.NAN_QUERY,
             Cat(check.feature, Const(0, 16 - len(check.feature)), check.row_found)),
        ]
        if not config.sparse:
            return faults, None
        sketch_check, mean_check, ranker = self._check_first_pass(m, check, table_check)
        faults.insert(3, (sketch_check.found, Status.NO_SKETCH, sketch_check.where))
        faults.append((mean_check.found, Status.NAN_MEAN, mean_check.feature))
        return faults, ranker

    def _check_first_pass(self, m: Module, check: NanCheck,
                          table_check: TableCheck) -> tuple[SketchCheck, NanCheck, Ranker]:
        """What sparse jobs need beside."""
        config, word, load = self._config, self.words.payload, self.load
        m.submodules.sketch_check = sketch_check = SketchCheck(config)
        m.submodules.mean_check = mean_check = NanCheck(
            bits=FP32_BITS, fraction_bits=FP32_FRACTION, exponent_bits=FP32_EXPONENT, elements=config.head_dim, rows=1)
        m.submodules.ranker = ranker = Ranker(config)
        codes = Signal()
        m.d.sync += codes.eq(self._fields["mode"] == Mode.CODES)
        m.d.comb += [
            sketch_check.ranked.eq(self.ranked & ~codes),
            sketch_check.stripe.eq(self.load_valid & load.stripe),
            sketch_check.sketch.eq(self.load_valid & load.sketch),
            sketch_check.entry.eq(load.data),
            sketch_check.number.eq(table_check.number),
            sketch_check.clear.eq(self.clear),
            table_check.reject.eq(sketch_check.bad),
            mean_check.valid.eq(self._in_mean),
            mean_check.word.eq(word.data),
            mean_check.index.eq(self._mean_index),
            mean_check.clear.eq(self.clear),
            ranker.clear.eq(self.clear),
            ranker.valid.eq(check.valid & self.ranked),
            ranker.word.eq(word.data),
            ranker.rows.eq(self._rows),
            # Codes have all features: a row's scale is then the command's.
            ranker.features.eq(Mux(codes, config.head_dim, self._fields["features"])),
            ranker.scale.eq(self.scale),
            ranker.k_offset.eq(self.k_offset),
        ]
        m.d.sync += [
            self.mean.slot.eq(self.slot),
            self.mean.index.eq(self._mean_index),
            self.mean.data.eq(word.data),
        ]
        return sketch_check, mean_check, ranker
