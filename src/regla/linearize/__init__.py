"""Linearisation: pretrained softmax models become models with ReGLA layers."""

from regla.linearize.convert import convert, layer_types
from regla.linearize.families import FAMILIES
from regla.linearize.run import linearize
from regla.linearize.transfer import check_transfer

__all__ = ["FAMILIES", "check_transfer", "convert", "layer_types", "linearize"]
