"""The model card: every line of its code and its command runs, and the front matter says where the model comes from."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from safetensors.torch import load_file

from regla.cli import main
from regla.linearize.origin import origin_of
from regla.runtime.log import TrainingLog
from tests.linearize.models import command


def fenced(card, language):
    """The one block of code in this language."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    return block


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_the_code_runs_in_a_fresh_process(converted):
    code = fenced((converted / "README.md").read_text(), "python").replace("THIS_FOLDER", str(converted))
    code += "print(model.generate(**tokenizer('the cat', return_tensors='pt'), max_new_tokens=3).shape[0])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,  # a question would fail
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "1" and "custom code" not in done.stdout + done.stderr


def test_the_command_repeats_the_conversion(folder, tmp_path, monkeypatch):
    """Interrupted and resumed, too, the card names the command that makes the same weights from nothing."""
    monkeypatch.chdir(folder)
    options = command(folder, "runs/first", "--tokens", "1024", "--save-every", "2")
    options = [os.path.relpath(word, folder) if word.startswith(str(folder)) else word for word in options]
    write = TrainingLog.__call__

    def killed(log, record):
        write(log, record)
        if record["step"] == 3:
            raise SystemExit(9)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(TrainingLog, "__call__", killed)
        main(options)
    assert main([*options, "--resume"]) == 0
    card = (folder / "runs" / "first" / "README.md").read_text()
    words = shlex.split(fenced(card, "sh"))
    assert words[:2] == ["regla", "linearize"] and "--resume" not in words and "runs/first" in words

    for name in ("model", "text.txt"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    assert main(words[1:]) == 0
    ours, theirs = (load_file(place / "runs" / "first" / "model.safetensors") for place in (tmp_path, folder))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_front_matter(folder, converted, tmp_path):
    found = front_matter((converted / "README.md").read_text())
    assert found["library_name"] == "transformers" and found["pipeline_tag"] == "text-generation"
    assert found["base_model"] == "model" and "license" not in found  # nobody knows it

    model = tmp_path / "licensed"
    shutil.copytree(folder / "model", model)
    (model / "README.md").write_text("---\nlicense: apache-2.0\ntags: [small]\n---\n# A model\n")
    out = tmp_path / "out"
    assert main(["linearize", str(model), "--out", str(out), "--data", str(folder / "text.txt")]) == 0
    found = front_matter((out / "README.md").read_text())
    assert found["license"] == "apache-2.0" and found["base_model"] == "licensed"
    assert found["tags"] == ["regla", "linear-attention"]


@pytest.mark.parametrize("text", ["no front matter", "---\nlicense: [\n---\n", "---\n- a list\n---\n", ""])
def test_cards_that_say_nothing(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert origin_of(str(tmp_path)).keys() <= {"base_model"}


def test_licence_of_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "small-Q4.gguf", "llama")
    writer.add_license("mit")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert origin_of(str(tmp_path / "small-Q4.gguf")) == {"base_model": "small-Q4", "license": "mit"}
