"""Tables and plots of `regla bench`."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from regla.report.benches import benches_table, kernels_table, latest, lines, plot_bench, speed_table
from regla.report.documents import documents, draw, fill

AROUND = {"device": "D", "torch": "9", "commit": "abc", "date": "today"}
ROOT = Path(__file__).parents[2]


def ops_row(backend: str, T: int, p50_us: float, **more: Any) -> dict[str, Any]:
    setting = {"B": 4096 // T, "T": T, "H": 12, "K": 64, "V": 64, "direction": "forward", "dtype": "bfloat16"}
    return {
        "benchmark": "bench ops",
        "subject": f"regla_attention/value/{backend}",
        "backend": backend,
        "setting": setting,
        "p20_us": p50_us - 1,
        "p50_us": p50_us,
        "p80_us": p50_us + 1000,
        "gb_per_s": 1234.5,
        "of_floor": 0.4567,
        "peak_extra_bytes": 3 * 2**20,
        "against": {"softmax_attention/none/sdpa": 1.25},
        **AROUND,
        **more,
    }


def model_row(kind: str, subject: str, along: str, length: int, **more: Any) -> dict[str, Any]:
    return {
        "benchmark": f"bench {kind}",
        "subject": subject,
        "setting": {"batch": 8, along: length, "compiled": True},
        "p20_us": 900.0,
        "p50_us": 1000.0,
        "p80_us": 1100.0,
        "tokens_per_second": 8000.0,
        "peak_bytes": 2**30,
        "against": {"softmax": 2.0, "identity": 0.9},
        **({"activation_checkpointing": False} if kind == "train" else {"cache_bytes": 2**21, "of_floor": 0.5}),
        **AROUND,
        **more,
    }


def test_table_of_operations() -> None:
    header, rule, line, _, where = benches_table([ops_row("triton", 1024, 99.0)]).splitlines()
    assert "| of copy bandwidth | extra memory | x sdpa | x fla |" in header
    assert line == (
        "| regla_attention/value/triton | B4 T1024 H12 64x64 | fwd | bfloat16 | 98.00 / 99.00 / 1,099 | 1,234 | 46% "
        "| 3.0 MiB | 1.25 | - |"
    )
    assert rule.count("|") == header.count("|") == line.count("|")
    assert where == "Measured on D, torch 9, commit abc, today."


def test_table_of_kernels() -> None:
    """A line for shape, gates and axis; both directions beside; other operations, dtypes and older rows left out."""
    backward = {**ops_row("triton", 1024, 0)["setting"], "direction": "forward+backward"}
    fla = {"softmax_attention/none/sdpa": 0.5, "chunk_gla/key/fla": 2.0}
    rows = [
        ops_row("triton", 1024, 50.0),
        ops_row("triton", 1024, 99.0),
        ops_row("chunked", 1024, 900.0),
        ops_row("triton", 1024, 300.0, setting=backward, against=fla),
        ops_row("triton", 1024, 400.0, setting=backward, subject="regla_attention_fast_gates/both/triton"),
        ops_row("triton", 1024, 70.0, setting={**backward, "dtype": "float32"}),
    ]
    _, rule, first, second, _, where = kernels_table(rows).splitlines()
    assert first == "| 4 x 1,024 | 12 x 64 | at initialisation | value | 99 | 1.25 | - | 300 | 0.50 | 2.00 |"
    assert second == "| 4 x 1,024 | 12 x 64 | fast | both | - | - | - | 400 | 1.25 | - |"
    assert rule.count("|") == first.count("|") and where.startswith("Measured on")


def test_tables_of_models() -> None:
    *_, line, _, _ = benches_table([model_row("decode", "regla", "context", 65536)]).splitlines()
    assert line == ("| ReGLA | 8 | 65,536 | 8,000 | 0.90 / 1.00 / 1.10 | 50% | 1,024.0 MiB | 2.0 MiB | 2.00 |")
    *_, line, _, _ = benches_table([model_row("train", "identity", "length", 2048)]).splitlines()
    assert line.startswith("| identity for a mixer | 2,048 | 8 | 8,000 |") and line.endswith("| 2.00 | - | 0.90 |")


def test_memory_that_ran_out_is_in_the_table() -> None:
    full = {key: value for key, value in model_row("train", "softmax", "length", 2048).items() if "us" not in key}
    full = {**full, "out_of_memory": True}
    for key in ("tokens_per_second", "peak_bytes", "against"):
        del full[key]
    again = model_row("train", "softmax", "length", 2048, activation_checkpointing=True)
    *_, first, second, _, _ = benches_table([full, again]).splitlines()
    assert first == "| softmax | 2,048 | 8 | - | out of memory | - | - | - | - |"
    assert second.startswith("| softmax, activation checkpointing | 2,048 |")


def test_the_table_of_training_speed() -> None:
    rows = [
        model_row("train", "softmax", "length", 2048, tokens_per_second=4000.0),
        model_row("train", "regla", "length", 2048, tokens_per_second=5000.0),
        model_row("train", "regla", "length", 8192),  # without softmax beside it
    ]
    assert speed_table(rows).splitlines()[2:] == [
        "| 2,048 | 4k | 5k | 1.25x |",
        "",
        "Measured on D, torch 9, commit abc, today.",
    ]


def test_a_later_run_counts() -> None:
    rows = [ops_row("triton", 1024, 99.0), ops_row("chunked", 1024, 500.0), ops_row("triton", 1024, 88.0)]
    assert [row["p50_us"] for row in latest(rows)] == [88.0, 500.0]


def test_printed_columns_stand_under_their_titles() -> None:
    titles, text = lines(ops_row("triton", 1024, 99.0))
    assert titles.index("x sdpa") == text.index("1.25") and titles.index("GB/s") == text.index("1,234")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rows = [
        *(ops_row(backend, T, 99.0) for backend in ("triton", "chunked") for T in (1024, 2048)),
        *(model_row("decode", "regla", "context", length) for length in (1024, 2048)),
        *(model_row("train", "regla", "length", length) for length in (1024, 2048)),
    ]
    (tmp_path / "benchmarks/gpu").mkdir(parents=True)
    (tmp_path / "docs/results").mkdir(parents=True)
    (tmp_path / "benchmarks/gpu/h.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_any_page_of_the_docs_can_show_them(root: Path) -> None:
    page = (
        "# A page\n\n<!-- table: ops/h -->\n<!-- end of table -->\n\n<!-- table: train/h -->\n<!-- end of table -->\n"
    )
    (root / "docs/page.md").write_text(page)
    assert "docs/page.md" in documents(root)
    filled = fill(page, root)
    assert "| regla_attention/value/triton | B4 T1024" in filled and "| ReGLA | 2,048 | 8 |" in filled
    with pytest.raises(ValueError, match="There is no table 'nonsense/h'"):
        fill(page.replace("ops/h", "nonsense/h"), root)


def test_plots(root: Path) -> None:
    page = root / "docs/page.md"
    page.write_text("![Training](results/h-train.png)\n")
    assert [file.name for file in draw(root)] == ["h-train.png"]
    page.write_text("".join(f"![{kind}](results/h-{kind}.png)\n" for kind in ("ops", "decode", "train")))
    drawn = draw(root)
    assert [file.name for file in drawn] == ["h-ops.png", "h-decode.png", "h-train.png"]
    for file in drawn:
        content = file.read_bytes()
        assert content.startswith(b"\x89PNG") and struct.unpack(">II", content[16:24]) == (840, 660)


def test_the_plot_of_operations_shows_the_shapes_with_most_lengths(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("regla.report.benches.plot_lengths", lambda panels, file, **_: seen.update(panels))
    other = ops_row("triton", 1024, 1.0)
    other["setting"] = other["setting"] | {"H": 16}
    plot_bench(
        [other, *(ops_row(name, T, 8.192) for name in ("triton", "chunked") for T in (2048, 1024))], tmp_path / "x"
    )
    assert seen == {"forward": {"regla_attention/value/triton": [(1024, 2.0), (2048, 2.0)]}}
