"""Dense jobs that the golden device computes together: the bits, registers and notes of each job served alone."""

import copy
import os
import random
from dataclasses import replace

import numpy as np
import pytest
from tests.host.golden.queue_host import DOMAIN, Host

from kvattic.driver.device import Device
from kvattic.errors import RequestError
from kvattic.golden import compiled, dense
from kvattic.golden.compiled import CompilerError, find_kernel
from kvattic.golden.device import GoldenDevice
from kvattic.golden.together import DenseJobs
from kvattic.spec import layout
from kvattic.spec.blocks import Queries, pack_queries
from kvattic.spec.commands import (
    COMMAND,
    COMPLETION,
    DATA_COMMAND,
    FLASH_COMMAND,
    TABLE_ENTRY,
    CompletionFlag,
    Opcode,
    Status,
    fp32_bits,
    pack_completion,
    query_row_bytes,
    result_row_bytes,
)
from kvattic.spec.config import HEAD_DIMS, PAPER, TINY
from kvattic.spec.elements import to_bits
from kvattic.spec.formats import Element
from kvattic.spec.layout import Block
from kvattic.spec.registers import REGISTERS

try:
    compiled.load()
except CompilerError as error:
    KERNELS = [pytest.param("c", marks=pytest.mark.skip(reason=str(error)))]
else:
    KERNELS = ["c"]

BLOCKS, RINGS, ENTRIES = 0x4000, 0x40000, 32
SPECIAL = {Element.FP16: 0x7E00, Element.BF16: 0x7F80}


# The kernel.


def job_of(rng, element, dim, rows, tokens, size):
    """q, K and V of a magnitude, with subnormals and zeros; windows, a draft tree and a scale."""
    bits = [to_bits((rng.standard_normal((n, dim)) * 10.0 ** rng.uniform(-3, size)).astype(np.float32), element)
            for n in (rows, tokens, tokens)]
    for array in bits[element is Element.BF16 :]:   # a subnormal in bf16's q is left out
        array[rng.random(array.shape) < rng.choice([0, 0.2])] &= 0x83FF if element is Element.FP16 else 0x807F
        array[rng.random(array.shape) < 0.02] = 0
    base = int(rng.choice([0, 256]))
    everything = rng.random() < 0.4
    start = np.zeros(rows, np.int64) if everything else base + rng.integers(0, tokens + 1, rows)
    end = np.full(rows, base + tokens) if everything else base + rng.integers(0, tokens + 3, rows)
    return bits, {
        "start": start, "end": end, "tree": rng.integers(0, 1 << 32, rows), "base_token": base,
        "tree_token": base + max(tokens - int(rng.integers(0, 40)), 0),
        "scale_bits": fp32_bits(float(rng.uniform(1, 2) * 2.0 ** rng.integers(-8, 3)))}


def addresses(pages):
    return pages.__array_interface__["data"][0] + np.arange(len(pages), dtype=np.int64)[None] * pages.shape[1]


def compute(config, bits, options):
    """A job's `DenseResults`, by the kernel in C."""
    query, *pages = bits[0], *(layout.pack_pages(each, config) for each in bits[1:])
    rows = {name: np.asarray(options[name], np.int64)[None] for name in ("start", "end", "tree")}
    return compiled.attend(DenseJobs(
        config, addresses(pages[0]), addresses(pages[1]), query[None].copy(), *rows.values(), len(bits[1]),
        options["base_token"], options["tree_token"], options["scale_bits"]))


def expected(config, bits, options):
    return dense.attend(*bits, element=config.element, end_token=options["base_token"] + len(bits[1]), **options)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("element", Element)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_the_kernel_gives_the_golden_models_bits(kernel, element, dim):
    config, clean = replace(PAPER, head_dim=dim, element=element, sparse=False, rows=16), 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        bits, options = job_of(rng, element, dim, int(rng.integers(1, 5)), int(rng.integers(1, 300)), 1.0)
        found, wanted = compute(config, bits, options), expected(config, bits, options)
        if found.clean[0]:
            assert wanted.flags == 0 and wanted.nan_key is None and wanted.nan_value is None
            for name in ("output", "maximum", "denominator"):
                assert np.array_equal(getattr(found, name)[0], getattr(wanted, name)), (seed, name)
            clean += 1
    assert clean > 35


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("element", Element)
def test_the_kernel_leaves_out_what_it_cannot_compute_exactly(kernel, element):
    """Sizes from those that are always exact to those that overflow: a result is right or left out."""
    config = replace(PAPER, head_dim=64, element=element, sparse=False, rows=16)
    clean = [0, 0]
    for seed in range(150):
        rng = np.random.default_rng(seed)
        bits, options = job_of(rng, element, 64, 2, 70, 3.5 if element is Element.FP16 else 6.0)
        found, wanted = compute(config, bits, options), expected(config, bits, options)
        clean[int(found.clean[0])] += 1
        if found.clean[0]:
            assert wanted.flags == 0
            assert np.array_equal(found.output[0], wanted.output)
    assert min(clean) > 10


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("element", Element)
def test_the_kernel_leaves_out_nan_and_infinity(kernel, element, which):
    config = replace(PAPER, head_dim=64, element=element, sparse=False)
    bits, options = job_of(np.random.default_rng(1), element, 64, 1, 70, 0.0)
    assert compute(config, bits, options).clean[0]
    for special in (SPECIAL[element], SPECIAL[element] | 0x8001):
        bits[which][-1, -1] = special
        assert not compute(config, bits, options).clean[0]


def test_a_kernel_has_a_name(monkeypatch):
    assert find_kernel("numpy") is None
    with pytest.raises(RequestError, match=r"kernel must be one of auto, c, numpy, not 'fortran'"):
        GoldenDevice(TINY, kernel="fortran")
    monkeypatch.setenv("KVATTIC_KERNEL", "cobol")
    with pytest.raises(RequestError, match=r"not 'cobol' \(the option kernel, or the environment variable KVATTIC"):
        GoldenDevice(TINY)


def test_without_a_compiler_the_device_works(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("KVATTIC_KERNEL", raising=False)
    compiled.load.cache_clear()
    try:
        with pytest.raises(RequestError, match="kernel='c': there is no C compiler"):
            GoldenDevice(TINY, kernel="c")
        assert find_kernel(None) is None
    finally:
        compiled.load.cache_clear()


def test_a_compiler_that_fails_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho no such target >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("KVATTIC_CACHE", str(tmp_path / "cache" / "kvattic"))
    compiled.load.cache_clear()
    try:
        with pytest.raises(RequestError, match=r"broken-cc failed: no such target"):
            GoldenDevice(TINY, kernel="c")
        assert not [*(tmp_path / "cache" / "kvattic").glob("*")]
    finally:
        compiled.load.cache_clear()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_that_computes_other_bits_is_refused(kernel, monkeypatch, tmp_path):
    wrong = tmp_path / "wrong-cc"
    wrong.write_text(f'#!/bin/sh\nexec {compiled.find_compiler()} -D__builtin_trunc=__builtin_rint "$@"\n')
    wrong.chmod(0o755)
    monkeypatch.setenv("CC", str(wrong))
    monkeypatch.setenv("KVATTIC_CACHE", str(tmp_path / "kvattic"))
    compiled.load.cache_clear()
    try:
        with pytest.raises(RequestError, match=r"kernel='c': .*wrong-cc .*computes other bits than NumPy"):
            GoldenDevice(TINY, kernel="c")
        assert find_kernel("auto") is None
    finally:
        compiled.load.cache_clear()


# The device.


class Pair:
    """Two devices that are told the same: one computes jobs together, the other each alone."""

    def __init__(self, kernel, config=TINY, **options):
        self.config = config
        self.devices = [GoldenDevice(config, memory_bytes=1 << 19, dram_bytes=64 * config.page_bytes, kernel=name,
                                     **options) for name in (kernel, "numpy")]
        self.hosts = [Host(device, rings=RINGS, entries=ENTRIES, window=(BLOCKS, RINGS)) for device in self.devices]
        for host in self.hosts:
            host.open()
        self.runs = self.count_runs()

    def count_runs(self):
        """Jobs that the first device has computed together."""
        runs, done = self.devices[0]._runs, []
        if runs is not None:
            kernel = runs._kernel
            runs._kernel = lambda jobs: done.append(len(jobs.query)) or kernel(jobs)
        return done

    def both(self, act):
        """What an act on a host gives, which must be the same on both."""
        one, other = map(act, self.hosts)
        assert one == other
        return one

    def write_memory(self, address, data):
        for device in self.devices:
            device.write_memory(address, data)

    def check(self):
        """The devices show the same: memory, registers, what was read, and how long it would take."""
        one, other = self.devices
        assert one.read_memory(0, one.memory_bytes) == other.read_memory(0, other.memory_bytes)
        for register in REGISTERS:
            assert one.read_register(register.name) == other.read_register(register.name), register.name
        assert one.traffic == other.traffic
        assert one.modelled_cycles() == other.modelled_cycles()

    def fill(self, rng, pages, element_bits=None):
        """Random numbers in the first pages of all channels, and in the device DRAM."""
        config = self.config
        for page in range(24):
            tokens = to_bits(rng.standard_normal((config.tokens_per_page, config.head_dim)).astype(np.float16),
                             config.element)
            for device in self.devices:
                device.write_dram(page * config.page_bytes, layout.pack_pages(tokens, config).tobytes())
        for channel in range(config.channels):
            lines = [FLASH_COMMAND.pack(opcode=Opcode.PROGRAM, channel=channel, page=page, domain=DOMAIN,
                                        argument=(channel + page) % 24) for page in range(pages)]
            for line in lines:
                self.both(lambda host, line=line: host.run(1, line))


def command_of(pair, rng, number, *, mistakes=True):
    """A job with blocks of its own, or with some mistake."""
    config = pair.config
    rows, stripes = rng.randint(1, config.rows), rng.randint(1, 5)
    at = BLOCKS + number * 0x1800
    numbers = np.random.default_rng(rng.getrandbits(32))
    query = to_bits(numbers.standard_normal((rows, config.head_dim)).astype(np.float16), config.element)
    last = config.tokens_per_page * (stripes - 1) + rng.randint(1, config.tokens_per_page)
    start, end = numbers.integers(0, last, rows), numbers.integers(0, last + 4, rows)
    if rng.random() < 0.6:
        start[:], end[:] = 0, last
    if mistakes and rng.random() < 0.1:
        query[-1, 3] = SPECIAL[config.element]
    pair.write_memory(at, pack_queries(Queries(query, start, end, numbers.integers(0, 1 << 32, rows))))
    table, result = at + rows * query_row_bytes(config.head_dim), at + 0xC00
    entries = []
    for stripe in range(stripes):
        dram = rng.random() < 0.3
        page = rng.randint(0, 23 if dram else 11)
        if mistakes and rng.random() < 0.03:
            page = rng.choice([30, 63, 900, (1 << 24) - 1])
        entries.append(TABLE_ENTRY.pack(channel=(stripe + number) % config.channels, key_page=page,
                                        value_page=rng.randint(0, 11), flags=int(dram)))
    if mistakes and rng.random() < 0.05:
        entries[-1] = entries[-1][:3] + bytes([rng.choice([99, 0]), *entries[-1][4:7], rng.choice([4, 2])])
    pair.write_memory(table, b"".join(entries))
    fields = {"opcode": Opcode.ATTEND, "identifier": 100 + number, "rows": rows, "stripe_pages": 1, "stripes": stripes,
              "table": table, "end_token": last, "domain": DOMAIN, "tree_token": max(last - rng.randint(0, 9), 0),
              "scale": fp32_bits(0.3), "query": at, "result": result}
    if mistakes and rng.random() < 0.2:
        fields |= rng.choice([
            {"rows": 0}, {"rows": 99}, {"mode": 9}, {"end_token": 0}, {"stripes": 7}, {"scale": 0}, {"domain": 7},
            {"query": at + 8}, {"result": BLOCKS - 64}, {"result": RINGS - 64}, {"table": 1 << 40}, {"flags": 1},
            {"opcode": Opcode.COUNTERS, "result": result}, {"opcode": 1}, {"base_token": 8}, {"stripe_pages": 3},
            {"result": BLOCKS + 0x1800}, {"result": at}, {"query": BLOCKS}, {"unit_bits": 1}])
        if fields["opcode"] == Opcode.COUNTERS:
            return DATA_COMMAND.pack(opcode=Opcode.COUNTERS, identifier=100 + number, domain=DOMAIN, result=result)
    return COMMAND.pack(**fields)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("seed", range(12))
def test_jobs_together_show_what_jobs_alone_show(kernel, seed):
    rng = random.Random(seed)
    config = TINY if seed % 3 else replace(TINY, element=Element.BF16)
    pair = Pair(kernel, config)
    pair.fill(np.random.default_rng(seed), 12)
    for _ in range(12):
        lines = [command_of(pair, rng, number, mistakes=seed % 4 != 0) for number in range(rng.randint(1, 20))]
        completions = pair.both(lambda host, lines=lines: host.run(1, *lines))
        assert len(completions) == len(lines)
        pair.check()
        if rng.random() < 0.4:  # what was read may be gone
            channel, block = rng.randrange(config.channels), rng.choice([0, 4, 9])
            pair.both(lambda host, channel=channel, block=block: host.run(
                1, FLASH_COMMAND.pack(opcode=Opcode.ERASE, channel=channel, page=block, domain=DOMAIN)))
        block, bits = Block(rng.randrange(config.channels), 0, 0, 0), rng.choice([2, 4, 4, 4])
        for device in pair.devices:
            device.faults.unreadable.clear()
            if bits == 2:
                device.faults.unreadable.add((block, 0, 1))
            device.write_register("REGION_BITS", bits)
    assert sum(pair.runs) > 10


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_run_is_taken_in_one_pass(kernel):
    pair, rng = Pair(kernel), random.Random(0)
    pair.fill(np.random.default_rng(0), 12)
    line = command_of(pair, rng, 0, mistakes=False)
    lines = []
    for number in range(9):
        fields = COMMAND.unpack(line)
        lines.append(COMMAND.pack(**{name: fields[name] for name in fields if not name.startswith("reserved")} | {
            "identifier": number, "result": 0x20000 + 0x400 * number}))
    completions = pair.both(lambda host: host.run(1, *lines))
    assert [c.status for c in completions] == [Status.OK] * 9 and pair.runs == [9]
    assert [c.identifier for c in completions] == list(range(9))
    assert {c.flags for c in completions} == {CompletionFlag(0)}
    pair.check()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_copy_of_a_device_reads_its_own_pages(kernel):
    pair, rng = Pair(kernel), random.Random(3)
    pair.fill(np.random.default_rng(3), 12)
    lines = [command_of(pair, rng, number, mistakes=False) for number in range(4)]
    pair.both(lambda host: host.run(1, *lines))
    places = pair.devices[0]._runs._places
    assert places._known and not copy.deepcopy(places)._known


@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_is_that_of_jobs_alone(kernel):
    rng = np.random.default_rng(5)
    key, value = rng.standard_normal((2, 4, 300, TINY.head_dim)).astype(np.float16)
    found = []
    for name in (kernel, "numpy"):
        with Device(GoldenDevice(TINY, kernel=name)) as device:
            sequence = device.create_sequence(4, capacity_tokens=400)
            sequence.held_tokens = 40
            sequence.prefill(key[:, :250], value[:, :250])
            for token in range(250, 300):
                sequence.append(key[:, token : token + 1], value[:, token : token + 1])
                result = sequence.attend(key[:, token : token + 1])
            tree = sequence.attend(key[:, :3], causal=True, window=77)
            found.append((result.bits.tobytes(), tree.bits.tobytes(), result.lse.tolist(), result.cost, tree.cost,
                          sequence.statistics(), device.statistics()))
    assert found[0] == found[1]


def test_a_completion_is_packed_as_the_record_says():
    values = {"where": 1 << 31, "flags": 3, "head": 5, "queue": 1, "identifier": 77, "state": 0x1234}
    assert pack_completion(**values) == COMPLETION.pack(**values)


def test_results_and_queries_fit_their_blocks():
    assert query_row_bytes(64) % 64 == 0 and result_row_bytes(64) % 64 == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernel_is_compiled_once(kernel, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("KVATTIC_CACHE", raising=False)
    compiled.load.cache_clear()
    try:
        compiled.load()
        [library] = (tmp_path / "kvattic").glob("kernel-*.so")
        assert library.stat().st_uid == os.getuid() and not library.parent.stat().st_mode & 0o077
        before = library.stat().st_mtime_ns
        compiled.load.cache_clear()
        monkeypatch.setattr(compiled, "_compile", None)
        compiled.load()
        assert library.stat().st_mtime_ns == before
    finally:
        compiled.load.cache_clear()
