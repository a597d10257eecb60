"""`open`: a device, by the name of the target that it runs on."""

import reprlib
from typing import Any

from kvattic.driver.device import Device
from kvattic.errors import ConfigError, RequestError
from kvattic.spec.config import PAPER, PRESETS, Config, preset
from kvattic.transport.base import Transport

__all__ = ["DEVICE_OPTIONS", "TARGETS", "open"]

TARGETS = ("model", "sim:verilator", "sim:icarus", "mmio:PATH")
DEVICE_OPTIONS = ("timeout_s", "bad_blocks", "spare_blocks", "erase_on_free", "entries")


def open(target: str = "model", config: Config | str = PAPER, **options: Any) -> Device:
    """Open a device; closing it gives back all that it holds.

    Args:
        target: `model`, the bit-exact golden device in NumPy; `sim:verilator` or `sim:icarus`, the RTL in a simulator's
            process; `mmio:/dev/xdma0`, an FPGA behind a PCIe driver's character devices.
        config: a configuration, or the name of a preset.
        options: of `Device`, and of the target: `golden.device.GoldenDevice`,
            `transport.simulator.open_simulator`, `transport.mmio.open_mmio`.

    Raises:
        RequestError: the target does not exist.
        ConfigError: the preset does not exist, or config is not a configuration.
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
        from kvattic.golden.device import GoldenDevice

        transport = GoldenDevice(config, **options)
    elif kind == "sim" and which in ("verilator", "icarus"):
        from kvattic.transport.simulator import open_simulator

        transport = open_simulator(which, config, **options)
    elif kind == "mmio" and which:
        from kvattic.transport.mmio import open_mmio

        transport = open_mmio(which, config, **options)
    else:
        raise RequestError(f"there is no target {target!r}; targets are {', '.join(TARGETS)}")
    try:
        return Device(transport, **own, owns_transport=True)
    except BaseException:
        transport.close()
        raise
