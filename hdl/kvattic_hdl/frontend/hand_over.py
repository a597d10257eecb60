"""Flash and admin commands on their way out of the front end."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from kvattic.spec.commands import COMMAND, DIRECTION_BITS, FLASH_COMMAND, GRANT_COMMAND, LINE_BYTES, QUEUE_COMMAND
from kvattic.spec.config import Config
from kvattic.spec.registers import QUEUES
from kvattic_hdl.frontend.fetch import command_fields
from kvattic_hdl.lib.shapes import OPCODE_BITS, Shapes

WINDOW = data.StructLayout({"base": 64, "limit": 64})
"""In which a queue's commands' blocks must lie."""


class HandOver(wiring.Component):
    """Keeps one flash and one admin command until they are taken, so that commands of other queues can pass.

    Latency: one cycle.  Throughput: one command a cycle.  Ordering: of each kind as they come.  Reset: none is there.

    Parameters
    ----------
    config : Config
        The configuration.

    Members
    -------
    valid : In(1)
        A command is given; it is taken if `ready`.
    ready : Out(1)
        It can be taken.
    is_flash : In(1)
        It is a flash command.
    command : In(512)
        Its line.
    queue : In(3)
        Its queue.
    bad_address : In(1)
        Its block is not aligned or not in the window.
    stop : In(1)
        Hand no flash command over.
    flash : Out(stream of Shapes.flash_command)
        Flash commands.
    admin : Out(stream of Shapes.admin_command)
        Admin commands.
    hold : Out(QUEUES)
        The queue whose flash command waits here.
    window : Out(WINDOW)
        That of the CREATE_QUEUE taken from `admin` last.
    """

    valid: Signal
    ready: Signal
    is_flash: Signal
    command: Signal
    queue: Signal
    bad_address: Signal
    stop: Signal
    flash: stream.Interface
    admin: stream.Interface
    hold: Signal
    window: data.View

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shapes = shapes = Shapes(config)
        super().__init__({
            "valid": In(1),
            "ready": Out(1),
            "is_flash": In(1),
            "command": In(LINE_BYTES * 8),
            "queue": In(range(QUEUES)),
            "bad_address": In(1),
            "stop": In(1),
            "flash": Out(stream.Signature(shapes.flash_command)),
            "admin": Out(stream.Signature(shapes.admin_command)),
            "hold": Out(QUEUES),
            "window": Out(WINDOW),
        })

    def elaborate(self, platform: object) -> Module:
        m = Module()
        flash, admin = Signal(self._shapes.flash_command), Signal(self._shapes.admin_command)
        flash_valid, admin_valid = Signal(), Signal()
        flash_queue = Signal.like(self.queue)
        given = Signal(WINDOW)
        m.d.comb += [
            self.ready.eq(Mux(self.is_flash, ~flash_valid | self.flash.ready, ~admin_valid | self.admin.ready)),
            self.flash.valid.eq(flash_valid & ~self.stop),
            self.flash.payload.eq(flash),
            self.admin.valid.eq(admin_valid),
            self.admin.payload.eq(admin),
            self.hold.eq(Mux(flash_valid, 1 << flash_queue, 0)),
        ]
        with m.If(self.flash.ready):
            m.d.sync += flash_valid.eq(0)
        with m.If(self.admin.ready):
            m.d.sync += admin_valid.eq(0)
            with m.If(admin_valid):
                m.d.sync += self.window.eq(given)
        with m.If(self.valid & self.ready):
            with m.If(self.is_flash):
                m.d.sync += [flash_valid.eq(1), flash_queue.eq(self.queue), *self._flash_command(flash)]
            with m.Else():
                create = command_fields(self._config, QUEUE_COMMAND, self.command)
                m.d.sync += [
                    admin_valid.eq(1),
                    given.base.eq(create["base"]),
                    given.limit.eq(create["limit"]),
                    *self._admin_command(admin),
                ]
        return m

    def _flash_command(self, flash: data.View) -> list:
        """Takes the line apart."""
        command = command_fields(self._config, FLASH_COMMAND, self.command)
        queue = Cat(self.queue, Const(0, 16 - len(self.queue)))
        return [
            flash.channel.eq(command["channel"]),
            flash.operation.opcode.eq(command["opcode"][DIRECTION_BITS:][:OPCODE_BITS]),
            flash.operation.page.eq(command["page"]),
            flash.operation.block.eq(command["argument"]),
            flash.operation.identity.eq(Cat(queue, command["identifier"])),
            flash.dram_page.eq(command["argument"]),
        ]

    def _admin_command(self, admin: data.View) -> list:
        """Takes the line apart."""
        command, create, grant = (
            command_fields(self._config, record, self.command) for record in (COMMAND, QUEUE_COMMAND, GRANT_COMMAND))
        return [
            admin.opcode.eq(command["opcode"]),
            admin.queue.eq(self.queue),
            admin.identifier.eq(command["identifier"]),
            admin.number.eq(create["queue"]),
            admin.entries.eq(create["entries"]),
            admin.first.eq(grant["first"]),
            admin.count.eq(grant["count"]),
            admin.domain.eq(grant["domain"]),
            admin.submission.eq(create["submission"]),
            admin.completion.eq(create["completion"]),
            admin.bad_address.eq(self.bad_address),
        ]
