"""The test bench around the engine: one flash twin for each channel, and clocks that stop when nobody needs them.

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
import os
import re
import tempfile
from importlib import resources
from pathlib import Path

from amaranth.hdl import Shape
from amaranth.lib import data
from amaranth.lib.wiring import Out

import kvattic
import kvattic_hdl
from kvattic.config import Config
from kvattic.registers import ADDRESS_BITS
from kvattic_hdl import AXI_READ, AXI_WRITE, EPOCH_BITS, Shapes, axi_lite, generate
from kvattic_sim.build import Model, Simulator, _locked, compile_model, default_build_root

__all__ = [
    "FLASH_BYTES",
    "QUEUE",
    "TOP",
    "build_testbench",
    "engine_verilog",
    "testbench_verilog",
]

TOP = "kvattic_testbench"
"""Name of the top-level module."""
FLASH_BYTES = {Simulator.VERILATOR: 1 << 26, Simulator.ICARUS: 1 << 21}
"""Contents of all flash twins together, unless `build_testbench` is told otherwise; Icarus erases them slowly."""
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
    "load": 1,
}
"""Inputs that all flash twins share, and their widths."""

_WAKE = re.compile(r"reg (\\\$auto\$verilog_backend\S+dump_module\$\d+) += 0;")
"""A register that each combinational block of a module reads, so that its first value wakes them all.

Icarus 11 gives it that value before the blocks listen, and they keep X until an input changes (amaranth issues 594
and 1629); a non-blocking assignment comes late enough.  always_comb would wake them too, but Icarus 11 then listens to
all bits of a vector where one is selected, and went round in circles in one block of this engine."""


def _range(width: int) -> str:
    return f"[{width - 1}:0]"


def _ports(layout: data.StructLayout, prefix: str, names: dict[str, str]) -> dict[str, int]:
    """Verilog parameters for the fields of a layout, `names` from field to parameter."""
    parameters = {}
    for field, name in names.items():
        parameters[f"{prefix}{name}_AT"] = layout[field].offset
        parameters[f"{prefix}{name}_BITS"] = Shape.cast(layout[field].shape).width
    return parameters


def channel_parameters(config: Config, pages: int, queue: int) -> dict[str, int]:
    """Parameters of flash_channel.sv: bit positions from `Shapes`, geometry, capacity."""
    shapes = Shapes(config)
    parameters = {
        "REQUEST_BITS": shapes.request.size,
        **_ports(shapes.request, "", {"tag": "TAG", "page": "PAGE", "codeword": "INDEX"}),
        **_ports(shapes.tag, "", {"slot": "SLOT", "kind": "KIND", "epoch": "EPOCH"}),
        "BEAT_BITS": shapes.beat.size,
        **_ports(shapes.beat, "BEAT_", {"tag": "TAG", "data": "DATA", "last": "LAST"}),
        "WORD_BITS": config.beat_bytes * 8,
        "BEATS": config.beats_per_codeword,
        "WORDS": config.codeword_bytes // config.beat_bytes,
        "CODEWORDS": config.codewords_per_page,
        "PAGES": pages,
        "QUEUE": queue,
        "SLOTS": config.jobs_in_flight,
    }
    for name in ("KIND_BITS", "BEAT_TAG_BITS", "BEAT_DATA_BITS", "BEAT_LAST_BITS"):
        del parameters[name]  # known by other names
    return parameters


def testbench_verilog(config: Config, *, pages_per_channel: int, queue: int = QUEUE) -> str:
    """The test bench as SystemVerilog text, top module `TOP`; it needs the engine and flash_channel.sv.

    Args:
        config: what the engine was generated for.
        pages_per_channel: capacity of each flash twin.
        queue: requests that each flash twin keeps.
    """
    shapes = Shapes(config)
    ports = ["input clk", "input rst", "input host_active"]
    body: list[str] = []
    connections = [".clk(clk)", ".rst(reset)", ".irq(irq)", ".flash_value_open(value_open)", ".flash_epoch(epoch)"]
    registered: list[tuple[str, str]] = []

    # The buses. A member that is Out in the signature is driven by the manager: Python on the host's bus, the engine on
    # the memory's.
    buses = (
        ("host", "s_axil", axi_lite(ADDRESS_BITS).members, True),
        ("memory", "m_axi", AXI_READ.members, False),
        ("memory", "m_axi", AXI_WRITE.members, False),
    )
    for bus, engine_prefix, members, python_is_manager in buses:
        for name, member in members.items():
            width = Shape.cast(member.shape).width
            ours, its = f"{bus}_{name}", f"{engine_prefix}_{name}"
            if (member.flow is Out) == python_is_manager:
                ports.append(f"input {_range(width)} {ours}")
                connections.append(f".{its}({ours})")
            else:
                ports.append(f"output reg {_range(width)} {ours}")
                body.append(f"wire {_range(width)} {its};")
                connections.append(f".{its}({its})")
                registered.append((ours, its))

    channels = config.channels
    ports += [
        "output host_clk",
        "output memory_clk",
        "output irq",
        *(f"input {_range(width)} flash_{name}" for name, width in _SETTINGS.items()),
        f"input {_range(channels * 3)} flash_fault",
        f"output {_range(32 * channels)} flash_served",
        f"output {_range(32 * channels)} flash_load_errors",
        "output reg [63:0] cycles",
        "output [31:0] pages_per_channel",
    ]
    body += [
        f"wire {_range(config.jobs_in_flight)} value_open;",
        f"wire {_range(config.jobs_in_flight * EPOCH_BITS)} epoch;",
        f"assign pages_per_channel = {pages_per_channel};",
        "// An input of the top level would make all logic behind it input-combinational, evaluated twice a cycle.",
        "reg reset = 1;",
        "always @(posedge clk) reset <= rst;",
        "initial cycles = 0;",
        "always @(posedge clk) cycles <= cycles + 1;",
    ]

    for channel in range(channels):
        signals = [f".{port}({port})" for port in ("clk", "value_open", "epoch")] + [".rst(reset)"]
        for stream, shape in (("request", shapes.request), ("codeword", shapes.beat)):
            for signal, width in (("valid", 1), ("ready", 1), ("payload", shape.size)):
                name = f"flash{channel}_{stream}_{signal}"
                body.append(f"wire {_range(width)} {name};")
                connections.append(f".{name}({name})")
                signals.append(f".{stream}_{signal}({name})")
        signals += [f".{name}(flash_{name})" for name in _SETTINGS]
        signals += [
            f".fault(flash_fault[{3 * channel} +: 3])",
            f".served(flash_served[{32 * channel} +: 32])",
            f".load_errors(flash_load_errors[{32 * channel} +: 32])",
        ]
        parameters = {"CHANNEL": channel} | channel_parameters(config, pages_per_channel, queue)
        body.append(
            f"flash_channel #({', '.join(f'.{k}({v})' for k, v in parameters.items())})\n"
            f"    flash{channel} ({', '.join(signals)});"
        )
    body.append(f"kvattic_engine engine (\n    {(','+chr(10)+'    ').join(connections)});")

    body += [
        "// What the engine showed at the edge, for Python, which looks between the edges.",
        "always @(posedge clk) begin",
        *(f"  {ours} <= {its};" for ours, its in registered),
        "end",
        "initial begin",
        *(f"  {ours} = 0;" for ours, _ in registered),
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
    head = ",\n    ".join(ports)
    text = "\n".join(f"  {line}" for line in body)
    # Python sees the top level's signals only, and what it may see is slow: all the rest lies one level deeper.
    shell = ",\n    ".join(port.replace("output reg", "output") for port in ports)
    names = ", ".join(f".{name}({name})" for name in (port.split()[-1] for port in ports))
    return (f"module {TOP}_inside (\n    {head}\n);\n\n{text}\n\nendmodule\n\n"
            f"module {TOP} (\n    {shell}\n);\n  {TOP}_inside bench ({names});\nendmodule\n")


def _rtl_sources() -> list[Path]:
    """The modules that the Verilog depends on: kvattic_hdl, and what it imports from kvattic."""
    host = Path(kvattic.__path__[0])
    found = sorted(Path(kvattic_hdl.__path__[0]).glob("*.py"))
    for source in found:
        for name in re.findall(r"^from kvattic\.(\w+) import", source.read_text(), re.MULTILINE):
            if (path := host / f"{name}.py") not in found:
                found.append(path)
    return found


def engine_verilog(config: Config, *, build_root: Path | None = None) -> Path:
    """Verilog of the engine, generated unless the same sources gave it before.

    Args:
        config: what to generate.
        build_root: where to put it; ``build/sim`` by default.
    """
    root = (build_root or default_build_root()).resolve() / "rtl"
    digest = hashlib.sha256(config.to_json().encode())
    digest.update(importlib.metadata.version("amaranth").encode())
    for source in [*_rtl_sources(), Path(__file__)]:
        digest.update(source.name.encode() + source.read_bytes())
    path = root / digest.hexdigest()[:16] / "kvattic_engine.sv"
    if not path.is_file():
        with _locked(root / f"{path.parent.name}.lock"):
            if not path.is_file():
                with tempfile.TemporaryDirectory(dir=root) as work:
                    text = generate(config, Path(work) / path.name).read_text()
                text = _WAKE.sub(r"reg \1 ; initial \1 <= 0;", text)
                text = f"// verilator lint_off INITIALDLY\n{text}"
                # Verilator compiles a lane once, however many there are.
                text = re.sub(r"(module kvattic_lane\(.*?\);)", r"\1 /*verilator no_inline_module*/", text, flags=re.S)
                path.parent.mkdir(exist_ok=True)
                part = path.with_suffix(f".{os.getpid()}")
                part.write_text(text)
                part.replace(path)
    return path


def build_testbench(
    config: Config,
    simulator: Simulator | str,
    *,
    waves: bool = False,
    pages_per_channel: int | None = None,
    queue: int = QUEUE,
    build_root: Path | None = None,
) -> Model:
    """Compile the engine with its flash twins, or return the model that was compiled before.

    Args:
        config: what to build.
        simulator: what to compile for.
        waves: compile so that waves can be recorded.
        pages_per_channel: capacity of each flash twin; such that all have `FLASH_BYTES` by default.
        queue: requests that each flash twin keeps.
        build_root: where to build; ``build/sim`` by default.

    Raises:
        SimulatorError: a tool is missing, or the compilation fails.
    """
    root = (build_root or default_build_root()).resolve()
    if pages_per_channel is None:
        pages_per_channel = FLASH_BYTES[Simulator(simulator)] // config.channels // config.page_bytes
    engine = engine_verilog(config, build_root=root)
    text = testbench_verilog(config, pages_per_channel=pages_per_channel, queue=queue)
    bench = root / "rtl" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}" / f"{TOP}.sv"
    if not bench.is_file():
        bench.parent.mkdir(parents=True, exist_ok=True)
        part = bench.with_suffix(f".{os.getpid()}")
        part.write_text(text)
        part.replace(bench)
    with resources.as_file(resources.files("kvattic_sim") / "verilog" / "flash_channel.sv") as twin:
        return compile_model([engine, bench, twin], TOP, Simulator(simulator), waves=waves, build_root=root)
