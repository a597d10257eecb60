"""Sequences that outlive the process and the drive's power: `Device.save` and `attach`."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import kvattic
from kvattic.driver.manifest import read_manifest, write_manifest
from kvattic.errors import CapacityError, ConfigMismatchError, ManifestError, RequestError
from kvattic.golden.device import GoldenDevice
from kvattic.spec import layout
from kvattic.spec.commands import Opcode
from kvattic.spec.config import TINY

DIM, HEADS = 32, 2
CONFIG = replace(TINY, part=replace(TINY.part, blocks=32))
KINDS = {
    "dense": ({}, {}),
    "isolated": ({"isolated": True}, {}),
    "sparf": ({"sparse": True, "window": 50}, {"mode": "sparf", "features": 8, "top_units": 4}),
    "centroid": ({"centroids": 16}, {"mode": "centroid", "top_units": 2}),
    "codes": ({"codes": True}, {"mode": "codes", "top_units": 12}),
}


def tokens(count, seed=0, layers=2):
    shape = (layers, 2, HEADS, count, DIM)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


QUERY = tokens(1, 77)[0, 0]


def append(sequence, kv):
    for layer in range(2):
        sequence.append(*kv[layer], layer=layer)


def answers(sequence, how):
    return [sequence.attend(QUERY, layer=layer, **how).bits.tolist() for layer in range(2)]


def opened(folder, config=CONFIG, **options):
    return kvattic.open("model", config, image=folder / "flash", **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["closed", "killed"])
def test_sequences_come_back(tmp_path, kind, end):
    options, how = KINDS[kind]
    kv, more = tokens(150), tokens(60, 2)
    device = opened(tmp_path)
    first = device.create_sequence(HEADS, capacity_tokens=400, layers=2, **options)
    first.held_tokens = 20
    append(first, kv)
    fork = first.fork()
    append(fork, more)
    expected = [answers(first, how), answers(fork, how)]
    device.save(tmp_path / "saved", note={"text": [1, 2, 3]})
    append(first, tokens(70, 9))    # what comes afterwards is not saved, and harms nothing
    other = device.create_sequence(HEADS, capacity_tokens=100)
    other.append(*tokens(90, 8)[0])
    other.free()
    if end == "closed":
        device.close()
    else:
        device.transport.close()    # nothing is freed or erased
    with opened(tmp_path) as device:
        (back, forked), note = device.attach(tmp_path / "saved")
        assert note == {"text": [1, 2, 3]} and back.held_tokens == 20 and back.isolated == ("isolated" in options)
        assert [answers(back, how), answers(forked, how)] == expected
        append(back, more)
        assert answers(back, how) == expected[1]
        if kind == "sparf":
            np.testing.assert_array_equal(back.mean_value(), forked.mean_value())
        back.free()
        assert answers(forked, how) == expected[1]
        forked.free()
        device.discard_saved(tmp_path / "saved")
        assert device.free_zones == device.media.allocator.zones and not (tmp_path / "saved").exists()


def test_a_loss_of_power_in_the_middle_of_a_program(tmp_path):
    kv = tokens(150)
    device = opened(tmp_path)
    sequence = device.create_sequence(HEADS, capacity_tokens=400, layers=2)
    append(sequence, kv)
    expected = answers(sequence, {})
    sequence.save(tmp_path / "saved")
    device.transport.faults.power_cut = 3
    with pytest.raises(kvattic.DeviceTimeoutError):
        append(sequence, tokens(200, 3))
    device.transport.close()
    for _ in range(2):      # and again, with what the first attempt left behind
        with opened(tmp_path) as device:
            (back,), _ = device.attach(tmp_path / "saved")
            assert answers(back, {}) == expected
            append(back, tokens(200, 4))
            assert back.length() == 350 and back.flushed() > 150


def test_a_killed_process_loses_nothing_that_was_saved(tmp_path):
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_manifest import *
folder = Path({str(tmp_path)!r})
device = opened(folder)
sequence = device.create_sequence(HEADS, capacity_tokens=300, layers=2)
append(sequence, tokens(100))
sequence.save(folder / "saved")
append(sequence, tokens(50, 1))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with opened(tmp_path) as device:
        (back,), _ = device.attach(tmp_path / "saved")
        assert back.length() == 100
        append(back, tokens(50, 1))
        with kvattic.open("model", CONFIG) as other:
            plain = other.create_sequence(HEADS, capacity_tokens=300, layers=2)
            append(plain, tokens(100))
            append(plain, tokens(50, 1))
            assert answers(back, {}) == answers(plain, {})


def test_what_failed_stays_known(tmp_path):
    """Bad blocks, replaced blocks and wear."""
    device = opened(tmp_path, bad_blocks=[kvattic.Block(0, 0, 0, 0)])
    for _ in range(3):
        with device.create_sequence(HEADS, capacity_tokens=200) as sequence:
            sequence.append(*tokens(100)[0])
    sequence = device.create_sequence(HEADS, capacity_tokens=200, layers=2)
    append(sequence, tokens(100))
    expected, bad, wear = answers(sequence, {}), device.bad_blocks, device.wear
    assert wear.maximum
    device.save(tmp_path / "saved")
    device.transport.close()
    with opened(tmp_path) as device:
        (back,), _ = device.attach(tmp_path / "saved")
        assert device.bad_blocks == bad and device.wear == wear and answers(back, {}) == expected


@pytest.fixture
def saved(tmp_path):
    with opened(tmp_path) as device:
        sequence = device.create_sequence(HEADS, capacity_tokens=200, layers=2)
        append(sequence, tokens(100))
        device.save(tmp_path / "saved")
    return tmp_path


def test_torn_and_strange_files_are_refused(saved):
    path, good = saved / "saved", (saved / "saved").read_bytes()
    with opened(saved) as device:
        for data, message in ((good[:-1], "is damaged"), (good[:20], "is no manifest"), (b"", "is no manifest"),
                              (good[:200] + b"\x00\x01" + good[202:], "its checksum is wrong"),
                              (good[:8] + b"\x02" + good[9:], "has format 2, this library reads 1")):
            path.write_bytes(data)
            with pytest.raises(ManifestError, match=message):
                device.attach(path)
        with pytest.raises(OSError, match="nowhere"):
            device.attach(saved / "nowhere")
        path.write_bytes(good)
        (back,), _ = device.attach(path)
        assert back.length() == 100
        with pytest.raises(RequestError, match="open the device anew"):
            device.attach(path)


def test_another_configuration_is_refused(saved):
    with (kvattic.open("model", replace(CONFIG, dies=4)) as device,
          pytest.raises(ConfigMismatchError, match="another configuration")):
        device.attach(saved / "saved")
    with pytest.raises(ConfigMismatchError, match="another configuration"):
        opened(saved, replace(CONFIG, dies=4))


def test_a_manifest_of_another_drive_is_refused(saved, tmp_path):
    """And changes nothing: the right one can be attached afterwards."""
    with kvattic.open("model", CONFIG) as device:
        with pytest.raises(ManifestError, match=r"V of sequence 0, layer 0.* cannot be read; the file is of another"):
            device.attach(saved / "saved")
        assert device.free_zones == device.media.allocator.zones and device.free_dram_pages == device.media.dram.pages
        with device.create_sequence(HEADS, capacity_tokens=100, layers=2) as sequence:
            append(sequence, tokens(70, 5))
            sequence.save(tmp_path / "other")
    with opened(saved) as device:
        with pytest.raises(ManifestError, match="changed; the file is of another"):
            device.attach(tmp_path / "other")
        assert device.attach(saved / "saved").sequences[0].length() == 100


def test_an_old_manifest_is_refused(saved):
    old = (saved / "saved").read_bytes()
    with opened(saved) as device:
        (back,), _ = device.attach(saved / "saved")
        back.free()
        device.save(saved / "saved", [])    # from now on the old one keeps nothing
    (saved / "saved").write_bytes(old)
    with opened(saved) as device, pytest.raises(ManifestError, match="its flash has been erased since"):
        device.attach(saved / "saved")


def test_zones_of_a_manifest_are_kept_until_another_takes_its_place(tmp_path):
    with opened(tmp_path) as device:
        free = device.free_zones
        sequence = device.create_sequence(HEADS, capacity_tokens=100, isolated=True)
        sequence.append(*tokens(70)[0])
        device.save(tmp_path / "saved")
        domain = sequence.domain
        sequence.free()
        assert device.free_zones < free
        with device.create_sequence(HEADS, capacity_tokens=100, isolated=True) as other:
            assert other.domain != domain
            with pytest.raises(RequestError, match="zones are in use"):
                device.format()
        device.save(tmp_path / "saved")
        assert device.free_zones == free


def test_a_failed_save_leaves_the_earlier_one(saved, monkeypatch):
    with opened(saved) as device:
        (back,), _ = device.attach(saved / "saved")
        before = (saved / "saved").read_bytes()
        append(back, tokens(10, 4))

        def full(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                device.save(saved / "saved")
        assert (saved / "saved").read_bytes() == before
    with opened(saved) as device:
        assert device.attach(saved / "saved").sequences[0].length() == 100


def test_room_for_what_comes_back(saved):
    with opened(saved) as device:
        for bad in (99, 0, True):
            with pytest.raises(RequestError, match="capacity_tokens must be an int from 100"):
                device.attach(saved / "saved", capacity_tokens=bad)
        with pytest.raises(CapacityError, match="no room"):
            device.attach(saved / "saved", capacity_tokens=1 << 22)
        (back,), _ = device.attach(saved / "saved", capacity_tokens=150)
        assert back.capacity_tokens == 150
        with kvattic.open("model", CONFIG) as other, pytest.raises(RequestError, match="belongs to another device"):
            other.save(saved / "x", [back])
        back.free()
        with pytest.raises(RequestError, match="freed"):
            device.save(saved / "x", [back])


def test_the_file(tmp_path):
    write_manifest(tmp_path / "a", TINY, {"x": 1}, {"numbers": np.arange(3)})
    header, arrays = read_manifest(tmp_path / "a", TINY)
    assert header == {"x": 1, "config": TINY.to_json()} and arrays["numbers"].tolist() == [0, 1, 2]
    assert json.loads(header["config"])


def test_the_flash_of_a_golden_device_in_a_file(tmp_path):
    path = tmp_path / "flash"
    device = GoldenDevice(TINY, image=path)
    with pytest.raises(RequestError, match="open already"):
        GoldenDevice(TINY, image=path)
    device.close()
    device.close()
    (tmp_path / "text").write_text("something else, which is long enough to be read as the front of such a file" * 20)
    with pytest.raises(RequestError, match="no file with the flash"):
        GoldenDevice(TINY, image=tmp_path / "text")
    drive = kvattic.Device(GoldenDevice(TINY, image=path))
    drive.create_sequence(HEADS, capacity_tokens=100).append(*tokens(70)[0])
    written = [(block, page, image.tobytes()) for block, page, image in drive.transport.written()]
    drive.transport.close()     # and nothing is freed
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"\x01\x00half a record")
    again = GoldenDevice(TINY, image=path)
    assert written and [(block, page, image.tobytes()) for block, page, image in again.written()] == written
    assert path.stat().st_size == size
    again.close()
    with pytest.raises(ConfigMismatchError, match="another configuration"):
        GoldenDevice(replace(TINY, dies=4), image=path)


def test_a_place_that_was_erased_is_found(tmp_path):
    """Of mean keys, too, whose zones are others."""
    device = opened(tmp_path)
    sequence = device.create_sequence(HEADS, capacity_tokens=200, layers=2, centroids=16)
    append(sequence, tokens(150))
    device.save(tmp_path / "saved")
    zones = sequence.describe()["zones"]
    assert set(zones[1]).isdisjoint(zones[0]) and zones[1]
    device.transport.close()
    flash = (tmp_path / "flash").read_bytes()
    for which in zones:
        (tmp_path / "flash").write_bytes(flash)
        drive = GoldenDevice(CONFIG, image=tmp_path / "flash")
        for block in [block for block in drive.flash.blocks if block.block in which]:
            drive.flash.operate(Opcode.ERASE, block.channel, int(layout.page_number(
                layout.PagePlace(block.block, 0, block.die, block.plane), CONFIG)), None)
        drive.close()
        with opened(tmp_path) as device, pytest.raises(ManifestError, match="cannot be read"):
            device.attach(tmp_path / "saved")
    (tmp_path / "flash").write_bytes(flash)
    with opened(tmp_path) as device:
        assert device.attach(tmp_path / "saved").sequences[0].length() == 150
