"""`transformers serve` on a saved folder, asked by a client over HTTP. Needs the packages of transformers[serving]."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from regla.data.tokenizer import train_tokenizer
from regla.models.modeling import NO_CONTINUOUS_BATCHING

TEXT = "some words to make a tokenizer of"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def served(build, tmp_path):
    """The folder of a small model, and what it answers."""
    tokenizer = train_tokenizer([TEXT] * 3, 300)
    tokenizer.chat_template = TEMPLATE
    model = build("hybrid", vocab_size=300, eos_token_id=None)
    for token in range(300):  # answers in letters: a stream holds back the bytes of an unfinished character
        if not tokenizer.decode([token]).isalpha():
            model.lm_head.weight.data[token] = 0.0
    folder = tmp_path / "folder"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    answer = tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :])
    assert answer.isalpha()
    return folder, answer


@pytest.fixture
def start(tmp_path):
    """`start(folder, *options)`: the address of a server, and its log."""
    started = []

    def serve(folder, *options):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = tmp_path / "log"
        command = [Path(sys.executable).with_name("transformers"), "serve", folder, "--trust-remote-code"]
        command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port), *options]
        with log.open("w") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
            )
        started.append(process)
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                return address, log
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        pytest.fail(log.read_text())

    yield serve
    for process in started:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def ask(address, path, **body):
    body |= {"max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--continuous-batching"]], ids=["plain", "continuous batching"])
def test_a_saved_folder_is_served(served, start, options):
    """Chat, completion and streams; asked for continuous batching, the server says that there is none and goes on."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("openai")
    folder, answer = served
    address, log = start(folder, *options)
    chat = {"model": str(folder), "messages": [{"role": "user", "content": TEXT}]}
    reply = json.loads(ask(address, "/v1/chat/completions", **chat))
    assert reply["choices"][0]["message"]["content"] == answer
    events = ask(address, "/v1/chat/completions", **chat, stream=True).splitlines()
    pieces = [json.loads(line.removeprefix("data: ")) for line in events if line.startswith("data: {")]
    assert "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces) == answer
    reply = json.loads(ask(address, "/v1/completions", model=str(folder), prompt=TEXT))
    assert reply["choices"][0]["text"] == answer
    assert ("does not support continuous batching" in log.read_text()) == bool(options)


def test_continuous_batching_is_refused_in_one_sentence(build):
    model = build("hybrid")
    assert not hasattr(model, "init_continuous_batching")  # what the server looks for
    with pytest.raises(ValueError) as error:
        model.generate_batch([[4, 5], [6]])
    assert str(error.value) == NO_CONTINUOUS_BATCHING
    with pytest.raises(ValueError, match="pages keys and values"), model.continuous_batching_context_manager():
        pass
    assert torch.equal(model.generate(torch.tensor([[4, 5]]), max_new_tokens=2)[:, :2], torch.tensor([[4, 5]]))
