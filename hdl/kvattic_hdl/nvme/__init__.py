"""The host's side of the drive: registers, queues, admin commands, owners."""
