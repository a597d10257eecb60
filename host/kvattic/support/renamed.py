"""Names that modules and keywords had before version 0.3: they still work, with a deprecation warning.

Each package installs one finder for its modules' old names; the module that comes is the new one itself, so that both
names give the same classes.
"""

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import ParamSpec, TypeVar

__all__ = ["RenamedModules", "keep_old_names", "old_selection_keywords", "renamed_keywords"]

P = ParamSpec("P")
T = TypeVar("T")


class RenamedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules under old names.

    Args:
        names: full new name by full old name, each old one a module or package directly below its package.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = dict(names)
        self._specs: dict[str, importlib.machinery.ModuleSpec | None] = {}

    def find_spec(self, fullname: str, path: Sequence[str] | None = None,
                  target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        """A spec for an old name, or for what lies below one, and None for any other."""
        return importlib.machinery.ModuleSpec(fullname, self) if self._new_name(fullname) else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """The module under its new name."""
        new = self._new_name(spec.name)
        assert new is not None
        warnings.warn(f"{spec.name} is now {new}; the old name goes with version 0.4", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self._specs[new] = module.__spec__
        return module

    def _new_name(self, name: str) -> str | None:
        known = ".".join(name.split(".")[:2])
        return self._names[known] + name[len(known):] if known in self._names else None

    def exec_module(self, module: ModuleType) -> None:
        """Only give the module its own spec back, in whose place the import machinery put that of the old name."""
        module.__spec__ = self._specs[module.__name__]


def keep_old_names(package: str, names: Mapping[str, str]) -> Callable[[str], ModuleType]:
    """Let a package's moved modules be imported as before.

    Args:
        package: its name.
        names: new name by old name, both within the package.

    Returns:
        The package's `__getattr__`, for those who import the package and write `package.module`.
    """
    finder = RenamedModules({f"{package}.{old}": f"{package}.{new}" for old, new in names.items()})
    # First: Python's own finder would load what lies below an old name a second time, under that name.
    sys.meta_path.insert(0, finder)

    def get(name: str) -> ModuleType:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(f"{package}.{name}")

    return get


def renamed_keywords(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A function whose keywords got other names: the old ones still work, with a deprecation warning.

    Args:
        names: new name by old name.

    Raises:
        TypeError: on a call that gives both names of one keyword.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*arguments: P.args, **keywords: P.kwargs) -> T:
            for old in [name for name in keywords if name in names]:
                new = names[old]
                if new in keywords:
                    raise TypeError(f"{function.__name__}() got {new} and its old name {old}")
                warnings.warn(f"{old} is now {new}; the old name goes with version 0.4", DeprecationWarning,
                              stacklevel=2)
                keywords[new] = keywords.pop(old)
            return function(*arguments, **keywords)

        return call

    return decorate


def old_selection_keywords(function: Callable[P, T]) -> Callable[P, T]:
    """Let `Sequence.attend` and its kind take the options of a sparse mode by their old names, too."""
    renamed = renamed_keywords(channels="features", units="top_units", local="local_tokens", unit="unit_tokens")
    return renamed(function)
