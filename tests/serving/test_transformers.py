"""`transformers serve` on a saved folder, asked by OpenAI's client. Needs the packages of the extra `serve`."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from regla.data.tokenizer import train_tokenizer
from regla.linearize.convert import convert
from regla.models import ReGLAConfig, ReGLAForCausalLM
from regla.models.modeling import NO_CONTINUOUS_BATCHING
from tests.linearize.models import llama

TEXT = "some words to make a tokenizer of"
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "eos_token_id": None,
}
L, F = "linear_attention", "full_attention"


def regla_model(*kinds):
    return ReGLAForCausalLM(ReGLAConfig(**SHAPE, num_hidden_layers=len(kinds), layer_types=list(kinds)))


MODELS = {
    "pure": lambda: regla_model(L, L),
    "hybrid": lambda: regla_model(L, F),
    "converted": lambda: convert(llama(vocab_size=300)),
}


class Folder:
    """A saved model with its tokenizer, and what `generate` answers."""

    def __init__(self, name, path, template):
        self.path, self.tokenizer = str(path), train_tokenizer([TEXT] * 3, 300)
        self.tokenizer.chat_template = template
        self.model = MODELS[name]().eval()
        for token in range(300):  # answers in letters: a stream holds back the bytes of an unfinished character
            if not self.tokenizer.decode([token]).isalpha():
                self.model.lm_head.weight.data[token] = 0.0
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    def answer(self, ids, tokens):
        whole = self.model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0]
        text = self.tokenizer.decode(whole[len(ids) :])
        assert text.isalpha()
        return text

    def completion(self, text, tokens):
        return self.answer(self.tokenizer(text)["input_ids"], tokens)

    def chat(self, messages, tokens):
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        return self.answer(ids, tokens)


@pytest.fixture
def serve(tmp_path):
    """`serve(model, *options, template=TEMPLATE)`: a folder, a client of its server, and the server's log."""
    for package in ("accelerate", "fastapi", "openai", "uvicorn"):
        pytest.importorskip(package, reason=f"{package} of the extra `serve` is not installed")
    from openai import OpenAI

    started = []

    def start(name, *options, template=TEMPLATE):
        folder = Folder(name, tmp_path / "folder", template)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = tmp_path / "log"
        command = [Path(sys.executable).with_name("transformers"), "serve", folder.path, "--trust-remote-code"]
        command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port), *options]
        with log.open("w") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
            )
        started.append(process)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
                return folder, client, log
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        pytest.fail(log.read_text())

    yield start
    for process in started:
        process.kill()  # it has nothing to save, and takes seconds to say goodbye
        process.wait(30)


def check_chat(folder, client):
    """A conversation of two questions, whole and streamed."""
    chat = [{"role": "user", "content": TEXT}]
    for tokens in (4, 7):
        asked = {"model": folder.path, "messages": chat, "max_tokens": tokens, "temperature": 0}
        reply = client.chat.completions.create(**asked)
        said = reply.choices[0].message.content
        assert said == folder.chat(chat, tokens)
        assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", tokens)
        pieces = client.chat.completions.create(**asked, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == said
        chat = [*chat, {"role": "assistant", "content": said}, {"role": "user", "content": "words"}]


def check_completions(folder, client):
    """Several at once, of different lengths; a stream; one that ends at a word."""
    texts = ["some " * count + "words" for count in (1, 7, 3)]

    def ask(text, **more):
        return client.completions.create(model=folder.path, prompt=text, max_tokens=6, temperature=0, **more)

    with ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(lambda text: ask(text).choices[0].text, texts))
    expected = [folder.completion(text, 6) for text in texts]
    assert answers == expected
    assert "".join(piece.choices[0].text for piece in ask(texts[0], stream=True)) == expected[0]
    stopped = ask(texts[0], stop=[expected[0][1:3]]).choices[0]
    assert stopped.finish_reason == "stop"
    assert expected[0].startswith(stopped.text) and expected[0][1:3] in stopped.text
    assert len(stopped.text) < len(expected[0])


def test_a_client_talks_to_a_hybrid(serve):
    folder, client, _ = serve("hybrid")
    check_chat(folder, client)
    check_completions(folder, client)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pure", "converted"])
def test_a_client_talks_to_other_models(name, serve):
    folder, client, _ = serve(name)
    check_chat(folder, client)
    check_completions(folder, client)
    asked = {"model": folder.path, "input": TEXT, "max_output_tokens": 5, "temperature": 0}
    reply = client.responses.create(**asked, stream=False)
    assert reply.output_text == folder.chat([{"role": "user", "content": TEXT}], 5)


@pytest.mark.slow
def test_the_server_says_that_there_is_no_continuous_batching_and_goes_on(serve):
    folder, client, log = serve("hybrid", "--continuous-batching")
    check_completions(folder, client)
    assert "does not support continuous batching" in log.read_text()


@pytest.mark.slow
def test_without_a_chat_template_there_are_completions(serve):
    from openai import InternalServerError

    folder, client, log = serve("pure", template=None)
    check_completions(folder, client)
    with pytest.raises(InternalServerError):
        client.chat.completions.create(model=folder.path, messages=[{"role": "user", "content": TEXT}], max_tokens=4)
    deadline = time.monotonic() + 20  # the server answers before it logs
    while "tokenizer.chat_template is not set" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def test_continuous_batching_is_refused_in_one_sentence():
    model = regla_model(L, F).eval()
    assert not hasattr(model, "init_continuous_batching")  # what the server looks for
    with pytest.raises(ValueError) as error:
        model.generate_batch([[4, 5], [6]])
    assert str(error.value) == NO_CONTINUOUS_BATCHING
    with pytest.raises(ValueError, match="pages keys and values"), model.continuous_batching_context_manager():
        pass
    assert torch.equal(model.generate(torch.tensor([[4, 5]]), max_new_tokens=2)[:, :2], torch.tensor([[4, 5]]))
