"""kvattic: LLM attention computed inside the flash drive that holds the KV cache.

    with kvattic.open("model", "tiny") as device:
        sequence = device.create_sequence(2, capacity_tokens=1024)
        sequence.prefill(key, value)                # (kv_heads, tokens, head_dim)
        result = sequence.attend(query)             # (q_heads, n_queries, head_dim)

Needs numpy alone; Amaranth, cocotb and torch are never loaded by this package.
"""

from kvattic.commands import Completion, CompletionFlag, Mode, Status
from kvattic.config import BOARD, GQA, PAPER, PRESETS, TINY, Config, preset
from kvattic.driver import AttendPlan, AttendResult, Device, FlashOperation, Job, JobResult, Loss, Sequence
from kvattic.errors import (
    CapacityError,
    ConfigError,
    ConfigMismatchError,
    DeviceBusyError,
    DeviceStatusError,
    DeviceTimeoutError,
    KvatticError,
    RequestError,
)
from kvattic.formats import Element
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
    "DeviceBusyError",
    "DeviceStatusError",
    "DeviceTimeoutError",
    "Element",
    "FlashOperation",
    "Job",
    "JobResult",
    "KvatticError",
    "Loss",
    "Mode",
    "RequestError",
    "Sequence",
    "Status",
    "Transport",
    "__version__",
    "open",
    "preset",
]

TARGETS = ("model",)


def open(target: str = "model", config: Config | str = PAPER) -> Device:
    """A device.

    Args:
        target: `model`, the bit-exact golden device in NumPy.
        config: a configuration, or the name of a preset.

    Raises:
        RequestError: there is no such target.
        ConfigError: there is no such preset.
    """
    if isinstance(config, str):
        config = preset(config)
    if target == "model":
        from kvattic.golden_device import GoldenDevice

        return Device(GoldenDevice(config))
    raise RequestError(f"there is no target {target!r}; targets are {', '.join(TARGETS)}")
