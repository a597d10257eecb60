"""The end of a with block."""

from collections.abc import Callable

from kvattic.errors import KvatticError

__all__ = ["end_block"]


def end_block(action: Callable[[], None], error: BaseException | None) -> None:
    """Clean up at the end of a with block.

    Args:
        action: the clean-up; its KvatticError is dropped if the block itself failed, so that it hides nothing.
        error: what ended the block, None if nothing did.
    """
    try:
        action()
    except KvatticError:
        if error is None:
            raise
