"""Linearisation: pretrained softmax models become models with ReGLA layers."""

from regla.linearize.calibration import calibrate
from regla.linearize.convert import convert, layer_types
from regla.linearize.driver import linearize
from regla.linearize.load import load_original
from regla.linearize.transfer import check_transfer
from regla.models.families import FAMILIES

__all__ = ["FAMILIES", "calibrate", "check_transfer", "convert", "layer_types", "linearize", "load_original"]
