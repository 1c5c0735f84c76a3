"""States in files: continuing one equals not having stopped, and a file of anything else is refused."""

import random
import subprocess
import sys

import pytest
import torch
from tests.linearize.models import llama
from transformers import DynamicCache, StaticCache

from regla.linearize import convert
from regla.models import SavedState, load_state, save_state, stack_states


@pytest.fixture(
    params=[
        "pure",
        "pure, delta",
        "pure, branch",
        "pure, rope",
        "hybrid",
        "hybrid, window",
        "hybrid, extras",
        "student",
    ]
)
def model(request, build):
    if request.param != "student":
        return build(request.param)
    torch.manual_seed(0)
    return convert(llama(), [1, 3], check=False).eval()


@torch.no_grad()
def read(model, ids) -> SavedState:
    """The state after all of `ids` but the last."""
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=cache)
    return SavedState(cache, ids, torch.ones_like(ids))


@torch.no_grad()
def written(model, state, steps=12):
    """Greedy tokens and their logits."""
    out = model.generate(
        **state.arguments(), max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return out.sequences[:, state.input_ids.shape[1] :], torch.stack(out.logits)


def ids_of(rows, length):
    return torch.randint(3, 97, (rows, length))


def test_a_loaded_state_continues_bit_for_bit(model, tmp_path):
    state = read(model, ids_of(2, 11))
    save_state(tmp_path / "s", model, state.cache, state.input_ids)
    loaded = load_state(tmp_path / "s", model)
    assert loaded.cache.get_seq_length() == 10
    for expected, actual in zip(written(model, state), written(model, loaded), strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.gpu
def test_a_state_saved_on_a_gpu_goes_on_on_a_cpu(model, tmp_path):
    """Greedy tokens in float32; logits differ by rounding."""
    ids = ids_of(2, 300)
    expected, logits = written(model, read(model, ids), 40)
    model.cuda()
    state = read(model, ids.cuda())
    save_state(tmp_path / "s", model, state.cache, state.input_ids)
    on_gpu, _ = written(model, state, 40)
    model.cpu()
    loaded = load_state(tmp_path / "s", model)
    assert loaded.input_ids.device.type == "cpu"
    tokens, ours = written(model, loaded, 40)
    assert torch.equal(tokens, expected) and torch.equal(tokens, on_gpu.cpu())
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)


def test_generation_in_two_parts_is_that_in_one(model, tmp_path):
    state = read(model, ids_of(1, 7))
    whole, _ = written(model, read(model, state.input_ids), 20)
    first, _ = written(model, state, 9)
    save_state(tmp_path / "s", model, state.cache, torch.cat([state.input_ids, first], 1))
    loaded = load_state(tmp_path / "s", model)
    more, _ = written(model, loaded, 11)
    assert torch.equal(torch.cat([first, more], 1), whole)


def test_states_of_different_lengths_are_rows_of_one_batch(model, tmp_path, assert_same):
    texts = [ids_of(1, length) for length in (9, 2, 17)]
    files = [tmp_path / str(number) for number in range(len(texts))]
    for file, ids in zip(files, texts, strict=True):
        state = read(model, ids)
        save_state(file, model, state.cache, ids)
    batch = stack_states([load_state(file, model) for file in files], model)
    assert batch.input_ids.shape == (3, 17) and batch.attention_mask.sum(1).tolist() == [9, 2, 17]
    save_state(tmp_path / "batch", model, batch.cache, batch.input_ids, batch.attention_mask)
    for together in (batch, load_state(tmp_path / "batch", model)):
        tokens, logits = written(model, together)
        for row, ids in enumerate(texts):
            alone, logits_alone = written(model, read(model, ids))
            assert torch.equal(tokens[row], alone[0])
            assert_same(logits[:, row], logits_alone[:, 0])


def test_the_given_states_stay_as_they_are(build):
    model = build("hybrid, window")
    states = [read(model, ids_of(1, length)) for length in (9, 4)]
    written(model, stack_states(states, model))
    for state in states:
        assert state.cache.get_seq_length() == state.input_ids.shape[1] - 1
        tokens, logits = written(model, read(model, state.input_ids))
        tokens_now, logits_now = written(model, state)
        assert torch.equal(tokens, tokens_now) and torch.equal(logits, logits_now)


def test_a_fresh_process_continues(build, tmp_path):
    model = build("hybrid")
    model.save_pretrained(tmp_path / "model")
    state = read(model, ids_of(1, 9))
    save_state(tmp_path / "s", model, state.cache, state.input_ids)
    program = (
        "import sys; from transformers import AutoModelForCausalLM; from regla.models import load_state\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "state = load_state(sys.argv[2], model)\n"
        "print(model.generate(**state.arguments(), max_new_tokens=12, do_sample=False)[0].tolist())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "model", tmp_path / "s"], capture_output=True, text=True, check=True
    )
    tokens, _ = written(model, state)
    assert run.stdout.strip() == str([*state.input_ids[0].tolist(), *tokens[0].tolist()])


def test_bfloat16_and_softmax_models_of_transformers(build, tmp_path):
    for number, model in enumerate((build("hybrid, extras").bfloat16(), llama())):
        state = read(model, ids_of(1, 9))
        save_state(tmp_path / str(number), model, state.cache, state.input_ids)
        loaded = load_state(tmp_path / str(number), model)
        assert torch.equal(written(model, state)[1], written(model, loaded)[1])


def test_the_size_hardly_depends_on_the_length(build, tmp_path):
    model, sizes = build("pure, delta"), []
    for length in (16, 216):
        state = read(model, ids_of(1, length))
        save_state(tmp_path / str(length), model, state.cache, state.input_ids)
        sizes.append((tmp_path / str(length)).stat().st_size)
    assert sizes[1] - sizes[0] <= 200 * 5 + 64  # ids and mask


def test_the_state_of_another_model_is_refused(build, tmp_path):
    model = build("pure")
    state = read(model, ids_of(1, 9))
    file = tmp_path / "s"
    save_state(file, model, state.cache, state.input_ids)
    with pytest.raises(ValueError, match=r"is the state of another model: .* is .* there and .* here"):
        load_state(file, build("hybrid"))
    with pytest.raises(ValueError, match="another model: feature_map is 'safe_exp' there and 'identity' here"):
        load_state(file, build("pure", feature_map="identity"))
    with pytest.raises(ValueError, match="is the state of a model in float32, and this one is in bfloat16"):
        load_state(file, build("pure").bfloat16())
    other = build("pure")
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight.add_(1e-3)
    with pytest.raises(ValueError, match="is the state of a model with other weights"):
        load_state(file, other)


def test_what_cannot_be_saved_is_refused(build, tmp_path):
    model, ids, file = build("pure"), ids_of(2, 9), tmp_path / "s"
    with pytest.raises(ValueError, match="cache is empty"):
        save_state(file, model, DynamicCache(config=model.config), ids)
    with pytest.raises(ValueError, match="StaticCache, whose state cannot be saved"):
        save_state(file, model, StaticCache(config=model.config, max_cache_len=16), ids)
    cache = read(model, ids).cache
    for wrong in (ids[:1], ids[0], ids[:, :7]):
        with pytest.raises(ValueError, match=r"the cache has read 8 tokens of 2 texts; pass all tokens"):
            save_state(file, model, cache, wrong)
    with pytest.raises(ValueError, match="attention_mask has the shape"):
        save_state(file, model, cache, ids, ids[:1])
    with pytest.raises(ValueError, match="states is empty"):
        stack_states([], model)
    longer = read(model, ids)._replace(input_ids=torch.cat([ids, ids], 1))
    with pytest.raises(ValueError, match="the states have 1 to 10 tokens that their caches have not read"):
        stack_states([read(model, ids), longer], model)
    assert not file.exists()
    file.write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        save_state(file, model, cache, ids)
    assert file.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_damaged_file_is_never_read(build, tmp_path):
    model = build("pure", num_hidden_layers=1)
    state = read(model, ids_of(1, 5))
    file, damaged = tmp_path / "s", tmp_path / "damaged"
    save_state(file, model, state.cache, state.input_ids)
    content, dice = file.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(content[:8], "little")
    expected = written(model, load_state(file, model))[1]
    sentences = set()
    for case in range(150):
        changed = bytearray(content)
        if case % 3 == 0:
            changed = changed[: dice.randrange(len(content))]
        else:
            changed[dice.randrange(header if case % 3 == 1 else len(content))] ^= 1 << dice.randrange(8)
        damaged.write_bytes(changed)
        try:
            loaded = load_state(damaged, model)
        except ValueError as error:
            sentences.add(str(error).split(";")[0])
        else:  # a space between two entries of the header, say
            assert torch.equal(written(model, loaded)[1], expected)
    assert any("is no state file, or a damaged one" in sentence for sentence in sentences)
    assert any("is damaged: its content does not have the recorded SHA-256" in sentence for sentence in sentences)


def test_other_files_are_refused(build, tmp_path):
    model = build("pure")
    model.save_pretrained(tmp_path)
    (tmp_path / "text").write_text("some text")
    (tmp_path / "empty").touch()
    for name in ("model.safetensors", "text", "empty"):
        with pytest.raises(ValueError, match="is no state file, or a damaged one; give a file that"):
            load_state(tmp_path / name, model)
    for name in ("none", "."):
        with pytest.raises(ValueError, match="There is no file"):
            load_state(tmp_path / name, model)


def test_a_later_format_is_refused(build, tmp_path, monkeypatch):
    model = build("pure")
    state = read(model, ids_of(1, 5))
    with monkeypatch.context() as patch:
        patch.setattr("regla.models.states.FORMAT", 2)
        save_state(tmp_path / "s", model, state.cache, state.input_ids)
    with pytest.raises(ValueError, match="has version 2 of the format, and this regla reads 1"):
        load_state(tmp_path / "s", model)
