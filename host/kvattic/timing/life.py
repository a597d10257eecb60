"""Wear: bytes that a token programs into flash, and how long drives last at a load."""

import math
from dataclasses import dataclass

from kvattic.errors import RequestError
from kvattic.spec import layout
from kvattic.spec.codes import check_codes
from kvattic.spec.config import Config

__all__ = ["Life", "programmed_bytes"]

SECONDS_A_DAY, DAYS_A_YEAR = 86_400, 365


def programmed_bytes(config: Config, *, layers: int, kv_heads: int, features: bool = False,
                     centroids: int | None = None, codes: bool = False) -> float:
    """Data bytes of flash pages that a token programs, once its stripe is full.

    Args:
        config: of the drive; its head_dim may be larger than the model's, and the rest is programmed, too.
        layers: of the model.
        kv_heads: of a layer.
        features: K is also written in the feature layout, which is a second copy of it.
        centroids: tokens of a unit whose mean keys are also written; None: there are none.
        codes: codes of K are also written.

    Raises:
        RequestError: layers or heads are not positive, or there are no such units.
        ConfigError: codes, and the configuration is without them.
    """
    for name, value in (("layers", layers), ("kv_heads", kv_heads)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RequestError(f"{name} must be a positive int, not {value!r}")
    head = (2 + features) * config.page_bytes / config.tokens_per_page
    if centroids is not None:
        head += layout.centroid_codewords(centroids, config) * config.codeword_bytes / config.group_tokens
    if codes:
        check_codes(config)
        head += config.octets * config.codeword_bytes / config.group_tokens
    return layers * kv_heads * head


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """How much can be written to drives until their blocks are worn.

    Attributes:
        token_bytes: that a token programs (`programmed_bytes`).
        capacity_bytes: of each drive.
        erases: that a block bears.
        drives: that share the load.
        amplification: bytes programmed for each one to be written; 1 for this library, which never copies pages.
        retention: times as many erases as promised that blocks bear if data must be kept for weeks instead of years.

    Raises:
        RequestError: a number is not positive, or amplification below 1.
    """

    token_bytes: float
    capacity_bytes: float
    erases: float
    drives: int = 1
    amplification: float = 1.0
    retention: float = 1.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            _check_positive(name, getattr(self, name))
        if self.amplification < 1:
            raise RequestError(f"amplification must be at least 1, not {self.amplification!r}")

    @property
    def tokens(self) -> float:
        """Tokens that all drives together can take."""
        written = self.drives * self.capacity_bytes * self.erases * self.retention
        return written / (self.token_bytes * self.amplification)

    def years(self, tokens_a_second: float) -> float:
        """How long they last at a load, without a pause.

        Args:
            tokens_a_second: prompt and answer, of all users.

        Raises:
            RequestError: it is not positive.
        """
        _check_positive("tokens_a_second", tokens_a_second)
        return self.tokens / tokens_a_second / SECONDS_A_DAY / DAYS_A_YEAR

    def users(self, years: float, tokens_a_day: float) -> float:
        """Users that they can serve for some years.

        Args:
            years: that the drives shall last.
            tokens_a_day: of each user, prompt and answer.

        Raises:
            RequestError: a number is not positive.
        """
        _check_positive("years", years)
        _check_positive("tokens_a_day", tokens_a_day)
        return self.tokens / (years * DAYS_A_YEAR * tokens_a_day)


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise RequestError(f"{name} must be a positive number, not {value!r}")
