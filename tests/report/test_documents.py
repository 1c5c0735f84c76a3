"""The tables in the documentation are those of the committed rows."""

import json
import re
import shutil
from pathlib import Path

import pytest

from regla.report.__main__ import main
from regla.report.documents import TABLES, documents, draw, fill, update
from regla.report.tables import markdown, ran_on, read_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in documents(ROOT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    return tmp_path


@pytest.mark.parametrize("name", documents(ROOT))
def test_documents_are_up_to_date(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert fill(text, ROOT) == text, "run `python -m regla.report readme`"


def test_every_table_is_in_a_document() -> None:
    texts = "".join((ROOT / name).read_text(encoding="utf-8") for name in documents(ROOT))
    assert all(f"<!-- table: {name} -->" in texts for name in TABLES)


def test_a_changed_row_changes_the_documents(copy: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["readme", "--root", str(copy)]) == 0
    assert capsys.readouterr().out == "All tables are up to date.\n"
    rows = copy / "benchmarks" / "cpu.jsonl"
    text = [json.loads(line) for line in rows.read_text().splitlines()]
    changed = [row | {"cache_bytes": 12_345 * 1024} if row["benchmark"] == "decode" else row for row in text]
    rows.write_text("".join(json.dumps(row) + "\n" for row in changed))
    before = (copy / "docs/results/cpu.md").read_text(encoding="utf-8")
    assert update(copy) == [copy / "docs/results/cpu.md"]
    after = (copy / "docs/results/cpu.md").read_text(encoding="utf-8")
    assert "| 12,345 KiB |" in after and "| 12,345 KiB |" not in before
    assert before.partition("<!-- table:")[0] == after.partition("<!-- table:")[0]
    assert update(copy) == []


def test_where_rows_were_measured_is_one_line() -> None:
    row = {"device": "D", "torch": "9", "commit": "abc", "date": "2026-01-02"}
    rows = [row, row | {"commit": "def", "date": "2026-01-01"}, row, row | {"device": "E", "threads": 2}]
    assert ran_on(rows) == (
        "Measured on D, torch 9, commits abc, def, 2026-01-01 to 2026-01-02; "
        "E, 2 threads, torch 9, commit abc, 2026-01-02."
    )


def test_markdown() -> None:
    assert markdown(["a", "b"], [["x", "1"]], numbers_from=1) == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_bad_input(copy: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="There is no table 'nonsense'; the known ones are forms"):
        fill("<!-- table: nonsense -->\n<!-- end of table -->\n", copy)
    with pytest.raises(ValueError, match="has no rows of the benchmark 'speed'"):
        read_rows(copy / "benchmarks" / "cpu.jsonl", "speed")
    (copy / "README.md").unlink()
    assert main(["readme", "--root", str(copy)]) == 2
    assert "run this in a checkout" in capsys.readouterr().err


def test_rows_of_an_installed_package_have_no_commit() -> None:
    """Their version is named."""
    row = {"device": "CPU", "torch": "2.13.0", "regla": "0.1.0", "commit": None, "date": "2026-01-02"}
    assert ran_on([row]) == "Measured on CPU, torch 2.13.0, regla 0.1.0, 2026-01-02."
    assert (
        ran_on([row, row | {"commit": "abc"}]) == "Measured on CPU, torch 2.13.0, commit abc, regla 0.1.0, 2026-01-02."
    )


def test_studies_of_one_text_can_share_a_table_and_a_plot(copy: Path) -> None:
    both = fill("<!-- table: quality/memory+final -->\n<!-- end of table -->\n", copy)
    for study in ("memory", "final"):
        alone = fill(f"<!-- table: quality/{study} -->\n<!-- end of table -->\n", copy).splitlines()
        assert {line for line in alone if re.match(r"\| [a-z]", line)} <= set(both.splitlines())
    with pytest.raises(ValueError, match="are of different texts"):
        fill("<!-- table: quality/memory+mqar -->\n<!-- end of table -->\n", copy)
    pictures = re.findall(r"\(([\w+-]+\.png)\)", (ROOT / "docs/results/memory.md").read_text(encoding="utf-8"))
    shutil.copytree(ROOT / "docs", copy / "docs", dirs_exist_ok=True)
    for name in pictures:
        (copy / "docs/results" / name).unlink()
    draw(copy)
    assert "memory+final-positions.png" in pictures
    assert all((copy / "docs/results" / name).is_file() for name in pictures)
