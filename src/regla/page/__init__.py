"""`regla report`: one page about a conversion, from what its folder holds and what is measured on the spot."""

from regla.page.run import report

__all__ = ["report"]
