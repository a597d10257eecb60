"""The bench of the scan for bad blocks: how it counts; the RTL is in tests/cosim."""

from random import Random

from kvattic import TINY, Block
from kvattic_sim.reports import bench
from kvattic_sim.reports.benches import bad_blocks


def test_half_of_the_blocks_are_marked_in_all_ways() -> None:
    part = bad_blocks.CONFIG.part
    blocks = bad_blocks.CONFIG.channels * bad_blocks.CONFIG.dies * part.planes * part.blocks
    assert blocks * bad_blocks.DRIVES == 10_000
    chosen = bad_blocks.marks(bad_blocks.CONFIG, Random(1))
    assert len({block for block, _ in chosen}) == len(chosen) == blocks // 2
    assert {page for _, page in chosen} == {None, *part.marked_pages} == {None, 0, 7}
    assert all(type(block) is Block for block, _ in chosen)
    assert bad_blocks.marks(TINY, Random(1)) != bad_blocks.marks(TINY, Random(2))


def test_the_bar_is_none_at_all() -> None:
    assert bench.BARS["flash.bad_block_scan"] == bench.Bar("<=", (0,))
    assert bench.verdict("flash.bad_block_scan", 1, {}) is bench.Verdict.SHORT
    total = bad_blocks.Judged(blocks=3, marked=1, lost=1) + bad_blocks.Judged(blocks=3, marked=2, missed=1)
    assert total == bad_blocks.Judged(blocks=6, marked=3, lost=1, missed=1)
