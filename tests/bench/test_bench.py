"""`regla bench`: every path runs at tiny sizes, and what a row says is what was measured."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from regla.bench import decode, ops, run
from regla.bench.decode import fill, set_length
from regla.bench.flops import training_flops
from regla.bench.measure import Case, Row, floor_columns, quantiles, time_call
from regla.bench.models import build, configs
from regla.bench.train import IdentityMixer, _model, _profile_table
from regla.cli import main
from regla.ops.dispatch import why_not_native
from regla.report.benches import benches_table

CPU = torch.device("cpu")
EVERY_ROW = {"benchmark", "subject", "setting", "p20_us", "p50_us", "p80_us", "repeats", "timing", "against"}
SURROUNDINGS = {"device", "threads", "python", "torch", "triton", "transformers", "regla", "commit", "date"}


def bench(line: str, out: Path) -> list[Row]:
    assert main(["bench", *line.split(), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        assert row.keys() >= EVERY_ROW | SURROUNDINGS
        assert row["p20_us"] <= row["p50_us"] <= row["p80_us"]
    return rows


def test_ops(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "new" / "rows.jsonl"
    rows = bench("ops --quick --device cpu --only */B2-T64-* */sdpa/B1-T128-*/forward *step", out)
    x = torch.ones(1)
    backends = ["chunked"] if why_not_native(x, x) else ["native", "chunked"]
    names = ("regla_attention", "gated_linear_attention")
    subjects = [f"{name}/{axis}/{backend}" for name in names for axis in ops.AXES for backend in backends]
    subjects += [f"{name}/key/{backend}" for name in ops.DELTAS for backend in backends]
    every = ["softmax_attention/none/sdpa", *subjects, *(f"{part}/none/eager" for part in ops.PARTS)]
    assert [row["subject"] for row in rows if row["setting"]["direction"] == "forward+backward"] == every
    assert {row["setting"]["direction"] for row in rows} == {"forward", "forward+backward", "step"}
    for row in rows:
        assert row["floor_us"] / row["p50_us"] == pytest.approx(row["of_floor"])
        assert row["gb_per_s"] == pytest.approx(row["of_floor"] * row["copy_gb_per_s"])
        assert row["timing"] == "clock" and row["peak_extra_bytes"] is None and row["repeats"] >= 3
    softmax, regla = rows[0], rows[1]
    assert softmax["against"] == {} and regla["against"] == {
        "softmax_attention/none/sdpa": softmax["p50_us"] / regla["p50_us"]
    }
    assert all(row["against"] == {} for row in rows if row["operation"] in ops.PARTS)
    printed = capsys.readouterr().out
    assert printed.startswith("operation ") and f"{regla['of_floor']:.0%}" in printed
    assert printed.count("regla_attention/value/triton: no rows, the tensors are on cpu") == 1
    assert printed.count("chunk_gla/key/fla: no rows, the package fla is not installed") == 1


@pytest.mark.slow
def test_the_kernels_run_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here through Triton's interpreter, a call of which may take seconds on a busy machine."""
    monkeypatch.setattr(ops, "_TOO_LONG", float("inf"))
    only = ["regla_step/value/triton/*", "*/key/triton/B1-T128-*/forward", "output_norm/*", "short_conv*"]
    rows = run.bench_ops(device="cpu", quick=True, only=only)
    assert [row["subject"] for row in rows] == [
        "regla_attention/key/triton",
        "gated_linear_attention/key/triton",
        "regla_attention_fast_gates/key/triton",
        *[f"{name}/key/triton" for name in ops.DELTAS],
        "regla_step/value/triton",
        *[f"{part}/none/{backend}" for part in ops.PARTS[1:] for backend in ("eager", "triton")],  # one token
        *[f"{part}/none/{backend}" for part in ops.PARTS for _ in range(2) for backend in ("eager", "triton")],
    ]


def test_floor_bytes() -> None:
    """B2 T3 H1 K4 V4 in float32: a tensor has 96 bytes; the state 2 * 16 floats, m 2."""
    x = torch.zeros(2, 3, 1, 4)
    assert ops._floor_bytes([x] * 5, x, "forward") == 96 * 6
    assert ops._floor_bytes([x] * 5, x, "forward+backward") == 96 * 17
    state = [torch.zeros(2, 1, 4, 4), torch.zeros(2, 1)]
    assert ops._floor_bytes([x, *state], x, "step") == 96 * 2 + 2 * (128 + 8)
    columns = floor_columns(3000, 1e9, 6.0)
    assert columns["floor_us"] == 3.0 and columns["of_floor"] == 0.5 and columns["gb_per_s"] == 0.5


def test_every_operation_computes_what_its_name_says() -> None:
    """From the same logits the gated form on features is the safe exponential one, up to the stabiliser's factor."""
    for axis in ops.AXES:
        logits = ops._logits(ops.Shape(1, 20, 2, 16, 16), axis, CPU, torch.float64)
        function, inputs = ops._operation("regla_attention", axis, "chunked", logits)
        gated, features = ops._operation("gated_linear_attention", axis, "chunked", logits)
        axes = 2 if axis == "both" else 1
        assert len(inputs) == 3 + 2 * axes and len(features) == 3 + axes
        # The first token's output is one key's value, whatever the gates.
        for out in (function(*inputs), gated(*features)):
            assert torch.allclose(
                torch.nn.functional.normalize(out[:, 0], dim=-1),
                torch.nn.functional.normalize(logits["v"][:, 0], dim=-1),
            )
        call = ops._call(function, inputs, "forward+backward")
        assert [tuple(x.shape) for x in call()] == [(1, 20, 2, 16)] * (4 + 2 * axes)
    softmax, inputs = ops._operation("softmax_attention", "none", "sdpa", logits)
    assert torch.allclose(softmax(*inputs)[:, :, 0], logits["v"][:, 0])


def test_the_delta_rule_starts_as_a_model_does() -> None:
    """Half-lives of 1 to 256 tokens over the channels; the first output is beta v (q . k) / sqrt K."""
    logits = ops._logits(ops.Shape(1, 20, 2, 16, 16), "key", CPU, torch.float64)
    function, inputs = ops._operation("gated_delta_attention", "key", "chunked", logits)
    q, k, v, beta, gk = inputs
    half_lives = math.log(0.5) / gk.mean((0, 1, 2))
    assert 0.8 < half_lives[0] < 1.2 and 200 < half_lives[-1] < 300
    first = beta[..., None] * v * (q * k).sum(-1, keepdim=True) / 4
    assert torch.allclose(function(*inputs)[:, 0], first[:, 0])


def test_a_backend_that_takes_too_long_has_no_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(ops, "_TOO_LONG", 0.0)
    assert run.bench_ops(device="cpu", quick=True, only=["*/chunked/B1-T128*/forward"]) == []
    assert capsys.readouterr().out.count("no row, one call takes") == 8


def test_decode(tmp_path: Path) -> None:
    rows = bench("decode --quick --device cpu --only */batch2/*", tmp_path / "rows.jsonl")
    assert [(row["subject"], row["setting"]["context"], row["setting"].get("in_turns", False)) for row in rows] == [
        ("softmax", 16, False),
        ("regla", 16, False),
        ("softmax", 64, False),
        ("regla", 64, False),
        ("regla", 16, True),
        ("regla", 64, True),
    ]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(2e6 / row["p50_us"]) and row["setting"]["compiled"] is False
    size = {(row["subject"], row["setting"]["context"]): row["cache_bytes"] for row in rows}
    assert size["regla", 16] == size["regla", 64]
    assert size["softmax", 16] < size["softmax", 64]
    assert set(rows[3]["against"]) == {"softmax"}
    assert "ReGLA, contexts in turns" in benches_table(rows)
    assert [row.get("of_shortest") for row in rows[:5]] == [None] * 4 + [1.0]
    parameters = [row["parameters"] for row in rows]
    assert parameters[1] == pytest.approx(parameters[0], rel=0.005)


def test_contexts_in_turns_on_a_host_of_two_paces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn is compared with itself: slow turns do not change the median of the ratios, but the medians' ratio."""
    paces = [[1.0, 2.0, 2.0, 1.0, 1.0], [1.1, 2.2, 2.2, 2.2, 1.1]]
    monkeypatch.setattr(decode, "_time_generate", lambda *_: (paces, None))
    rows = bench("decode --quick --device cpu --only regla/batch2/in_turns", tmp_path / "rows.jsonl")
    assert [row["of_shortest"] for row in rows] == [1.0, pytest.approx(1.1)]
    assert rows[1]["p50_us"] / rows[0]["p50_us"] == pytest.approx(2.2)
    assert "| x shortest |" in benches_table(rows)


@pytest.mark.parametrize("name", ["softmax", "regla"])
def test_decoding_goes_on_behind_the_context_each_time(name: str) -> None:
    from transformers import StaticCache

    config = configs(max_length=32, quick=True)[name]
    model = build(config, CPU, torch.float32).eval()
    cache = StaticCache(config=config, max_cache_len=32)
    fill(model, cache, 2, 20)
    assert int(cache.get_seq_length()) == 20
    ids, mask = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 21, dtype=torch.long)
    for _ in range(3):  # without the way back it would run out of room
        set_length(cache, 20)
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=9, min_new_tokens=9)
        assert int(cache.get_seq_length()) == 29


def test_train(tmp_path: Path) -> None:
    rows = bench("train --quick --device cpu --only */length16 --dtype bfloat16", tmp_path / "rows.jsonl")
    assert [row["subject"] for row in rows] == ["softmax", "identity", "values", "regla"]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(64e6 / row["p50_us"])
        assert row["setting"] == {"length": 16, "batch": 4, "dtype": "bfloat16", "compiled": False}
        assert row["activation_checkpointing"] is False
    assert set(rows[3]["against"]) == {"softmax", "identity", "values"}


@pytest.mark.parametrize("update_rule", ["additive", "delta"])
def test_operations_are_counted_from_shapes(update_rule: str) -> None:
    """As PyTorch counts linear maps and attention, half of which causality saves; and recurrences by hand."""
    more = {"update_rule": update_rule, "feature_map": "unit_safe_exp"} if update_rule == "delta" else None
    ids, L = torch.zeros(1, 16, dtype=torch.int64), 16
    for name in ("softmax", "identity", "values", "regla"):
        model = _model(name, L, CPU, True, more)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.set_attn_implementation("eager") if name == "softmax" else None
            if name == "regla":
                _model("values", L, CPU, True, more)(ids, use_cache=False)
            else:
                model(ids, use_cache=False)
        attention = 2 * L * 32 * 2  # of a token and two layers of width 32, without the half that causality saves
        recurrence = 2 * 2 * 2 * 16 * 16 * (3 if update_rule == "delta" else 2)  # two layers of two heads
        recurrence += 2 * 2 * 2 * 32 if update_rule == "delta" else 0  # beta, which values for outputs have not
        expected = counter.get_total_flops() / L
        expected += {"softmax": -attention, "regla": recurrence}.get(name, 0)
        assert training_flops(model, L) == 3 * expected, name


def test_a_profile_names_what_takes_the_time(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "train", "--quick", "--device", "cpu", "--only", "regla/length16", "--profile"]) == 0
    shown = capsys.readouterr().out
    busy, step = map(float, re.search(r"Busy ([\d.]+) of ([\d.]+) ms a step", shown).groups())  # type: ignore[union-attr]
    assert 0 < busy < 1.5 * step
    shares = [float(share) for share in re.findall(r"([\d.]+)%$", shown[shown.index("Busy") :], re.MULTILINE)]
    assert sum(shares) == pytest.approx(100, abs=2) and shares[:-1] == sorted(shares[:-1], reverse=True)
    assert "aten::mm" in shown


def test_a_profile_of_a_gpu_counts_kernels_once() -> None:
    """Neither what launches them nor a named range around them adds to their time."""
    events = [
        SimpleNamespace(key=key, device_type=device, is_user_annotation=range_, self_device_time_total=us, count=count)
        for key, device, range_, us, count in (
            ("cudaLaunchKernel", DeviceType.CPU, False, 900.0, 6),
            ("Optimizer.step", DeviceType.CUDA, True, 900.0, 2),
            ("short", DeviceType.CUDA, False, 300.0, 4),
            ("long", DeviceType.CUDA, False, 600.0, 2),
        )
    ]
    heading, _, *rows = _profile_table(events, 2, 0.001, True).splitlines()
    assert heading == "Busy 0.45 of 1.00 ms a step, profiled."
    assert [row.split() for row in rows[:2]] == [["long", "1", "300", "66.7%"], ["short", "2", "150", "33.3%"]]
    assert len(rows) == 3 and rows[2].split() == ["all", "others", "0", "0.0%"]


def test_lengths_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = bench("train --quick --device cpu --only regla/* --lengths 8 128", tmp_path / "rows.jsonl")
    assert [(row["setting"]["length"], row["setting"]["batch"]) for row in rows] == [(8, 8), (128, 1)]
    assert all(row["utilisation"] > 0 for row in rows) and "FLOP utilisation" in capsys.readouterr().out
    assert rows[0]["matrix_flops_per_second"] == rows[1]["matrix_flops_per_second"]  # measured once
    assert main(["bench", "train", "--lengths", "0", "--quick"]) == 2
    assert capsys.readouterr().err == "regla: error: --lengths has 0, expected numbers of tokens above 0.\n"


def test_the_identity_is_all_of_regla_but_its_mixers() -> None:
    identity, regla = (_model(name, 16, CPU, True) for name in ("identity", "regla"))
    assert all(isinstance(layer.self_attn, IdentityMixer) for layer in identity.model.layers)
    rest = {name: x.shape for name, x in regla.named_parameters() if ".self_attn." not in name}
    assert {name: x.shape for name, x in identity.named_parameters()} == rest


def test_values_for_outputs_keep_every_projection_at_work() -> None:
    for overrides in ({"gate_axis": "value"}, {"num_key_value_heads": 1, "value_head_dim": 24, "output_gate": None}):
        model = _model("values", 16, CPU, True, overrides)
        ids = torch.randint(128, (2, 16))
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(x.grad is not None for x in model.parameters())
        y = model(input_ids=ids).logits
        model.model.layers[0].self_attn.q_proj.weight.data.add_(1.0)
        assert torch.equal(model(input_ids=ids).logits, y)


def test_another_configuration(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "own.json"
    file.write_text('{"gate_axis": "value", "output_gate": null}')
    for line in (
        "train --quick --device cpu --only */length16",
        "decode --quick --device cpu --only */batch1/context16",
    ):
        rows = bench(f"{line} --config {file}", tmp_path / f"{line.split()[0]}.jsonl")
        for row in rows:
            own = None if row["subject"] == "softmax" else {"gate_axis": "value", "output_gate": None}
            assert row.get("overrides") == own
        assert "ReGLA, gate_axis value, output_gate None" in capsys.readouterr().out
        for text, complaint in (
            ('{"gate_axes": "value"}', "Unknown configuration key 'gate_axes'; the nearest known one is 'gate_axis'."),
            ('{"gate_axis": "time"}', "gate_axis is 'time'"),
            ('{"gate_axis": 3}', "The configuration does not fit"),
        ):
            bad = tmp_path / "bad.json"
            bad.write_text(text)
            assert main(["bench", *line.split(), "--config", str(bad)]) == 2
            assert complaint in capsys.readouterr().err


def test_where_memory_runs_out_training_tries_again_with_less(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from regla.bench import train

    whole = train._time_steps

    def short_of_memory(model, length, batch, dtype, compiled, checkpointing, *others):
        if not checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, length, batch, dtype, compiled, checkpointing, *others)

    monkeypatch.setattr(train, "_time_steps", short_of_memory)
    failed, done = run.bench_train(device="cpu", quick=True, only=["regla/length64"], out=str(tmp_path / "r.jsonl"))
    assert failed["out_of_memory"] and not failed["activation_checkpointing"]
    assert done["activation_checkpointing"] and done["tokens_per_second"] > 0
    assert "out of memory" in capsys.readouterr().out


def case(name: str, *found: Row | str, error: BaseException | None = None) -> Case:
    def measure() -> Iterator[Row | str]:
        yield from found
        if error is not None:
            raise error

    return Case(name, measure)


def row(subject: str, setting: int, p50_us: float) -> Row:
    return {"benchmark": "any", "subject": subject, "setting": {"n": setting}, "p50_us": p50_us}


def test_an_interrupt_costs_no_row_that_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    cases = [case("a", row("a", 1, 2.0)), case("b", row("b", 1, 3.0), error=KeyboardInterrupt())]
    with pytest.raises(KeyboardInterrupt):
        run.run(cases, CPU, out=str(out))
    assert [json.loads(line)["subject"] for line in out.read_text().splitlines()] == ["a", "b"]
    run.run(cases[:1], CPU, out=str(out))
    assert len(out.read_text().splitlines()) == 3  # appended


def test_ratios_are_within_a_run_and_a_setting() -> None:
    shown: list[str] = []
    full = {"benchmark": "any", "subject": "d", "setting": {"n": 1}, "out_of_memory": True}
    cases = [
        case("a", row("a", 1, 8.0), "a remark"),
        case("d", full, "a remark"),
        case("b", row("b", 2, 4.0)),
        case("c", row("c", 1, 2.0)),
    ]
    rows = run.run(cases, CPU, out=None, show=shown.append)
    assert [found.get("against") for found in rows] == [{}, None, {}, {"a": 4.0}]
    assert shown.count("a remark") == 1
    assert run.run(cases, CPU, out=None, only=["b", "c"])[1]["against"] == {}


def test_quantiles_and_the_clock() -> None:
    timing = quantiles([1e-6, 2e-6, 3e-6, 4e-6, 5e-6, 6e-6], "clock")
    assert (timing.p20_us, timing.p50_us, timing.p80_us) == pytest.approx((2.0, 3.5, 5.0))
    calls = []

    def call() -> tuple[()]:
        calls.append(0)
        return ()

    assert time_call(call, CPU, seconds=0.0).repeats == 3 and len(calls) == 4  # one to warm up


def test_bench_cpu_runs_what_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from regla.bench import cpu

    monkeypatch.setattr(cpu, "measure_memory", lambda: [{"benchmark": "memory", "T": 8, "setting": {}}])
    threads, out = torch.get_num_threads(), tmp_path / "cpu.jsonl"
    try:
        assert main(["bench", "cpu", "--only", "memory", "--out", str(out), "--threads", "1"]) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    (line,) = out.read_text().splitlines()
    assert json.loads(line).items() >= {"benchmark": "memory", "T": 8, "threads": 1}.items()
    assert '"T": 8' in capsys.readouterr().out


def test_bench_cpu_compares_forms_of_the_delta_rule() -> None:
    from regla.bench.cpu import measure_delta

    rows = measure_delta([(1, 40, 1, 16, 8), (2, 3, 2, 8, 16)], turns=1)
    backends = ["chunked"] if why_not_native(torch.ones(1), torch.ones(1)) else ["native", "chunked"]
    assert [row["backend"] for row in rows] == backends * 2
    assert [row["shape"] for row in rows[:: len(backends)]] == [
        {"B": 1, "T": 40, "H": 1, "K": 16, "V": 8},
        {"B": 2, "T": 3, "H": 2, "K": 8, "V": 16},
    ]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["recurrent_seconds"] / row["seconds"]) and row["load_before"] >= 0


BAD = {
    "no benchmark": ("bench", "the following arguments are required: WHAT"),
    "unknown benchmark": ("bench speed", "invalid choice: 'speed'"),
    "no case": ("bench ops --device cpu --quick --only zebra", "--only matches no case; their names are like"),
    "no rows file": ("bench ops --device cpu --quick --out rows.txt", "expected a file that ends in .jsonl"),
    "folder": ("bench ops --device cpu --quick --out folder.jsonl", "folder.jsonl cannot be written (Is a directory)"),
    "threads": ("bench cpu --threads 0", "--threads is 0, expected a number above 0."),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.jsonl").mkdir()
    line, message = BAD[name]
    try:
        code: object = main(line.split())
    except SystemExit as end:
        code = end.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("what", ["", "ops", "decode", "train", "cpu"])
def test_help_teaches(what: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", *what.split(), "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text and f"regla bench {what}".strip() in text


def test_bench_eval_times_both_ways_and_compares_them(tmp_path: Path, capsys) -> None:
    file = tmp_path / "eval.jsonl"
    assert main(["bench", "eval", "--quick", "--device", "cpu", "--out", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["subject"] for row in rows] == ["softmax", "regla", "hybrid"]
    for row in rows:
        assert row["speed_up"] == pytest.approx(row["seconds_whole"] / row["seconds_shared"])
        assert 0 <= row["largest_difference"] < 1e-3
    titles, *lines = capsys.readouterr().out.splitlines()
    assert titles.startswith("model ") and "speed-up" in titles and len(lines) == 3
