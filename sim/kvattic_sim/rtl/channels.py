"""Flash channels without the engine: a list of codewords is asked for, and the time is taken.

The channels (controller, ECC) and the dies are those of the drive; what asks is verilog/request_source.sv, which keeps
a given number of codewords in flight. All data that arrive are added up and compared with what the flash holds.

    run = read_list(config, requests, in_flight=..., pages=...)

`scattered` makes the list of a stream of sparse jobs.
"""

import hashlib
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from amaranth.hdl import Shape, Value
from numpy.typing import NDArray

from kvattic.spec import ecc
from kvattic.spec.config import Config
from kvattic.spec.layout import page_place
from kvattic.spec.scheduling import channels_of_corrector
from kvattic.support.files import write_whole
from kvattic_hdl import EPOCH_BITS, Corrector, FlashChannel, Netlist, Shapes, phy_signature, ports
from kvattic_sim.nand.files import nand_parameters
from kvattic_sim.rtl.transport import NandSettings
from kvattic_sim.simulators.build import (
    Model,
    Simulator,
    cache_errors,
    compile_model,
    default_build_root,
    new_run_dir,
    run_model,
)

__all__ = ["ListRun", "Requests", "build_channels", "read_list", "scattered"]

TOP = "kvattic_channel_bench"
CHANNEL, CORRECTOR = "kvattic_flash_channel", "kvattic_corrector"
LIST = 1 << 16
"""Entries of a list at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Requests:
    """What is read: int64 arrays of one length, an entry for each run of consecutive codewords of a page.

    Attributes:
        channel: where it is read.
        page: page number.
        first: its first codeword.
        count: codewords.
        room: the entry is asked for when so many codewords more may be in flight; by default its own.  So entries are
            asked for together, as a walker asks: the first one has room for all of them, the others for none.
    """

    channel: NDArray[np.int64]
    page: NDArray[np.int64]
    first: NDArray[np.int64]
    count: NDArray[np.int64]
    room: NDArray[np.int64] | None = None

    @property
    def codewords(self) -> int:
        """Codewords in all."""
        return int(self.count.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class ListRun:
    """What came of it.

    Attributes:
        cycles: from the first request to the last beat.
        codewords: codewords that came.
        errors: those of them that could not be read.
        steady_cycles: those of them with a steady load, as many codewords in flight as were allowed.
        steady_codewords: codewords that came meanwhile.
        run_dir: where the run was, with traces if they were asked for.
    """

    cycles: int
    codewords: int
    errors: int
    steady_cycles: int
    steady_codewords: int
    run_dir: Path

    def bus_utilization(self, config: Config) -> float:
        """Share of what all buses could have moved under the steady load that they did, parity included."""
        return self._share(config.raw_codeword_bytes, config)

    def read_efficiency(self, config: Config) -> float:
        """The same, but only data bytes count."""
        return self._share(config.codeword_bytes, config)

    def _share(self, codeword_bytes: int, config: Config) -> float:
        moved = self.steady_codewords * codeword_bytes
        return moved * config.clock_mhz / (self.steady_cycles * config.channels * config.part.bus_mts)


def scattered(config: Config, jobs: int, rng: np.random.Generator, *, wanted: int, stripes: int = 2,
              periods: int = 16) -> Requests:
    """What a stream of SPARF jobs reads on each channel: single codewords of groups of pages.

    A group is a page on each plane of a die.  Each job has `stripes` of them of K, of V and of the feature layout,
    which follow each other through the dies as a prefill places them.  Together come the codewords of one group, in
    its order; first those of the feature layout of job j + 2, then K of job j + 1, then V of job j.

    Args:
        config: channels, dies, part and clock.
        jobs: how many.
        rng: chooses the codewords.
        wanted: codewords of each page.
        stripes: of a job on each channel.
        periods: pages of each plane that are used, then again from the first on.
    """
    planes, groups, kinds = config.part.planes, periods * config.dies, 3
    entries: list[tuple[int, int, int, int, int]] = []
    for job in range(jobs):
        for kind, ahead in ((2, 2), (0, 1), (1, 0)):
            for stripe in range(stripes):
                number = ((job + ahead) * kinds + kind) * stripes + stripe
                for channel in range(config.channels):
                    room = wanted * planes
                    for plane in range(planes):
                        page = number % groups * planes + plane
                        for codeword in np.sort(rng.choice(config.codewords_per_page, wanted, replace=False)).tolist():
                            entries.append((channel, page, codeword, 1, room))
                            room = 0
    columns = np.array(entries, np.int64).T
    return Requests(channel=columns[0], page=columns[1], first=columns[2], count=columns[3], room=columns[4])


def _correctors(config: Config, corrector_ports: Mapping[str, tuple[Value, object]]) -> Iterator[str]:
    """The correctors, and for each channel the wires to its one, named as the channel's port."""
    sharers = channels_of_corrector(config)
    for number in range(config.channels // sharers):
        connections = {"clk": "clk", "rst": "reset"}
        for port, (value, _) in corrector_ports.items():
            _, of_group, member = port.split("__", 2)
            wire = f"channel{number * sharers + int(of_group)}_corrections__{member}"
            yield f"wire [{len(value) - 1}:0] {wire};"
            connections[port] = wire
        yield f"{CORRECTOR} corrector{number} (" + ", ".join(f".{k}({v})" for k, v in connections.items()) + ");"


def _verilog(config: Config, frames: int, channel_ports: Iterable[str],
             corrector_ports: Mapping[str, tuple[Value, object]]) -> str:
    shapes, channels = Shapes(config), config.channels
    body, source = [], {"request": shapes.request.size, "codeword": shapes.channel_word.size}
    for name, width in source.items():
        body += [f"wire [{channels * width - 1}:0] {name}_payload;", f"wire [{channels - 1}:0] {name}_valid;"]
    body.append(f"wire [{channels - 1}:0] request_ready;")
    body += _correctors(config, corrector_ports)
    for c in range(channels):
        signals = {"clk": "clk", "rst": "reset"}
        for port in channel_ports:
            signals[port] = f"channel{c}_{port}" if port.startswith("corrections__") else ""
        for name, wire in (("requests", "request"), ("codewords", "codeword")):
            width = source[wire]
            signals[f"{name}__valid"] = f"{wire}_valid[{c}]"
            signals[f"{name}__payload"] = f"{wire}_payload[{width * c} +: {width}]"
        signals |= {
            "requests__ready": f"request_ready[{c}]", "codewords__ready": "1'b1",
            "value_open": f"{{{config.jobs_in_flight}{{1'b1}}}}",
            "epoch": f"{config.jobs_in_flight * EPOCH_BITS}'d0",
            "operations__valid": "1'b0", "operations__payload": f"{shapes.operation.size}'d0",
            "page_words__valid": "1'b0", "page_words__payload": f"{shapes.page_word.size}'d0",
            "outcomes__ready": "1'b1",
        }
        nand = {"clk": "clk", "rst": "reset", "channel": f"32'd{c}", "configure": "configure",
                "load": "load", "dump": "1'b0"}
        nand |= {n: f"{n}[{32 * c} +: 32]" for n in ("violations", "load_errors", "words_moved")}
        for path, _, value in phy_signature(config).flatten(phy_signature(config).create()):
            wire = f"phy{c}_" + "_".join(map(str, path))
            body.append(f"wire [{Shape.cast(value.shape()).width - 1}:0] {wire};")
            signals["phy__" + "__".join(map(str, path))] = wire
            nand["_".join(map(str, path))] = wire
        body.append(f"{CHANNEL} channel{c} (" + ", ".join(f".{k}({v})" for k, v in signals.items()) + ");")
        parameters = nand_parameters(config, frames=frames)
        body.append(f"nand_channel #({', '.join(f'.{k}({v})' for k, v in parameters.items())}) nand{c} ("
                    + ", ".join(f".{k}({v})" for k, v in nand.items()) + ");")
    fields = {"PLACE_AT": shapes.request["tag"].offset + shapes.tag["place"].offset, "PLACE_BITS": shapes.place.width,
              "PAGE_AT": shapes.request["page"].offset, "PAGE_BITS": Shape.cast(shapes.request["page"].shape).width,
              "INDEX_AT": shapes.request["codeword"].offset,
              "INDEX_BITS": Shape.cast(shapes.request["codeword"].shape).width,
              "DATA_AT": shapes.channel_word["data"].offset, "LAST_AT": shapes.channel_word["last"].offset,
              "ERROR_AT": shapes.channel_word["error"].offset, "REQUEST_BITS": shapes.request.size,
              "BEAT_BITS": shapes.channel_word.size, "WORD_BITS": config.word_bytes * 8, "CHANNELS": channels,
              "LIST": LIST}
    outputs = {"done": 1, "cycles": 64, "sum": 64, "codewords": 32, "errors": 32, "steady_cycles": 64,
               "steady_codewords": 32}
    names = ("request_valid", "request_ready", "request_payload", "codeword_valid", "codeword_payload", "go",
             "in_flight", *outputs)
    body.append(f"request_source #({', '.join(f'.{k}({v})' for k, v in fields.items())}) source (.clk(clk), "
                f".rst(reset), {', '.join(f'.{n}({n})' for n in names)});")
    heads = ["input clk", "input rst", "input configure", "input load", "input go", "input [31:0] in_flight",
             *(f"output [{w - 1}:0] {n}" for n, w in outputs.items()),
             *(f"output [{32 * channels - 1}:0] {n}" for n in ("violations", "load_errors", "words_moved"))]
    inner = "\n  ".join(["reg reset = 1;", "always @(posedge clk) reset <= rst;", *body])
    connect = ", ".join(f".{head.split()[-1]}({head.split()[-1]})" for head in heads)
    # As in the drive's test bench: what Python may see lies one level above the rest.
    return (f"module {TOP}_inside ({', '.join(heads)});\n  {inner}\nendmodule\n"
            f"module {TOP} ({', '.join(heads)});\n  {TOP}_inside bench ({connect});\nendmodule\n")


def build_channels(config: Config, simulator: Simulator = Simulator.VERILATOR, *, frames: int) -> Model:
    """Compile the channels of a configuration with their dies and the source of requests.

    Args:
        config: channels, dies, part and clock.
        simulator: what to compile for.
        frames: pages whose contents each channel can keep.
    """
    netlist = Netlist()
    channel, corrector = FlashChannel(config), Corrector(config, channels_of_corrector(config))
    rtl = [netlist.convert(block, name, ports(block)) for block, name in ((channel, CHANNEL), (corrector, CORRECTOR))]
    text = "\n".join([*netlist.modules.values(), *rtl, _verilog(config, frames, ports(channel), ports(corrector))])
    root = default_build_root()
    bench = root / "rtl" / hashlib.sha256(text.encode()).hexdigest()[:16] / f"{TOP}.sv"
    with cache_errors(root):
        write_whole(bench, text)
    with resources.as_file(resources.files("kvattic_sim") / "verilog") as verilog:
        return compile_model(
            [bench, verilog / "nand_channel.sv", verilog / "request_source.sv"], TOP, simulator)


def read_list(config: Config, requests: Requests, *, in_flight: int, pages: NDArray[np.int64],
              settings: NandSettings | None = None, model: Model | None = None, seed: int = 1) -> ListRun:
    """Fill pages of every channel with random data, read the list, and check the sum of all that came.

    Args:
        config: channels, dies, part and clock.
        requests: what to read; of pages in `pages`.
        in_flight: codewords outstanding at most, over all channels.
        pages: page numbers that hold data, the same on each channel.
        settings: of the dies.
        model: from `build_channels`, if it is there already.
        seed: of the data.

    Raises:
        RuntimeError: the data are not what the flash holds, or the dies saw a violation.
    """
    if len(requests.page) > LIST:
        raise ValueError(f"a list must have at most {LIST} entries, not {len(requests.page)}")
    model = model or build_channels(config, frames=len(pages))
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (config.channels, len(pages), config.page_bytes), np.uint8)
    run_dir = new_run_dir(f"channels-{config.part.name}-")
    room = requests.count if requests.room is None else requests.room
    if max(room.max(), requests.count.max()) > 255:
        raise ValueError("an entry must have at most 255 codewords, and ask for room for at most 255")
    entries = (requests.channel << 56 | requests.page << 32 | requests.first << 16 | room << 8 | requests.count
               ).astype(">u8")
    write_whole(run_dir / "requests.bin", entries.tobytes())
    raw = [ecc.encode(config, image, pages) for image in data]
    places = page_place(pages, config)
    indices = config.part.page_index(places.die, places.plane, places.zone, places.page)
    write_whole(run_dir / "job.pickle", pickle.dumps((config, in_flight, indices, raw, settings or NandSettings())))
    run_model(model, test_module="kvattic_sim.rtl.cocotb_channels", run_dir=run_dir)
    found: dict[str, Any] = pickle.loads((run_dir / "result.pickle").read_bytes())

    # Every codeword's words that are sent, added up as 64-bit numbers.
    used = config.words_per_codeword * config.word_bytes
    sums = np.ascontiguousarray(
        data.reshape(config.channels, len(pages), config.codewords_per_page, config.codeword_bytes)[..., :used]
    ).view("<u8").sum(axis=-1, dtype=np.uint64)
    place = {int(page): i for i, page in enumerate(pages)}
    expected = np.uint64(0)
    with np.errstate(over="ignore"):
        for channel, page, first, count in zip(requests.channel.tolist(), requests.page.tolist(),
                                               requests.first.tolist(), requests.count.tolist(), strict=True):
            expected += sums[channel, place[page], first : first + count].sum(dtype=np.uint64)
    if found["violations"]:
        raise RuntimeError(f"the dies saw violations: {found['violations'][:5]} (in {run_dir})")
    if found["codewords"] != requests.codewords or (found["errors"] == 0 and found["sum"] != int(expected)):
        raise RuntimeError(f"what came is not what the flash holds: {found}, expected {int(expected)} (in {run_dir})")
    return ListRun(cycles=found["cycles"], codewords=found["codewords"], errors=found["errors"],
                   steady_cycles=found["steady_cycles"], steady_codewords=found["steady_codewords"],
                   run_dir=run_dir)
