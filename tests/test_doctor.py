"""What `regla doctor` says, against what is there."""

import importlib.metadata
import json
import platform
import sys
from pathlib import Path

import pytest
import torch

from regla import doctor
from regla.cli import main
from regla.ops import additive, attention, dispatch
from regla.runtime.install import EXTRAS, PACKAGES, install_regla, require


def test_versions_and_devices() -> None:
    found = doctor.examine()
    assert found["python"] == platform.python_version()
    for package in ("torch", "transformers", "huggingface-hub"):
        assert found["packages"][package] == importlib.metadata.version(package)
    assert len(found["devices"]) == 1 + torch.cuda.device_count()
    assert found["default_device"] == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("length", "plain"), [(1, "recurrent"), (2, "chunked")])
@pytest.mark.parametrize("compiler", [True, False])
def test_the_backend_named_is_the_one_that_runs(
    length: int, plain: str, compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiler:
        monkeypatch.setattr(dispatch, "why_missing", lambda: "there is no C compiler")
    backend = plain if dispatch.why_missing() else "native"
    assert doctor.chosen_backend(length) == backend

    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("this one ran")

    monkeypatch.setitem(additive._FORMS, backend, broken)
    x = torch.ones(1, length, 1, 16)
    with pytest.raises(RuntimeError, match="this one ran"):
        attention.gated_linear_attention(x, x, x)


def test_the_kernels_absence_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "why_missing", lambda: "there is no C compiler")
    (row,) = (row for row in doctor.examine()["backends"] if row["use"] == "backend='native'")
    assert row["backend"] == "none" and row["why"] == "there is no C compiler"


def test_absent_packages_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.PACKAGES, "no-such-package-here", "nothing")
    monkeypatch.setitem(doctor.PACKAGES, "numpy", "arrays")
    found = doctor.examine()
    assert found["optional"]["no-such-package-here"]["version"] is None
    text = doctor.describe(found)
    (absent,) = (line for line in text.splitlines() if "no-such-package-here" in line)
    (present,) = (line for line in text.splitlines() if line.endswith("arrays"))
    assert (
        "absent" in absent
        and absent.endswith('nothing; `pip install "no-such-package-here"`')
        and importlib.metadata.version("numpy") in present
    )


def test_extras_are_what_pyproject_says_and_each_package_has_a_use() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for extra, needs in EXTRAS.items():
        line = f"{extra} = [{', '.join(f'{chr(34)}{need}{chr(34)}' for need in needs)}]"
        assert line in text
        assert all(need.partition(">")[0] in PACKAGES for need in needs)


def test_a_line_that_installs_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError) as caught:
        require("gguf", "model.gguf needs", "accelerate")
    assert str(caught.value) == (
        "model.gguf needs the packages gguf and accelerate, which are not installed; "
        'run `pip install "gguf>=0.10" "accelerate>=1.10"`.'
    )
    require("torch", "This needs")


def test_the_line_that_installs_regla(monkeypatch: pytest.MonkeyPatch) -> None:
    """A git address only where others can reach it."""

    class Installed:
        def __init__(self, origin: str | None) -> None:
            self.origin = origin

        def read_text(self, name: str) -> str | None:
            return self.origin

    git = '{"url": "%s", "vcs_info": {"vcs": "git", "commit_id": "abc"}}'
    checkout = "pip install .  # in a checkout of regla"
    for origin, line in (
        (git % "https://example.com/regla.git", 'pip install "regla @ git+https://example.com/regla.git@abc"'),
        (git % "file:///home/me/regla", checkout),
        ('{"url": "file:///home/me/regla", "dir_info": {"editable": true}}', checkout),
        (None, checkout),
    ):
        monkeypatch.setattr(importlib.metadata, "distribution", lambda name, origin=origin: Installed(origin))
        assert install_regla() == line


def test_nothing_optional_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gguf", "tensorboard", "peft"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    doctor.examine()
    assert not {"gguf", "tensorboard", "peft"} & set(sys.modules)


def test_the_command(capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert (
        f"torch            {torch.__version__}" in text
        and f"decoding token by token     {doctor.chosen_backend(1)}" in text
    )
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == doctor.examine()
