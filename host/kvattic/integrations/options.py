"""Whether the options of a `DriveCache` go together."""

from inspect import signature
from typing import Any

from kvattic.array import SPLITS
from kvattic.driver.checks import as_member, check_integer
from kvattic.driver.device import Device
from kvattic.driver.jobs import MAX_SINKS, MAX_UNITS
from kvattic.errors import ConfigError, RequestError
from kvattic.spec.commands import Mode
from kvattic.spec.config import Config
from kvattic.spec.formats import KvFormat
from kvattic.spec.layout import unit_bits

__all__ = ["SINKS", "check_format", "check_mode", "check_options", "count_sinks"]

SINKS = 16
"""First tokens of a row that sparse modes attend in any case, unless a `DriveCache` is told otherwise."""

_OWN_OPTIONS = {"self", "kv_heads", "capacity_tokens", "layers", "sparse", "centroids", "codes", "sinks",
                "window"}
"""Arguments of `create_sequence` that a `DriveCache` sets itself."""


def check_options(options: dict[str, Any], several: bool) -> None:
    """Check the options that `DriveCache` hands on to `create_sequence`.

    Raises:
        TypeError: it has no such argument, or it is not for the user.
        RequestError: a value that it does not take.
    """
    known = [name for name in signature(Device.create_sequence).parameters if name not in _OWN_OPTIONS]
    known += ["split"] * several
    for name, value in options.items():
        if name == "split" and not several:
            raise TypeError("DriveCache got the option 'split', which is for several drives only (DriveArray)")
        if name not in known:
            raise TypeError(f"DriveCache has no option {name!r}; those of its sequences are {', '.join(known)}")
        if name == "isolated" and not isinstance(value, bool):
            raise RequestError(f"isolated must be a bool, not {value!r}")
        if name == "split" and value not in SPLITS:
            raise RequestError(f"split must be one of {', '.join(SPLITS)}, not {value!r}")


def check_format(config: Config, kv: KvFormat | str | None) -> None:
    """Check that the drive stores K and V as a `DriveCache` wants.

    Raises:
        RequestError: there is no such format.
        ConfigError: the drive stores them otherwise.
    """
    if kv is None:
        return
    wanted = as_member("kv", kv, KvFormat)
    if wanted is not config.kv:
        raise ConfigError(f"this drive stores K and V as {config.kv.value}, not {wanted.value}: open one whose "
                          f"configuration has it, as config_for(model, kv={wanted.value!r})")


def check_mode(config: Config, mode: Mode, features: int | None, top_units: int | None, local_tokens: int,
                sinks: int | None, unit_tokens: int | None) -> int | None:
    """Check that a mode and its numbers go together; the tokens of a unit, None if the mode has no units."""
    name = mode.name.lower()
    if mode is Mode.DENSE:
        if (features, top_units, local_tokens, sinks, unit_tokens) != (None, None, 0, None, None):
            raise RequestError("mode dense attends all tokens: features, top_units, local_tokens, sinks and "
                               "unit_tokens must not be given")
        return None
    if not config.sparse:
        raise ConfigError(f"mode {name}: the drive is without sparse attention (Config.sparse)")
    if mode is Mode.CODES and not config.codes:
        raise ConfigError(f"mode {name}: the drive is without codes: {config.why_no_codes} in its configuration")
    if top_units is None:
        raise RequestError(f"mode {name} needs top_units (the paper's k)")
    check_integer("top_units (the paper's k)", top_units, 1, MAX_UNITS)
    if mode.featured:
        check_integer("features (the paper's r)", features, 1, config.head_dim)
    elif features is not None:
        raise RequestError(f"mode {name} has no features: it must not be given")
    if mode.by_token:
        if unit_tokens is not None:
            raise RequestError(f"mode {name} has no unit_tokens: it must not be given")
    else:
        unit_tokens = config.tokens_per_codeword if unit_tokens is None else unit_tokens
        unit_bits(unit_tokens, config)
    check_integer("local_tokens", local_tokens, 0, top_units * (unit_tokens or 1))
    if mode is Mode.CODES and sinks is not None:
        check_integer("sinks", sinks, 0, config.codes_sinks_max)
    return unit_tokens


def count_sinks(top_units: int, local_tokens: int, sinks: int | None, unit_tokens: int) -> int:
    """The number of sinks: as asked for, otherwise as many as there is room for.

    Args:
        top_units: that a step attends.
        local_tokens: newest tokens that are always attended and not held, and so lie in some of the units.
        sinks: as given.
        unit_tokens: tokens of a unit.

    Raises:
        RequestError: not a number of tokens, or sinks and local_tokens need more units than there are.
    """
    newest = -(-(local_tokens - 1) // unit_tokens) + 1 if local_tokens else 0     # wherever the last of them begins
    if sinks is None:
        return max(min(SINKS, (top_units - newest) * unit_tokens), 0)
    check_integer("sinks", sinks, 0, MAX_SINKS)
    if (needed := -(-sinks // unit_tokens) + newest) > top_units:
        raise RequestError(f"top_units (the paper's k) must be at least {needed} for {sinks} sinks and the newest "
                           f"{local_tokens} tokens that are not held, in units of {unit_tokens}, not {top_units}")
    return sinks
