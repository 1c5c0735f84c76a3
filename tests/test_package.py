"""The package as a whole: what it loads, how its parts may depend on each other, and its documentation's code."""

import importlib.metadata
import importlib.resources
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules_after(statement: str) -> set[str]:
    """Top-level modules loaded in a fresh interpreter once the statement has run."""
    script = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


@pytest.mark.parametrize("module", ["regla.ops", "regla.layers"])
def test_the_core_needs_torch_alone(module):
    loaded = modules_after(f"import {module}")
    assert "torch" in loaded
    assert not loaded & {"transformers", "tokenizers", "safetensors", "huggingface_hub"}


def test_importing_the_package_is_light():
    assert not modules_after("import regla") & {"torch", "numpy", "transformers"}


def test_the_check_of_what_is_loaded_can_fail():
    assert "numpy" in modules_after("import regla, numpy.linalg")


def test_type_information_is_shipped():
    assert importlib.resources.files("regla").joinpath("py.typed").is_file()


def test_the_command_is_installed():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="regla")
    assert callable(script.load())


def check_layering(root: Path) -> subprocess.CompletedProcess[str]:
    """Runs the contracts of pyproject.toml on the package `regla` under root."""
    lint_imports = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [lint_imports, "--no-cache", "--no-logo", "--config", ROOT / "pyproject.toml"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "src" / "regla", tmp_path / "regla", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_layering_holds(copy):
    result = check_layering(copy)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("module", "statement", "contract"),
    [
        ("ops/__init__.py", "import transformers", "The operations and layers need torch alone"),
        (
            "layers/__init__.py",
            "from transformers import PreTrainedModel",
            "The operations and layers need torch alone",
        ),
        ("ops/__init__.py", "def f():\n    import regla.layers", "Data flows one way"),
        ("layers/__init__.py", "import regla.models", "Data flows one way"),
        ("models/__init__.py", "from regla.cli import main", "Data flows one way"),
        ("layers/__init__.py", "import triton", "Only the kernels import triton"),
        ("misplaced.py", "", "Data flows one way"),
    ],
)
def test_a_breach_of_the_layering_is_found(copy, module, statement, contract):
    with (copy / "regla" / module).open("a") as file:
        file.write(f"\n{statement}\n")
    result = check_layering(copy)
    assert result.returncode == 1
    assert f"{contract} BROKEN" in result.stdout


def test_kernels_may_import_triton(copy):
    (copy / "regla" / "ops" / "triton").mkdir(exist_ok=True)
    with (copy / "regla" / "ops" / "triton" / "__init__.py").open("a") as file:
        file.write("\nimport triton\n")
    result = check_layering(copy)
    assert result.returncode == 0, result.stdout


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_the_code_of_the_readme_runs(capsys):
    blocks = python_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
