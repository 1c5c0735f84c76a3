"""Layers: feature maps, gates, norms, and the mixer that composes them. Needs torch alone."""

from regla.layers.attention import ReGLAAttention, ReGLAState
from regla.layers.feature_maps import FEATURE_MAPS
from regla.layers.gates import GATES
from regla.layers.init import init_linear_attention
from regla.layers.norms import NORMS

__all__ = ["FEATURE_MAPS", "GATES", "NORMS", "ReGLAAttention", "ReGLAState", "init_linear_attention"]
