"""What the flash path makes of its buses: dense attention, random pages, single codewords, ECC, writing.

Every figure comes from dies with their timing, behind controllers and ECC; every result is compared, bit for bit with
the golden device where the engine takes part, by the sum of all data where channels run alone.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvattic import PAPER, AttendResult, Config, Device
from kvattic.spec.nand import part
from kvattic_sim.reports.benches.engine import Bench, Case, Figures, Lab, check
from kvattic_sim.rtl.channels import Requests, build_channels, read_list, scattered
from kvattic_sim.rtl.jobs import report, run_in_simulation
from kvattic_sim.rtl.transport import NandSettings, RtlTransport
from kvattic_sim.workloads import Usage, decode, measured

__all__ = ["BENCHES", "DENSE", "Measured", "run_drive"]

DENSE = Case(config=PAPER, kv_heads=40, tokens=2048)
"""OPT-13B's heads on the paper's drive."""
ERROR_RATES = (1e-5, 1e-4)
"""Raw bit errors over bits read."""
DRAM_BYTES = 1 << 27
"""Device DRAM: room for all pages of the prefill, so that they are submitted at once."""
VARIANTS = {
    "tlc": Case(config=replace(PAPER, part=part("tlc")), kv_heads=16, tokens=2048),
    "lowlatency": Case(config=replace(PAPER, part=part("lowlatency")), kv_heads=16, tokens=2048),
}
"""The same on other parts, fewer heads of it."""

RANDOM_PAGE = replace(PAPER, part=part("mqsim_1000"))
"""MQSim's geometry: 8 channels x 1,000 MT/s, 16 KB pages, tR 50 us, 8 dies x 2 planes a channel."""
RANDOM_PAGES, IN_FLIGHT = 4096, 1024
"""Pages read, and reads (of pages, or of codewords) in flight over all channels."""
COLUMN_SHARE = 16
"""One of this many codewords is wanted."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run on the drive gave: the usage of writing, of attending, and of attending with bit errors."""

    result: AttendResult
    write: Usage
    dense: Usage
    errors: dict[float, tuple[AttendResult, Usage]]


def on_drive(device: Device, case: Case, error_rates: tuple[float, ...] = ()) -> Measured:
    """Write, attend, and attend again with bit errors; this is the part that runs inside of the simulator."""
    transport = device.transport
    assert isinstance(transport, RtlTransport)
    transport.heartbeat = lambda cycle: report(f"cycles|{cycle}")
    attention = decode(case.config, kv_heads=case.kv_heads, tokens=case.tokens, group=case.config.rows)
    sequence = device.create_sequence(case.kv_heads, capacity_tokens=case.tokens)
    _, write = measured(device, lambda: sequence.prefill(attention.key, attention.value))
    result, dense = measured(device, lambda: sequence.attend(attention.query))
    errors = {}
    for rate in error_rates:
        transport.set_flash(NandSettings(bit_error_rate=rate))
        errors[rate] = measured(device, lambda: sequence.attend(attention.query))
    return Measured(result, write, dense, errors)


def run_drive(lab: Lab, name: str, case: Case, error_rates: tuple[float, ...] = ()) -> Measured:
    """Write and attend a case on the RTL of a whole drive, and check it.

    Args:
        lab: where.
        name: for what is told of it.
        case: what to attend.
        error_rates: attend again with so many raw bit errors over bits read.

    Raises:
        WrongResultError: a bit or a counter is wrong.
    """

    def follow(line: str) -> None:
        kind, _, rest = line.partition("|")
        if kind == "cycles":
            lab.progress(f"drive, {name}", int(rest), None)

    lab.progress(f"drive, {name}: building", 0, None)
    raw = 2 * case.kv_heads * case.tokens * case.config.token_bytes // case.config.page_bytes
    found: Measured = run_in_simulation(
        case.config, on_drive, {"case": case, "error_rates": error_rates}, simulator=lab.simulator,
        frames=raw // case.config.channels + case.config.zone_pages // 8, dram_bytes=DRAM_BYTES, progress=follow).result
    check(case, found.result, found.dense)
    for result, usage in found.errors.values():
        check(case, result, usage)
    return found


def write_limit(config: Config) -> float:
    """Pages a cycle that the part lets all channels program: its planes all busy, or its buses."""
    planes = config.dies * config.part.planes / (config.part.t_prog * config.clock_mhz / 1000)
    bus = config.part.bus_mts / config.clock_mhz / config.raw_page_bytes
    return config.channels * min(planes, bus)


def dense(lab: Lab) -> Figures:
    """The paper's drive: use of the buses, cost of bit errors, use of the program bandwidth in writing K and V."""
    found, config = run_drive(lab, "paper", DENSE, ERROR_RATES), DENSE.config
    (rate, (_, few)), (_, (_, many)) = found.errors.items()
    assert rate == ERROR_RATES[0]
    return {
        "flash.dense.bus_utilization": found.dense.bus_use_in_window(config),
        "flash.dense.command_share": found.dense.flash["flash_commands"] * config.part.t_cad * config.clock_mhz / 1000
        / (config.channels * found.dense.window),
        "flash.dense.die_utilization": found.dense.die_use(config),
        "flash.ecc.cost": few.cycles / found.dense.cycles,
        "flash.ecc.cost.1e-4": many.cycles / found.dense.cycles,
        "flash.ecc.corrected.1e-4": many.flash["corrected"] / many.flash["codewords"],
        "flash.ecc.retries.1e-4": many.flash["retries"],
        "flash.write.utilization.token_layout":
            found.write.flash["page_programs"] / found.write.cycles / write_limit(config),
    }


def write_both_layouts(device: Device, case: Case) -> Usage:
    """Write a sequence with the feature layout, K twice; runs inside of the simulator."""
    attention = decode(case.config, kv_heads=case.kv_heads, tokens=case.tokens)
    sequence = device.create_sequence(case.kv_heads, capacity_tokens=case.tokens, sparse=True)
    return measured(device, lambda: sequence.prefill(attention.key, attention.value))[1]


def write(lab: Lab) -> Figures:
    """The program bandwidth in the prefill of a layer, K twice and V once."""
    config = DENSE.config
    lab.progress("drive, writing both layouts", 0, None)
    pages = 3 * DENSE.kv_heads * DENSE.tokens * config.token_bytes // config.page_bytes
    usage: Usage = run_in_simulation(
        config, write_both_layouts, {"case": DENSE}, simulator=lab.simulator,
        frames=pages // config.channels + config.zone_pages // 8, dram_bytes=DRAM_BYTES).result
    return {"flash.write.utilization": usage.flash["page_programs"] / usage.cycles / write_limit(config)}


def variant(name: str) -> Bench:
    """Use of the buses on another part."""
    key = f"flash.dense.bus_utilization.{name}"

    def run(lab: Lab) -> Figures:
        found, config = run_drive(lab, name, VARIANTS[name]), VARIANTS[name].config
        return {
            key: found.dense.bus_use_in_window(config),
            f"flash.dense.die_utilization.{name}": found.dense.die_use(config),
            f"flash.write.utilization.{name}":
                found.write.flash["page_programs"] / found.write.cycles / write_limit(config),
        }

    return Bench(keys=(key, f"flash.dense.die_utilization.{name}", f"flash.write.utilization.{name}"), measure=run)


def random_page(lab: Lab) -> Figures:
    """Whole pages at random places, 1,024 in flight."""
    config, rng = RANDOM_PAGE, np.random.default_rng(1)
    pages = np.arange(16 * config.dies * config.part.planes)   # the first pages of all blocks of a zone
    one = np.ones(RANDOM_PAGES, np.int64)
    requests = Requests(channel=rng.integers(0, config.channels, RANDOM_PAGES), page=rng.choice(pages, RANDOM_PAGES),
                        first=0 * one, count=config.codewords_per_page * one)
    lab.progress("channels: random pages", 0, None)
    run = read_list(config, requests, in_flight=IN_FLIGHT * config.codewords_per_page, pages=pages)
    return {"flash.random_page.bus_utilization": run.bus_utilization(config)}


def column(name: str, config: Config) -> Bench:
    """One codeword in 16, chosen at random, in the order of their places."""
    key = f"flash.column.read_efficiency{name}"

    def run(lab: Lab) -> Figures:
        rng = np.random.default_rng(1)
        pages = np.arange(16 * config.dies * config.part.planes)
        chosen = rng.random((config.channels, len(pages), config.codewords_per_page)) < 1 / COLUMN_SHARE
        channel, page, first = (a.astype(np.int64) for a in np.nonzero(chosen))
        order = np.lexsort((first, channel, page))   # all channels side by side
        requests = Requests(channel=channel[order], page=pages[page[order]], first=first[order],
                            count=np.ones(len(order), np.int64))
        lab.progress(f"channels: single codewords, {config.part.name}", 0, None)
        run = read_list(config, requests, in_flight=IN_FLIGHT, pages=pages)
        return {key: run.read_efficiency(config), f"flash.column.bus_utilization{name}": run.bus_utilization(config)}

    return Bench(keys=(key, f"flash.column.bus_utilization{name}"), measure=run)


CACHED = replace(PAPER, cache_reads=True)
"""The paper's drive with cache reads, which hide tR where little of each page is wanted."""
SEPARATE_BUS = replace(CACHED, part=replace(PAPER.part, name="pslc, separate command bus", separate_command_bus=True))
"""The same with JESD230G's separate command and address bus, nothing else changed."""

# One channel alone: the figures of docs/controller.md.


def _channels() -> dict[str, Config]:
    """The paper's drive with one channel, both kinds of command bus, with cache reads and without."""
    one = replace(PAPER.with_lane_channels(1), channels=1)
    separate = replace(one, part=SEPARATE_BUS.part)
    return {"shared": one, "shared.cache_reads": replace(one, cache_reads=True),
            "separate": separate, "separate.cache_reads": replace(separate, cache_reads=True)}


CHANNELS = _channels()
OTHER_CHANNELS = {
    "tlc": replace(CHANNELS["shared"], part=part("tlc")),
    "tlc.cache_reads": replace(CHANNELS["shared.cache_reads"], part=part("tlc")),
    "lowlatency": replace(CHANNELS["shared"], part=part("lowlatency")),
    "two_dies": replace(CHANNELS["shared"], dies=2),
    "two_dies.cache_reads": replace(CHANNELS["shared.cache_reads"], dies=2),
}
CHANNEL_IN_FLIGHT = 1024
"""Codewords: a page of every plane of eight dies."""
SPARSE_IN_FLIGHT = (64, 96, 128, 192)
SPARSE_JOBS, SPARSE_WANTED = 48, 4


def _pages(config: Config) -> NDArray[np.int64]:
    """The first 16 pages of a block of each plane."""
    return np.arange(16 * config.dies * config.part.planes)


def dense_pages(name: str, config: Config) -> Bench:
    """Whole pages in their order."""
    key = f"flash.channel.dense.{name}"

    def run(lab: Lab) -> Figures:
        lab.progress(f"a channel: dense pages, {name}", 0, None)
        pages = _pages(config)
        requests = Requests(channel=0 * pages, page=pages, first=0 * pages,
                            count=np.full(len(pages), config.codewords_per_page))
        return {key: read_list(config, requests, in_flight=CHANNEL_IN_FLIGHT, pages=pages).bus_utilization(config)}

    return Bench(keys=(key,), measure=run)


def sparse_jobs(name: str, config: Config) -> Bench:
    """What SPARF jobs read, by the number of codewords in flight."""
    keys = {f"flash.channel.sparse.{name}.{n}": n for n in SPARSE_IN_FLIGHT}

    def run(lab: Lab) -> Figures:
        pages = _pages(config)
        requests = scattered(config, SPARSE_JOBS, np.random.default_rng(1), wanted=SPARSE_WANTED)
        lab.progress(f"a channel: what sparse jobs read, {name}: building", 0, None)
        model = build_channels(config, frames=len(pages))
        found = {}
        for key, in_flight in keys.items():
            lab.progress(f"a channel: what sparse jobs read, {name}, {in_flight} in flight", 0, None)
            run = read_list(config, requests, in_flight=in_flight, pages=pages, model=model)
            found[key] = run.bus_utilization(config)
        return found

    return Bench(keys=tuple(keys), measure=run)


BENCHES = (
    *(sparse_jobs(name, config) for name, config in CHANNELS.items()),
    *(dense_pages(name, config) for name, config in (CHANNELS | OTHER_CHANNELS).items()),
    Bench(keys=("flash.random_page.bus_utilization",), measure=random_page),
    column("", CACHED),
    column(".no_cache_reads", PAPER),
    column(".separate_command_bus", SEPARATE_BUS),
    Bench(keys=("flash.dense.bus_utilization", "flash.dense.command_share", "flash.dense.die_utilization",
                "flash.ecc.cost", "flash.ecc.cost.1e-4", "flash.ecc.corrected.1e-4", "flash.ecc.retries.1e-4",
                "flash.write.utilization.token_layout"), measure=dense),
    Bench(keys=("flash.write.utilization",), measure=write),
    *(variant(name) for name in VARIANTS),
)
"""What the bench runner calls, short ones first."""
