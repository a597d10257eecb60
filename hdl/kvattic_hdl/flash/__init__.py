"""The flash side of the drive: for each channel a controller, an encoder and a decoder, behind a PHY interface."""
