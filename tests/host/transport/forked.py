"""Forked children for tests."""

import os
from collections.abc import Callable
from typing import Any


def in_child(work: Callable[[], Any]) -> str:
    """What a function says in a forked child: what it returns, or the error that it raises."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(send, str(work()).encode())
        except BaseException as error:  # noqa: BLE001 - it must not go on as a second pytest
            os.write(send, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(send)
    with open(receive, "rb") as file:
        said = file.read().decode()
    os.waitpid(child, 0)
    return said
