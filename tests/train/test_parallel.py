"""Several processes take the steps of one: data parallel, sharded, and along the sequence; on the CPU, over gloo."""

import errno
import json
import math
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from regla.cli import main
from regla.data.embedded import embedded_text
from regla.data.tokenizer import train_tokenizer
from regla.linearize import convert
from regla.models import ReGLAForCausalLM
from regla.runtime import checkpoint
from regla.train import loop, material

from ..linearize.originals import original
from ..ranks import Ended, in_processes

KINDS = ("ddp", "fsdp", "sequence")
SHAPE = {"vocab-size": 280, "hidden-size": 16, "layers": 2, "heads": 2, "intermediate-size": 48}
# Neither the sequences nor the tokens of one divide evenly among two or four processes.
RUN = {"seq-len": 17, "batch-size": 5, "lr": 1e-2, "device": "cpu", "save-every": 5, "eval-every": 25}
STEPS = 50


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text(embedded_text().documents[0][:3000], encoding="utf-8")
    return file


def command(out: Path, corpus: Path, *more: str, steps: int = STEPS) -> list[str]:
    options = {"out": out, "data": corpus, "steps": steps} | SHAPE | RUN
    return ["train", *(str(part) for name, value in options.items() for part in ("--" + name, value)), *more]


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one process."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    assert main(command(out, corpus)) == 0
    return out


def run(
    count: int, out: Path, corpus: Path, *more: str, before: Callable[[], None] = lambda: None, steps: int = STEPS
) -> list[Ended]:
    def one() -> int:
        before()
        return main(command(out, corpus, *more, steps=steps))

    return in_processes(count, one, out.parent / f"{out.name}-written")


def in_step(number: int, rank: int, act: Callable[[], None]) -> Callable[[], None]:
    """Makes process `rank` call `act` when it draws the crops of step `number`."""

    def before() -> None:
        draw = loop.crops

        def drawing(*arguments, batch: int, **options):
            if batch == number - 1 and os.environ["RANK"] == str(rank):
                act()
            return draw(*arguments, batch=batch, **options)

        loop.crops = drawing

    return before


def log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_run(out: Path, alone: Path) -> None:
    """Every step once, with the losses, gradients and validation losses of one process, and the same kind of folder."""
    ours, theirs = log(out), log(alone)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys() and one["tokens"] == other["tokens"] and one["lr"] == other["lr"]
        for key, tolerance in (("loss", 1e-5), ("validation_loss", 1e-5), ("gradient_norm", 1e-3)):
            assert one.get(key, 0.0) == pytest.approx(other.get(key, 0.0), abs=tolerance), (one["step"], key)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (out, alone))
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-4, rtol=1e-4)
    assert json.loads((out / "config.json").read_text()) == json.loads((alone / "config.json").read_text())
    assert {path.name for path in out.iterdir()} == {path.name for path in alone.iterdir()}


@pytest.mark.parametrize(("kind", "count"), [(kind, n) for n in (2, 4) for kind in KINDS if (kind, n) != ("fsdp", 4)])
def test_losses_are_those_of_one_process(kind: str, count: int, alone: Path, corpus: Path, tmp_path: Path) -> None:
    ended = run(count, tmp_path / "run", corpus, "--parallel", kind)
    assert [one.code for one in ended] == [0] * count, ended
    assert_same_run(tmp_path / "run", alone)
    assert f"{count} processes ({kind})" in ended[0].out and "Validation loss" in ended[0].out
    assert all((one.out, one.err) == ("", "") for one in ended[1:])  # the first alone prints
    assert json.loads((tmp_path / "run" / "training.json").read_text())["processes"] == count
    ReGLAForCausalLM.from_pretrained(tmp_path / "run")


def test_groups_share_sequences_and_their_processes_tokens(alone: Path, corpus: Path, tmp_path: Path) -> None:
    ended = run(4, tmp_path / "run", corpus, "--parallel", "sequence", "--sequence-parallel-size", "2")
    assert [one.code for one in ended] == [0] * 4, ended
    assert_same_run(tmp_path / "run", alone)


def spoil_layer(step: int, rank: int, what: str) -> Callable[[], None]:
    """Makes the gradient of an output in layer 1, or the output, NaN in process `rank` and step `step` alone."""

    def before() -> None:
        good, latest, draw = loop.next_token_loss, [0], loop.crops
        spoil = {"gradient": lambda x: x + 0 * torch.sqrt(0 * x), "loss": lambda x: x * math.nan}[what]

        def drawing(*arguments, batch: int, **options):
            latest[0] = batch + 1
            return draw(*arguments, batch=batch, **options)

        def loss(model, crop_BL):
            if latest[0] != step or os.environ.get("RANK", str(rank)) != str(rank):
                return good(model, crop_BL)
            named = getattr(model, "module", model).model.layers[1].mlp.up_proj
            handle = named.register_forward_hook(lambda module, args, x: spoil(x))
            value = good(model, crop_BL)
            handle.remove()
            return value

        loop.crops, material.next_token_loss = drawing, loss

    return before


SPOILT = [("fsdp", "loss"), ("fsdp", "gradient"), ("ddp", "loss"), ("sequence", "loss"), ("sequence", "gradient")]


@pytest.mark.parametrize(
    ("kind", "what"), [SPOILT[0], *(pytest.param(*one, marks=pytest.mark.slow) for one in SPOILT[1:])]
)
def test_what_is_not_finite_in_one_process_is_skipped_in_all(
    kind: str, what: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--max-skipped-steps", "1", "--parallel", kind)
    before = spoil_layer(4, 1, what)
    ended = run(2, tmp_path / "run", corpus, *options, before=before, steps=6)
    assert [one.code for one in ended] == [0, 0], ended
    with monkeypatch.context() as patch:
        patch.setattr(loop, "crops", loop.crops)
        patch.setattr(material, "next_token_loss", material.next_token_loss)
        before()
        assert main(command(tmp_path / "alone", corpus, *options, steps=6)) == 0
    assert json.loads((tmp_path / "run" / "training.json").read_text())["skipped_steps"] == 1
    for out in (tmp_path / "run", tmp_path / "alone"):
        (found,) = [one for line in log(out) for one in line.get("skipped", ())]
        assert found["step"] == 4
        if what == "gradient":
            assert found["last"].startswith("model.layers.1."), found
        else:  # seen in process 1, told by process 0; behind the module, whose own output is good
            assert found["layer"].startswith("model.layers.1.mlp."), found
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "alone"))
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_states_are_carried_in_any_number_of_processes(kind: str, corpus: Path, tmp_path: Path) -> None:
    """Two processes end as one does, and one goes on from their checkpoint."""
    options = ("--carry-state", "--accumulate", "2", "--parallel", kind)
    assert main(command(tmp_path / "alone", corpus, *options, steps=8)) == 0
    ended = run(2, tmp_path / "run", corpus, *options, steps=8)
    assert [one.code for one in ended] == [0, 0], ended
    assert_same_run(tmp_path / "run", tmp_path / "alone")
    states = [load_file(tmp_path / name / "checkpoints/step-000005/carried.safetensors") for name in ("run", "alone")]
    assert states[0].keys() == states[1].keys() and any(bool(state.any()) for state in states[0].values())
    for name, state in states[1].items():
        assert (states[0][name] - state).double().norm() <= 1e-3 * state.double().norm(), name
    assert main(command(tmp_path / "run", corpus, *options, "--resume", steps=8)) == 0
    assert_same_run(tmp_path / "run", tmp_path / "alone")


def test_states_are_not_carried_along_the_sequence(corpus: Path, tmp_path: Path) -> None:
    ended = run(2, tmp_path / "run", corpus, "--carry-state", "--parallel", "sequence", steps=2)
    assert [one.code for one in ended] == [2, 1], ended  # the first one tells
    assert "--carry-state is given with --parallel sequence, whose processes have other tokens of a se" in ended[0].err


@pytest.mark.slow
def test_losses_of_four_shards(alone: Path, corpus: Path, tmp_path: Path) -> None:
    ended = run(4, tmp_path / "run", corpus, "--parallel", "fsdp")
    assert [one.code for one in ended] == [0] * 4, ended
    assert_same_run(tmp_path / "run", alone)


DELTA = {
    "update_rule": "delta",
    "feature_map": "unit_safe_exp",
    "gate_axis": "key",
    "linear_conv_kernel_dim": 4,
    "linear_rope": True,
    "tie_word_embeddings": True,
}
SUM = {"linear_conv_kernel_dim": 0, "attention_norm": "sum", "output_gate": None}


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("sequence", DELTA),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("sequence", SUM), ("fsdp", DELTA))),
    ],
)
def test_other_models_and_options(kind: str, model: dict, corpus: Path, tmp_path: Path) -> None:
    """The delta rule, positions, a state without a convolution or with the normaliser's channel, tied weights;
    activations computed again, several batches a step."""
    (tmp_path / "model.json").write_text(json.dumps(model))
    more = ("--config", str(tmp_path / "model.json"), "--activation-checkpointing", "--accumulate", "3")
    assert main(command(tmp_path / "alone", corpus, *more, steps=4)) == 0
    ended = run(2, tmp_path / "run", corpus, "--parallel", kind, *more, steps=4)
    assert [one.code for one in ended] == [0, 0], ended
    assert_same_run(tmp_path / "run", tmp_path / "alone")


@pytest.mark.parametrize(
    ("kind", "mixer", "rows"),
    [("ddp", "regla", 5), pytest.param("ddp", "hybrid", 4, marks=pytest.mark.slow), ("fsdp", "hybrid", 4)],
)
def test_documents_that_reset_states(kind: str, mixer: str, rows: int, corpus: Path, tmp_path: Path) -> None:
    """All sequences as one row, or with softmax layers one by one, as many in each process."""
    text = tmp_path / "text.txt"
    text.write_text(corpus.read_text().replace(". ", ".\n<|endoftext|>\n"), encoding="utf-8")
    more = ("--reset-at-documents", "--mixer", mixer, "--accumulate", "2")
    assert main(command(tmp_path / "alone", text, *more, "--batch-size", str(rows), steps=4)) == 0
    ended = run(2, tmp_path / "run", text, "--parallel", kind, *more, "--batch-size", str(rows), steps=4)
    assert [one.code for one in ended] == [0, 0], ended
    assert_same_run(tmp_path / "run", tmp_path / "alone")
    if mixer == "hybrid":
        ended = run(2, tmp_path / "no", text, "--parallel", kind, *more, steps=4)
        assert ended[0].code == 2 and "--batch-size is 5, but --reset-at-documents with softmax" in ended[0].err


@pytest.mark.parametrize("kind", ["fsdp", pytest.param("sequence", marks=pytest.mark.slow)])
def test_students(kind: str, corpus: Path, tmp_path: Path) -> None:
    """Converted models in their original's class, GPT-2's with its table of positions; a softmax layer is refused."""
    tokenizer = train_tokenizer([corpus.read_text()], 280)
    for name, keep in (("pure", "none"), ("hybrid", "every-2")):
        model = original("gpt2", vocab_size=280, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        convert(model, keep, check=False).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)

    def words(out: str, name: str, *more: str) -> list[str]:
        run = [str(part) for option, value in RUN.items() for part in ("--" + option, value)]
        place = ["--out", str(tmp_path / out), "--init", str(tmp_path / name), "--data", str(corpus), "--steps", "3"]
        return ["train", *place, *run, *more]

    assert main(words("alone", "pure")) == 0
    ended = in_processes(2, lambda: main(words("run", "pure", "--parallel", kind)), tmp_path / "written")
    assert [one.code for one in ended] == [0, 0], ended
    assert_same_run(tmp_path / "run", tmp_path / "alone")
    if kind == "sequence":
        ended = in_processes(2, lambda: main(words("no", "hybrid", "--parallel", kind)), tmp_path / "refused")
        assert ended[0].code == 2 and "layer 1 of the model is full_attention" in ended[0].err


@pytest.mark.parametrize("kind", ["ddp", pytest.param("sequence", marks=pytest.mark.slow)])
def test_tokens_weigh_alike_wherever_they_are(kind: str, tmp_path: Path) -> None:
    """Answers of recall: their number differs between sequences, and the first parts of sequences have none."""
    options = {"task": "mqar", "pairs": "1,6", "seq-len": 33, "batch-size": 4, "accumulate": 2, "steps": 4}
    options |= {name: value for name, value in SHAPE.items()} | {"device": "cpu"}
    arguments = ["train", *(str(part) for name, value in options.items() for part in ("--" + name, value))]
    assert main([*arguments, "--out", str(tmp_path / "alone")]) == 0
    out = tmp_path / "run"
    ended = in_processes(2, lambda: main([*arguments, "--out", str(out), "--parallel", kind]), tmp_path / "written")
    assert [one.code for one in ended] == [0, 0], ended
    assert_same_run(out, tmp_path / "alone")


@pytest.mark.parametrize(("first", "then"), [(("fsdp", 2), ("ddp", 4)), (("sequence", 4), ("fsdp", 1))])
def test_another_number_of_processes_goes_on(
    first: tuple[str, int], then: tuple[str, int], alone: Path, corpus: Path, tmp_path: Path
) -> None:
    """SIGTERM to one process ends all of them behind the same step, with a checkpoint."""
    out = tmp_path / "run"
    stop = in_step(12, first[1] - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    ended = run(first[1], out, corpus, "--parallel", first[0], before=stop)
    assert [one.code for one in ended] == [128 + signal.SIGTERM] * first[1], ended
    assert "Interrupted after 12 of 50 steps" in ended[0].out
    assert [path.name for path in checkpoint.found_in(out / "checkpoints")] == ["step-000010", "step-000012"]
    ended = run(then[1], out, corpus, "--parallel", then[0], "--resume")
    assert [one.code for one in ended] == [0] * then[1], ended
    assert "Goes on from" in ended[0].out
    assert_same_run(out, alone)


@pytest.mark.parametrize("kind", ["ddp", pytest.param("sequence", marks=pytest.mark.slow)])
def test_a_process_is_killed(kind: str, corpus: Path, tmp_path: Path) -> None:
    """The others end, and the run goes on to the same weights, bit for bit, as one that nothing disturbed."""
    run(2, tmp_path / "undisturbed", corpus, "--parallel", kind, steps=12)
    out = tmp_path / "run"
    killed = in_step(9, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
    ended = run(2, out, corpus, "--parallel", kind, before=killed, steps=12)
    assert [one.code for one in ended] == [1, -signal.SIGKILL]
    message = "regla: error: Process 0 of 2 has lost another process, which ended. --resume goes on from the last "
    assert message + f"checkpoint, {out}/checkpoints/step-000005.\n" in ended[0].err
    ended = run(2, out, corpus, "--parallel", kind, "--resume", steps=12)
    assert [one.code for one in ended] == [0, 0], ended
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "undisturbed"))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_kills(kind: str, corpus: Path, tmp_path: Path) -> None:
    """Of either process, soon after the start or after a checkpoint: a whole one is always there to go on from."""
    steps, moments, out = 40, random.Random(KINDS.index(kind)), tmp_path / "run"
    more = ("--parallel", kind, "--save-every", "1")
    run(2, tmp_path / "undisturbed", corpus, *more, steps=steps)
    for number in range(10):
        before = checkpoint.found_in(out / "checkpoints")

        def kill(processes: list, before=before, number=number) -> None:
            while number % 2 and checkpoint.found_in(out / "checkpoints") == before and processes[0].is_alive():
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.2 if number % 2 else 1.0))
            processes[moments.randrange(2)].kill()
            for process in processes:  # torchrun does this: one that waits for the other's first word would wait on
                process.join(5)
                process.kill()

        ended = in_processes(
            2,
            lambda: main(command(out, corpus, *more, "--resume", steps=steps)),
            tmp_path / "written",
            meanwhile=kill,
        )
        assert {one.code for one in ended} <= {0, 1, -signal.SIGKILL}, ended
        assert all("Traceback" not in one.err for one in ended), ended
    ended = run(2, out, corpus, *more, "--resume", steps=steps)
    assert [one.code for one in ended] == [0, 0], ended
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "undisturbed"))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    assert [line["step"] for line in log(out)] == list(range(1, steps + 1))


def test_the_disk_of_the_first_is_full(corpus: Path, tmp_path: Path) -> None:
    def before() -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        checkpoint._write = full

    ended = run(2, tmp_path / "run", corpus, before=before, steps=12)
    assert [one.code for one in ended] == [2, 1]
    assert "The checkpoint of step 5 cannot be written" in ended[0].err
    assert "No space left on device" in ended[0].err and ended[1].err == ""


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            ["--parallel", "sequence", "--mixer", "hybrid"],
            "regla: error: --parallel sequence passes the states of linear layers between processes, but layer 1 of "
            "the model is full_attention; use --parallel ddp or fsdp, or --mixer regla.\n",
        ),
        (
            ["--parallel", "sequence", "--config", "branch.json"],
            "regla: error: --parallel sequence passes the states of recurrences between processes, not the keys and "
            "values of a window_branch, which is 4 in the model; use --parallel ddp or fsdp, or a model without it.\n",
        ),
        (
            ["--batch-size", "1"],
            "regla: error: --batch-size is 1, but there are 2 processes, and each takes at least one sequence of a "
            "batch; raise it, or start fewer.\n",
        ),
        (
            ["--parallel", "sequence", "--sequence-parallel-size", "3"],
            "regla: error: --sequence-parallel-size is 3, but there are 2 processes, which is no multiple of it; "
            "change one of them.\n",
        ),
        (
            ["--data", "absent.txt"],
            "regla: error: There is no file absent.txt; give the path of a text or token file.\n",
        ),
    ],
)
def test_bad_input_is_told_once(more: list[str], says: str, corpus: Path, tmp_path: Path) -> None:
    if "branch.json" in more:
        (tmp_path / "branch.json").write_text('{"window_branch": 4}')
        more = [str(tmp_path / word) if word == "branch.json" else word for word in more]
    ended = run(2, tmp_path / "run", corpus, *more)
    assert [one.code for one in ended] == [2, 1]
    assert ended[0].err == says and ended[1].err == ""
    assert not (tmp_path / "run").exists()


def test_a_size_of_groups_for_what_has_none(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--out", str(tmp_path / "run"), "--parallel", "fsdp", "--sequence-parallel-size", "2"]) == 2
    assert capsys.readouterr().err == (
        "regla: error: --sequence-parallel-size 2 is given with --parallel fsdp; it is of --parallel sequence: leave "
        "one out.\n"
    )


def test_what_differs_between_processes(corpus: Path, tmp_path: Path) -> None:
    """Each has another text: all end before anything is written."""

    def one() -> int:
        rank = os.environ["RANK"]
        mine = tmp_path / f"{rank}.txt"
        mine.write_text(rank + corpus.read_text())
        return main(command(tmp_path / "run", mine))

    ended = in_processes(2, one, tmp_path / "written")
    assert [one.code for one in ended] == [1, 2]
    assert ended[1].err.startswith("regla: error: Process 1 has --data (SHA-256 of its tokens) ")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_another_run_holds(alone: Path, corpus: Path, tmp_path: Path) -> None:
    ended = run(2, alone, corpus)
    assert [one.code for one in ended] == [2, 1]
    assert f"{alone} is not empty" in ended[0].err and ended[1].err == ""
