"""The page of `regla report`: its figures, its parts, what it says of missing ones, and its look in a browser."""

import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread
from transformers import AutoModelForCausalLM

from regla.cli import main
from regla.data.tokenizer import load_tokenizer, train_tokenizer
from regla.linearize.losses import transfer_loss
from regla.models.folders import load_model
from regla.page.measure import alignment, compare, measure
from regla.page.run import _held_out
from tests.linearize.models import llama

PARTS = ["converted", "alignment", "training", "comparison", "gates", "decoding", "samples", "command"]
MEASURED = ["comparison", "gates", "decoding", "samples"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def page(converted, tmp_path_factory):
    """Of a whole run, with everything measured."""
    file = tmp_path_factory.mktemp("page") / "page.html"
    assert main(["report", str(converted), "--out", str(file), "--device", "cpu"]) == 0
    return file


@pytest.fixture
def unmeasured(converted, tmp_path):
    """A copy of the run's folder without weights, to change, and what makes its page."""
    copy = tmp_path / "run"
    shutil.copytree(converted, copy, ignore=shutil.ignore_patterns("*.safetensors"))

    def render():
        assert main(["report", str(copy), "--skip-measurements"]) == 0
        return parts((copy / "report.html").read_text(encoding="utf-8"))

    return copy, render


def parts(html):
    """The content of each part of the page, by its key."""
    return dict(re.findall(r'<section id="(\w+)">(.*?)</section>', html, flags=re.DOTALL))


class References(HTMLParser):
    """Everything that a browser would load or run."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        if tag in ("script", "link", "iframe", "object", "embed", "img", "base"):
            self.found.append(tag)
        for name, value in attributes:
            loads = name in ("src", "href", "xlink:href", "data", "action", "srcset", "poster") or name.startswith("on")
            if loads and not (value or "").startswith("#"):
                self.found.append(f"{tag} {name}={value}")


def references(html):
    parser = References()
    parser.feed(html)
    return parser.found + re.findall(r"@import|url\((?!#)[^)]*\)", html)


def test_every_part_is_there_and_nothing_else_is_needed(page):
    html = page.read_text(encoding="utf-8")
    assert list(parts(html)) == PARTS
    assert 'class="absent"' not in html
    assert html.count("<svg ") == 6
    assert references(html) == []
    assert "regla linearize model" in parts(html)["command"]


def test_the_check_of_references_can_fail():
    assert references('<script src="a.js"></script><p style="background: url(b.png)" onclick="c()">') != []


def test_comparison_is_of_both_models_with_standard_errors_over_sequences(folder, converted):
    teacher = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    student = load_model(converted, torch.device("cpu"))
    ids_BL = torch.randint(290, (6, 33), generator=torch.Generator().manual_seed(1))
    found = compare(teacher, student, ids_BL)
    with torch.no_grad():
        p_BTV, q_BTV = (model(ids_BL[:, :-1]).logits.double().log_softmax(-1) for model in (teacher, student))
    nats_B = [F.nll_loss(x.transpose(1, 2), ids_BL[:, 1:], reduction="none").mean(1) for x in (p_BTV, q_BTV)]
    kl_B = (p_BTV.exp() * (p_BTV - q_BTV)).sum(-1).mean(1)
    expected = {
        "teacher_loss": nats_B[0],
        "student_loss": nats_B[1],
        "loss_gap": nats_B[1] - nats_B[0],
        "kl": kl_B,
        "same": (p_BTV.argmax(-1) == q_BTV.argmax(-1)).double().mean(1),
    }
    for name, values_B in expected.items():
        assert found[name] == pytest.approx((float(values_B.mean()), float(values_B.std() / 6**0.5)), abs=1e-5), name
    assert (found["sequences"], found["length"], found["tokens"]) == (6, 32, 192)
    assert found["positions"][0]["kl"] == pytest.approx(float(kl_B.mean()), abs=1e-5)


def test_a_model_against_itself(folder):
    teacher = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    found = compare(teacher, teacher, torch.randint(290, (3, 17)))
    assert found["kl"] == pytest.approx((0, 0), abs=1e-6)
    assert found["same"] == (1.0, 0.0) and found["loss_gap"] == (0.0, 0.0)


def test_alignment_is_what_attention_transfer_minimises(folder, converted):
    teacher = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    student = load_model(converted, torch.device("cpu"))
    crop_BL = torch.randint(290, (3, 41), generator=torch.Generator().manual_seed(2))
    errors = alignment(teacher, student, crop_BL[:, :-1])
    assert sorted(errors) == [0, 1]
    mean = sum(errors.values()) / 2
    assert mean == pytest.approx(transfer_loss(teacher)(student, crop_BL).item(), rel=1e-4)


@pytest.mark.parametrize("tokens", [2, 5, 70])
def test_short_texts(folder, converted, tokens):
    teacher = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    student = load_model(converted, torch.device("cpu"))
    tokenizer = load_tokenizer(converted)
    ids_N = torch.randint(290, (tokens,)).numpy()
    found = measure(teacher, student, tokenizer, ids_N, announce=lambda _: None)
    assert found["comparison"]["tokens"] == tokens - 1 and math.isnan(found["comparison"]["kl"][1])
    assert len(found["samples"]) >= 1 and len(found["gates"]) == 2


@pytest.mark.parametrize("arguments", [{}, {"data": 5}, {"data": [5]}, {"data": ["gone.txt"]}, {"valid": "gone"}])
def test_where_the_validation_text_is_gone_the_embedded_text_takes_its_place(converted, arguments):
    ids_N, text = _held_out(arguments, load_tokenizer(converted))
    assert len(ids_N) > 1000 and ("is not there" in text) == bool(arguments) and "pydoc_data.topics" in text


def test_without_measurements_no_weights_are_needed(unmeasured):
    found = unmeasured[1]()
    assert all("--skip-measurements" in found[key] for key in MEASURED)
    assert all("absent" not in found[key] for key in PARTS if key not in MEASURED)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"calibration": []}, "alignment"),
        ({"calibration": None}, "alignment"),
        ({"calibration": [{"layer": "x"}]}, "alignment"),
        ({"linear_layers": None}, "converted"),
        ({"scores": {"original": 3}}, "training"),
        ({"stages": {}}, "training"),
        ({"stages": {"distillation": []}}, "training"),
        ({"layer_choice": {}}, "choice"),
        ({"arguments": {}}, "command"),
        ({"arguments": {"model": 3}}, "command"),
        ({"versions": [1]}, "converted"),
    ],
)
def test_a_part_without_figures_says_so(unmeasured, change, part):
    copy, render = unmeasured
    file = copy / "linearize.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    found = render()
    assert 'class="absent"' in found[part]
    others = [key for key in found if key != part and key not in MEASURED and 'class="absent"' in found[key]]
    assert others == []


def test_layers_that_were_chosen_are_shown_and_logs_may_be_damaged(unmeasured):
    copy, render = unmeasured
    row = {"kl": 1.0, "kl_gain": 0.2, "kl_gain_se": 0.01, "recall": 1.0, "recall_gain": 0.1, "recall_gain_se": 0.2}
    rows = [row | {"layer": 1, "score": 0.5}, row | {"layer": 0, "score": 0.1}]
    file = copy / "linearize.json"
    choice = {"kept": [1], "ranking": rows}
    kl = {"trained": {"mean": 0.25, "se": 0.5, "tokens": 3}}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_choice": choice, "divergence": kl}))
    with (copy / "log.jsonl").open("a") as log:
        log.write('[1]\n{"step": 3}\n{"step": "x", "loss": 1}\n{"step": 200, "loss": NaN, "stage": 3}\n{"st')
    found = render()
    assert "<svg " in found["choice"] and "0.2000 ± 0.0100" in found["choice"]
    assert "0.2500 ± 0.5000" in found["training"] and "<svg " in found["training"]


def test_the_kind_of_every_layer_is_shown(unmeasured):
    copy, render = unmeasured
    file = copy / "config.json"
    config = json.loads(file.read_text()) | {"num_hidden_layers": 4, "windowed": {"layers": [3], "window": 8}}
    file.write_text(json.dumps(config))
    kinds = re.findall(r'<span class="(\w+)">(\d)</span>', render()["converted"])
    assert kinds == [("linear", "0"), ("linear", "1"), ("softmax", "2"), ("window", "3")]


def test_names_and_texts_are_no_markup(unmeasured):
    copy, render = unmeasured
    file = copy / "linearize.json"
    summary = json.loads(file.read_text())
    summary["arguments"]["model"] = "<script>alert(1)</script>&"
    file.write_text(json.dumps(summary))
    render()
    html = (copy / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in html
    assert references(html) == []


def test_an_earlier_page_is_replaced(unmeasured):
    copy, render = unmeasured
    (copy / "report.html").write_text("old")
    assert list(render()) == PARTS


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no folder", "There is no folder"),
        ("a file", "There is no folder"),
        ("no conversion", "holds no conversion"),
        ("damaged", "is damaged"),
        ("no teacher", "--teacher"),
        ("another teacher", "has num_hidden_layers 2, but"),
        ("another tokenizer", "The tokenizer of"),
        ("no page", "expected the name of an .html file"),
        ("no folder for the page", "There is no folder for"),
        ("both", "leave one out"),
    ],
)
def test_bad_input_is_a_sentence(case, words, folder, converted, tmp_path, capsys):
    target, more = converted, []
    if case == "no folder":
        target = tmp_path / "none"
    elif case == "a file":
        target = folder / "text.txt"
    elif case == "no conversion":
        target = folder / "model"
    elif case == "damaged":
        target = tmp_path / "damaged"
        target.mkdir()
        (target / "linearize.json").write_text('{"arguments": {')
    elif case == "no teacher":
        more = ["--teacher", str(tmp_path / "none")]
    elif case == "another teacher":
        shutil.copytree(folder / "model", tmp_path / "deeper")
        config = json.loads((folder / "model" / "config.json").read_text())
        llama(vocab_size=config["vocab_size"], num_hidden_layers=3).save_pretrained(tmp_path / "deeper")
        more = ["--teacher", str(tmp_path / "deeper")]
    elif case == "another tokenizer":
        shutil.copytree(folder / "model", tmp_path / "other")
        train_tokenizer(["quick brown foxes jump over lazy dogs, " * 50], 280).save_pretrained(tmp_path / "other")
        more = ["--teacher", str(tmp_path / "other")]
    elif case == "no page":
        more = ["--out", str(converted / "model.safetensors")]
    elif case == "no folder for the page":
        more = ["--out", str(tmp_path / "none" / "page.html")]
    elif case == "both":
        more = ["--teacher", str(folder / "model"), "--skip-measurements"]
    before = sorted(path.name for path in converted.iterdir())
    capsys.readouterr()  # of saving the models
    assert main(["report", str(target), *more]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and said.startswith("regla: error: ") and "\n" not in said and "Traceback" not in said
    assert sorted(path.name for path in converted.iterdir()) == before


PROBE = """<script>addEventListener("load", () => {
  const inside = (a, b) =>
    a.left >= b.left - 2 && a.right <= b.right + 2 && a.top >= b.top - 2 && a.bottom <= b.bottom + 2;
  const figures = [...document.querySelectorAll("svg")];
  const facts = {
    width: document.documentElement.clientWidth,
    scrolls: document.documentElement.scrollWidth,
    loaded: performance.getEntriesByType("resource").map(entry => entry.name),
    sections: [...document.querySelectorAll("section")].filter(x => x.getBoundingClientRect().height > 40).length,
    figures: figures.filter(x => x.getBoundingClientRect().height > 100).length,
    outside: figures.flatMap(x => [...x.querySelectorAll("text")].filter(
      text => !inside(text.getBoundingClientRect(), x.getBoundingClientRect())).map(text => text.textContent)),
    height: document.documentElement.scrollHeight,
  };
  const node = document.createElement("pre");
  node.id = "facts";
  node.textContent = JSON.stringify(facts);
  document.body.append(node);
});</script>"""


@pytest.mark.parametrize("width", [1200, 600])
def test_in_a_browser(page, tmp_path, width):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser on the PATH: {', '.join(BROWSERS)}")

    def browse(file, *options):
        words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        words += ["--no-first-run", f"--user-data-dir={tmp_path / 'profile'}", *options, Path(file).as_uri()]
        done = subprocess.run(words, capture_output=True, timeout=180, env=os.environ | {"HOME": str(tmp_path)})
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.decode()

    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    dom = browse(probed, f"--window-size={width},900", "--dump-dom")
    facts = json.loads(re.search(r'<pre id="facts">(.*?)</pre>', dom, flags=re.DOTALL)[1])
    assert facts["loaded"] == []
    assert facts["scrolls"] <= facts["width"] <= width
    assert facts["sections"] == len(PARTS) and facts["figures"] == 6
    assert facts["outside"] == []
    browse(page, f"--window-size={width},{facts['height']}", f"--screenshot={tmp_path / 'page.png'}")
    pixels = torch.from_numpy(imread(tmp_path / "page.png"))[..., :3]
    for colour in ("0072b2", "d55e00"):  # the curves of teacher and student
        near = (pixels - torch.tensor(list(bytes.fromhex(colour))) / 255).abs().amax(-1) < 0.05
        assert int(near.sum()) > 500, colour
