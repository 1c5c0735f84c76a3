"""The tables in the documentation are those of the committed rows."""

import json
import shutil
from pathlib import Path

import pytest

from regla.report.__main__ import main
from regla.report.documents import TABLES, documents, fill, update
from regla.report.tables import markdown, read_rows, training_table

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
    rows = copy / "benchmarks" / "train_34m.jsonl"
    *rest, last = rows.read_text().splitlines()
    row = json.loads(last) | {"validation_perplexity": 12.345}
    rows.write_text("\n".join([*rest, json.dumps(row)]) + "\n")
    before = (copy / "README.md").read_text(encoding="utf-8")
    assert update(copy) == [copy / "README.md", copy / "docs/results/34m.md"]
    after = (copy / "README.md").read_text(encoding="utf-8")
    assert "| 12.3 |" in after and "| 12.3 |" not in before
    assert before.partition("<!-- table:")[0] == after.partition("<!-- table:")[0]
    assert update(copy) == []


def test_the_training_table_shows_each_source() -> None:
    row = {
        "arguments": {"mixer": "hybrid", "lr": 0.003, "overrides": {"initializer_range": 0.5, "qk_norm": False}},
        "parameters": 1_230_000,
        "tokens": 4_560_000,
        "validation": [{"name": "valid_wiki_06.bin", "perplexity": 7.04}, {"name": "b.txt", "perplexity": 8.0}],
        "validation_perplexity": 7.5,
        "tokens_per_second": 12_345.0,
        "device": "D",
        "commit": "abc",
        "date": "today",
        "versions": {"torch": "9"},
    }
    header, _, line, _, where = training_table([row]).splitlines()
    assert "| wiki | b.txt | all |" in header
    assert line == "| hybrid | 0.003 | 0.5 | qk_norm False | 1.23M | 4.6M | 7.0 | 8.0 | 7.5 | 12k |"
    assert where == "Measured on: D; torch 9; commit abc, today."


def test_markdown() -> None:
    assert markdown(["a", "b"], [["x", "1"]], numbers_from=1) == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_bad_input(copy: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="There is no table 'nonsense'; the known ones are train_34m"):
        fill("<!-- table: nonsense -->\n<!-- end of table -->\n", copy)
    with pytest.raises(ValueError, match="has no rows of the benchmark 'speed'"):
        read_rows(copy / "benchmarks" / "cpu.jsonl", "speed")
    (copy / "README.md").unlink()
    assert main(["readme", "--root", str(copy)]) == 2
    assert "run this in a checkout" in capsys.readouterr().err
