"""The dense kernel in C: compiled at first use with the system's compiler, and kept in the user's cache.

It is an option: without a compiler, or with KVATTIC_KERNEL=numpy, NumPy computes the same bits, each job alone.
``kernel.c`` says why its floating point is exact; a compiler that breaks that is found out at the first use in each
process, which compares a few jobs with NumPy's.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np

from kvattic.errors import RequestError
from kvattic.golden import dense
from kvattic.golden.together import DenseJobs, DenseResults
from kvattic.spec import layout
from kvattic.spec.commands import fp32_bits
from kvattic.spec.config import PAPER
from kvattic.spec.elements import to_bits
from kvattic.spec.formats import (
    EXP_STEP_BITS,
    SCORE_FRACTION,
    SCORE_MASKED,
    SCORE_MAX,
    SCORE_ROUND_SHIFT,
    SCORE_WINDOW_BITS,
    SCORE_WINDOW_FRACTION,
    WEIGHT_ALIGNMENT,
    WEIGHT_BITS,
    WEIGHT_EXPONENT_BITS,
    WEIGHT_ROUND_SHIFT,
    Element,
    KvFormat,
    exp_table,
)
from kvattic.spec.stored import element_table, to_kv_bits
from kvattic.support.files import whole

__all__ = ["KERNELS", "CompilerError", "attend", "find_compiler", "find_kernel", "load"]

FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fPIC",
         "-shared")
COMPILE_S = 120
KERNELS = ("auto", "c", "numpy")
"""What `find_kernel` takes."""
_LOG = logging.getLogger("kvattic")


class CompilerError(Exception):
    """There is no compiler, or it cannot compile the kernel, or what it made computes other bits than NumPy."""


class _Shape(ctypes.Structure):
    """`Shape` of kernel.c."""

    _fields_ = [(name, ctypes.c_int64) for name in (
        "jobs", "rows", "head_dim", "bf16", "coded", "pages", "tokens", "tokens_per_page", "tokens_per_codeword",
        "codeword_bytes", "base_token", "end_token", "tree_token", "scale_bits", "score_fraction", "score_masked",
        "score_max", "round_shift", "window_fraction", "window_bits", "step_bits", "weight_bits", "weight_round_shift",
        "weight_alignment", "weight_exponents")]


_FORMATS = (SCORE_FRACTION, SCORE_MASKED, SCORE_MAX, SCORE_ROUND_SHIFT, SCORE_WINDOW_FRACTION, SCORE_WINDOW_BITS,
            EXP_STEP_BITS, WEIGHT_BITS, WEIGHT_ROUND_SHIFT, WEIGHT_ALIGNMENT, 1 << WEIGHT_EXPONENT_BITS)


def find_compiler() -> str:
    """Path of the C compiler.

    Raises:
        CompilerError: there is none.
    """
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    raise CompilerError("there is no C compiler (cc, gcc or clang)")


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(("flags", "Features"))})])


def _library(source: bytes, compiler: str) -> Path:
    """Where the compiled kernel lies; the name says what it was made from."""
    key = b"\0".join([source, compiler.encode(), " ".join(FLAGS).encode(), _processor().encode()])
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("KVATTIC_CACHE") or caches / "kvattic")
    return root / f"kernel-{hashlib.sha256(key).hexdigest()[:16]}.so"


def _compile(source: Path, compiler: str, library: Path) -> None:
    library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with whole(library) as aside:
        done = subprocess.run([compiler, *FLAGS, "-o", str(aside), str(source), "-lm"], capture_output=True, text=True,
                              timeout=COMPILE_S, check=False)
        if done.returncode:
            raise CompilerError(f"{compiler} failed: {done.stderr.strip()[-500:]}")


@cache
def load() -> ctypes.CDLL:
    """The compiled kernel; compiles it unless it is in the cache (about a second), and checks it.

    Raises:
        CompilerError: it cannot be compiled or loaded, or computes other bits than NumPy.
    """
    try:
        with resources.as_file(resources.files("kvattic.golden") / "kernel.c") as source:
            compiler = find_compiler()
            library = _library(source.read_bytes(), compiler)
            if not library.exists():
                _compile(source, compiler, library)
            elif library.stat().st_uid != os.getuid():
                raise CompilerError(f"{library} belongs to another user")
            found = ctypes.CDLL(str(library))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise CompilerError(f"the kernel cannot be compiled or loaded: {error}") from error
    function = found.kvattic_dense
    function.argtypes = [ctypes.POINTER(_Shape)] + [ctypes.c_void_p] * 12
    function.restype = ctypes.c_int
    if not all(_agrees(found, element, kv, head_dim) for element in Element for head_dim in (64, 80, 128)
               for kv in KvFormat if kv is KvFormat.ELEMENT or head_dim == 128):
        raise CompilerError(f"{library}, compiled by {compiler} {' '.join(FLAGS)}, computes other bits than NumPy")
    _LOG.debug("golden device: dense jobs are computed by %s", library)
    return found


_NO_CODES = np.zeros(256, np.uint16)
_TABLE = np.ascontiguousarray(np.array(exp_table(), np.int64).T)


def attend(jobs: DenseJobs) -> DenseResults:
    """Compute jobs.

    Raises:
        CompilerError: see `load`.
        MemoryError: there is no memory.
    """
    return _run(load(), jobs)


def _run(library: ctypes.CDLL, jobs: DenseJobs) -> DenseResults:
    function = library.kvattic_dense
    number, rows, head_dim = jobs.query.shape
    config = jobs.config
    shape = _Shape(
        number, rows, head_dim, config.element is Element.BF16, config.kv is not KvFormat.ELEMENT, jobs.keys.shape[1],
        jobs.tokens, config.tokens_per_page, config.tokens_per_codeword, config.codeword_bytes, jobs.base_token,
        jobs.base_token + jobs.tokens, jobs.tree_token, jobs.scale_bits, *_FORMATS)
    codes = element_table(config.kv, config.element)
    results = DenseResults(np.empty((number, rows, head_dim), np.uint32), np.empty((number, rows), np.int64),
                           np.empty((number, rows), np.int64), np.empty(number, np.bool_))
    arrays = (jobs.keys, jobs.values, jobs.query, jobs.start, jobs.end, jobs.tree, _TABLE,
              _NO_CODES if codes is None else codes, *results)
    if not function(ctypes.byref(shape), *(array.__array_interface__["data"][0] for array in arrays)):
        raise MemoryError("the golden device's kernel got no memory")
    return results


def _agrees(library: ctypes.CDLL, element: Element, kv: KvFormat, head_dim: int) -> bool:
    """Whether a job has NumPy's bits: with windows, a draft tree, and weights of all sizes."""
    config = replace(PAPER, head_dim=head_dim, element=element, kv=kv, sparse=False)
    rng, tokens, rows = np.random.default_rng(head_dim), 70, 3
    # V is so small that what is cut off shows in the result.
    query = to_bits(rng.standard_normal((rows, head_dim), np.float32), element)
    key, value = (to_kv_bits(rng.standard_normal((tokens, head_dim), np.float32) * size, kv, element)
                  for size in (1, 2**-14 if kv is KvFormat.ELEMENT else 2**-7))
    tree_token, scale_bits = tokens - 5, fp32_bits(8 / head_dim**0.5)
    start, end, tree = np.array([0, 0, 9]), np.array([tokens, 33, tokens]), np.array([-1, 0, 0b10110])
    pages = [layout.pack_pages(bits, config) for bits in (key, value)]
    first = [page.__array_interface__["data"][0] + np.arange(len(page), dtype=np.int64)[None] * page.shape[1]
             for page in pages]
    found = _run(library, DenseJobs(config, first[0], first[1], query[None], start[None], end[None], tree[None], tokens,
                                    0, tree_token, scale_bits))
    wanted = dense.attend(query, key, value, element=element, scale_bits=scale_bits, start=start, end=end, tree=tree,
                          tree_token=tree_token, base_token=0, end_token=tokens)
    return bool(found.clean[0]) and all(np.array_equal(getattr(found, name)[0], getattr(wanted, name))
                                        for name in ("output", "maximum", "denominator"))


def find_kernel(name: str | None) -> Callable[[DenseJobs], DenseResults] | None:
    """What computes dense jobs.

    Args:
        name: one of `KERNELS`; None: the environment variable KVATTIC_KERNEL says, or else `auto`.

    Returns:
        None: `dense.attend`, each job alone.

    Raises:
        RequestError: there is no such kernel; or it is `c` and cannot be compiled.
    """
    name = os.environ.get("KVATTIC_KERNEL", "auto") if name is None else name
    if name not in KERNELS:
        raise RequestError(f"the golden device's kernel must be one of {', '.join(KERNELS)}, not {name!r} "
                           "(the option kernel, or the environment variable KVATTIC_KERNEL)")
    if name == "numpy":
        return None
    try:
        load()
    except CompilerError as error:
        if name == "c":
            raise RequestError(f"kernel='c': {error}") from error
        _LOG.info("golden device: NumPy computes dense jobs, each alone, which is slower: %s", error)
        return None
    return attend
