"""The issue stage of a lane's front: which beat, or which token of a harvest, enters the pipeline in this cycle."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import ceil_log2

from kvattic.spec.codes import level_beats
from kvattic.spec.config import Config
from kvattic_hdl.datapath.cell import accumulator_words, group_base
from kvattic_hdl.datapath.codes import BANKS, BUILD_CYCLES
from kvattic_hdl.datapath.score import score_interval, scored_token
from kvattic_hdl.lane.arrivals import header_shape
from kvattic_hdl.lane.first_pass import harvest_shape
from kvattic_hdl.lane.octets import OctetTurns, halves_taken, level_query_beat
from kvattic_hdl.lib.arithmetic import times
from kvattic_hdl.lib.shapes import ACCUMULATE_CYCLES, Shapes


def stage_shape(config: Config) -> data.StructLayout:
    """The metadata that accompany a beat, or a token of a harvest, through the pipeline's stages.

    valid: a beat.  into_score: its products go into the score window.  error: it cannot be read.  first, last: of its
    token.  accumulate: its products are added to word `address` of the accumulators.  where: the beat's token.  Sparse
    configurations only: feature: a beat of the feature pass.  harvest: a token of a harvest, whose sums are element
    `element` of word `address`.  clear: it is the word's last one.  element: otherwise that of q, for `feature`.
    `Config.codes` only: levels: a beat of an octet's levels.  upper, lower: it takes the upper (lower) half of a beat
    of q twice.  codes: a beat of an octet's fields, whose tables are in `bank`.  sink: of a harvest, a token that has
    its score.
    """
    members = {
        "valid": 1, "into_score": 1, "error": 1, "first": 1, "last": 1, "accumulate": 1,
        "address": ceil_log2(accumulator_words(config)), "where": scored_token(Shapes(config))}
    if config.sparse:
        members |= {"feature": 1, "harvest": 1, "clear": 1, "element": ceil_log2(config.elements_per_beat)}
    if config.codes:
        members |= {"levels": 1, "upper": 1, "lower": 1, "codes": 1, "bank": range(BANKS), "sink": 1}
    return data.StructLayout(members)


class GatheredWeights(wiring.Component):
    """Gathers the weights of the next V token, one row a cycle, while the current ones are in use.  Reset drops them.

    The first of the next token's is taken in the cycle after `use`.

    Parameters
    ----------
    config : Config

    Members
    -------
    weights : In(stream of weight)
        Token by token, row by row.
    full : Out(1)
        All rows of the next token are there.
    use : In(1)
        Strobe, only while `full`: the next token's first beat is issued.
    current : Out(array of weight, by row)
        The weights of the token in use, from the cycle after `use`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        self.token = data.ArrayLayout(shapes.weight, config.rows)
        super().__init__({
            "weights": In(stream.Signature(shapes.weight)),
            "full": Out(1),
            "use": In(1),
            "current": Out(self.token),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        rows = self.config.rows
        gathered = Signal(self.token)
        gathered_rows = Signal(range(rows))
        gather = Signal()
        m.d.comb += [
            # Not as soon as they are used: no path goes from the issue of a beat into the weight unit.
            self.weights.ready.eq(~self.full),
            gather.eq(self.weights.valid & self.weights.ready),
        ]
        with m.If(self.use):
            m.d.sync += [self.current.eq(gathered), self.full.eq(0)]
        with m.Elif(gather):
            last = gathered_rows == rows - 1
            m.d.sync += [self.full.eq(last), gathered_rows.eq(Mux(last, 0, gathered_rows + 1))]
        with m.If(gather):
            m.d.sync += gathered.as_value().eq(
                Cat(gathered.as_value(), self.weights.payload.as_value())[self.shapes.weight.size :])
        return m


class Spacing(wiring.Component):
    """Keeps tokens for the score unit apart, and beats that are added to the same word of a group.

    The score unit takes a token every rows * score_interval cycles; a token of K that waited for one of a harvest goes
    before the next one.

    Parameters
    ----------
    config : Config

    Members
    -------
    there : In(1)
        A beat is there.
    scores : In(1)
        The next one completes a token that is to be scored.
    group_begin : In(1)
        It is the first of a codeword of the feature pass.
    group_beat : In(1), word : In
        It is of a codeword of the feature pass, and added to this word of the group.
    issue : In(1)
        It is issued.
    waits : Out(1)
        It may not be, if it is there.
    harvest_valid : In(1), harvest_ready : Out(1)
        A token of a harvest is there; it is taken.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        super().__init__({
            "there": In(1),
            "scores": In(1),
            "group_begin": In(1),
            "group_beat": In(1),
            "word": In((config.group_words - 1).bit_length()),
            "issue": In(1),
            "waits": Out(1),
            "harvest_valid": In(1),
            "harvest_ready": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self.config
        harvest = Signal()
        spacing = config.rows * score_interval(config)
        m.d.comb += harvest.eq(self.harvest_valid & self.harvest_ready)
        if spacing > config.beats_per_token or config.sparse:
            rest = Signal(range(spacing))
            m.d.comb += self.waits.eq(self.scores & (rest != 0))
            with m.If(self.issue & self.scores | harvest):
                m.d.sync += rest.eq(spacing - 1)
            with m.Elif(rest != 0):
                m.d.sync += rest.eq(rest - 1)
            if config.sparse:
                beat_turn = Signal()
                waits = self.there & self.scores
                m.d.comb += self.harvest_ready.eq((rest == 0) & ~beat_turn)
                with m.If(harvest):
                    m.d.sync += beat_turn.eq(waits)
                with m.Elif(self.issue | ~waits):
                    m.d.sync += beat_turn.eq(0)
        if config.sparse and config.group_words < ACCUMULATE_CYCLES:
            # No beat of the next codeword may follow so soon on the one that is added to the same word.  It comes at
            # least `word` cycles behind its codeword's first, so that it is enough to keep that one back.
            apart = Signal(range(ACCUMULATE_CYCLES))
            with m.If(self.group_begin & (apart != 0)):
                m.d.comb += self.waits.eq(1)
            with m.If(self.issue & self.group_beat):
                m.d.sync += apart.eq(ACCUMULATE_CYCLES - 1 - self.word)
            with m.Elif(apart != 0):
                m.d.sync += apart.eq(apart - 1)
        return m


class Issue(wiring.Component):
    """Takes a beat each cycle, as soon as its token's weights are there and the score unit can take what it completes.

    Tokens of a harvest take the place of beats, and so do fields of octets whose tables are built.  Reset begins with a
    codeword's first beat.

    Parameters
    ----------
    config : Config

    Members
    -------
    headers : In(stream of header)
        One for each codeword, see `arrivals.header_shape`; taken with the codeword's last beat.
    beat_valid : In(1), beat_ready : Out(1)
        The codewords' beats.
    weights : In(stream of weight)
        Those of the V codewords' tokens.
    harvest : In(stream of `first_pass.harvest_shape`)
    copy_ready : In(1)
        A beat of a READ is copied if it is issued in the next cycle.
    copy_valid, copy_last : Out(1)
        One was issued in the cycle before; it was its codeword's last one.
    stage : Out(`stage_shape`)
        What enters the pipeline in this cycle: stage 0.
    query_beat : Out
        Number of the beat of q that goes with it.
    current_weights : Out(array of weight, by row)
        Those of a V beat in stage 1.
    waits_weight, waits_score, waits_copy, starves : Out(1)
        Why no beat is issued: its weights are not there; the score unit is not free, or takes a token of a harvest, or
        tables are being built; it cannot be copied yet; there is none.
    fields_issued : Out(1)
        Fields of an octet are.  Only if `config.codes`.
    built : In(1)
        As `OctetTurns`'.  Only if `config.codes`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shapes = shapes = Shapes(config)
        self.gathered_weights = GatheredWeights(config)
        self.spacing = Spacing(config)
        self.beat_index = Signal(shapes.beat_index)
        self.token_index = Signal(shapes.lane_token["index"].shape)
        self.word_index = Signal((config.group_words - 1).bit_length())
        super().__init__({
            "headers": In(stream.Signature(header_shape(config))),
            "beat_valid": In(1),
            "beat_ready": Out(1),
            "weights": In(stream.Signature(shapes.weight)),
            "harvest": In(stream.Signature(harvest_shape(config))),
            "copy_ready": In(1),
            "copy_valid": Out(1),
            "copy_last": Out(1),
            "stage": Out(stage_shape(config)),
            "query_beat": Out(shapes.beat_index),
            "current_weights": Out(self.gathered_weights.token),
            "waits_weight": Out(1),
            "waits_score": Out(1),
            "waits_copy": Out(1),
            "starves": Out(1),
        } | ({"built": In(1), "fields_issued": Out(1)} if config.codes else {}))
        if config.codes:
            self.turns = OctetTurns(config, BUILD_CYCLES)
            self.level_index = Signal(range(max(2, level_beats(config))))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self.config
        m.submodules.gathered_weights = gathered = self.gathered_weights
        m.submodules.spacing = spacing = self.spacing
        connect(m, flipped(self.weights), gathered.weights)
        header = self.headers.payload
        there, harvest, fields = Signal(), Signal(), Signal()
        levels_wait = Signal()
        first, last = Signal(init=1), Signal()   # beat of its token
        waits_weight, may_issue, copied = Signal(), Signal(), Signal()
        issue = self.beat_ready
        feature = header.feature if config.sparse else Const(0)
        m.d.comb += [
            there.eq(self.headers.valid & self.beat_valid),
            waits_weight.eq(~header.into_score & first & ~gathered.full),
            gathered.use.eq(issue & ~header.into_score & first),
            self.current_weights.eq(gathered.current),
            spacing.there.eq(there),
            spacing.scores.eq(header.into_score & last),
            spacing.group_begin.eq(feature & (self.word_index == 0)),
            spacing.group_beat.eq(feature),
            spacing.word.eq(self.word_index),
            spacing.issue.eq(issue),
            spacing.harvest_valid.eq(self.harvest.valid),
            self.harvest.ready.eq(spacing.harvest_ready),
            harvest.eq(self.harvest.valid & self.harvest.ready),
            may_issue.eq(there & ~waits_weight & ~spacing.waits & ~levels_wait & ~harvest & ~fields),
            issue.eq(may_issue & (~header.read | copied)),
            self.waits_copy.eq(may_issue & header.read & ~copied),
            self.waits_weight.eq(there & waits_weight & ~harvest & ~fields),
            self.waits_score.eq((there & (spacing.waits | levels_wait) & ~fields) | harvest),
            self.starves.eq(~there & ~harvest & ~fields),
        ]
        last_copied = self.headers.ready & header.read
        m.d.sync += [
            self.copy_valid.eq(issue & header.read),
            self.copy_last.eq(last_copied),
            # Behind a codeword's last beat the copier takes none until it has seen that one.
            copied.eq(self.copy_ready & ~last_copied & ~self.copy_last),
        ]
        self._count(m, first, last, feature)
        self._describe_beat(m, first, last)
        if config.sparse:
            self._describe_first_pass(m)
        if config.codes:
            m.d.comb += fields.eq(self.turns.valid & ~harvest)
            self._take_octets(m, fields, levels_wait)
        if config.sparse:
            with m.If(harvest):
                self._describe_harvest(m)
        return m

    def _count(self, m: Module, first: Signal, last: Signal, feature: Value) -> None:
        """Count the beats and tokens of a codeword, or the words of one of the feature pass.

        What is first or last is known beside the counts, as the issue of a beat hangs on it.
        """
        config, issue, word = self.config, self.beat_ready, self.word_index
        beat_index, token_index = self.beat_index, self.token_index
        last_token = Signal(init=config.tokens_per_codeword == 1)
        ends = last & last_token   # the codeword with this beat
        levels = self.headers.payload.codes if config.codes else Const(0)
        with m.If(issue & ~feature & ~levels):
            m.d.sync += [
                beat_index.eq(Mux(last, 0, beat_index + 1)),
                first.eq(last),
                last.eq(beat_index == config.beats_per_token - 2),
            ]
            with m.If(last):
                m.d.sync += [
                    token_index.eq(Mux(last_token, 0, token_index + 1)),
                    last_token.eq(token_index == config.tokens_per_codeword - 2 if config.tokens_per_codeword > 1
                                  else 1),
                ]
        if config.sparse:
            last_word = Signal()
            ends = Mux(feature, last_word, ends)
            with m.If(issue & feature):
                m.d.sync += [word.eq(word + 1), last_word.eq(word == config.group_words - 2)]
        if config.codes:
            last_level = self.level_index == level_beats(config) - 1
            ends = Mux(levels, last_level, ends)
            with m.If(issue & levels):
                m.d.sync += self.level_index.eq(Mux(last_level, 0, self.level_index + 1))
        m.d.comb += self.headers.ready.eq(issue & ends)

    def _describe_beat(self, m: Module, first: Signal, last: Signal) -> None:
        config, shapes, stage, header = self.config, self.shapes, self.stage, self.headers.payload
        issue = self.beat_ready
        copy = Signal(range(max(2, shapes.copies)))
        drain_address = Cat(self.beat_index[: ceil_log2(config.beats_per_token)], copy)[: shapes.drain_address.width]
        m.d.comb += [
            self.query_beat.eq(self.beat_index),
            stage.valid.eq(issue),
            stage.into_score.eq(header.into_score),
            stage.error.eq(header.error),
            stage.first.eq(first),
            stage.last.eq(last),
            stage.accumulate.eq(issue & (~header.into_score | (header.feature if config.sparse else 0))),
            stage.address.eq(Cat(drain_address, header.slot)),
            stage.where.slot.eq(header.slot),
            stage.where.ring.eq(header.ring),
            stage.where.index.eq(self.token_index),
            stage.where.token.eq(header.token + self.token_index),
            stage.where.last.eq(self.token_index == config.tokens_per_codeword - 1),
        ]
        if shapes.copies > 1:
            with m.If(issue & last):
                m.d.sync += copy.eq(Mux(copy == shapes.copies - 1, 0, copy + 1))

    def _describe_first_pass(self, m: Module) -> None:
        """What differs where a beat is of the first pass: of a centroid, or of the feature pass."""
        config, stage, header, word = self.config, self.stage, self.headers.payload, self.word_index
        element_bits = ceil_log2(config.elements_per_beat)
        m.d.comb += [
            stage.feature.eq(header.feature),
            stage.harvest.eq(0),
            stage.element.eq(header.number),
            stage.where.selected.eq(header.marks.bit_select(self.token_index, 1)),
            stage.where.sketch.eq(header.first),
            stage.where.centroid.eq(header.centroid),
            stage.where.group.eq(header.group),
        ]
        with m.If(header.centroid):
            # Units whose scores are kept where the unit begins.
            m.d.comb += [
                stage.where.ring.eq(header.ring + (self.token_index << header.unit_bits)),
                stage.where.index.eq(0),
                stage.where.token.eq(
                    header.token + (times(self.token_index, config.tokens_per_codeword) << header.unit_bits)),
            ]
        with m.If(header.feature):
            m.d.comb += [
                self.query_beat.eq(header.number[element_bits:]),
                stage.address.eq(group_base(config) + Cat(word, header.group)),
                stage.where.token.eq(header.token + Cat(Const(0, element_bits), word)),
                stage.where.last.eq(word == config.group_words - 1),
            ]

    def _take_octets(self, m: Module, fields: Signal, levels_wait: Signal) -> None:
        """Issue the levels of octets as their tables' turn comes, and the fields of those whose tables are built."""
        config, stage, header, turns = self.config, self.stage, self.headers.payload, self.turns
        m.submodules.octet_turns = turns
        octet = header.number[: ceil_log2(config.octets)]
        m.d.comb += [
            turns.levels_last.eq(self.headers.ready & header.codes),
            turns.slot.eq(header.slot),
            turns.group.eq(header.group),
            turns.built.eq(self.built),
            turns.issue.eq(fields),
            levels_wait.eq(header.codes & (self.level_index == 0) & ~turns.room),
            self.fields_issued.eq(fields),
            stage.levels.eq(self.beat_ready & header.codes),
            Cat(stage.upper, stage.lower).eq(Mux(header.codes, halves_taken(config, octet), 0)),
            stage.codes.eq(fields),
            stage.bank.eq(turns.bank),
        ]
        with m.If(header.codes):
            m.d.comb += self.query_beat.eq(level_query_beat(config, octet, self.level_index))
        with m.If(fields):
            m.d.comb += [
                stage.into_score.eq(1),
                stage.error.eq(0),
                stage.accumulate.eq(1),
                stage.feature.eq(1),
                stage.address.eq(group_base(config) + Cat(turns.word, turns.octet_group)),
                stage.where.slot.eq(turns.octet_slot),
                stage.where.group.eq(turns.octet_group),
                stage.where.last.eq(turns.word == config.group_words - 1),
            ]

    def _describe_harvest(self, m: Module) -> None:
        """A token of a harvest takes the beat's place."""
        config, stage, harvested = self.config, self.stage, self.harvest.payload
        m.d.comb += [
            stage.harvest.eq(1),
            stage.address.eq(group_base(config) + Cat(harvested.word, harvested.buffer)),
            stage.element.eq(harvested.element),
            stage.clear.eq(harvested.element.all()),
            stage.where.harvest.eq(1),
            stage.where.centroid.eq(0),
            stage.where.sketch.eq(0),
            stage.where.selected.eq(1),
        ]
        m.d.comb += [stage.where[name].eq(harvested.where[name]) for name, _ in self.shapes.lane_token]
        if config.codes:
            m.d.comb += stage.sink.eq(harvested.sink)
