"""The test bench: the drive with NAND on its PHYs, or the engine alone with an ideal flash twin for each channel.

Device DRAM is a behavioural memory inside of the model.  Clocks stop when nobody needs them:

Python is slow, so it must not be called in each cycle.  cocotbext-axi waits for edges of its clock; here it gets two
clocks of its own, which run only while there is something to transfer: ``host_clk`` while Python holds
``host_active``, ``memory_clk`` while an AXI4 transaction is outstanding or begins.  While the engine works on
codewords, neither runs, and Python sleeps until ``irq``.

Both rise when ``clk`` falls.  Between the two edges nothing moves, so what Python sees must be what the engine saw at
the rising edge of ``clk``: signals that the engine drives reach Python through a register on ``clk``, and signals
that Python drives go straight to the engine, which samples them at the next edge.  Seen from either side, that is
an ordinary synchronous bus, and no simulator's order of events matters.
"""

import hashlib
import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import cast

from amaranth.hdl import Shape
from amaranth.lib import data
from amaranth.lib.wiring import Member, Out

import kvattic
import kvattic_hdl
from kvattic.spec.commands import MediaCause, Opcode, Status
from kvattic.spec.config import Config
from kvattic.spec.registers import ADDRESS_BITS
from kvattic.support.files import write_whole
from kvattic_hdl import (
    AXI_READ,
    AXI_WRITE,
    EPOCH_BITS,
    Shapes,
    axi_lite,
    dram_signature,
    generate,
    operation_code,
    phy_signature,
)
from kvattic_sim.nand.files import nand_parameters
from kvattic_sim.simulators import progress
from kvattic_sim.simulators.build import Model, Simulator, cache_errors, compile_model, default_build_root, locked

__all__ = [
    "DRAM_BYTES",
    "FLASH_BYTES",
    "QUEUE",
    "TOP",
    "Flash",
    "build_testbench",
    "rtl_verilog",
    "testbench_verilog",
]

TOP = "kvattic_testbench"
"""Name of the top-level module."""
TWIN = "kvattic_twin"
"""Name of the module that is the twin of one channel."""
FLASH_BYTES = {Simulator.VERILATOR: 1 << 27, Simulator.ICARUS: 1 << 21}
"""Contents that all channels keep together, unless `build_testbench` is told otherwise; Icarus is slow to begin."""
DRAM_BYTES = {Simulator.VERILATOR: 1 << 24, Simulator.ICARUS: 1 << 20}
"""Size of device DRAM."""
QUEUE = 64
"""Requests that a flash twin keeps, unless `build_testbench` is told otherwise."""
_SETTINGS = {
    "latency": 32,
    "jitter": 32,
    "shuffle": 1,
    "gap": 9,
    "gap_pattern": 4,
    "request_stall": 9,
    "request_stall_pattern": 4,
    "seed": 32,
    "fault_number": 32,
    "fault_value": 32,
    "configure": 1,
}
"""Inputs that all ideal flash twins share, and their widths."""
_NAND_SETTINGS = {"configure": 1, "load": 1, "dump": 1}
"""Inputs that all NAND models share: toggles that make them read or write their files."""
_DRAM_SETTINGS = {"latency": 32, "bad": 1, "bad_word": 32, "load": 1}
"""Inputs of device DRAM."""


class Flash(StrEnum):
    """What stands behind the channels."""

    NAND = "nand"
    """The whole drive, with NAND timing, ECC and all."""
    IDEAL = "ideal"
    """The engine alone; every codeword is at hand at the lanes' full rate."""

    @property
    def top(self) -> str:
        """The RTL's top module."""
        return "kvattic_drive" if self is Flash.NAND else "kvattic_engine"

    @property
    def twin(self) -> str:
        """The behavioural module on each channel."""
        return "nand_channel" if self is Flash.NAND else "flash_channel"

    @property
    def separate_modules(self) -> tuple[str, ...]:
        """Modules that are in the model several times, and compiled once."""
        channel = ("kvattic_flash_channel", "kvattic_corrector") if self is Flash.NAND else ()
        return ("kvattic_lane", *channel, TWIN)

    @property
    def settings(self) -> dict[str, int]:
        """Inputs that all twins share, and their widths."""
        return _NAND_SETTINGS if self is Flash.NAND else _SETTINGS


def _range(width: int) -> str:
    return f"[{width - 1}:0]"


def _ports(layout: data.StructLayout, prefix: str, names: dict[str, str]) -> dict[str, int]:
    """Verilog parameters for the fields of a layout, `names` from field to parameter."""
    parameters = {}
    for field, name in names.items():
        parameters[f"{prefix}{name}_AT"] = layout[field].offset
        parameters[f"{prefix}{name}_BITS"] = Shape.cast(layout[field].shape).width
    return parameters


def ideal_parameters(config: Config, frames: int, queue: int) -> dict[str, int]:
    """Parameters of flash_channel.sv: bit positions from `Shapes`, geometry, capacity."""
    shapes = Shapes(config)
    parameters = {
        "REQUEST_BITS": shapes.request.size,
        **_ports(shapes.request, "", {"tag": "TAG", "page": "PAGE", "codeword": "INDEX"}),
        **_ports(shapes.tag, "", {"slot": "SLOT", "kind": "KIND", "epoch": "EPOCH"}),
        "OPERATION_BITS": shapes.operation.size,
        **_ports(shapes.operation, "OPERATION_", {"opcode": "OPCODE", "page": "PAGE", "identity": "IDENTITY"}),
        "OUTCOME_BITS": shapes.outcome.size,
        **_ports(shapes.outcome, "OUTCOME_", {"identity": "IDENTITY", "page": "PAGE", "status": "STATUS"}),
        "PAGE_WORD_BITS": shapes.page_word.size,
        **_ports(shapes.page_word, "PAGE_WORD_", {"data": "DATA"}),
        "MEDIA_BITS": shapes.media_error.size,
        **_ports(shapes.media_error, "MEDIA_", {"page": "PAGE", "codeword": "INDEX", "cause": "CAUSE"}),
        "IDENTITY_BITS": Shape.cast(shapes.identity).width,
        "PROGRAM": operation_code(Opcode.PROGRAM),
        "ERASE": operation_code(Opcode.ERASE),
        "PROGRAM_FAILED": int(Status.PROGRAM_FAILED),
        "ERASED": int(MediaCause.ERASED),
        "BEAT_BITS": shapes.channel_word.size,
        **_ports(shapes.channel_word, "BEAT_", {"tag": "TAG", "data": "DATA", "last": "LAST", "error": "ERROR"}),
        "WORD_BITS": config.word_bytes * 8,
        "BEATS": config.words_per_codeword,
        "WORDS": config.codeword_bytes // config.word_bytes,
        "CODEWORDS": config.codewords_per_page,
        "PAGES": config.pages_per_channel,
        "FRAMES": frames,
        "UNIT_BITS": config.plane_bits + config.die_bits,
        "BLOCK_PAGE_BITS": config.block_page_bits,
        "QUEUE": queue,
        "SLOTS": config.jobs_in_flight,
    }
    known = set(re.findall(r"parameter (?:\[\S+\] )?(\w+)", _verilog("flash_channel.sv")))
    return {name: value for name, value in parameters.items() if name in known}


def _verilog(name: str) -> str:
    return (resources.files("kvattic_sim") / "verilog" / name).read_text()


class _Bench:
    """Text of the test bench, as it grows: ports, declarations, connections of the RTL, the twins' module."""

    def __init__(self) -> None:
        self.ports: list[str] = []
        self.body: list[str] = []
        self.connections: list[str] = []
        self.registered: list[tuple[str, str]] = []
        self.twin = ""

    def wire(self, name: str, width: int) -> str:
        """Declare a wire that the RTL has as a port of the same name; gives the name."""
        self.body.append(f"wire {_range(width)} {name};")
        self.connections.append(f".{name}({name})")
        return name


def _buses(bench: _Bench) -> None:
    """The buses to Python.

    A member that is Out in the signature is driven by the manager: Python on the host's bus, the RTL on the memory's.
    """
    for bus, its_prefix, members, python_is_manager in (
        ("host", "s_axil", axi_lite(ADDRESS_BITS).members, True),
        ("memory", "m_axi", AXI_READ.members, False),
        ("memory", "m_axi", AXI_WRITE.members, False),
    ):
        for name, member in members.items():
            width = Shape.cast(member.shape).width
            ours, its = f"{bus}_{name}", f"{its_prefix}_{name}"
            if (member.flow is Out) == python_is_manager:
                bench.ports.append(f"input {_range(width)} {ours}")
                bench.connections.append(f".{its}({ours})")
            else:
                bench.ports.append(f"output reg {_range(width)} {ours}")
                bench.wire(its, width)
                bench.registered.append((ours, its))


def _dram(bench: _Bench, config: Config, dram_bytes: int) -> None:
    """Device DRAM on its port."""
    signals = [".clk(clk)", ".rst(reset)", ".load_errors(dram_load_errors)"]
    used = ("arvalid", "arready", "araddr", "arlen", "rvalid", "rready", "rdata", "rresp", "rlast")
    for name, member in dram_signature(config).members.items():
        wire = bench.wire(f"m_axi_dram_{name}", Shape.cast(member.shape).width)
        if name in used:
            signals.append(f".{name}({wire})")
        elif member.flow is not Out:
            bench.body.append(f"assign {wire} = 0;")
    for name, width in _DRAM_SETTINGS.items():
        bench.ports.append(f"input {_range(width)} dram_{name}")
        signals.append(f".{name}(dram_{name})")
    bench.ports += ["output [31:0] dram_load_errors", "output [63:0] dram_size"]
    bench.body += [
        f"assign dram_size = 64'd{dram_bytes};",
        f"axi_memory #(.WORD_BITS({config.dram_beat_bytes * 8}), .WORDS({dram_bytes // config.dram_beat_bytes}), "
        f".LOG2_BYTES({config.dram_beat_bytes.bit_length() - 1})) dram ({', '.join(signals)});",
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Port:
    """A port of a twin: its width, its direction, and what stands at it on one channel."""

    name: str
    width: int
    signal: str
    output: bool = False


def _put_twin(bench: _Bench, channel: int, twin: str, parameters: dict[str, int], ports: list[_Port]) -> None:
    """Put a channel's twin into the bench, as an instance of a module that is the same for all channels.

    It has no parameters, so that it can be compiled by itself.
    """
    signals = ", ".join(f".{port.name}({port.signal})" for port in ports)
    bench.body.append(f"{TWIN} twin{channel} ({signals});")
    heads = ",\n    ".join(f"{'output' if port.output else 'input'} {_range(port.width)} {port.name}" for port in ports)
    values = ", ".join(f".{name}({value})" for name, value in parameters.items())
    names = ", ".join(f".{port.name}({port.name})" for port in ports)
    bench.twin = f"module {TWIN} (\n    {heads}\n);\n  {twin} #({values})\n    model ({names});\nendmodule\n"


def _common(channel: int, settings: dict[str, int]) -> list[_Port]:
    """The ports of both twins."""
    return [
        _Port(name="clk", width=1, signal="clk"),
        _Port(name="rst", width=1, signal="reset"),
        _Port(name="channel", width=32, signal=f"32'd{channel}"),
        *(_Port(name=name, width=width, signal=f"flash_{name}") for name, width in settings.items()),
    ]


def _ideal_channels(bench: _Bench, config: Config, frames: int, queue: int) -> None:
    """An ideal twin on the streams of each of the engine's channels."""
    shapes, channels = Shapes(config), config.channels
    bench.ports += [f"input {_range(channels * 3)} flash_fault", f"output {_range(32 * channels)} flash_served"]
    value_open = bench.wire("flash_value_open", config.jobs_in_flight)
    epoch = bench.wire("flash_epoch", config.jobs_in_flight * EPOCH_BITS)
    events = bench.wire("flash_events", channels * shapes.flash_events.size)
    media = bench.wire("media_errors", channels * shapes.media_error.size)
    streams = {"request": (shapes.request, False), "codeword": (shapes.channel_word, True),
               "operation": (shapes.operation, False), "page_word": (shapes.page_word, False),
               "outcome": (shapes.outcome, True)}
    error = shapes.media_error.size
    for c in range(channels):
        ports = _common(c, _SETTINGS)
        ports += [_Port(name="value_open", width=config.jobs_in_flight, signal=value_open),
                  _Port(name="epoch", width=config.jobs_in_flight * EPOCH_BITS, signal=epoch)]
        for stream, (shape, given) in streams.items():
            for signal, width in (("valid", 1), ("ready", 1), ("payload", shape.size)):
                wire = bench.wire(f"flash{c}_{stream}_{signal}", width)
                ports.append(_Port(
                    name=f"{stream}_{signal}", width=width, signal=wire, output=given != (signal == "ready")))
        unreadable = shapes.flash_events["unreadable"].offset
        size, rest = shapes.flash_events.size, shapes.flash_events.size - unreadable - 1
        bench.body += [
            f"wire media_valid{c};",
            f"assign {events}[{size * c} +: {size}] = {{{rest}'d0, media_valid{c}, {unreadable}'d0}};",
        ]
        ports += [
            _Port(name="fault", width=3, signal=f"flash_fault[{3 * c} +: 3]"),
            _Port(name="served", width=32, signal=f"flash_served[{32 * c} +: 32]", output=True),
            _Port(name="media_valid", width=1, signal=f"media_valid{c}", output=True),
            _Port(name="media_payload", width=error, signal=f"{media}[{error * c} +: {error}]", output=True),
        ]
        _put_twin(bench, c, "flash_channel", ideal_parameters(config, frames, queue), ports)


def _nand_channels(bench: _Bench, config: Config, frames: int) -> None:
    """Dies on each PHY of the drive."""
    outputs = ("violations", "load_errors", "words_moved")
    bench.ports += [f"output {_range(32 * config.channels)} flash_{name}" for name in outputs]
    phy = phy_signature(config)
    for c in range(config.channels):
        ports = _common(c, _NAND_SETTINGS)
        for path, member, value in phy.flatten(phy.create()):
            name, width = "_".join(map(str, path)), Shape.cast(value.shape()).width
            wire = bench.wire(f"phy{c}_{name}", width)
            flow = cast(Member, member).flow  # the stubs say that it is a Flow itself
            ports.append(_Port(name=name, width=width, signal=wire, output=flow is not Out))
        ports += [_Port(name=name, width=32, signal=f"flash_{name}[{32 * c} +: 32]", output=True) for name in outputs]
        _put_twin(bench, c, "nand_channel", nand_parameters(config, frames=frames), ports)


def testbench_verilog(
    config: Config, flash: Flash = Flash.NAND, *, frames: int, dram_bytes: int, queue: int = QUEUE
) -> str:
    """The test bench as SystemVerilog text, top module `TOP`; it needs the RTL and the behavioural modules.

    Args:
        config: what the RTL was generated for.
        flash: what stands behind the channels.
        frames: pages whose contents each channel can keep.
        dram_bytes: size of device DRAM.
        queue: requests that each ideal twin keeps.
    """
    bench = _Bench()
    bench.ports += ["input clk", "input rst", "input host_active"]
    bench.connections += [".clk(clk)", ".rst(reset)", ".irq(irq)"]
    bench.body += [
        "// An input of the top level would make all logic behind it input-combinational, evaluated twice a cycle.",
        "reg reset = 1;",
        "always @(posedge clk) reset <= rst;",
        "initial cycles = 0;",
        "always @(posedge clk) cycles <= cycles + 1;",
    ]
    _buses(bench)
    bench.ports += [
        "output host_clk",
        "output memory_clk",
        "output irq",
        *(f"input {_range(width)} flash_{name}" for name, width in flash.settings.items()),
        "output reg [63:0] cycles",
        "output [31:0] frames_per_channel",
    ]
    bench.body.append(f"assign frames_per_channel = {frames};")
    _dram(bench, config, dram_bytes)
    if flash is Flash.NAND:
        _nand_channels(bench, config, frames)
    else:
        _ideal_channels(bench, config, frames, queue)
    bench.body.append(f"{flash.top} rtl (\n    {(','+chr(10)+'    ').join(bench.connections)});")

    bench.body += [
        "// What the RTL showed at the edge, for Python, which looks between the edges.",
        "always @(posedge clk) begin",
        *(f"  {ours} <= {its};" for ours, its in bench.registered),
        "end",
        "initial begin",
        *(f"  {ours} = 0;" for ours, _ in bench.registered),
        "end",
        "// The enables change when clk rises, where the gated clocks are low: no glitches.",
        "reg host_enable = 0, memory_enable = 0;",
        "reg [7:0] reads = 0, writes = 0;",
        "reg [1:0] lately = 0;",
        "wire [7:0] reads_next = reads + (m_axi_arvalid & memory_arready)",
        "    - (memory_rvalid & m_axi_rready & memory_rlast);",
        "wire [7:0] writes_next = writes + (m_axi_awvalid & memory_awready)",
        "    - (memory_bvalid & m_axi_bready);",
        "wire memory_busy = m_axi_arvalid | m_axi_awvalid | m_axi_wvalid | memory_rvalid | memory_bvalid",
        "    | reads_next != 0 | writes_next != 0;",
        "always @(posedge clk) begin",
        "  host_enable <= host_active;",
        "  memory_enable <= memory_busy | lately != 0;",
        "  lately <= {lately[0], memory_busy};",
        "  reads <= rst ? 0 : reads_next;",
        "  writes <= rst ? 0 : writes_next;",
        "end",
        "assign host_clk = ~clk & host_enable;",
        "assign memory_clk = ~clk & memory_enable;",
    ]
    head = ",\n    ".join(bench.ports)
    text = "\n".join(f"  {line}" for line in bench.body)
    # Python sees the top level's signals only, and what it may see is slow: all the rest lies one level deeper.
    shell = ",\n    ".join(port.replace("output reg", "output") for port in bench.ports)
    names = ", ".join(f".{name}({name})" for name in (port.split()[-1] for port in bench.ports))
    return (f"{bench.twin}\nmodule {TOP}_inside (\n    {head}\n);\n\n{text}\n\nendmodule\n\n"
            f"module {TOP} (\n    {shell}\n);\n  {TOP}_inside bench ({names});\nendmodule\n")


def _rtl_sources() -> list[Path]:
    """The modules that the Verilog depends on: kvattic_hdl, and what it imports from kvattic, directly or not."""
    host = Path(kvattic.__path__[0])
    found = sorted(Path(kvattic_hdl.__path__[0]).rglob("*.py"))
    for source in found:
        for module in _imports(source.read_text()):
            place = host.joinpath(*module.split(".")[1:])
            for path in (place.with_suffix(".py"), place / "__init__.py"):
                if module.startswith("kvattic.") and path.is_file() and path not in found:
                    found.append(path)
    return found


def _imports(source: str) -> Iterator[str]:
    """Names of the modules that a source may import from kvattic; a test holds the one form of imports."""
    # Not by ast.parse: CPython 3.11's fails where two threads call it at once, as a Dask worker's do.
    for module, names in re.findall(r"^\s*from (kvattic[\w.]*) import (\([^)]*\)|[^\n(]+)", source, re.MULTILINE):
        yield module
        yield from (f"{module}.{name}" for name in re.findall(r"\w+", names))


def rtl_verilog(config: Config, top: str, *, build_root: Path | None = None) -> Path:
    """Verilog of the drive or the engine, generated unless the same sources gave it before.

    Args:
        config: what to generate.
        top: one of `kvattic_hdl.TOPS`.
        build_root: where to put it; `default_build_root` if None.
    """
    root = (build_root or default_build_root()).resolve() / "rtl"
    digest = hashlib.sha256(config.to_json().encode())
    digest.update(importlib.metadata.version("amaranth").encode())
    for source in _rtl_sources():
        digest.update(f"{source.parent.name}/{source.name}".encode() + source.read_bytes())
    path = root / digest.hexdigest()[:16] / f"{top}.sv"
    if not path.is_file():
        with cache_errors(root.parent), locked(root / f"{path.parent.name}.lock"):
            if not path.is_file():
                progress.tell(progress.GENERATING, top)
                generate(config, path, top)
    return path


def build_testbench(
    config: Config,
    simulator: Simulator | str,
    flash: Flash = Flash.NAND,
    *,
    waves: bool = False,
    frames: int | None = None,
    dram_bytes: int | None = None,
    queue: int = QUEUE,
    build_root: Path | None = None,
) -> Model:
    """Compile the RTL with what stands around it, or return the model that was compiled before.

    Args:
        config: what to build.
        simulator: what to compile for.
        flash: what stands behind the channels.
        waves: compile so that waves can be recorded.
        frames: pages whose contents each channel can keep; such that all have `FLASH_BYTES` by default.
        dram_bytes: size of device DRAM; `DRAM_BYTES` by default.
        queue: requests that each ideal twin keeps.
        build_root: where to build; `default_build_root` if None.

    Raises:
        SimulatorError: a tool is missing, or the compilation fails.
    """
    root = (build_root or default_build_root()).resolve()
    simulator = Simulator(simulator)
    if frames is None:
        frames = min(FLASH_BYTES[simulator] // config.channels // config.page_bytes, config.pages_per_channel)
    rtl = rtl_verilog(config, flash.top, build_root=root)
    text = testbench_verilog(
        config, flash, frames=frames, dram_bytes=dram_bytes or DRAM_BYTES[simulator], queue=queue)
    bench = root / "rtl" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}" / f"{TOP}.sv"
    if not bench.is_file():
        with cache_errors(root):
            write_whole(bench, text)
    with resources.as_file(resources.files("kvattic_sim") / "verilog") as folder:
        twins = [folder / f"{flash.twin}.sv", folder / "axi_memory.sv"]
        return compile_model(
            [rtl, bench, *twins], TOP, simulator, waves=waves, separate_modules=flash.separate_modules, build_root=root)
