"""Forks on the RTL, and a simulated drive whose flash outlives the process that used it."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import kvattic
from kvattic.errors import DeviceLostError, ManifestError, RequestError
from kvattic.spec.config import TINY
from kvattic_sim.rtl.flash_file import FlashFile

HEADS, DIM = 2, TINY.head_dim


def tokens(count, seed=0):
    return np.random.default_rng(seed).standard_normal((2, HEADS, count, DIM)).astype(np.float16)


QUERY = tokens(1, 9)[0]


def grow(device, **options):
    """A sequence, its fork and the fork's fork, each with tokens of its own."""
    first = device.create_sequence(HEADS, capacity_tokens=150, **options)
    first.append(*tokens(70))
    fork = first.fork()
    fork.append(*tokens(30, 1))
    deeper = fork.fork(64)
    deeper.append(*tokens(20, 2))
    return [first, fork, deeper]


@pytest.mark.parametrize(("options", "how"), [
    ({}, {}), ({"isolated": True}, {}), ({"sparse": True}, {"mode": "sparf", "features": 8, "top_units": 4})],
    ids=["dense", "isolated", "sparf"])
def test_forks_have_the_golden_devices_bits(options, how):
    answers = []
    for target in ("model", "sim:verilator"):
        with kvattic.open(target, TINY) as device:
            first, *others = grow(device, **options)
            first.free()
            answers.append([sequence.attend(QUERY, **how).bits.tolist() for sequence in others])
            for sequence in others:
                sequence.free()
            assert device.free_zones == device.media.allocator.zones
    assert answers[0] == answers[1]


def test_the_flash_outlives_a_killed_process(tmp_path):
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_outliving import *
folder = Path({str(tmp_path)!r})
device = kvattic.open("sim:verilator", TINY, image=folder / "flash")
sequences = grow(device)
np.save(folder / "answers.npy", [sequence.attend(QUERY).bits for sequence in sequences])
device.save(folder / "saved")
sequences[0].append(*tokens(40, 3))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with kvattic.open("sim:verilator", TINY, image=tmp_path / "flash") as device:
        back = device.attach(tmp_path / "saved").sequences
        answers = [sequence.attend(QUERY).bits for sequence in back]
        np.testing.assert_array_equal(answers, np.load(tmp_path / "answers.npy"))
        back[0].append(*tokens(40, 3))
        assert back[0].length() == 110
    with kvattic.open("sim:verilator", TINY) as other, pytest.raises(ManifestError, match="cannot be read"):
        other.attach(tmp_path / "saved")


def test_what_is_no_flash_of_this_drive_is_refused(tmp_path):
    FlashFile(tmp_path / "flash", replace(TINY, dies=4)).write([])
    with pytest.raises(DeviceLostError, match="another configuration"):
        kvattic.open("sim:verilator", TINY, image=tmp_path / "flash")
    with pytest.raises(RequestError, match="ideal flash has no image"):
        kvattic.open("sim:verilator", TINY, image=tmp_path / "flash", flash="ideal")


def test_the_file(tmp_path):
    pages = [(np.array([3, 5 + channel]), np.full((2, 10), channel, np.uint8)) for channel in range(TINY.channels)]
    file = FlashFile(tmp_path / "flash", TINY)
    assert file.read() is None
    file.write(pages)
    again = FlashFile(tmp_path / "flash", TINY)
    for (indices, data), (wanted, raw) in zip(again.read(), pages, strict=True):
        assert indices.tolist() == wanted.tolist() and data.tolist() == raw.tolist()
