"""The plots' numbers; whether they please is for eyes to judge."""

import struct
from pathlib import Path

import pytest

from regla.report.plots import moving_mean, plot_decoding, plot_losses


def test_the_moving_mean_looks_back() -> None:
    assert moving_mean([4.0, 2.0, 6.0, 1.0], 3) == pytest.approx([4.0, 3.0, 4.0, 3.0])


def test_plots_are_png_files(tmp_path: Path) -> None:
    plot_losses({"a": [(1024, 7.0), (2048, 6.0)], "b": [(1024, 7.1), (2048, 5.0)]}, tmp_path / "loss.png")
    curve = [(128, 1.0), (4096, 2.0)]
    plot_decoding({"a": curve}, {"a": curve}, tmp_path / "cost.png", title="Cost")
    for name, size in (("loss.png", (1050, 675)), ("cost.png", (1500, 630))):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG") and struct.unpack(">II", content[16:24]) == size
