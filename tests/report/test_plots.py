"""The plots' numbers; whether they please is for eyes to judge."""

import struct
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from regla.report.plots import moving_mean, plot_decoding, plot_lengths, plot_losses


def test_the_moving_mean_looks_back() -> None:
    assert moving_mean([4.0, 2.0, 6.0, 1.0], 3) == pytest.approx([4.0, 3.0, 4.0, 3.0])


def test_noise_does_not_look_like_a_cliff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = []
    monkeypatch.setattr(Figure, "savefig", lambda self, _: ranges.extend(axes.get_ylim() for axes in self.axes))
    panels = {"nearly flat": {"a": [(1024, 1.0), (4096, 1.1)]}, "steep": {"a": [(1024, 1.0), (4096, 8.0)]}}
    plot_lengths(panels, tmp_path / "x.png", title="", along="", unit="", least_ratio=2.0)
    (low, high), (steep_low, steep_high) = ranges
    assert (low, high) == pytest.approx((0.5, 2.2))
    assert 0.5 < steep_low < 1.0 and 8.0 < steep_high < 16.0


def test_plots_are_png_files(tmp_path: Path) -> None:
    plot_losses({"a": [(1024, 7.0), (2048, 6.0)], "b": [(1024, 7.1), (2048, 5.0)]}, tmp_path / "loss.png")
    curve = [(128, 1.0), (4096, 2.0)]
    plot_decoding({"a": curve}, {"a": curve}, tmp_path / "cost.png", title="Cost")
    for name, size in (("loss.png", (1050, 675)), ("cost.png", (1500, 630))):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG") and struct.unpack(">II", content[16:24]) == size
