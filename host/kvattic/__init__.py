"""kvattic: LLM attention computed inside the flash drive that holds the KV cache.

    with kvattic.open("model", "tiny") as device:
        sequence = device.create_sequence(2, capacity_tokens=1024)
        sequence.prefill(key, value)                # (kv_heads, tokens, head_dim)
        result = sequence.attend(query)             # (q_heads, n_queries, head_dim)

        future = sequence.attend_async(query)       # goes on meanwhile; so do append_async and prefill_async
        result = future.result()                    # or: await future

Needs numpy alone; Amaranth, cocotb and torch are never loaded by this package.
"""

from typing import TYPE_CHECKING

from kvattic.driver.device import (
    Attached,
    AttendPlan,
    AttendResult,
    Device,
    FlashOperation,
    Job,
    JobResult,
    Loss,
    Sequence,
)
from kvattic.driver.futures import Future, wait
from kvattic.driver.planning import AttendOptions
from kvattic.errors import (
    CapacityError,
    ConfigError,
    ConfigMismatchError,
    DeviceLostError,
    DeviceStatusError,
    DeviceTimeoutError,
    ForkedError,
    KvatticError,
    ManifestError,
    RangeError,
    RequestError,
)
from kvattic.spec.commands import Completion, CompletionFlag, Mode, Status
from kvattic.spec.config import BOARD, GQA, PAPER, PRESETS, TINY, Config, preset
from kvattic.spec.formats import Element, KvFormat
from kvattic.spec.layout import Block
from kvattic.support.renamed import keep_old_names
from kvattic.targets import open
from kvattic.timing.cost import Cost
from kvattic.transport.base import Transport

__version__ = "0.2.0"

__all__ = [
    "BOARD",
    "GQA",
    "PAPER",
    "PRESETS",
    "TINY",
    "Attached",
    "AttendOptions",
    "AttendPlan",
    "AttendResult",
    "Block",
    "CapacityError",
    "Completion",
    "CompletionFlag",
    "Config",
    "ConfigError",
    "ConfigMismatchError",
    "Cost",
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
    "KvFormat",
    "KvatticError",
    "Loss",
    "ManifestError",
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

_old_module = keep_old_names("kvattic", {
    **{name: f"spec.{name}"
       for name in ("commands", "config", "ecc", "elements", "formats", "layout", "nand", "registers")},
    "futures": "driver.futures",
    "golden_device": "golden.device",
    "huggingface": "integrations.transformers",
    "mmio_transport": "transport.mmio",
    "prefill": "driver.prefill",
    "sequence": "driver.sequence",
    "sim_transport": "transport.simulator",
    "sparse": "golden.sparse",
})

if not TYPE_CHECKING:  # a type checker would take any name for a module
    __getattr__ = _old_module
