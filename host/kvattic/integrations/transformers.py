"""Hugging Face transformers with K and V in the drive: `DriveCache` and the attention backend `kvattic`.

    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="kvattic")
    with kvattic.open("model", config_for(model)) as device, DriveCache(device, model.config) as cache:
        model.generate(**inputs, cache=cache)

Importing this module registers the backend; it needs torch and transformers (the extra `transformers`).  What is
computed where: docs/transformers.md.
"""

from kvattic.integrations.backend import register
from kvattic.integrations.cache import HELD_TOKENS, LAYERS_IN_FLIGHT, NAME, DriveCache
from kvattic.integrations.configuration import config_for
from kvattic.integrations.encoder_decoder import DriveEncoderDecoderCache
from kvattic.integrations.layer import DriveLayer
from kvattic.integrations.options import SINKS
from kvattic.integrations.prefix_store import PrefixStatistics, PrefixStore, digest_of
from kvattic.integrations.storage import round_to_storage

__all__ = ["HELD_TOKENS", "LAYERS_IN_FLIGHT", "NAME", "SINKS", "DriveCache", "DriveEncoderDecoderCache", "DriveLayer",
           "PrefixStatistics", "PrefixStore", "config_for", "digest_of", "round_to_storage"]

register()
