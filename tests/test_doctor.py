"""What `regla doctor` says, against what is there."""

import importlib.metadata
import json
import platform
import sys

import pytest
import torch

from regla import doctor
from regla.cli import main
from regla.ops import attention, backends


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
        monkeypatch.setattr(backends, "why_missing", lambda: "there is no C compiler")
    backend = plain if backends.why_missing() else "native"
    assert doctor.chosen_backend(length) == backend

    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("this one ran")

    monkeypatch.setitem(attention._FORMS, backend, broken)
    x = torch.ones(1, length, 1, 16)
    with pytest.raises(RuntimeError, match="this one ran"):
        attention.gated_linear_attention(x, x, x)


def test_the_kernels_absence_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "why_missing", lambda: "there is no C compiler")
    (row,) = (row for row in doctor.examine()["backends"] if row["use"] == "backend='native'")
    assert row["backend"] == "none" and row["why"] == "there is no C compiler"


def test_absent_packages_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor._OPTIONAL, "no-such-package-here", "nothing")
    monkeypatch.setitem(doctor._OPTIONAL, "numpy", "arrays")
    found = doctor.examine()
    assert found["optional"]["no-such-package-here"]["version"] is None
    text = doctor.describe(found)
    (absent,) = (line for line in text.splitlines() if "no-such-package-here" in line)
    (present,) = (line for line in text.splitlines() if line.endswith("arrays"))
    assert "absent" in absent and importlib.metadata.version("numpy") in present


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
