"""Encoder-decoder models: the decoder's K and V and the encoder's, both in the drive."""

from typing import Any

from transformers.cache_utils import Cache, EncoderDecoderCache

from kvattic.array import DriveArray
from kvattic.driver.device import Device
from kvattic.errors import RequestError
from kvattic.integrations.cache import DriveCache
from kvattic.support.closing import Closing

__all__ = ["DriveEncoderDecoderCache"]


class DriveEncoderDecoderCache(Closing, EncoderDecoderCache):
    """K and V of an encoder-decoder model (Whisper, BART) in the drive: what it gets as `cache`.

    The encoder's tokens are written once, in the first step, and attended in the drive at each one that follows.

    Usable as a context manager, which gives the flash back at the end.

    Args:
        device: the drive, or several as one.
        config: the model's configuration.
        self_attention: a cache for the decoder's own tokens; a `DriveCache` if None.  With transformers' own
            `DynamicCache`, only the encoder's tokens are in the drive: for T5, which adds a position bias.
        options: of the `DriveCache` of the decoder's own tokens.

    Attributes:
        self_attention_cache: of the decoder's own tokens.
        cross_attention_cache: of the encoder's, a `DriveCache`.

    Raises:
        RequestError: see `DriveCache`; or options without a `DriveCache` that they are for.
    """

    def __init__(self, device: Device | DriveArray, config: Any, *, self_attention: Cache | None = None,
                 **options: Any) -> None:
        if self_attention is not None and options:
            raise RequestError(f"{', '.join(options)}: options are for the decoder's own DriveCache, in whose place "
                               "self_attention was given")
        own = DriveCache(device, config, **options) if self_attention is None else self_attention
        super().__init__(own, DriveCache(device, config, cross=True))

    def reset(self) -> None:
        """Forget everything and give the flash back.

        Raises:
            DeviceStatusError: see `Sequence.free`.
        """
        super().reset()

    def check_dynamic_cache(self, method: str) -> None:
        """Allow what transformers allow their own caches: both of these can crop and choose rows."""

    def _end_block(self) -> None:
        self.reset()
