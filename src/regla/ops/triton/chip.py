"""The GPUs that the kernels are written for, and what was chosen for them by measurement (docs/dev/kernel-log.md).

Needs torch alone: whether the kernels can run is asked before they are imported.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Chip(NamedTuple):
    """A kind of GPU. Pairs are for heads of up to 64 channels and for wider ones."""

    name: str
    capability: tuple[int, int]
    shared_memory: int  #: bytes that a CTA may have; less, and some of the kernels do not launch
    multiprocessors: int  #: where torch sees none, as when tests compile the kernels without a GPU
    chains: tuple[int, int]  #: heads of all sequences that a launch computes side by side: their states stay in L2
    few_heads: tuple[int, int]  #: heads of all sequences up to which a long sequence is cut into segments
    segments: tuple[int, int]  #: of all sequences, that cutting aims for
    pieces: tuple[int, int]  #: of these, for the pass that computes what each leaves
    shortest_piece: int  #: chunks
    norm_ctas: int  #: of a multiprocessor, for the gradient of q's and of k's norm each
    output_norm_ctas: dict[str, int]  #: of a multiprocessor, for the gradient of the output's norm
    decode_ctas: int  #: of a multiprocessor, that decode with 80 registers a thread, of heads of 64


HOPPER = Chip(
    name="H100, H200",
    capability=(9, 0),
    shared_memory=227 * 1024,
    multiprocessors=132,
    chains=(192, 96),
    few_heads=(32, 24),
    segments=(96, 32),
    pieces=(768, 528),
    shortest_piece=8,
    norm_ctas=4,
    output_norm_ctas={"rms": 7, "layer": 4},
    decode_ctas=6,
)
CHIPS = {chip.capability: chip for chip in (HOPPER,)}
_SUPPORTED = ", ".join(f"{chip.capability[0]}.{chip.capability[1]} ({chip.name})" for chip in CHIPS.values())


@torch.compiler.assume_constant_result
def why_unsupported(device: torch.device) -> str | None:
    """Why the kernels do not run on this CUDA device; None if they do. A constant to torch.compile."""
    return _why_unsupported(device)


@functools.cache
def _why_unsupported(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "the GPU is one of AMD, and the kernels are written for NVIDIA's"
    properties = torch.cuda.get_device_properties(device)
    capability = properties.major, properties.minor
    if capability not in CHIPS:
        own = f"{properties.name} has {capability[0]}.{capability[1]}"
        return f"the kernels support GPUs of compute capability {_SUPPORTED}, and {own}"
    needed = CHIPS[capability].shared_memory
    given = getattr(properties, "shared_memory_per_block_optin", needed)  # not in torch's types
    if given < needed:
        return f"the kernels need {needed:,} bytes of shared memory a CTA, and {properties.name} gives {given:,}"
    return None


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """The row of the table, with the device's own number of multiprocessors (a MIG slice has fewer)."""
    if device.type != "cuda":  # tests: through Triton's interpreter, or without a launch
        return HOPPER
    properties = torch.cuda.get_device_properties(device)
    chip = CHIPS[properties.major, properties.minor]
    return chip._replace(multiprocessors=properties.multi_processor_count)
