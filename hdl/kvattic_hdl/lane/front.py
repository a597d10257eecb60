"""The front of a lane: from a channel's beats to accumulated V, to the sums of K tokens, and to what is wrong."""

from typing import Any

from amaranth.hdl import Array, Cat, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from kvattic.spec.config import Config
from kvattic.spec.formats import SCORE_SUM_BITS
from kvattic_hdl.datapath.cell import ADDEND_STAGE, READ_STAGE, SHIFT_STAGE, SUM_STAGE, Cell
from kvattic_hdl.datapath.codes import FIELDS_STAGE, CodeTables
from kvattic_hdl.lane.arrivals import CodewordBuffer, header_shape
from kvattic_hdl.lane.copier import copy_link
from kvattic_hdl.lane.first_pass import harvest_shape
from kvattic_hdl.lane.issue import Issue, stage_shape
from kvattic_hdl.lane.octets import OctetQueue
from kvattic_hdl.lane.operands import Operands
from kvattic_hdl.lane.sums import AccumulatorPorts, RowSum
from kvattic_hdl.lib.shapes import Shapes
from kvattic_hdl.verilog.shared import shared


def front_link(config: Config) -> wiring.Signature:
    """Between a front and the token back end, as the front sees it.

    Members
    -------
    headers : In(stream of header), beats : In(stream of beat_bytes * 8 bits)
        Codewords that were let through, see `arrivals.header_shape`.
    beat_taken : Out(1)
        Strobe: a beat was taken out of its buffer, and issued; not of levels, whose codewords' places are others'.
    beat_issued : Out(1)
        Strobe: a beat was issued.
    codes_taken : Out(1)
        Strobe: a beat of an octet's fields was taken out of its queue.  Only if `config.codes`.
    heading : In(1)
        If there is one of `beats`, it is its codeword's first.  Only if `config.codes`.
    weights : In(stream of weight)
        Of the V codewords' tokens, row by row.
    harvest : In(stream of `first_pass.harvest_shape`)
        Tokens of the feature pass whose sums are to be scored.
    job_slot : Out(slot), k_offset : In
        The `Shapes.start` field of that slot's job, in the same cycle.
    waits_weight, waits_score, waits_copy, starves : Out(1)
        Why no beat is issued (see `Issue`).
    checked : Out(`stage_shape`), special : Out(elements_per_beat), stage 2
        A beat, and its elements that are NaN or infinity.
    value_clipped, feature_clipped : Out(1), clipped_slot : Out(slot), stage 10
        Strobes: a product of a beat of V, or of the feature pass, was clipped.
    value_stored, feature_stored : Out(1), stored_slot : Out(slot), stored_group : Out, stage 10
        Strobes: the last beat of a codeword of V, or of the feature pass (of this group), is accumulated.
    scored : Out(`stage_shape`), sums : Out(by row), clipped : Out(by row)
        A token of K, of a sketch or of a harvest, if `last` or `harvest`: its sums; a product of them was clipped.
    ready : Out(1)
        The accumulators are cleared.
    """
    shapes = Shapes(config)
    stage = stage_shape(config)
    return wiring.Signature({
        "headers": In(stream.Signature(header_shape(config), always_ready=True)),
        "beats": In(stream.Signature(config.beat_bytes * 8, always_ready=True)),
        "beat_taken": Out(1),
        "beat_issued": Out(1),
        "weights": In(stream.Signature(shapes.weight)),
        "harvest": In(stream.Signature(harvest_shape(config))),
        "job_slot": Out(shapes.slot),
        "k_offset": In(shapes.start["k_offset"].shape),
        "waits_weight": Out(1),
        "waits_score": Out(1),
        "waits_copy": Out(1),
        "starves": Out(1),
        "checked": Out(stage),
        "special": Out(config.elements_per_beat),
        "value_clipped": Out(1),
        "feature_clipped": Out(1),
        "clipped_slot": Out(shapes.slot),
        "value_stored": Out(1),
        "feature_stored": Out(1),
        "stored_slot": Out(shapes.slot),
        "stored_group": Out((config.groups_in_flight - 1).bit_length()),
        "scored": Out(stage),
        "sums": Out(data.ArrayLayout(signed(SCORE_SUM_BITS), config.rows)),
        "clipped": Out(config.rows),
        "ready": Out(1),
    } | ({"codes_taken": Out(1), "heading": In(1)} if config.codes else {}))


class Front(wiring.Component):
    """Multiplies each beat: V with its tokens' weights, into accumulators; K and sketches with q, into scores' sums.

    A beat enters in each cycle; the pipeline never stalls.  Stage numbers count from a beat's issue.  Reset empties the
    pipeline and clears the accumulators.

    Parameters
    ----------
    config : Config

    Members
    -------
    back_end : Out(`front_link`)
    load_valid, load : In
        q and row scales.
    chain_i : In(stream of partial), chain_o : Out(stream of partial)
        Adds the accumulators to each word that passes, and clears them.
    copy : Out(`copy_link`)
        The codewords of READs; they pass like others, but with weights of zero.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        shapes = Shapes(config)
        self.buffer = CodewordBuffer(config)
        self.issue = Issue(config)
        self.operands = Operands(config)
        self.accumulator_ports = AccumulatorPorts(config)
        self.row_sums = [RowSum(config) for _ in range(config.rows)]
        if config.codes:
            self.octets = OctetQueue(config)
            self.tables = [CodeTables(config) for _ in range(config.rows)]
        super().__init__({
            "back_end": Out(front_link(config)),
            "load_valid": In(1),
            "load": In(shapes.load),
            "chain_i": In(stream.Signature(shapes.partial)),
            "chain_o": Out(stream.Signature(shapes.partial)),
            "copy": Out(copy_link(config)),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self.config
        tree_stage = ADDEND_STAGE + self.row_sums[0].levels
        stages = [Signal(stage_shape(config), name=f"stage_{i}") for i in range(max(tree_stage + 1, SUM_STAGE) + 1)]
        m.d.sync += [b.eq(a) for a, b in zip(stages, stages[1:], strict=False)]
        cells = []
        for r in range(config.rows):
            cells.append([])
            for e in range(config.elements_per_beat):
                cell, m.submodules[f"cell_{r}_{e}"] = shared(platform, "kvattic_cell", lambda: Cell(config))
                cells[r].append(cell)
        self._issue(m, stages[0])
        self._copy(m)
        self._multiply(m, stages, cells)
        self._accumulate(m, stages, cells)
        self._sum(m, stages[ADDEND_STAGE], stages[tree_stage], stages[tree_stage + 1], cells)
        if config.codes:
            self._look_codes_up(m, stages, cells)
        self._report(m, stages, cells)
        return m

    def _issue(self, m: Module, stage_0: Any) -> None:
        """Take beats out of their buffer; stage 0."""
        m.submodules.buffer = buffer = self.buffer
        m.submodules.issue_stage = issue = self.issue
        back_end = self.back_end
        connect(m, flipped(back_end.headers), buffer.headers_i)
        if self.config.codes:
            m.submodules.octets = octets = self.octets
            connect(m, flipped(back_end.beats), octets.beats_i)
            connect(m, octets.beats_o, buffer.beats_i)
            m.d.comb += [octets.begins.eq(back_end.heading), octets.octet.eq(back_end.headers.payload.codes)]
        else:
            connect(m, flipped(back_end.beats), buffer.beats_i)
        connect(m, buffer.headers_o, issue.headers)
        connect(m, flipped(back_end.weights), issue.weights)
        connect(m, flipped(back_end.harvest), issue.harvest)
        m.d.comb += [
            issue.beat_valid.eq(buffer.beats_o.valid),
            buffer.beats_o.ready.eq(issue.beat_ready),
            back_end.beat_taken.eq(issue.beat_ready & ~buffer.headers_o.payload.codes if self.config.codes
                                   else issue.beat_ready),
            back_end.beat_issued.eq(issue.beat_ready | issue.fields_issued if self.config.codes
                                    else issue.beat_ready),
            stage_0.eq(issue.stage),
            back_end.waits_weight.eq(issue.waits_weight),
            back_end.waits_score.eq(issue.waits_score),
            back_end.waits_copy.eq(issue.waits_copy),
            back_end.starves.eq(issue.starves),
        ]

    def _copy(self, m: Module) -> None:
        """Show the copier the codeword that is next, and its beats as they are issued."""
        buffer, issue, header = self.buffer, self.issue, self.buffer.headers_o.payload
        m.d.comb += [
            self.copy.wants.eq(buffer.headers_o.valid & header.read),
            self.copy.slot.eq(header.slot),
            self.copy.token.eq(header.token),
            self.copy.value.eq(~header.into_score),
            issue.copy_ready.eq(self.copy.ready),
            self.copy.data.eq(buffer.beats_o.payload),
            self.copy.valid.eq(issue.copy_valid),
            self.copy.last.eq(issue.copy_last),
        ]

    def _multiply(self, m: Module, stages: list[Any], cells: list[list[Cell]]) -> None:
        """Give the cells their operands; stages 0 to 4."""
        m.submodules.operands = operands = self.operands
        at_1 = stages[1]
        m.d.comb += [
            operands.load_valid.eq(self.load_valid),
            operands.load.eq(self.load),
            operands.beat.eq(self.buffer.beats_o.payload),
            operands.query_beat.eq(self.issue.query_beat),
            operands.query_slot.eq(self.buffer.headers_o.payload.slot),
            operands.slot.eq(at_1.where.slot),
            operands.into_score.eq(at_1.into_score),
            operands.weights.eq(self.issue.current_weights),
            self.back_end.job_slot.eq(at_1.where.slot),
            operands.k_offset.eq(self.back_end.k_offset),
            self.back_end.special.eq(operands.special),
        ]
        if self.config.sparse:
            m.d.comb += [operands.feature.eq(at_1.feature), operands.element.eq(at_1.element)]
        if self.config.codes:
            m.d.comb += [operands.upper.eq(at_1.upper), operands.lower.eq(at_1.lower)]
        for r, row in enumerate(cells):
            for e, cell in enumerate(row):
                m.d.comb += [
                    cell.a_significand.eq(operands.significand_a[r][e]),
                    cell.b_significand.eq(operands.significand_b[e]),
                    cell.sign.eq(operands.sign[r][e]),
                    cell.shift.eq(operands.shift[r][e]),
                    cell.into_score.eq(stages[SHIFT_STAGE].into_score),
                ]

    def _accumulate(self, m: Module, stages: list[Any], cells: list[list[Cell]]) -> None:
        """Add V, and codewords of the feature pass, to the cells' accumulators, and drain these; stages 7 to 10."""
        m.submodules.accumulator_ports = ports = self.accumulator_ports
        drained, partial = self.chain_i.payload, self.chain_o.payload
        m.d.comb += [
            ports.reading.eq(stages[READ_STAGE]),
            ports.writing.eq(stages[SUM_STAGE]),
            ports.chain_i.valid.eq(self.chain_i.valid),
            ports.chain_i.payload.slot.eq(drained.slot),
            ports.chain_i.payload.address.eq(drained.address),
            self.chain_i.ready.eq(ports.chain_i.ready),
            self.chain_o.valid.eq(ports.chain_o.valid),
            partial.slot.eq(ports.chain_o.payload.slot),
            partial.address.eq(ports.chain_o.payload.address),
            ports.chain_o.ready.eq(self.chain_o.ready),
            self.back_end.ready.eq(ports.ready),
        ]
        for r, row in enumerate(cells):
            for e, cell in enumerate(row):
                m.d.comb += [
                    cell.read_address.eq(ports.read_address),
                    cell.drain.eq(ports.drain),
                    cell.accumulate.eq(stages[ADDEND_STAGE].accumulate),
                    cell.chain_i.eq(drained.data[r][e]),
                    partial.data[r][e].eq(cell.chain_o),
                    cell.write.eq(ports.write),
                    cell.write_address.eq(ports.write_address),
                ]

    def _sum(self, m: Module, addends: Any, tree: Any, scored: Any,
             cells: list[list[Cell]]) -> None:
        """Sum the products of each row, from the stage of the addends on."""
        m.d.comb += self.back_end.scored.eq(scored)
        for r, (row, row_sum) in enumerate(zip(cells, self.row_sums, strict=True)):
            m.submodules[f"row_sum_{r}"] = row_sum
            m.d.comb += [
                row_sum.overflow.eq(Cat(cell.overflow for cell in row).any()),
                row_sum.valid.eq(tree.valid),
                row_sum.first.eq(tree.first),
                self.back_end.sums[r].eq(row_sum.sum),
                self.back_end.clipped[r].eq(row_sum.clipped),
            ]
            for e, cell in enumerate(row):
                m.d.comb += [row_sum.addend[e].eq(cell.addend), row_sum.negative[e].eq(cell.negative)]
            if self.config.sparse:
                m.d.comb += [
                    row_sum.word.eq(Array(cell.word for cell in row)[addends.element]),
                    row_sum.harvest.eq(scored.harvest),
                ]

    def _look_codes_up(self, m: Module, stages: list[Any], cells: list[list[Cell]]) -> None:
        """Build octets' tables from levels, and add what the tables say of fields; stages 5 to 9."""
        octets, issue = self.octets, self.issue
        levels, fields = stages[ADDEND_STAGE], stages[FIELDS_STAGE]
        m.d.comb += [
            octets.take.eq(stages[FIELDS_STAGE - 1].codes),
            self.back_end.codes_taken.eq(octets.take),
            issue.built.eq(self.tables[0].soon),   # all rows' at the same time
        ]
        for r, (row, tables) in enumerate(zip(cells, self.tables, strict=True)):
            m.submodules[f"tables_{r}"] = tables
            m.d.comb += [
                tables.levels.eq(levels.levels),
                tables.overflow.eq(Cat(cell.overflow for cell in row).any()),
                tables.fields.eq(octets.fields),
                tables.bank.eq(fields.bank),
                tables.valid.eq(stages[ADDEND_STAGE - 1].codes),
            ]
            for e, cell in enumerate(row):
                m.d.comb += [
                    tables.addend[e].eq(cell.addend),
                    tables.negative[e].eq(cell.negative),
                    cell.codes.eq(stages[ADDEND_STAGE - 1].codes),
                    cell.codes_sum.eq(tables.sums[e]),
                ]

    def _report(self, m: Module, stages: list[Any], cells: list[list[Cell]]) -> None:
        """Tell what is checked, clipped, and accumulated."""
        added, stored = stages[ADDEND_STAGE], stages[SUM_STAGE]
        any_clip = Cat(cell.overflow for row in cells for cell in row).any()
        if self.config.codes:
            octet_clip = Cat(tables.clipped.bit_select(added.bank, 1) for tables in self.tables).any()
            any_clip = Mux(added.codes, octet_clip, any_clip)
        m.d.comb += [
            self.back_end.checked.eq(stages[2]),
            self.back_end.value_stored.eq(stored.accumulate & ~stored.into_score & stored.last & stored.where.last),
            self.back_end.stored_slot.eq(stored.where.slot),
        ]
        m.d.sync += [
            self.back_end.value_clipped.eq(added.accumulate & ~added.into_score & any_clip),
            self.back_end.feature_clipped.eq(added.accumulate & added.into_score & any_clip),
            self.back_end.clipped_slot.eq(added.where.slot),
        ]
        if self.config.sparse:
            m.d.comb += [
                self.back_end.feature_stored.eq(stored.accumulate & stored.feature & stored.where.last),
                self.back_end.stored_group.eq(stored.where.group),
            ]
