"""Fused kernels for GPUs; the only importer of triton."""
