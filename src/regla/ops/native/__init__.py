"""Kernels in C for a CPU."""
