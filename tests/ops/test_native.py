"""The C kernels as a library: compiled once, wherever there is a compiler, and explained where there is none."""

import ctypes
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regla.ops import gated_linear_attention, regla_attention, safe_exp_attention
from regla.ops.fused import Inputs
from regla.ops.native import build, delta, operation

from . import test_delta
from .test_forms import SHAPES, assert_equal_to_definition, make, native, skip_without


@pytest.fixture(autouse=True)
def _on_the_cpu():
    with torch.device("cpu"):
        yield


#: What a process of its own does; without optimisation, which takes most of a compilation.
PROGRAM = """
from regla.ops.native import build
build._OPTIONS = tuple("-O0" if option == "-O3" else option for option in build._OPTIONS)
print(build.why_missing())
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a library not yet loaded, which is made without optimisation."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_OPTIONS", tuple("-O0" if x == "-O3" else x for x in build._OPTIONS))
    build.load.cache_clear()
    yield tmp_path / "cache" / "regla"
    build.load.cache_clear()


@pytest.fixture
def no_compiler(cache, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)


def test_structures_are_the_same_in_c_and_python():
    skip_without("native")
    assert build.load().regla_size_of_problem() == ctypes.sizeof(operation._Problem)
    assert build.load().regla_size_of_delta_problem() == ctypes.sizeof(delta._Problem)


def test_compiled_once(cache, monkeypatch):
    skip_without("native")
    (made,) = cache.iterdir()
    build.load.cache_clear()
    ran = []
    monkeypatch.setattr(build, "_run", lambda command, run=build._run: ran.append(command) or run(command))
    assert build.why_missing() is None
    assert list(cache.iterdir()) == [made] and not any("-o" in command for command in ran)


@pytest.mark.slow
def test_another_source_is_another_file(cache, monkeypatch, tmp_path):
    skip_without("native")
    folder = tmp_path / "source"
    shutil.copytree(Path(build.__file__).parent, folder)
    with (folder / "kernels.c").open("a") as source:
        source.write("/* more */\n")
    monkeypatch.setattr(build, "__file__", str(folder / "build.py"))
    build.load.cache_clear()
    assert build.why_missing() is None and len(list(cache.iterdir())) == 2


@pytest.mark.slow
def test_processes_that_compile_at_once(cache):
    """Both load a whole file, and one remains."""
    skip_without("native")
    shutil.rmtree(cache)
    started = [subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in started] == ["None", "None"]
    assert len(list(cache.iterdir())) == 1


@pytest.mark.slow
def test_a_cache_that_cannot_be_written(cache, monkeypatch, tmp_path):
    """As in a container whose home is read-only, or is no folder at all."""
    skip_without("native")
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    build.load.cache_clear()
    assert build.why_missing() is None


def test_a_user_without_a_home(cache, monkeypatch):
    skip_without("native")

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nobody)
    build.load.cache_clear()
    assert build.why_missing() is None


@pytest.mark.slow
def test_a_damaged_file_is_made_again(cache):
    """Of no length, as a crash or a full disk leave one."""
    skip_without("native")
    (made,) = cache.iterdir()
    made.unlink()
    made.touch()
    for _ in range(2):  # in processes of their own: this one has the library open under that name
        assert subprocess.check_output([sys.executable, "-c", PROGRAM], text=True).strip() == "None"
        assert list(cache.iterdir()) == [made] and made.stat().st_size > 0


def test_a_cache_that_nothing_may_be_run_from(cache, monkeypatch):
    skip_without("native")

    def open_library(path, CDLL=ctypes.CDLL):
        if str(cache) in path:
            raise OSError("failed to map segment from shared object")
        return CDLL(path)

    monkeypatch.setattr(ctypes, "CDLL", open_library)
    build.load.cache_clear()
    assert build.why_missing() is None


def test_no_compiler(no_compiler):
    x = torch.ones(1, 2, 1, 4)
    with pytest.raises(ValueError, match=r"backend='native' cannot run: there is no C compiler .* use 'auto' or"):
        gated_linear_attention(x, x, x, backend="native")
    o, _ = gated_linear_attention(x, x, x)
    assert torch.equal(o, gated_linear_attention(x, x, x, backend="chunked")[0])


def test_a_compiler_that_fails(cache, monkeypatch):
    monkeypatch.setenv("CC", "false")
    assert build.why_missing().startswith("the C kernels did not compile here: ")


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        (torch.float64, {}, "a tensor is float64, and the C kernels compute in float32"),
        (torch.float32, {"key_max": "sequence"}, "key_max is 'sequence', which is not causal"),
    ],
)
def test_what_they_do_not_do(dtype, options, message):
    inputs = [x.to(dtype) for x in make(5, SHAPES[4], "value", "plain")]
    with pytest.raises(ValueError, match=f"backend='native' cannot run: {message}"):
        regla_attention(*inputs, backend="native", **options)


@pytest.mark.parametrize("axis", ["value", "key"])
def test_any_split_into_calls_gives_the_same_bits(axis):
    """A token's result depends on the state alone: so a prompt read at once and one read token by token are equal."""
    skip_without("native")
    inputs = make(140, SHAPES[1], axis, "outliers", B=2)
    options = {"gate_axis": axis, "backend": "native", "output_final_state": True}
    whole, final = regla_attention(*inputs, **options)
    state, parts = None, []
    for lo, hi in ((0, 1), (1, 64), (64, 65), (65, 140)):
        h, state = regla_attention(*(x[:, lo:hi] for x in inputs), initial_state=state, **options)
        parts.append(h)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert all(torch.equal(one, other) for one, other in zip(state, final, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(threads):
    skip_without("native")
    before = torch.get_num_threads()
    leaves = [x.requires_grad_() for x in make(200, SHAPES[3], "both", "extreme", B=3)]
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            h, _ = regla_attention(*leaves, gate_axis="both", backend="native")
            results.append([h, *torch.autograd.grad(h.square().sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_strided_inputs_and_small_dtypes():
    """Heads as views of one projection, in bfloat16: gradients come back in their dtype."""
    skip_without("native")
    qkv = torch.randn(2, 30, 2 * 16 + 2 * 16 + 2 * 24).bfloat16().requires_grad_()
    q, k, v = (x.unflatten(-1, (2, -1)) for x in qkv.split([32, 32, 48], -1))
    o, _ = gated_linear_attention(q, k, v, backend="native")
    expected, _ = gated_linear_attention(*(x.detach().float() for x in (q, k, v)), backend="recurrent")
    assert o.dtype == torch.bfloat16 and torch.allclose(o.float(), expected, rtol=1e-2, atol=1e-2)
    (grad,) = torch.autograd.grad(o.float().square().sum(), qkv)
    assert grad.dtype == torch.bfloat16 and grad.isfinite().all() and (grad != 0).any()


def test_padding_does_not_set_the_unit_of_gradients():
    """What memory happens to hold at padding tokens is not taken for factors of outputs."""
    skip_without("native")
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[0, :20], mask[1, 50:] = False, False
    q, k, v, gate, refine = make(70, SHAPES[4], "value", "plain", B=2)
    inputs = Inputs(q, k, v, None, None, gate, refine, mask)
    *_, factors, _ = operation.forward(inputs, 1.0, safe_exp=True, decaying=True, keep=True)
    assert (factors[~mask] == 0).all() and (factors[mask] > 0).all()


@pytest.mark.parametrize("attention", [gated_linear_attention, safe_exp_attention])
def test_every_head_has_a_unit_of_gradients(attention):
    """Huge gradients of one head leave another's tiny ones as they are alone."""
    skip_without("native")
    leaves = [x.requires_grad_() for x in torch.randn(3, 1, 70, 2, 20).unbind(0)]
    o, _ = attention(*leaves, backend="native")
    tiny = torch.randn_like(o) * torch.tensor([0.0, 2.0**-60])[:, None]
    both = tiny + torch.randn_like(o) * torch.tensor([2.0**80, 0.0])[:, None]
    alone, beside = (torch.autograd.grad(o, leaves, d_o, retain_graph=True) for d_o in (tiny, both))
    for one, other in zip(alone, beside, strict=True):
        assert torch.equal(one[:, :, 1], other[:, :, 1]) and (one[:, :, 1] != 0).all() and other.isfinite().all()


@pytest.mark.parametrize("axis", ["value", "key", "both"])
def test_a_nan_stays_one(axis):
    """From a token's gate, refining gate, key or value, or from a state's m: what comes after is not a number."""
    skip_without("native")
    inputs = make(70, SHAPES[4], axis, "plain")
    for i in range(1, 5):
        broken = [x.clone() for x in inputs]
        broken[i][0, 30, 1, 2] = torch.nan
        h, _ = regla_attention(*broken, gate_axis=axis, backend="native")
        assert h[0, :30].isfinite().all() and h[0, 30:, 3:6].isnan().any(-1).all(), i
    state = torch.ones(1, 3, 16, 24), torch.full((1, 3), torch.inf)
    assert regla_attention(*inputs, gate_axis=axis, initial_state=state, backend="native")[0].isnan().all()


def test_m_takes_no_gradient():
    skip_without("native")
    leaves = [x.requires_grad_() for x in make(5, SHAPES[4], "value", "plain")]
    _, (S, m) = regla_attention(*leaves, output_final_state=True, backend="native")
    assert S.requires_grad and not m.requires_grad


def test_a_log_decay_that_is_nan():
    skip_without("native")
    q, k, v = torch.randn(3, 1, 5, 1, 4).unbind(0)
    g = torch.full((1, 5, 1, 4), -1.0)
    g[0, 2, 0, 1] = torch.nan
    for decays in ({"gk": g}, {"gv": g}):
        for attention in (gated_linear_attention, safe_exp_attention):
            o, _ = attention(q, k, v, **decays, validate=False, backend="native")
            assert o[0, :2].isfinite().all() and o[0, 2:].isnan().any(-1).all()


@pytest.mark.parametrize("T", [1, 5])
def test_a_batch_of_none(T):
    skip_without("native")
    leaves = [x.requires_grad_() for x in make(T, SHAPES[0], "value", "plain", B=0)]
    h, (S, m) = regla_attention(*leaves, output_final_state=True, backend="native")
    assert h.shape == (0, T, 2, 65) and S.shape == (0, 2, 33, 65) and m.shape == (0, 2)
    assert [x.shape for x in torch.autograd.grad(h.sum() + S.sum(), leaves)] == [x.shape for x in leaves]
    with torch.no_grad():
        assert regla_attention(*leaves, backend="native")[0].shape == h.shape


@pytest.mark.parametrize("bounds", [[0, 9], [-3, 5], [0, 4, 3, 5]])
def test_boundaries_are_always_checked(bounds):
    """Also where numbers are not: the kernels would write beyond the tensors."""
    skip_without("native")
    x = torch.ones(1, 5, 1, 4)
    with pytest.raises(ValueError, match="expected boundaries that start at 0, ascend, and end at T = 5"):
        gated_linear_attention(x, x, x, cu_seqlens=torch.tensor(bounds), validate=False, backend="native")


@pytest.mark.parametrize("options", [[], pytest.param(["-mavx2", "-mfma"], marks=pytest.mark.slow)])
def test_other_widths_of_vectors(cache, monkeypatch, options):
    """Of 4 and 8 numbers: what older processors have."""
    skip_without("native")
    if options and platform.machine() != "x86_64":
        pytest.skip("the option is for x86-64")
    monkeypatch.setattr(build, "_options_for", lambda compiler: [*build._OPTIONS, *options])
    build.load.cache_clear()
    skip_without("native")
    assert build.load().regla_lanes() == (8 if options else 4)
    for shape, axis, scenario in ((SHAPES[0], "both", "outliers"), (SHAPES[4], "value", "extreme")):
        assert_equal_to_definition(make(70, shape, axis, scenario), axis, forms={"native": native})
    test_delta.assert_equal_to_definition(test_delta.make(70, (6, 3, 33, 17), "extreme"), only=["native"])
