"""What is generated, and what a step of it takes: `Load`, `Step`."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvattic.errors import RequestError
from kvattic_sim.system.transformer import Transformer

__all__ = ["Load", "Step"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is generated.

    Attributes:
        batch: sequences that are decoded together.
        prompt: tokens of each prompt.
        new: tokens generated for each.
    """

    batch: int
    prompt: int = 1024
    new: int = 1024

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("prompt", 1), ("new", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise RequestError(f"{name} must be an integer of at least {least}, not {value!r}")

    @property
    def tokens(self) -> float:
        """Tokens that a step attends, on average over the generation."""
        return self.prompt + (self.new - 1) / 2

    def kv_bytes(self, model: Transformer) -> float:
        """Bytes of K and V that a dense step reads, on average."""
        return self.batch * self.tokens * model.kv_bytes

    def kv_capacity(self, model: Transformer) -> float:
        """Bytes of K and V at the end of the generation."""
        return self.batch * (self.prompt + self.new) * model.kv_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A decode step of a whole batch.

    Attributes:
        load: what is decoded.
        parts: seconds by name; `kv` is access to the KV cache, `gpu` the matrix products.
        overlapped: the GPU works while the rest is done: for the next layer, or for the other half of the batch.
        prefill: seconds of the prompts before the first step.
        flash, dram: bytes of flash, and of the drives' own DRAM, that a drive needs at the end; 0: none, or not known.
    """

    load: Load
    parts: Mapping[str, float]
    overlapped: bool = False
    prefill: float = 0.0
    flash: float = 0.0
    dram: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        total = sum(self.parts.values())
        if not self.overlapped:
            return total
        gpu = self.parts.get("gpu", 0.0)
        return max(gpu, total - gpu)

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated a second, all sequences together."""
        return self.load.batch / self.seconds

    @property
    def tokens_per_second_with_prefill(self) -> float:
        """The same over the whole generation, prompts included."""
        return self.load.batch * self.load.new / (self.prefill + self.load.new * self.seconds)

    def share(self, part: str) -> float:
        """Share of the step that a part takes."""
        return self.parts[part] / self.seconds
