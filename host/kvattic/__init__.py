"""kvattic: LLM attention computed inside the flash drive that holds the KV cache.

    with kvattic.open("model", "tiny") as device:
        sequence = device.create_sequence(2, capacity_tokens=1024)
        sequence.prefill(key, value)                # (kv_heads, tokens, head_dim)
        result = sequence.attend(query)             # (q_heads, n_queries, head_dim)

        future = sequence.attend_async(query)       # goes on meanwhile; so do append_async and prefill_async
        result = future.result()                    # or: await future

Needs numpy alone; Amaranth, cocotb and torch are never loaded by this package.
"""

import reprlib
from typing import Any

from kvattic.commands import Completion, CompletionFlag, Mode, Status
from kvattic.config import BOARD, GQA, PAPER, PRESETS, TINY, Config, preset
from kvattic.driver import AttendPlan, AttendResult, Device, FlashOperation, Job, JobResult, Loss, Sequence
from kvattic.errors import (
    CapacityError,
    ConfigError,
    ConfigMismatchError,
    DeviceLostError,
    DeviceStatusError,
    DeviceTimeoutError,
    ForkedError,
    KvatticError,
    RangeError,
    RequestError,
)
from kvattic.formats import Element
from kvattic.futures import Future, wait
from kvattic.layout import Block
from kvattic.transport import Transport

__version__ = "0.2.0"

__all__ = [
    "BOARD",
    "GQA",
    "PAPER",
    "PRESETS",
    "TINY",
    "AttendPlan",
    "AttendResult",
    "Block",
    "CapacityError",
    "Completion",
    "CompletionFlag",
    "Config",
    "ConfigError",
    "ConfigMismatchError",
    "Device",
    "DeviceLostError",
    "DeviceStatusError",
    "DeviceTimeoutError",
    "Element",
    "FlashOperation",
    "ForkedError",
    "Future",
    "Job",
    "JobResult",
    "KvatticError",
    "Loss",
    "Mode",
    "RangeError",
    "RequestError",
    "Sequence",
    "Status",
    "Transport",
    "__version__",
    "open",
    "preset",
    "wait",
]

TARGETS = ("model", "sim:verilator", "sim:icarus", "mmio:PATH")
DEVICE_OPTIONS = ("timeout_s", "bad_blocks", "spare_blocks", "erase_on_free", "entries")


def open(target: str = "model", config: Config | str = PAPER, **options: Any) -> Device:
    """A device; closing it gives back all that it holds.

    Args:
        target: `model`, the bit-exact golden device in NumPy; `sim:verilator` or `sim:icarus`, the RTL in a simulator's
            process; `mmio:/dev/xdma0`, an FPGA behind a PCIe driver's character devices.
        config: a configuration, or the name of a preset.
        options: of `Device`, and of the target: `golden_device.GoldenDevice`, `sim_transport.open_simulator`,
            `mmio_transport.open_mmio`.

    Raises:
        RequestError: there is no such target.
        ConfigError: there is no such preset, or it is no configuration.
        ConfigMismatchError, DeviceTimeoutError, DeviceLostError, CapacityError: see `Device`.
    """
    if isinstance(config, str):
        config = preset(config)
    if not isinstance(config, Config):
        raise ConfigError(f"config must be a kvattic.Config, such as Config(channels=4), or a preset's name "
                          f"({', '.join(PRESETS)}), not {reprlib.repr(config)}; Config(**fields) makes one of a dict, "
                          "Config.from_json(text) of JSON")
    own = {name: options.pop(name) for name in DEVICE_OPTIONS if name in options}
    kind, _, which = target.partition(":") if isinstance(target, str) else (target, "", "")
    transport: Transport
    if target == "model":
        from kvattic.golden_device import GoldenDevice

        transport = GoldenDevice(config, **options)
    elif kind == "sim" and which in ("verilator", "icarus"):
        from kvattic.sim_transport import open_simulator

        transport = open_simulator(which, config, **options)
    elif kind == "mmio" and which:
        from kvattic.mmio_transport import open_mmio

        transport = open_mmio(which, config, **options)
    else:
        raise RequestError(f"there is no target {target!r}; targets are {', '.join(TARGETS)}")
    try:
        return Device(transport, **own, owns_transport=True)
    except BaseException:
        transport.close()
        raise
