"""`regla quickstart`: three small models side by side, streaming, decoding cost, plots and a sample, in minutes."""

from regla.quickstart.run import quickstart

__all__ = ["quickstart"]
