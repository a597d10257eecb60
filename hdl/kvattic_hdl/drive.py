"""The whole drive: the engine, a flash channel with its PHY interface on each of its channels, and their correctors."""

from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from kvattic.spec.config import Config
from kvattic.spec.registers import ADDRESS_BITS
from kvattic.spec.scheduling import channels_of_corrector
from kvattic_hdl.engine import Engine
from kvattic_hdl.flash.channel import FlashChannel
from kvattic_hdl.flash.corrector import Corrector
from kvattic_hdl.flash.phy import phy_signature
from kvattic_hdl.lib.axi import AXI_READ, AXI_WRITE, axi_lite
from kvattic_hdl.storage.dram_reader import dram_signature
from kvattic_hdl.verilog.shared import shared


class Drive(wiring.Component):
    """Host bus and device DRAM on one side, NAND PHYs on the other.

    A soft reset (CONTROL.RESET) resets the engine alone: the channels finish what was asked of them.

    Parameters
    ----------
    config : Config

    Members
    -------
    host : In(axi_lite)
    read, write : Out(AXI4 channels)
    dram : Out(dram_signature)
    irq : Out(1)
        As of `Engine`.
    phys : Array of Out(phy_signature)
        One for each channel.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        super().__init__({
            "host": In(axi_lite(ADDRESS_BITS)),
            "read": Out(AXI_READ),
            "write": Out(AXI_WRITE),
            "dram": Out(dram_signature(config)),
            "phys": Out(phy_signature(config)).array(config.channels),
            "irq": Out(1),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self.config
        m.submodules.engine = engine = Engine(config)
        connect(m, flipped(self.host), engine.host)
        for name in ("read", "write", "dram"):
            connect(m, getattr(engine, name), flipped(getattr(self, name)))
        m.d.comb += self.irq.eq(engine.irq)
        sharers = channels_of_corrector(config)
        correctors = []
        for number in range(config.channels // sharers):
            corrector, m.submodules[f"corrector_{number}"] = shared(
                platform, "kvattic_corrector", lambda: Corrector(config, sharers))
            correctors.append(corrector)
        for c in range(config.channels):
            channel, m.submodules[f"channel_{c}"] = shared(
                platform, "kvattic_flash_channel", lambda: FlashChannel(config))
            for name in ("requests", "operations", "page_words"):
                connect(m, getattr(engine, name)[c], getattr(channel, name))
            for name in ("codewords", "outcomes"):
                connect(m, getattr(channel, name), getattr(engine, name)[c])
            connect(m, channel.corrections, correctors[c // sharers].channels[c % sharers])
            connect(m, channel.phy, flipped(self.phys[c]))
            m.d.comb += [
                channel.value_open.eq(engine.value_open),
                channel.epoch.eq(engine.epoch),
                engine.flash_events[c].eq(channel.events),
                engine.media_errors[c].eq(channel.media_error),
            ]
        return m
