"""The one configuration that golden model, RTL, driver and reports are built from."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from math import ceil
from typing import Any, Self

from kvattic.errors import ConfigError
from kvattic.spec.formats import VALUE_FRACTION, Element, KvFormat
from kvattic.spec.nand import PSLC, TINY_PART, NandPart, is_power_of_two

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
BEAT_BYTES = (8, 16, 32)
LANE_CHANNELS = (1, 2, 4)
MAX_CHANNELS = 32
MAX_ROWS = 16
ELEMENT_BYTES = 2
"""Bytes of an element of q; those of K and V are `Config.kv_element_bytes`."""
CRC_BITS = 24
"""Bits of the check value that detects a miscorrected or misplaced codeword (kvattic.spec.ecc)."""
OCTET_FEATURES = 8
"""Features in a codeword of codes (kvattic.spec.codes)."""
MAX_CLOCK_MHZ = 10_000
"""No chip is clocked faster: a larger number was meant in Hz or kHz."""
PAGE_NUMBER_BITS = 24
"""Bits of a page number on its channel, and of a page number in device DRAM."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Geometry of the drive: the engine, the flash behind it, and the KV pages that it reads.

    Attributes:
        channels: flash channels (1 to 32).
        lane_channels: channels whose codewords one lane of the engine attends (1, 2 or 4).
        beat_bytes: bytes that a lane takes in one cycle (8, 16 or 32); 8 or more for each of its channels.
        rows: query rows that share one pass over K and V (1 to 16).
        head_dim: elements of one token of one head (32, 64, 80, 96, 128 or 256).
        element: format of q, and of K and V unless `kv` says otherwise.
        kv: how K and V are stored in flash and device DRAM, centroids and the feature layout included.
        part: the NAND die; its page is the page.
        dies: dies of a channel, each a target of its own, a power of two.
        cache_reads: the controllers read a die's next pages while they move its last ones out of the cache register.
        ecc_t: bit errors that are corrected in each codeword.
        dram_beat_bytes: bytes that the device DRAM's port moves in one cycle (a power of two, 8 to 128).
        codeword_bytes: data bytes of an ECC codeword, the smallest unit that is read.
        score_depth: tokens that one lane's score buffer holds, over all jobs in flight.  A lane of several channels has
            the stripes of all of them.
        jobs_in_flight: jobs that the engine overlaps (2 to 16).
        sparse: the engine has the sparse modes (`commands.Mode`).
        groups_in_flight: groups of the feature layout that a lane sums at the same time (2, 4, 8, 16 or 32).
        clock_mhz: clock that turns cycles into seconds and the part's times into cycles (above 0, at most 10,000).

    Raises:
        ConfigError: a value is not supported.
    """

    channels: int = 8
    lane_channels: int = 1
    beat_bytes: int = 8
    rows: int = 1
    head_dim: int = 128
    element: Element = Element.FP16
    kv: KvFormat = KvFormat.ELEMENT
    part: NandPart = PSLC
    dies: int = 8
    cache_reads: bool = False
    ecc_t: int = 8
    dram_beat_bytes: int = 64
    codeword_bytes: int = 512
    score_depth: int = 4096
    jobs_in_flight: int = 4
    sparse: bool = True
    groups_in_flight: int = 4
    clock_mhz: float = 285.0

    def __post_init__(self) -> None:
        for name, kind in (("element", Element), ("kv", KvFormat)):
            try:
                object.__setattr__(self, name, kind(getattr(self, name)))
            except ValueError:
                raise ConfigError(
                    f"{name} must be one of {[e.value for e in kind]}, not {getattr(self, name)!r}") from None
        if not isinstance(self.part, NandPart):
            raise ConfigError(f"part must be a NandPart, not {self.part!r}")
        for name in ("cache_reads", "sparse"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be a bool, not {getattr(self, name)!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, "int") and (not isinstance(value, int) or isinstance(value, bool)):
                raise ConfigError(f"{field.name} must be an int, not {value!r}")
        if not isinstance(self.clock_mhz, (int, float)) or isinstance(self.clock_mhz, bool):
            raise ConfigError(f"clock_mhz must be a number, not {self.clock_mhz!r}")
        object.__setattr__(self, "clock_mhz", float(self.clock_mhz))
        self._check(1 <= self.channels <= MAX_CHANNELS, "channels", f"1 to {MAX_CHANNELS}")
        self._check(self.lane_channels in LANE_CHANNELS, "lane_channels", f"one of {LANE_CHANNELS}")
        whole = self.lanes * self.lane_channels == self.channels
        self._check(self.lane_channels == 1 or (whole and is_power_of_two(self.lanes)), "channels",
                    f"1, 2, 4, ... lanes of {self.lane_channels} channels")
        self._check(self.beat_bytes in BEAT_BYTES, "beat_bytes", f"one of {BEAT_BYTES}")
        self._check(self.word_bytes >= BEAT_BYTES[0], "beat_bytes",
                    f"at least {BEAT_BYTES[0]} for each of {self.lane_channels} channels")
        self._check(1 <= self.rows <= MAX_ROWS, "rows", f"1 to {MAX_ROWS}")
        self._check(self.head_dim in HEAD_DIMS, "head_dim", f"one of {HEAD_DIMS}")
        beats = self.beats_per_token
        self._check(beats > 1 and beats * self.elements_per_beat == self.head_dim, "beat_bytes",
                    f"such that a token ({self.token_bytes} bytes at head_dim {self.head_dim} and kv {self.kv.value}) "
                    "is two beats, or more whole ones")
        self._check(self.codeword_bytes >= self.token_bytes, "codeword_bytes",
                    f"at least one token ({self.token_bytes} bytes at head_dim {self.head_dim})")
        self._check(is_power_of_two(self.codeword_bytes), "codeword_bytes", "a power of two")
        self._check(self.page_bytes >= self.codeword_bytes, "page_bytes", "at least codeword_bytes")
        self._check(is_power_of_two(self.dies), "dies", "a power of two")
        self._check(1 <= self.ecc_t <= 64, "ecc_t", "1 to 64")
        self._check(is_power_of_two(self.dram_beat_bytes) and 8 <= self.dram_beat_bytes <= 128, "dram_beat_bytes",
                    "a power of two from 8 to 128")
        self._check(self.dram_beat_bytes >= self.beat_bytes, "dram_beat_bytes", "at least beat_bytes")
        self._check(self.codeword_bytes >= self.dram_beat_bytes, "codeword_bytes", "at least dram_beat_bytes")
        self._check(self.raw_page_bytes <= self.page_bytes + self.part.spare_bytes, "ecc_t",
                    f"such that {self.codewords_per_page} codewords of {self.raw_codeword_bytes} bytes fit a page of "
                    f"{self.page_bytes} + {self.part.spare_bytes} bytes")
        self._check(self.pages_per_channel <= 1 << PAGE_NUMBER_BITS, "dies",
                    f"such that a channel has at most 2**{PAGE_NUMBER_BITS} pages")
        self._check(is_power_of_two(self.score_depth), "score_depth", "a power of two")
        self._check(self.score_depth >= self.codewords_per_page << self.slot_bits_per_codeword, "score_depth",
                    f"at least one page of tokens ({self.codewords_per_page << self.slot_bits_per_codeword})")
        self._check(2 <= self.jobs_in_flight <= 16, "jobs_in_flight", "2 to 16")
        self._check(self.groups_in_flight in (2, 4, 8, 16, 32), "groups_in_flight", "2, 4, 8, 16 or 32")
        if self.sparse and (reason := self._no_groups):
            raise ConfigError(f"sparse must be False here: {reason}")
        self._check(0 < self.clock_mhz <= MAX_CLOCK_MHZ, "clock_mhz", f"above 0 and at most {MAX_CLOCK_MHZ:,}, in MHz")
        self._check(self.max_tokens < 1 << 24, "score_depth", "such that lanes * score_depth is below 2**24")

    def _check(self, good: bool, name: str, what: str) -> None:
        if not good:
            raise ConfigError(f"{name} must be {what}, not {getattr(self, name)!r}")

    # Derived geometry of flash.

    @property
    def page_bytes(self) -> int:
        """Data bytes of a flash page."""
        return self.part.page_bytes

    @property
    def bch_m(self) -> int:
        """The code's field is GF(2**m): the smallest whose codewords are long enough."""
        data = self.codeword_bytes * 8 + CRC_BITS
        m = 5
        while data + m * self.ecc_t > (1 << m) - 1:
            m += 1
        return m

    @property
    def check_bytes(self) -> int:
        """Bytes behind a codeword's data: CRC, BCH parity, and zeros up to a whole word."""
        bits = CRC_BITS + self.bch_m * self.ecc_t
        return ceil(bits / 8 / self.word_bytes) * self.word_bytes

    @property
    def raw_codeword_bytes(self) -> int:
        """Bytes that a codeword takes in flash and on the flash bus."""
        return self.codeword_bytes + self.check_bytes

    @property
    def raw_codeword_words(self) -> int:
        """Words of `word_bytes` that a codeword takes on the flash side."""
        return self.raw_codeword_bytes // self.word_bytes

    @property
    def raw_page_bytes(self) -> int:
        """Bytes of a page that hold codewords; codeword i begins at column i * raw_codeword_bytes."""
        return self.codewords_per_page * self.raw_codeword_bytes

    @property
    def plane_bits(self) -> int:
        """Lowest bits of a page number: the plane."""
        return (self.part.planes - 1).bit_length()

    @property
    def die_bits(self) -> int:
        """Next bits: the die."""
        return (self.dies - 1).bit_length()

    @property
    def block_page_bits(self) -> int:
        """Next bits: the page of the block; above them stands the zone."""
        return (self.part.pages - 1).bit_length()

    @property
    def zone_page_bits(self) -> int:
        """Bits of a page number below the zone."""
        return self.plane_bits + self.die_bits + self.block_page_bits

    @property
    def zone_pages(self) -> int:
        """Pages of a zone on each channel."""
        return self.part.planes * self.dies * self.part.pages

    @property
    def pages_per_channel(self) -> int:
        """Page numbers of a channel, those that pad a block to a power of two included."""
        return self.part.blocks << self.zone_page_bits

    def cycles(self, nanoseconds: float) -> int:
        """Whole clock cycles that take at least so long."""
        return ceil(round(nanoseconds * self.clock_mhz / 1000, 6))

    @property
    def word_bytes(self) -> int:
        """Bytes that a flash channel gives or takes in one cycle: its share of a lane's beat."""
        return self.beat_bytes // self.lane_channels

    @property
    def words_per_codeword(self) -> int:
        """Words of a codeword that hold tokens; what is left of its data is padding."""
        return self.tokens_per_codeword * self.token_bytes // self.word_bytes

    # Derived geometry of the engine.

    @property
    def lanes(self) -> int:
        """Lanes of the engine.  Channel c is one of lane c % lanes's, the (c // lanes)-th."""
        return self.channels // self.lane_channels

    @property
    def kv_element_bytes(self) -> int:
        """Bytes that an element of K or V takes where it is stored, and in a beat."""
        return self.kv.element_bytes

    @property
    def query_beat_bytes(self) -> int:
        """Bytes of the elements of q that go with a beat of K."""
        return self.elements_per_beat * ELEMENT_BYTES

    @property
    def elements_per_beat(self) -> int:
        """Elements that a lane takes in one cycle."""
        return self.beat_bytes // self.kv_element_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one head, K or V."""
        return self.head_dim * self.kv_element_bytes

    @property
    def beats_per_token(self) -> int:
        """Beats that carry one token."""
        return self.head_dim // self.elements_per_beat

    @property
    def tokens_per_codeword(self) -> int:
        """Whole tokens in one codeword; what is left of it is padding and never sent to a lane."""
        return self.codeword_bytes // self.token_bytes

    @property
    def beats_per_codeword(self) -> int:
        """Beats that a codeword puts on its lane."""
        return self.tokens_per_codeword * self.beats_per_token

    @property
    def codewords_per_page(self) -> int:
        """Codewords in one page."""
        return self.page_bytes // self.codeword_bytes

    @property
    def tokens_per_page(self) -> int:
        """Consecutive tokens of one head in one page: a stripe."""
        return self.codewords_per_page * self.tokens_per_codeword

    @property
    def slot_bits_per_codeword(self) -> int:
        """log2 of the score-buffer places kept for one codeword's tokens."""
        return (self.tokens_per_codeword - 1).bit_length()

    @property
    def ring_codewords(self) -> int:
        """Codewords that one lane's score buffer holds."""
        return self.score_depth >> self.slot_bits_per_codeword

    @property
    def max_tokens(self) -> int:
        """Tokens of one job at most: what the score buffers of all lanes hold."""
        return self.lanes * self.ring_codewords * self.tokens_per_codeword

    # Derived geometry of sparse attention.

    @property
    def _no_groups(self) -> str:
        """Why this geometry cannot have the feature layout; empty if it can."""
        if self.tokens_per_codeword * self.token_bytes != self.codeword_bytes:
            return ("codewords of the feature layout have no rest, so those of the token layout must have none; "
                    f"{self.tokens_per_codeword} tokens of {self.token_bytes} bytes leave some of "
                    f"{self.codeword_bytes}; choose a power of two for head_dim")
        tokens, page = self.group_tokens, self.tokens_per_page
        pages = tokens // page
        if pages * page != tokens or not is_power_of_two(pages):
            return (f"a codeword of the feature layout has {tokens} tokens, which must be 1, 2, 4, ... pages of the "
                    f"token layout, of {page} tokens each, not {tokens / page:g}; choose another page_bytes")
        if pages * self.codewords_per_page > self.ring_codewords:
            return (f"a stripe of the feature layout has {pages * self.codewords_per_page} codewords of K, which must "
                    f"fit a lane's score buffer, {self.ring_codewords} codewords (score_depth {self.score_depth})")
        return ""

    @property
    def group_tokens(self) -> int:
        """Tokens of a stripe of a sparse sequence: those of one feature in a codeword of the feature layout."""
        return self.codeword_bytes // self.kv_element_bytes

    @property
    def group_pages(self) -> int:
        """Pages of K (and of V, and of the feature layout) of a group, a power of two."""
        return self.group_tokens // self.tokens_per_page

    @property
    def group_codewords(self) -> int:
        """Codewords of K of a group, a power of two, at least head_dim."""
        return self.group_pages * self.codewords_per_page

    @property
    def octets(self) -> int:
        """Codewords of codes of a group, a power of two: each has eight features of all tokens."""
        return self.head_dim // OCTET_FEATURES

    @property
    def codes_sinks_max(self) -> int:
        """Sinks that CODES scores exactly, at most: half of a stripe's tokens."""
        return self.group_tokens // 2

    @property
    def codes(self) -> bool:
        """Whether the engine has the mode CODES."""
        return not self.why_no_codes

    @property
    def why_no_codes(self) -> str:
        """Why this configuration is without codes; empty if it has them."""
        if not self.sparse:
            return "sparse must be True"
        if self.kv is not KvFormat.ELEMENT:
            return f"kv must be {KvFormat.ELEMENT.value}, not {self.kv.value}"
        if self.codeword_bytes not in (256, 512):
            return f"codeword_bytes must be 256 or 512, not {self.codeword_bytes}"
        return ""

    @property
    def group_words(self) -> int:
        """Accumulator words of a group: beats of a codeword of the feature layout."""
        return self.codeword_bytes // self.beat_bytes

    @property
    def unit_bits_max(self) -> int:
        """log2 of the codewords of the largest unit: at most a page, and a stripe's centroids fill whole codewords."""
        return min(self.codewords_per_page, self.group_codewords // self.tokens_per_codeword).bit_length() - 1

    @property
    def sweep_tokens(self) -> int:
        """Tokens whose scores a lane keeps side by side, so that a selection's sweep takes them in one cycle."""
        return min(self.lane_channels, self.tokens_per_codeword)

    @property
    def accumulator_bits(self) -> int:
        """Width of an output accumulator: no sum of `max_tokens` addends can overflow it (docs/numerics.md)."""
        # An fp16 addend stays below half of the window; only bf16 values can fill it.
        addend = self.element.encoding.value_window_bits - (self.element is Element.FP16)
        return addend + (self.max_tokens - 1).bit_length() + 1

    @property
    def lane_accumulator_bits(self) -> int:
        """Width of what one lane sums of it: a job has at most `score_depth` tokens in a lane."""
        return self.accumulator_bits - (self.max_tokens - 1).bit_length() + (self.score_depth - 1).bit_length()

    @property
    def denominator_bits(self) -> int:
        """Width of a denominator: `max_tokens` weights of at most 1.0 in the value window."""
        return VALUE_FRACTION + self.max_tokens.bit_length()

    # Others of its kind.

    def with_lane_channels(self, lane_channels: int) -> Self:
        """The same drive with so many channels a lane; each keeps its share of a beat, of the scores, of the groups.

        Raises:
            ConfigError: it cannot be divided so.
        """
        def share(whole: int) -> int:
            return whole // self.lane_channels * lane_channels

        return replace(
            self, lane_channels=lane_channels, beat_bytes=share(self.beat_bytes), score_depth=share(self.score_depth),
            groups_in_flight=max(2, share(self.groups_in_flight)))

    # Identity.

    def to_json(self) -> str:
        """This configuration as JSON text with sorted keys; without `kv` if it is ELEMENT.

        So `hash` is what it was before there were other formats, and what was saved then can be opened.
        """
        values = asdict(self)
        if self.kv is KvFormat.ELEMENT:
            del values["kv"]
        return json.dumps(values, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The configuration that `to_json` wrote.

        Raises:
            ConfigError: the text is not a JSON object of known fields with supported values.
        """
        try:
            values: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"a configuration must be JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"a configuration must be a JSON object, not {type(values).__name__}")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown configuration fields {unknown}; known are {sorted(known)}")
        if isinstance(values.get("part"), dict):
            try:
                values["part"] = NandPart(**values["part"])
            except TypeError as error:
                raise ConfigError(f"part must have the fields of a NandPart: {error}") from None
        return cls(**values)

    @property
    def hash(self) -> int:
        """32 bits for the register CONFIG_HASH; the driver refuses a device with another value."""
        text = self.to_json()
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


TINY = Config(channels=2, rows=2, head_dim=32, part=TINY_PART, dies=2, dram_beat_bytes=16, codeword_bytes=256,
              score_depth=256)
"""Fast tests."""
BOARD = Config(channels=4, lane_channels=4, beat_bytes=32, score_depth=16384, jobs_in_flight=8, groups_in_flight=16)
"""A four-channel OpenSSD board (paper v1: 4 flash channels)."""
PAPER = Config(lane_channels=4, beat_bytes=32, score_depth=32768, jobs_in_flight=16, groups_in_flight=32)
"""The paper's drive: 8 channels, one query row, 285 MHz (HPCA text, section VI)."""
GQA = Config(lane_channels=2, beat_bytes=16, rows=8, score_depth=8192, jobs_in_flight=8, groups_in_flight=8)
"""Groups of eight query rows share each byte of K and V."""

PRESETS = {"tiny": TINY, "board": BOARD, "paper": PAPER, "gqa": GQA}


def preset(name: str) -> Config:
    """The named preset.

    Raises:
        ConfigError: there is no preset of that name.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise ConfigError(f"there is no preset {name!r}; presets are {', '.join(PRESETS)}") from None
