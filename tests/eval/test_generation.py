"""Text from a saved folder, as the terminal shows it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from regla.data.tokenizer import train_tokenizer
from regla.eval.generation import generate, generate_batch
from regla.models import ReGLAConfig, ReGLAForCausalLM, load_state, save_state, stack_states


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["some words to learn"], 270)
    tokenizer.save_pretrained(path)
    config = ReGLAConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=None,  # so that the length is known
        pad_token_id=0,
    )
    torch.manual_seed(0)
    ReGLAForCausalLM(config).save_pretrained(path)
    return path


def text(capsys: pytest.CaptureFixture, *arguments, **options) -> str:
    generate(*arguments, device="cpu", **options)
    return capsys.readouterr().out


def greedy(folder: Path, ids: list[int], steps: int) -> str:
    """The likeliest tokens after `ids`, from full forward passes without a cache."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = ReGLAForCausalLM.from_pretrained(folder).eval()
    for _ in range(steps):
        ids = [*ids, int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return tokenizer.decode(ids, skip_special_tokens=True) + "\n"


def test_temperature_zero_continues_with_the_likeliest_tokens(folder: Path, capsys) -> None:
    ids = AutoTokenizer.from_pretrained(folder)("some words")["input_ids"]
    printed = text(capsys, folder, "some words", max_new_tokens=12, temperature=0)
    assert printed == greedy(folder, ids, 12)


def test_sampling_repeats_for_a_seed(folder: Path, capsys) -> None:
    first, again, other = (
        text(capsys, folder, "some", max_new_tokens=20, temperature=1.0, top_k=0, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first.startswith("some")


def test_top_k_of_one_is_the_likeliest_token(folder: Path, capsys) -> None:
    likeliest = text(capsys, folder, "some", max_new_tokens=10, temperature=0)
    assert text(capsys, folder, "some", max_new_tokens=10, temperature=5.0, top_k=1) == likeliest


def test_an_empty_prompt_starts_a_text(folder: Path, capsys) -> None:
    assert text(capsys, folder, "", max_new_tokens=10, temperature=0) == greedy(folder, [0], 10)


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        generate(folder, "some", max_new_tokens=0)
    with pytest.raises(ValueError, match=r"temperature is -1.0, expected 0 or more"):
        generate(folder, "some", temperature=-1.0)
    with pytest.raises(ValueError, match="is no model folder"):
        generate(tmp_path, "some")


def test_a_batch_is_each_prompt_alone(folder: Path, tmp_path: Path, capsys) -> None:
    prompts = ["some words", "to", "words to learn, and some more of them"]
    (tmp_path / "p.txt").write_text("\n".join([prompts[0], "", *prompts[1:], ""]), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    alone = [greedy(folder, tokenizer(prompt)["input_ids"], 12).removesuffix("\n") for prompt in prompts]
    for batch_size in (2, 8):
        generate_batch(
            folder, tmp_path / "p.txt", batch_size=batch_size, max_new_tokens=12, temperature=0, device="cpu"
        )
        assert capsys.readouterr().out == "\n".join(alone) + "\n"
    texts = generate_batch(folder, tmp_path / "p.txt", as_json=True, max_new_tokens=12, temperature=0, device="cpu")
    rows = [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]
    assert rows == [{"prompt": prompt, "continuation": text} for prompt, text in zip(prompts, texts, strict=True)]
    assert [row["prompt"] + row["continuation"] for row in rows] == alone


def test_a_sampled_batch_repeats_for_a_seed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("some\nwords\n", encoding="utf-8")
    first, again, other = (
        generate_batch(folder, tmp_path / "p.txt", max_new_tokens=20, top_k=0, seed=seed, device="cpu")
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_bad_prompts(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xe4")
    for name, message in (("none", "cannot be read"), ("empty", "holds no prompt"), ("latin", "is not UTF-8 text")):
        with pytest.raises(ValueError, match=message):
            generate_batch(folder, tmp_path / f"{name}.txt")
    with pytest.raises(ValueError, match="batch_size is 0"):
        generate_batch(folder, tmp_path / "empty.txt", batch_size=0)


def test_a_text_continues_from_its_state(folder: Path, tmp_path: Path, capsys) -> None:
    whole = text(capsys, folder, "some words", max_new_tokens=12, temperature=0)
    first = text(capsys, folder, "some words", max_new_tokens=5, temperature=0, save_state=tmp_path / "a")
    then = text(capsys, folder, load_state=tmp_path / "a", max_new_tokens=3, temperature=0, save_state=tmp_path / "b")
    last = text(capsys, folder, load_state=tmp_path / "b", max_new_tokens=4, temperature=0)
    assert "".join(part.removesuffix("\n") for part in (first, then, last)) + "\n" == whole


def test_the_state_of_a_prompt_continues_in_several_ways(folder: Path, tmp_path: Path, capsys) -> None:
    assert text(capsys, folder, "some words", max_new_tokens=0, save_state=tmp_path / "s") == ""
    ids = AutoTokenizer.from_pretrained(folder)("some words")["input_ids"]
    for more in (None, " to learn", " words"):
        added = AutoTokenizer.from_pretrained(folder)(more)["input_ids"] if more else []
        printed = text(capsys, folder, more, load_state=tmp_path / "s", max_new_tokens=12, temperature=0)
        assert "some words" + printed == greedy(folder, ids + added, 12)


def test_bad_states(folder: Path, tmp_path: Path, capsys) -> None:
    state = tmp_path / "s"
    text(capsys, folder, "some words", max_new_tokens=0, save_state=state)
    content = state.read_bytes()
    with pytest.raises(ValueError, match="exists already; give the name of a new file"):
        generate(folder, "some", save_state=state)
    with pytest.raises(ValueError, match="max_new_tokens is 0, expected a number above 0"):
        generate(folder, "some", max_new_tokens=0, load_state=state)
    with pytest.raises(ValueError, match="no text to continue; give prompt, prompts_file or load_state"):
        generate(folder, save_state=tmp_path / "t")
    with pytest.raises(ValueError, match="a state is of two tokens or more; give a longer prompt"):
        generate(folder, "s", max_new_tokens=0, save_state=tmp_path / "t", device="cpu")
    model = ReGLAForCausalLM.from_pretrained(folder).eval()
    pair = load_state(state, model)
    pair = stack_states([pair, pair], model)
    save_state(tmp_path / "pair", model, pair.cache, pair.input_ids)
    all_read = load_state(state, model)
    read_ids = all_read.input_ids[:, : all_read.cache.get_seq_length()]
    save_state(tmp_path / "read", model, all_read.cache, read_ids)
    for name, message in (
        ("pair", "holds 2 texts or padding"),
        ("none", "There is no file"),
        ("read", "holds no token that is still to be read; give a text with prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(folder, load_state=tmp_path / name, device="cpu")
    assert state.read_bytes() == content and not (tmp_path / "t").exists()


def test_a_folder_without_all_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    """transformers would draw those that are missing at random."""
    shutil.copytree(folder, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        del weights[name]
    save_file(weights, tmp_path / "m/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of the model in its config.json \(model.layers.1.mlp.up_proj"):
        generate(tmp_path / "m", "some", device="cpu")


@pytest.mark.parametrize("value", ["x", [0, "x"], 2.5, {"a": 1}])
def test_a_special_token_that_is_no_id_is_refused(folder: Path, tmp_path: Path, value: object) -> None:
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((folder / "generation_config.json").read_text()) | {"bos_token_id": value}
    (tmp_path / "m/generation_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"bos_token_id of .* expected a token id; correct its generation_config.json"):
        generate(tmp_path / "m", "some", device="cpu")
