"""The golden device in the sparse modes: results, what is read and what is not, and every status."""

from dataclasses import replace

import numpy as np
import pytest
from tests.host.golden.queue_host import DOMAIN, Host

from kvattic.golden import dense, sparse
from kvattic.golden.device import GoldenDevice
from kvattic.spec import codes, layout
from kvattic.spec.commands import (
    COMMAND,
    FLASH_COMMAND,
    ROW,
    SKETCH_ENTRY,
    TABLE_ENTRY,
    TRAILER,
    Completion,
    CompletionFlag,
    Kind,
    MediaCause,
    Mode,
    Opcode,
    Status,
    TableFlag,
    fp32_bits,
    fp32_block_bytes,
    query_row_bytes,
    result_row_bytes,
)
from kvattic.spec.config import TINY
from kvattic.spec.elements import from_bits, to_bits
from kvattic.spec.formats import Element, KvFormat
from kvattic.spec.registers import Control, StatusBit

QUERIES, RESULTS, TABLES, LIMIT, RINGS = range(0x3000, 0x8000, 0x1000)
MEAN_BYTES = fp32_block_bytes(32)
MODES = pytest.mark.parametrize("mode", [Mode.SPARF, Mode.FETCHED, Mode.CENTROID, Mode.CODES])
FEATURED = pytest.mark.parametrize("mode", [Mode.SPARF, Mode.FETCHED])
GROUP, GROUP_PAGES = TINY.group_tokens, TINY.group_pages
STRIPES = 4
END = STRIPES * GROUP - 6
"""Of four stripes, the last one in DRAM."""
UNIT_BITS = 1
UNIT = TINY.tokens_per_codeword << UNIT_BITS
CENTROID_CODEWORDS = GROUP // UNIT // TINY.tokens_per_codeword
SINKS = 6
"""In CODES; of two codewords, the second of which they cut."""
SCALE = fp32_bits(1.4426950408889634 / 32**0.5)
ROWS = 2


class Bench:
    """A device with four stripes of random K and V, three of them in flash with feature layout and centroids."""

    def __init__(self) -> None:
        rng = np.random.default_rng(8)
        self.query = to_bits(rng.standard_normal((ROWS, 32)) * 2, Element.FP16)
        self.key, self.value = (to_bits(rng.standard_normal((STRIPES * GROUP, 32)), Element.FP16) for _ in range(2))
        key = from_bits(self.key, Element.FP16).astype(np.float64)
        self.centroids = to_bits(key.reshape(-1, UNIT, 32).mean(axis=1), Element.FP16)
        mean = from_bits(self.value, Element.FP16).mean(axis=0)
        self.mean = np.ascontiguousarray(mean.astype(np.float32)).view(np.uint32)
        self.device = GoldenDevice(TINY, memory_bytes=1 << 16, dram_bytes=64 * TINY.page_bytes)
        self.open()
        self.entries: list[dict[str, int]] = []
        self.channel_sketches: list[dict[str, int]] = []
        self.centroid_sketches: list[dict[str, int]] = []
        self.codes_sketches: list[dict[str, int]] = []
        self.codes = codes.encode(self.key, TINY, skip=SINKS)
        self.write()
        self.device.write_memory(QUERIES, b"".join(
            ROW.pack(start_token=0, end_token=1 << 20) + q.tobytes() for q in self.query))

    def open(self, limit: int = LIMIT) -> None:
        """The device's queues."""
        self.device.write_register("CONTROL", Control.RESET)
        self.host = Host(self.device, rings=RINGS, entries=32, window=(QUERIES, limit))
        self.host.open()

    def write(self) -> None:
        """Stripes 0 and 2 to channel 0, 1 to channel 1, each to a zone of its own; 3 to device DRAM."""
        pages = [{}, {}]
        for stripe in range(STRIPES):
            tokens = slice(stripe * GROUP, (stripe + 1) * GROUP)
            key, value = (layout.pack_pages(bits[tokens], TINY) for bits in (self.key, self.value))
            features = layout.pack_feature_pages(self.key[tokens], TINY)
            if stripe == 3:
                self.device.write_dram(16 * TINY.page_bytes, np.concatenate([key, value]).tobytes())
                self.entries.append({"key_page": 16, "channel": 1, "value_page": 24, "flags": TableFlag.DRAM})
                self.channel_sketches.append({"written": 0})
                self.centroid_sketches.append({"written": 0})
                self.codes_sketches.append({"written": 0})
                continue
            to = pages[stripe % 2]
            at = stripe // 2 << TINY.zone_page_bits
            # Centroids begin with codeword 1 + stripe of a page, so that some go on into the next page.
            images = np.zeros((2, TINY.codewords_per_page, TINY.codeword_bytes), np.uint8)
            bits = self.centroids[stripe * GROUP // UNIT : (stripe + 1) * GROUP // UNIT]
            data = bits.view(np.uint8).reshape(CENTROID_CODEWORDS, TINY.codeword_bytes)
            images.reshape(-1, TINY.codeword_bytes)[1 + stripe : 1 + stripe + CENTROID_CODEWORDS] = data
            # And so do codes.
            octets = np.zeros((2, TINY.codewords_per_page, TINY.codeword_bytes), np.uint8)
            octets.reshape(-1, TINY.codeword_bytes)[stripe : stripe + TINY.octets] = codes.pack(
                self.codes, TINY)[stripe]
            to |= enumerate([*value, *features, *key, *images.reshape(2, -1), *octets.reshape(2, -1)], at)
            self.entries.append({"key_page": at + 16, "channel": stripe % 2, "value_page": at, "flags": 0})
            self.channel_sketches.append({"page": at + 8, "codeword": 0, "written": 1})
            self.centroid_sketches.append({"page": at + 24, "codeword": 1 + stripe, "written": 1})
            self.codes_sketches.append({"page": at + 26, "codeword": stripe, "written": 1})
        for channel, images in enumerate(pages):
            for page, image in images.items():
                self.device.write_dram(0, image.tobytes())
                line = FLASH_COMMAND.pack(opcode=Opcode.PROGRAM, channel=channel, page=page, domain=DOMAIN)
                assert self.run(line)[0].status is Status.OK

    def table(self, mode: Mode) -> None:
        sketches = {Mode.CENTROID: self.centroid_sketches, Mode.CODES: self.codes_sketches}.get(
            mode, self.channel_sketches)
        pairs = zip(self.entries, sketches, strict=True)
        mean = self.mean.tobytes() if mode.blended else b""
        words = [TABLE_ENTRY.pack(**entry) + (SKETCH_ENTRY.pack(**sketch) if mode else b"") for entry, sketch in pairs]
        self.device.write_memory(TABLES, mean + b"".join(words))

    def fields(self, mode: Mode, /, **changes: int) -> dict[str, int]:
        units = 40 if mode.by_token else 5
        return {
            "opcode": Opcode.ATTEND, "mode": mode, "identifier": 9, "rows": ROWS, "stripe_pages": GROUP_PAGES,
            "stripes": STRIPES, "end_token": END, "domain": DOMAIN, "tree_token": END, "scale": SCALE, "query": QUERIES,
            "result": RESULTS, "table": TABLES, "features": 6 if mode.featured else 0,
            "sinks": SINKS if mode is Mode.CODES else 0,
            "local_tokens": 0 if mode is Mode.DENSE else 7,
            "top_units": 0 if mode is Mode.DENSE else units,
            "unit_bits": UNIT_BITS if mode in (Mode.FETCHED, Mode.CENTROID) else 0} | changes

    def run(self, *commands: bytes) -> list[Completion]:
        return self.host.run(1, *commands)

    def attend(self, mode: Mode, /, **changes: int) -> Completion:
        self.table(mode)
        return self.run(COMMAND.pack(**self.fields(mode, **changes)))[0]

    def result(self) -> tuple[list[list[int]], list[int], list[int]]:
        """Outputs, maxima and denominators of the result block."""
        data = self.device.read_memory(RESULTS, ROWS * result_row_bytes(32))
        rows = [data[r * result_row_bytes(32) : (r + 1) * result_row_bytes(32)] for r in range(ROWS)]
        trailers = [TRAILER.unpack(row[128:]) for row in rows]
        signed = [t["maximum"] - (t["maximum"] >> 63 << 64) for t in trailers]
        outputs = [np.frombuffer(row[:128], "<u4").tolist() for row in rows]
        return outputs, signed, [t["denominator"] for t in trailers]

    def limits(self, end_token: int = END) -> dict[str, object]:
        return {"element": Element.FP16, "scale_bits": SCALE, "start": np.zeros(ROWS, int),
                "end": np.full(ROWS, 1 << 20), "tree": np.zeros(ROWS, int), "tree_token": END, "base_token": 0,
                "end_token": end_token}

    def golden(self, mode: Mode, **changes: int) -> sparse.SparseTrace:
        fields = self.fields(mode, **changes)
        names = ("features", "top_units", "local_tokens", "sinks", "unit_bits")
        return sparse.attend_sparse(
            self.query, self.key, self.value, mode=mode, group_tokens=GROUP, tail=np.arange(STRIPES) == 3,
            tokens_per_codeword=TINY.tokens_per_codeword, mean=None if mode is Mode.CENTROID else self.mean,
            sketch={Mode.CENTROID: self.centroids, Mode.CODES: self.codes}.get(mode),
            **{name: fields[name] for name in names}, **self.limits(fields["end_token"]))

    def lose(self, kind: Kind, stripe: int, codeword: int) -> tuple[int, int, int]:
        """Make a codeword of flash unreadable; (channel, page, codeword of the page)."""
        entry = self.entries[stripe]
        page, codeword = {
            Kind.KEY: (entry["key_page"], codeword),
            Kind.VALUE: (entry["value_page"], codeword),
            Kind.FEATURE: (self.channel_sketches[stripe].get("page", 0), codeword),
            Kind.SKETCH: (self.centroid_sketches[stripe].get("page", 0),
                          codeword + self.centroid_sketches[stripe].get("codeword", 0)),
            Kind.CODES: (self.codes_sketches[stripe].get("page", 0),
                         codeword + self.codes_sketches[stripe].get("codeword", 0)),
        }[kind]
        number = page + codeword // TINY.codewords_per_page
        place = layout.page_place(number, TINY)
        block = self.device.flash.block(entry["channel"], place)
        self.device.faults.unreadable.add((block, place.page, codeword % TINY.codewords_per_page))
        return entry["channel"], number, codeword % TINY.codewords_per_page

    def media(self) -> tuple[int, int, int] | None:
        """(channel, page, codeword) of the media registers, which are freed."""
        if not self.device.read_register("STATUS") & StatusBit.MEDIA_ERROR:
            return None
        error, cause = (self.device.read_register(name) for name in ("MEDIA_ERROR", "MEDIA_CAUSE"))
        self.device.write_register("STATUS", StatusBit.MEDIA_ERROR)
        assert cause >> 16 == MediaCause.UNCORRECTABLE
        return error >> 24, error & 0xFFFFFF, cause & 0xFFFF


@pytest.fixture
def bench() -> Bench:
    return Bench()


# Results.


@MODES
@pytest.mark.parametrize("changes", [
    {}, {"local_tokens": 0}, {"local_tokens": 40}, {"top_units": 1, "local_tokens": 0}, {"end_token": 3 * GROUP + 1},
    {"end_token": 3 * GROUP + 77}])
def test_results_are_the_golden_models(bench, mode, changes):
    found = bench.attend(mode, **changes)
    trace = bench.golden(mode, **changes)
    assert (found.status, found.identifier, found.where) == (Status.OK, 9, 0)
    assert found.flags == trace.flags == CompletionFlag(0)
    assert bench.result() == (trace.output.tolist(), trace.maximum.tolist(), trace.denominator.tolist())
    assert 0 < trace.first.selected.sum() < trace.first.valid.sum()


@MODES
def test_all_units_are_dense(bench, mode):
    reference = dense.attend(bench.query, bench.key, bench.value, **bench.limits())
    units = END if mode.by_token else -(-END // UNIT)
    assert bench.attend(mode, top_units=units).status is Status.OK
    want = (reference.output.tolist(), reference.maximum.tolist(), reference.denominator.tolist())
    assert bench.result() == want
    # The same stripes, dense: the table has no sketches.
    assert bench.attend(Mode.DENSE).status is Status.OK
    assert bench.result() == want


def test_dense_and_sparse_jobs_at_once(bench):
    """Each with a table and results of its own."""
    commands, tables = [], b""
    for number, mode in enumerate((Mode.SPARF, Mode.DENSE, Mode.CENTROID, Mode.FETCHED)):
        bench.table(mode)
        tables += bench.device.read_memory(TABLES, MEAN_BYTES + 64)
        result = RESULTS + number * ROWS * result_row_bytes(32)
        commands.append(COMMAND.pack(**bench.fields(
            mode, table=TABLES + (MEAN_BYTES + 64) * number, result=result, identifier=number)))
    bench.device.write_memory(TABLES, tables)
    assert [(c.status, c.identifier) for c in bench.run(*commands)] == [(Status.OK, n) for n in range(4)]
    size = ROWS * result_row_bytes(32)
    for number, mode in ((0, Mode.SPARF), (2, Mode.CENTROID), (3, Mode.FETCHED)):
        data = bench.device.read_memory(RESULTS + number * size, 128)
        assert np.frombuffer(data, "<u4").tolist() == bench.golden(mode).output[0].tolist()


@MODES
@pytest.mark.parametrize("end_token", [5, GROUP])
def test_a_sequence_that_is_all_tail(bench, mode, end_token):
    bench.entries = [bench.entries[3]]
    bench.channel_sketches = bench.centroid_sketches = bench.codes_sketches = [{"written": 0}]
    found = bench.attend(mode, stripes=1, end_token=end_token, top_units=1, local_tokens=1, tree_token=end_token)
    assert found.status is Status.OK
    tail = slice(3 * GROUP, 4 * GROUP)
    reference = dense.attend(bench.query, bench.key[tail], bench.value[tail], **bench.limits(end_token))
    assert bench.result() == (reference.output.tolist(), reference.maximum.tolist(), reference.denominator.tolist())
    assert not any(bench.device.traffic.flash.values())


# What is read.


@MODES
def test_traffic(bench, mode):
    names = ("CODEWORDS", "FLASH_WORDS", "PAGE_READS", "UNREADABLE", "CYCLES", "BEATS")
    before = {name: bench.device.read_register(name) for name in names}
    bench.attend(mode)
    first = bench.golden(mode).first
    stripe = first.codewords // TINY.group_codewords
    flash, dram = int((stripe < 3).sum()), int((stripe == 3).sum())
    assert dram == 31
    features = len(first.features)
    traffic = bench.device.traffic
    assert traffic.flash == {
        Kind.KEY: flash, Kind.VALUE: flash, Kind.FEATURE: 3 * features,
        Kind.CODES: 3 * TINY.octets if mode is Mode.CODES else 0,
        Kind.SKETCH: {Mode.CENTROID: 3 * CENTROID_CODEWORDS, Mode.CODES: 2}.get(mode, 0)}
    assert traffic.dram == {Kind.KEY: dram, Kind.VALUE: dram, Kind.FEATURE: 0, Kind.CODES: 0,
                            Kind.SKETCH: 0 if mode is Mode.CENTROID else dram}
    pages = 2 * len({int(c) // TINY.codewords_per_page for c in first.codewords[stripe < 3]})
    if mode is Mode.CENTROID:
        pages += 6    # codewords 1 to 4, 2 to 5 and 3 to 6: two pages each
    elif mode is Mode.CODES:
        pages += 1 + 2 + 2 + 1  # codewords 0 to 3, 1 to 4, 2 to 5; the sinks' page of K
    else:
        pages += 3 * len({int(c) // TINY.codewords_per_page for c in first.features})
    total = sum(traffic.flash.values())
    registers = {name: bench.device.read_register(name) - before[name] for name in names}
    assert registers["CODEWORDS"] == total
    assert registers["FLASH_WORDS"] == total * TINY.raw_codeword_words
    assert registers["BEATS"] == (total + sum(traffic.dram.values())) * TINY.beats_per_codeword
    assert registers["UNREADABLE"] == registers["CYCLES"] == 0
    assert registers["PAGE_READS"] == traffic.page_reads
    assert traffic.page_reads == pages
    # What reads nothing counts nothing, and nothing is forgotten.
    bench.attend(mode, top_units=0)
    assert sum(bench.device.traffic.flash.values()) == total
    assert bench.device.read_register("CODEWORDS") - before["CODEWORDS"] == total


def test_traffic_of_a_dense_job(bench):
    bench.attend(Mode.DENSE)
    traffic = bench.device.traffic
    nothing = dict.fromkeys(Kind, 0)
    assert traffic.flash == nothing | {Kind.KEY: 96, Kind.VALUE: 96}
    assert traffic.dram == nothing | {Kind.KEY: 31, Kind.VALUE: 31}
    assert traffic.page_reads == 48
    # Two jobs: the sum.
    line = COMMAND.pack(**bench.fields(Mode.DENSE))
    bench.run(line, line)
    assert bench.device.traffic.page_reads == 3 * 48
    assert bench.device.read_register("CODEWORDS") == 3 * 192


@MODES
def test_what_is_not_read_may_be_lost(bench, mode):
    """Every codeword of flash that the trace does not name, at once; then each kind of what it names."""
    trace = bench.golden(mode)
    read = set(trace.first.codewords.tolist())
    features = set(trace.first.features.tolist())
    for stripe in range(3):
        for codeword in range(TINY.group_codewords):
            if stripe * TINY.group_codewords + codeword not in read:
                bench.lose(Kind.KEY, stripe, codeword)
                bench.lose(Kind.VALUE, stripe, codeword)
            if codeword not in features:
                bench.lose(Kind.FEATURE, stripe, codeword)
        if mode is not Mode.CENTROID:
            for codeword in range(CENTROID_CODEWORDS):
                bench.lose(Kind.SKETCH, stripe, codeword)
        if mode is not Mode.CODES:
            for codeword in range(TINY.octets):
                bench.lose(Kind.CODES, stripe, codeword)
    assert bench.attend(mode).status is Status.OK
    assert bench.result()[0] == trace.output.tolist()
    assert bench.media() is None


@FEATURED
def test_lost_features(bench, mode):
    features = bench.golden(mode).first.features.tolist()
    place = bench.lose(Kind.FEATURE, 2, features[4])
    found = bench.attend(mode)
    assert (found.status, found.where) == (Status.UNREADABLE_SKETCH, 2 * GROUP)
    assert bench.media() == place
    assert bench.device.read_register("UNREADABLE") == 1
    place = bench.lose(Kind.FEATURE, 1, features[5])
    found = bench.attend(mode)
    assert (found.status, found.where) == (Status.UNREADABLE_SKETCH, GROUP)
    assert bench.media() == place


@pytest.mark.parametrize("codeword", range(CENTROID_CODEWORDS))
def test_lost_centroids(bench, codeword):
    for stripe in (2, 1):
        place = bench.lose(Kind.SKETCH, stripe, codeword)
        found = bench.attend(Mode.CENTROID)
        where = stripe * GROUP + codeword * TINY.tokens_per_codeword * UNIT
        assert (found.status, found.where) == (Status.UNREADABLE_SKETCH, where)
        assert bench.media() == place


@pytest.mark.parametrize("octet", range(TINY.octets))
def test_lost_codes(bench, octet):
    for stripe in (2, 1):
        place = bench.lose(Kind.CODES, stripe, octet)
        found = bench.attend(Mode.CODES)
        assert (found.status, found.where) == (Status.UNREADABLE_SKETCH, stripe * GROUP)
        assert bench.media() == place


def test_lost_sinks(bench):
    """Their codewords of K are read in the first pass; the second one is not even selected but for them."""
    place = bench.lose(Kind.KEY, 0, 1)
    found = bench.attend(Mode.CODES)
    assert (found.status, found.where) == (Status.UNREADABLE_SKETCH, 4)
    assert bench.media() == place
    # Without them nobody reads it at once; it is one of the tail's if the stripe is.
    assert bench.attend(Mode.CODES, sinks=4).status in (Status.OK, Status.UNREADABLE_KEY)
    bench.entries[0]["flags"] = TableFlag.WHOLE
    found = bench.attend(Mode.CODES)
    assert (found.status, found.where) == (Status.UNREADABLE_SKETCH, 4)
    # Before the codes of a later stripe.
    bench.lose(Kind.CODES, 1, 0)
    assert bench.attend(Mode.CODES).where == 4


def test_codes_need_a_configuration_with_them():
    bench = Bench.__new__(Bench)
    bench.device = GoldenDevice(replace(TINY, kv=KvFormat.FP8_E4M3), memory_bytes=1 << 16)
    bench.open()
    assert bench.run(COMMAND.pack(**bench.fields(Mode.CODES)))[0].status is Status.INVALID_FIELD


@MODES
def test_lost_tokens(bench, mode):
    read = bench.golden(mode).first.codewords
    codeword = int(read[read < 3 * TINY.group_codewords][-1])
    place = bench.lose(Kind.VALUE, *divmod(codeword, TINY.group_codewords))
    found = bench.attend(mode)
    assert (found.status, found.where) == (Status.UNREADABLE_VALUE, codeword * 4)
    assert bench.media() == place
    place = bench.lose(Kind.KEY, *divmod(codeword, TINY.group_codewords))
    found = bench.attend(mode)
    assert (found.status, found.where) == (Status.UNREADABLE_KEY, codeword * 4)
    assert bench.media() == place


@MODES
def test_lost_tail(bench, mode):
    """The last two pages of K and of V of the tail lie behind the end of DRAM; K is read in the first pass already."""
    bench.entries[3] = bench.entries[3] | {"value_page": 58}
    found = bench.attend(mode)
    assert (found.status, found.where) == (Status.UNREADABLE_VALUE, 3 * GROUP + 6 * TINY.tokens_per_page)
    bench.entries[3]["key_page"] = 60
    found = bench.attend(mode)
    status = Status.UNREADABLE_KEY if mode is Mode.CENTROID else Status.UNREADABLE_SKETCH
    assert (found.status, found.where) == (status, 3 * GROUP + 4 * TINY.tokens_per_page)
    assert bench.media() is None    # no flash
    # Up to the end only.
    assert bench.attend(mode, end_token=3 * GROUP + 4 * TINY.tokens_per_page).status is Status.OK


# Statuses.


GOOD_UNITS = -(-END // UNIT)


@pytest.mark.parametrize(("mode", "change", "status", "where"), [
    (Mode.SPARF, {"mode": 5}, Status.INVALID_FIELD, 0),
    (Mode.CODES, {"features": 1}, Status.INVALID_FIELD, 0),
    (Mode.CODES, {"unit_bits": 1}, Status.INVALID_FIELD, 0),
    (Mode.CODES, {"sinks": GROUP // 2 + 1}, Status.INVALID_SELECTION, 4),
    (Mode.CODES, {"local_tokens": 41, "sinks": 65535}, Status.INVALID_SELECTION, 2),
    (Mode.SPARF, {"reserved0": 1}, Status.INVALID_FIELD, 0),
    (Mode.SPARF, {"unit_bits": 1}, Status.INVALID_FIELD, 0),
    (Mode.CENTROID, {"features": 1}, Status.INVALID_FIELD, 0),
    (Mode.SPARF, {"stripe_pages": 4}, Status.INVALID_FIELD, 0),
    (Mode.FETCHED, {"stripe_pages": 16}, Status.INVALID_FIELD, 0),
    (Mode.CENTROID, {"stripe_pages": 1}, Status.INVALID_FIELD, 0),
    (Mode.CENTROID, {"stripe_pages": 0}, Status.INVALID_FIELD, 0),
    (Mode.DENSE, {"sinks": 1}, Status.INVALID_FIELD, 0),
    (Mode.DENSE, {"top_units": 1}, Status.INVALID_FIELD, 0),
    (Mode.SPARF, {"rows": 3}, Status.INVALID_ROWS, 3),
    (Mode.SPARF, {"stripes": 3}, Status.INVALID_LENGTH, 0),
    (Mode.SPARF, {"features": 0}, Status.INVALID_SELECTION, 0),
    (Mode.FETCHED, {"features": 0}, Status.INVALID_SELECTION, 0),
    (Mode.SPARF, {"features": 33}, Status.INVALID_SELECTION, 0),
    (Mode.FETCHED, {"features": 65535}, Status.INVALID_SELECTION, 0),
    (Mode.SPARF, {"top_units": 0}, Status.INVALID_SELECTION, 1),
    (Mode.FETCHED, {"top_units": 0}, Status.INVALID_SELECTION, 1),
    (Mode.CENTROID, {"top_units": 0}, Status.INVALID_SELECTION, 1),
    (Mode.SPARF, {"top_units": END + 1}, Status.INVALID_SELECTION, 1),
    (Mode.FETCHED, {"top_units": GOOD_UNITS + 1}, Status.INVALID_SELECTION, 1),
    (Mode.CENTROID, {"top_units": 65535}, Status.INVALID_SELECTION, 1),
    (Mode.SPARF, {"local_tokens": 41}, Status.INVALID_SELECTION, 2),
    (Mode.FETCHED, {"local_tokens": 5 * UNIT + 1}, Status.INVALID_SELECTION, 2),
    (Mode.CENTROID, {"local_tokens": 65535}, Status.INVALID_SELECTION, 2),
    (Mode.FETCHED, {"unit_bits": 3}, Status.INVALID_SELECTION, 3),
    (Mode.CENTROID, {"unit_bits": 255, "top_units": 1}, Status.INVALID_SELECTION, 3),
    (Mode.SPARF, {"table": TABLES + 4}, Status.INVALID_ADDRESS, 2),
    (Mode.SPARF, {"table": QUERIES - 64}, Status.INVALID_ADDRESS, 2),
    (Mode.FETCHED, {"table": LIMIT - 64}, Status.INVALID_ADDRESS, 2),
    (Mode.FETCHED, {"table": LIMIT - MEAN_BYTES}, Status.INVALID_ADDRESS, 2),
    (Mode.CENTROID, {"table": LIMIT}, Status.INVALID_ADDRESS, 2),
    (Mode.SPARF, {"table": LIMIT}, Status.INVALID_ADDRESS, 2),
    (Mode.SPARF, {"scale": 0}, Status.INVALID_SCALE, 0),
])
def test_invalid_commands(bench, mode, change, status, where):
    before = bench.device.read_memory(RESULTS, 512)
    found = bench.attend(mode, **change)
    assert (found.status, found.where) == (status, where)
    assert bench.device.read_memory(RESULTS, 512) == before
    assert bench.attend(mode).status is Status.OK


@pytest.mark.parametrize(("mode", "change"), [
    (Mode.SPARF, {"features": 1}),
    (Mode.SPARF, {"features": 32}),
    (Mode.SPARF, {"top_units": 1, "local_tokens": 1}),
    (Mode.SPARF, {"top_units": END, "local_tokens": END}),
    (Mode.FETCHED, {"top_units": GOOD_UNITS, "local_tokens": GOOD_UNITS * UNIT}),
    (Mode.FETCHED, {"unit_bits": 0}),
    (Mode.FETCHED, {"unit_bits": 2}),
    (Mode.CENTROID, {"top_units": 1, "local_tokens": UNIT}),
    (Mode.SPARF, {"table": LIMIT - 64 - MEAN_BYTES}),
    (Mode.CENTROID, {"table": LIMIT - 64}),
    (Mode.CODES, {"sinks": GROUP // 2}),
])
def test_the_last_valid_values(bench, mode, change):
    bench.table(mode)
    if table := change.get("table"):
        bench.device.write_memory(table, bench.device.read_memory(TABLES, LIMIT - table))
    assert bench.attend(mode, **change).status is Status.OK


def test_a_sketch_entry_counts_in_the_tables_size(bench):
    """The window has room for four entries of a dense job, and for two of a sparse one."""
    bench.open(LIMIT - 32)
    bench.table(Mode.DENSE)
    bench.device.write_memory(LIMIT - 64, bench.device.read_memory(TABLES, 64))
    found = bench.attend(Mode.DENSE, table=LIMIT - 64)
    assert found.status is Status.OK
    found = bench.attend(Mode.CENTROID, table=LIMIT - 64)
    assert (found.status, found.where) == (Status.INVALID_ADDRESS, 2)
    bench.table(Mode.CENTROID)
    bench.device.write_memory(LIMIT - 64, bench.device.read_memory(TABLES, 64))
    found = bench.attend(Mode.CENTROID, table=LIMIT - 64, stripes=2, end_token=2 * GROUP)
    assert found.status is Status.OK


def test_the_first_status_is_reported(bench):
    """Each command has all of the mistakes that follow."""
    bench.channel_sketches[1]["written"] = 0
    bench.channel_sketches[2]["written"] = 2
    bench.device.write_memory(QUERIES + query_row_bytes(32) + 64 + 9 * 2, b"\x01\x7c")
    good = int(bench.mean[5])
    bench.mean[5] = 0x7F80_0000
    mistakes = [
        ({"reserved0": 1}, Status.INVALID_FIELD, 0), ({"rows": 0}, Status.INVALID_ROWS, 0),
        ({"stripes": 9}, Status.INVALID_LENGTH, 0), ({"features": 0}, Status.INVALID_SELECTION, 0),
        ({"top_units": 0}, Status.INVALID_SELECTION, 1), ({"local_tokens": 41}, Status.INVALID_SELECTION, 2),
        ({"query": 1}, Status.INVALID_ADDRESS, 0), ({"table": 65}, Status.INVALID_ADDRESS, 2),
        ({"scale": 0}, Status.INVALID_SCALE, 0),
        ({}, Status.INVALID_TABLE, 2)]
    for at, (_, status, where) in enumerate(mistakes):
        fields: dict[str, int] = {}
        for change, *_ in reversed(mistakes[at:]):
            fields |= change
        found = bench.attend(Mode.SPARF, **fields)
        assert (found.status, found.where) == (status, where)
    bench.channel_sketches[2]["written"] = 1
    found = bench.attend(Mode.SPARF)
    assert (found.status, found.where) == (Status.NO_SKETCH, 1)
    bench.channel_sketches[1]["written"] = 1
    found = bench.attend(Mode.SPARF)
    assert (found.status, found.where) == (Status.NAN_QUERY, 1 << 16 | 9)
    assert not any(bench.device.traffic.flash.values())
    bench.device.write_memory(QUERIES + query_row_bytes(32) + 64 + 9 * 2, b"\x01\x3c")
    found = bench.attend(Mode.SPARF)
    assert (found.status, found.where) == (Status.NAN_MEAN, 5)
    assert not any(bench.device.traffic.flash.values())
    bench.mean[5] = good
    assert bench.attend(Mode.SPARF).status is Status.OK


def test_bus_errors(bench):
    bench.open(1 << 20)
    for field in ("query", "table", "result"):
        found = bench.attend(Mode.FETCHED, **{field: 1 << 16})
        assert (found.status, found.where) == (Status.BUS_ERROR, 0)
        assert bench.device.read_register("STATUS") & StatusBit.BUS_ERROR
        bench.device.write_register("STATUS", StatusBit.BUS_ERROR)
    # Before what stands in the table.
    bench.channel_sketches[0]["reserved"] = 1
    assert bench.attend(Mode.FETCHED, table=1 << 16).status is Status.BUS_ERROR
    assert bench.attend(Mode.FETCHED).status is Status.INVALID_TABLE


@MODES
@pytest.mark.parametrize(("change", "status"), [
    ({"reserved": 1}, Status.INVALID_TABLE), ({"reserved": 1 << 23}, Status.INVALID_TABLE),
    ({"written": 2}, Status.INVALID_TABLE), ({"written": 3}, Status.INVALID_TABLE),
    ({"codeword": 4}, Status.INVALID_TABLE), ({"written": 0}, Status.NO_SKETCH)])
def test_bad_sketch_entries(bench, mode, change, status):
    for stripe in (2, 0):
        for sketches in (bench.channel_sketches, bench.centroid_sketches, bench.codes_sketches):
            sketches[stripe] = sketches[stripe] | change
        found = bench.attend(mode)
        assert (found.status, found.where) == (status, stripe)
    # Dense jobs have no sketch entries, and the tail needs no sketch.
    assert bench.attend(Mode.DENSE).status is Status.OK
    bench.channel_sketches[3] = {"written": 1, "page": 77}
    bench.centroid_sketches[3] = {"written": 1, "page": 77, "codeword": 3}
    bench.codes_sketches[3] = {"written": 1, "page": 77, "codeword": 3}
    for stripe in (0, 2):
        bench.channel_sketches[stripe] |= {"written": 1, "reserved": 0, "codeword": 0}
        bench.centroid_sketches[stripe] |= {"written": 1, "reserved": 0, "codeword": 1 + stripe}
        bench.codes_sketches[stripe] |= {"written": 1, "reserved": 0, "codeword": stripe}
    assert bench.attend(mode).status is Status.OK
    # The feature layout begins with a page; what is wrong is wrong for the tail, too.
    bench.channel_sketches[3]["codeword"] = 1
    bench.centroid_sketches[3]["codeword"] = bench.codes_sketches[3]["codeword"] = 4
    found = bench.attend(mode)
    assert (found.status, found.where) == (Status.INVALID_TABLE, 3)


@MODES
def test_flags_of_entries(bench, mode):
    """A stripe that is attended whole needs no sketch; other bits are reserved."""
    for flags in (4, 0x80, 0xFF):
        bench.entries[2]["flags"] = flags
        found = bench.attend(mode)
        assert (found.status, found.where) == (Status.INVALID_TABLE, 2)
    bench.entries[2]["flags"] = 0
    for sketches in (bench.channel_sketches, bench.centroid_sketches, bench.codes_sketches):
        sketches[0] = sketches[0] | {"written": 0}
        sketches[2] = sketches[2] | {"written": 0}
    bench.entries[0]["flags"] = TableFlag.WHOLE
    found = bench.attend(mode)
    assert (found.status, found.where) == (Status.NO_SKETCH, 2)


def test_without_sparse_hardware():
    device = GoldenDevice(replace(TINY, sparse=False), memory_bytes=1 << 16)
    bench = Bench.__new__(Bench)
    bench.device = device
    bench.open()
    for mode in list(Mode)[1:]:
        assert bench.run(COMMAND.pack(**bench.fields(mode)))[0].status is Status.INVALID_FIELD
    assert bench.run(COMMAND.pack(**bench.fields(Mode.DENSE, rows=0)))[0].status is Status.INVALID_ROWS


# NaN.


@MODES
def test_nan_of_tokens(bench, mode):
    """A NaN in the token layout counts if its codeword is read, whether or not its token is selected."""
    plain = Bench().golden(mode).first
    read = plain.codewords[plain.codewords < 3 * TINY.group_codewords].tolist()
    unread = next(c for c in range(96) if c not in read)
    chosen = plain.features.tolist()
    other = next(c for c in range(32) if c not in chosen)
    token = next(t for t in range(4 * read[1], 4 * read[1] + 4))
    key, value = bench.key, bench.value
    key[4 * unread, other] = value[4 * unread + 1, 3] = 0x7C00
    bench = rebuilt(bench)
    assert bench.attend(mode).status is Status.OK
    value[token + 1, 31] = 0xFE00
    bench = rebuilt(bench)
    found = bench.attend(mode)
    assert (found.status, found.where) == (Status.NAN_VALUE, token + 1)
    key[token + 2, other] = 0x7C01
    bench = rebuilt(bench)
    found = bench.attend(mode)
    assert (found.status, found.where) == (Status.NAN_KEY, token + 2)


def rebuilt(bench: Bench) -> Bench:
    """The same K and V in a device of its own; mean keys and mean of V stay what they were."""
    fresh = Bench()
    fresh.device = GoldenDevice(TINY, memory_bytes=1 << 16, dram_bytes=64 * TINY.page_bytes)
    fresh.open()
    fresh.device.write_memory(QUERIES, bench.device.read_memory(QUERIES, LIMIT - QUERIES))
    fresh.key, fresh.value, fresh.centroids, fresh.mean = bench.key, bench.value, bench.centroids, bench.mean
    fresh.codes = bench.codes
    fresh.entries, fresh.channel_sketches, fresh.centroid_sketches, fresh.codes_sketches = [], [], [], []
    fresh.write()
    return fresh


@FEATURED
def test_nan_of_the_feature_layout(bench, mode):
    chosen = bench.golden(mode).first.features.tolist()
    other = next(c for c in range(32) if c not in chosen)
    sketch = bench.key.copy()
    key, bench.key = bench.key, sketch
    sketch[200, other] = 0x7C00
    bench = rebuilt(bench)
    token_layout = bench.golden(mode).first.read[200]
    assert bench.attend(mode).status is (Status.NAN_KEY if token_layout else Status.OK)
    sketch[200] = key[200]
    sketch[300, chosen[2]] = sketch[170, chosen[0]] = 0xFC00
    bench = rebuilt(bench)
    found = bench.attend(mode)
    assert (found.status, found.where) == (Status.NAN_KEY, 170)


def test_nan_of_a_centroid(bench):
    bench.centroids = bench.centroids.copy()
    bench.centroids[[40, 17, 50]] = 0x7C00     # 50 is the tail's, and nowhere
    bench = rebuilt(bench)
    found = bench.attend(Mode.CENTROID)
    assert (found.status, found.where) == (Status.NAN_KEY, 17 * UNIT)
    for mode in (Mode.SPARF, Mode.FETCHED, Mode.DENSE):
        assert bench.attend(mode).status is Status.OK


def test_nan_of_codes(bench):
    """In the levels of a stripe, in sinks, and in what else is in their codewords."""
    for name, where in (("step", 2), ("base", 1)):
        bits = getattr(bench.codes, name).copy()
        bits[where, 17] = 0x7C00
        bench.codes = replace(bench.codes, **{name: bits})
        bench = rebuilt(bench)
        found = bench.attend(Mode.CODES)
        assert (found.status, found.where) == (Status.NAN_KEY, where * GROUP)
    for token in (7, 5):
        bench.key[token, 3] = 0x7E01
        bench = rebuilt(bench)
        found = bench.attend(Mode.CODES)
        assert (found.status, found.where) == (Status.NAN_KEY, token)


def test_sinks_of_codes_behind_the_end_are_read_and_not_attended(bench):
    found = bench.attend(Mode.CODES, stripes=1, end_token=5, top_units=5, local_tokens=0, sinks=9, tree_token=5)
    assert found.status is Status.OK
    reference = dense.attend(bench.query, bench.key[:GROUP], bench.value[:GROUP], **bench.limits(5))
    assert bench.result()[0] == reference.output.tolist()
    assert bench.device.traffic.flash[Kind.SKETCH] == 3


def test_overflow_of_the_first_pass_is_flagged(bench):
    feature = int(bench.golden(Mode.SPARF).first.features[0])
    bench.query[0, feature] = 0x6400
    bench.key[5, feature] = 0x7BFF
    bench = rebuilt(bench)
    bench.query = np.where(np.arange(32) == feature, 0x6400, 0).astype(np.uint16)[None].repeat(ROWS, axis=0)
    bench.device.write_memory(QUERIES, b"".join(
        ROW.pack(start_token=300, end_token=1 << 20) + q.tobytes() for q in bench.query))
    assert bench.attend(Mode.SPARF).flags == CompletionFlag.SCORE_OVERFLOW
    assert bench.attend(Mode.DENSE).flags == CompletionFlag(0)   # nobody attends token 5
