"""The effective context is found where a model stops using its past, and noise is not mistaken for use."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from regla.cli import main
from regla.data.embedded import embedded_text
from regla.data.sources import Encoded
from regla.data.tokenizer import train_tokenizer
from regla.eval.context import context_table, cut_losses, effective_context, find
from regla.models import ReGLAConfig, ReGLAForCausalLM

T = 1024


def losses(falls_until: int, noise: float = 0.3, windows: int = 64) -> torch.Tensor:
    """[W, T] losses that fall by 0.2 with every doubling of the position up to `falls_until`; windows differ more."""
    generator = torch.Generator().manual_seed(0)
    position = torch.arange(T).clamp(min=32, max=falls_until)
    loss = 3.0 - 0.2 * (position / 32).log2()
    of_window = torch.randn(windows, 1, generator=generator)
    return loss + of_window + noise * torch.randn(windows, T, generator=generator)


@pytest.mark.parametrize("last", [64, 128, 256])
def test_the_loss_stops_to_fall(last: int) -> None:
    bins, index = find(losses(last))
    assert bins[index].first == last
    assert [bin_.falls_by > 2 * bin_.falls_by_se for bin_ in bins[:index]] == [True] * index


def test_a_loss_that_falls_on() -> None:
    bins, index = find(losses(10**9))
    assert index == len(bins) - 1


def test_pairs_of_windows_find_what_means_alone_cannot() -> None:
    """Windows differ by far more than a bin: unpaired, no difference would be seen."""
    bins, index = find(losses(256))
    assert bins[index].first == 256 and 2 * 2**0.5 * bins[2].loss_se > bins[2].falls_by > 0.05


def test_noise_alone_is_no_context() -> None:
    found = [find(torch.randn(32, T, generator=torch.Generator().manual_seed(seed)).exp())[1] for seed in range(20)]
    assert found.count(0) >= 14  # four comparisons at two standard errors each: some do exceed them


class Window(nn.Module):
    """Knows a token that stood `reach` before: the text repeats itself with that period."""

    device = torch.device("cpu")

    def __init__(self, reach: int, vocab_size: int = 50) -> None:
        super().__init__()
        self.reach = reach
        self.config = SimpleNamespace(vocab_size=vocab_size, get_text_config=lambda: self.config)

    def forward(self, input_ids, use_cache=False):
        B, T = input_ids.shape
        logits = torch.zeros(B, T, self.config.vocab_size)
        at = torch.arange(min(self.reach - 1, T), T)
        logits[:, at] = 6.0 * nn.functional.one_hot(input_ids[:, at - self.reach + 1], self.config.vocab_size)
        return SimpleNamespace(logits=logits)


def periodic(period: int, tokens: int = 20_000) -> Encoded:
    ids = np.random.default_rng(0).integers(50, size=period)
    return Encoded("text", np.resize(ids, tokens).astype(np.int32), None)


def test_of_a_model_that_needs_200_tokens() -> None:
    """Its loss falls where 200 tokens are there; cut below, it knows nothing, and cut above, nothing is lost."""
    found = effective_context(
        Window(200), [periodic(200)], first=0, seq_len=2048, batch_size=8, dtype="float32", samples=64
    )
    assert found.tokens == 256 and not found.still_falling and found.windows == 9
    short, middle, long = found.cuts
    assert [cut.context for cut in found.cuts] == [64, 256, 1024] and short.n == 64
    assert short.loss == pytest.approx(np.log(50)) and short.more > 3
    assert middle.more == long.more == 0 and long.loss < 0.2
    text = context_table(found)
    assert "Effective context: 256 tokens (9 windows of 2,048)" in text and "| 64 | 64 | 3.91" in text


def test_a_cut_leaves_exactly_so_many_tokens() -> None:
    ids_WT = torch.from_numpy(periodic(64).ids[: 4 * 512].astype(np.int64)).view(4, 512)
    nats_WT = torch.zeros(4, 512)
    for reach, seen in ((64, True), (65, False)):
        (cut,) = cut_losses(
            Window(reach), ids_WT, nats_WT, batch_size=8, dtype="float32", seed=0, samples=16, cuts=(64,)
        )
        assert (cut.loss < 0.5) == seen


def test_too_little_text() -> None:
    with pytest.raises(ValueError, match="the text has 1 windows of that length; the effective context needs at least"):
        effective_context(Window(4), [periodic(4, 300)], first=0, seq_len=200, batch_size=8, dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = ReGLAConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    ReGLAForCausalLM(config).save_pretrained(out)
    train_tokenizer(embedded_text().documents[:3], 300).save_pretrained(out)
    return str(out)


def test_the_command(folder: str, tmp_path, capsys) -> None:
    file = tmp_path / "scores.json"
    assert main(["eval", folder, "--effective-context", "--seq-len", "512", "--json", str(file)]) == 0
    assert "| context cut to | tokens | loss | more than with the whole window |" in capsys.readouterr().out
    found = json.loads(file.read_text())["effective_context"]
    assert found["seq_len"] == 512 and [cut["context"] for cut in found["cuts"]] == [64, 256]


SCRIPT = """
import resource, sys
import numpy as np, torch
from regla.eval.perplexity import stream_nats
from regla.models.folders import load_model

torch.set_num_threads(1)
model = load_model(sys.argv[1], torch.device("cpu"))
ids = np.random.default_rng(0).integers(300, size=int(sys.argv[2])).astype(np.int32)
stream_nats(model, ids[:4096], first=0, chunk=1024, dtype="float32")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nats = stream_nats(model, ids, first=0, chunk=1024, dtype="float32")
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(nats))
"""


@pytest.mark.timing
def test_memory_is_flat_after_4k_tokens(folder: str) -> None:
    """The peak of 64k tokens is that of 4k, but for 20 bytes a token: ids, inputs, targets and losses."""
    result = subprocess.run([sys.executable, "-c", SCRIPT, folder, "65536"], capture_output=True, text=True, check=True)
    before, after, n = map(int, result.stdout.split())
    assert n == 65536
    assert (after - before) * 1024 < 8 * 2**20  # of a softmax model the keys and values alone would be 16 MiB


def test_a_stream_says_what_memory_it_uses(folder: str, tmp_path, capsys) -> None:
    file, text = tmp_path / "scores.json", tmp_path / "text.txt"
    text.write_text("\n".join(embedded_text().documents[:4]))
    assert main(["eval", folder, "--stream", "6000", "--data", str(text), "--json", str(file)]) == 0
    assert "Memory in use: " in capsys.readouterr().out
    memory = json.loads(file.read_text())["memory_bytes"]
    assert list(memory) == ["4096", "6000"] and all(used > 2**26 for used in memory.values())
