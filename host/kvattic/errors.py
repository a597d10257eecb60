"""Exceptions of the host library.  Every one says what was wrong, where, and what would be right."""


class KvatticError(Exception):
    """Base class of all errors that kvattic raises on purpose."""


class ConfigError(KvatticError, ValueError):
    """A configuration or geometry that the engine does not support."""


class RequestError(KvatticError, ValueError):
    """A call of the host library with arguments that the device cannot serve."""


class ForkedError(RequestError):
    """A forked child used its parent's device; the parent is unharmed."""


class CapacityError(RequestError):
    """The flash, the buffers or the score buffer cannot hold what was asked for."""


class ConfigMismatchError(KvatticError):
    """The device was built from another configuration than the driver's."""


class ManifestError(KvatticError):
    """A manifest is damaged, or does not say what the drive's flash holds: it is of another drive, or out of date."""


class DeviceTimeoutError(KvatticError):
    """The device did not answer in time."""


class DeviceStatusError(KvatticError):
    """A command ended with a status other than OK.

    Attributes:
        completion: the device's completion entry (`kvattic.spec.commands.Completion`).
    """

    def __init__(self, message: str, completion: object) -> None:
        super().__init__(message)
        self.completion = completion


class RangeError(KvatticError, ArithmeticError):
    """A result lies outside of the range that the drive computes exactly; see docs/numerics.md."""


class DeviceLostError(KvatticError):
    """The device, or the simulator that stands for it, is gone; nothing that was asked of it will be answered."""
