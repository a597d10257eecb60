"""The golden device's registers."""

from kvattic.spec.config import Config
from kvattic.spec.registers import REGISTER_MAP, StatusBit

__all__ = ["Registers"]


class Registers:
    """Values by name.

    Args:
        config: what CONFIG_HASH is made from.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._values: dict[str, int] = {}
        self.reset()

    def reset(self) -> None:
        """All registers as they are after power-up."""
        self._values = {name: register.reset for name, register in REGISTER_MAP.items()}
        self["CONFIG_HASH"] = self._config.hash
        self["STATUS"] = int(StatusBit.READY)

    def __getitem__(self, name: str) -> int:
        return self._values[name]

    def __setitem__(self, name: str, value: int) -> None:
        self._values[name] = value

    def count(self, name: str, number: int = 1) -> None:
        """Add to a counter; it wraps."""
        self[name] = self[name] + number & (1 << REGISTER_MAP[name].width) - 1

    def report(self, bit: StatusBit, **details: int) -> None:
        """Set a bit of STATUS.

        Args:
            bit: which one.
            details: registers that describe the event by name; written only while the bit is clear, so that they
                describe the first event.
        """
        if not self["STATUS"] & bit:
            self["STATUS"] |= bit
            self._values.update(details)

    @property
    def region_bits(self) -> int:
        """log2 of the pages of a region of device DRAM."""
        return self["REGION_BITS"] & 0xF
