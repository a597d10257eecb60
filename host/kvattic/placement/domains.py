"""Domains: who owns zones of flash and regions of device DRAM.

Domain 1 is everybody's: it has whatever no other domain needs.  An isolated sequence has a domain of its own.
"""

from kvattic.errors import RequestError
from kvattic.spec.commands import DOMAINS

__all__ = ["COMMON_DOMAIN", "NOBODY", "check_domain"]

COMMON_DOMAIN = 1
"""The domain of all sequences that are not isolated."""
NOBODY = 0
"""Owner of what no command may reach, or whose owner is not known."""


def check_domain(domain: int) -> None:
    """Refuse what is not a domain that can own anything.

    Raises:
        RequestError: says what it was.
    """
    if isinstance(domain, bool) or not isinstance(domain, int) or not COMMON_DOMAIN <= domain < DOMAINS:
        raise RequestError(f"domain must be an int from {COMMON_DOMAIN} to {DOMAINS - 1}, not {domain!r}")
