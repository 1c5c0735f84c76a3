"""The documentation: its commands parse, its code runs, its links lead somewhere."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from regla.cli import _parser
from regla.train.config import TrainConfig
from regla.train.run import train

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every `regla` command in the shell blocks of a page, under torchrun as well."""
    for block in blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.partition(" > ")[0], comments=True)
            if words and words[0] in ("regla", "torchrun"):
                yield words[words.index("regla") + 1 :]


@pytest.mark.parametrize("name", NAMES)
def test_commands_parse(name: str) -> None:
    for words in commands((ROOT / name).read_text(encoding="utf-8")):
        try:
            _parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"regla {shlex.join(words)}")


def test_the_check_of_commands_sees_them_and_can_fail() -> None:
    page = "```sh\nregla train --out a \\\n  --steps 3  # a note\nregla eval x > y\ntorchrun -m regla train\nls\n```\n"
    assert list(commands(page)) == [["train", "--out", "a", "--steps", "3"], ["eval", "x"], ["train"]]
    with pytest.raises(SystemExit):
        _parser().parse_args(["train", "--out", "a", "--stepps", "3"])
    assert sum(len(list(commands(page.read_text(encoding="utf-8")))) for page in PAGES) > 10


@pytest.fixture(scope="module")
def with_a_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in runs/regla, which the pages' code speaks of."""
    root = tmp_path_factory.mktemp("docs")
    train(TrainConfig(out=str(root / "runs/regla"), vocab_size=300, hidden_size=32, layers=2, heads=2, seq_len=32,
                      steps=2, device="cpu"))  # fmt: skip
    return root


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("docs")])
def test_code_runs(name: str, with_a_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from regla.layers import FEATURE_MAPS, GATES
    from regla.models.families import FAMILIES

    before: list[tuple[dict, dict]] = [(table, dict(table)) for table in (FEATURE_MAPS, GATES, FAMILIES)]
    monkeypatch.chdir(with_a_model)
    try:
        for block in blocks((ROOT / name).read_text(encoding="utf-8"), "python"):
            exec(compile(block, name, "exec"), {})
    finally:
        for table, entries in before:
            table.clear()
            table.update(entries)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("name", NAMES)
def test_no_page_names_a_module_that_is_gone(name: str) -> None:
    for path in re.findall(r"`(regla/[\w/]+\.py)`", (ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / "src" / path).is_file(), path
