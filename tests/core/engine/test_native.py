"""The native step: bit-equal however rows are put together and on every path, close to torch, and never a must."""

from __future__ import annotations

import ctypes
import itertools
import logging
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.engine import choice, weights
from core.engine.base import BadCheckpoint
from core.engine.config import read_config
from core.engine.model import GPT2, Batch, Model, Rows, multiplies_int8
from core.engine.native import gpt2, library
from core.engine.native.gpt2 import SOURCES, WEIGHTS, NativeGPT2
from core.engine.native.memory import ARENA, Arena
from tests.checkpoints import SHAPES
from tests.core.engine.oracle import prompts, reference
from tests.core.engine.rounding import dequantised, quantise, rounded, whole

pytestmark = pytest.mark.usefixtures("inference")
Make = Callable[..., Path]
CPU = torch.device("cpu")
DTYPES = [torch.int8, torch.bfloat16, torch.float32]
ROOT = Path(__file__).parents[3]
SOURCE = ROOT / "core/engine/native/step.cpp"
EMBEDDED = ROOT / "core/models/tiny"


def compiled(source: Path, out: Path, *more: str) -> Path:
    """step.cpp, of this tree or changed, compiled as the package's install does it."""
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler, "the native step's tests need a C++ compiler: apt install g++"
    [extension] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    assert extension["optional"], "without a compiler the install must go on"
    assert extension["sources"] == [str(SOURCE.relative_to(ROOT))]
    flags = [*extension["extra-compile-args"], *extension["extra-link-args"], *more]
    assert not any("native" in flag for flag in flags), "an image built here must run elsewhere"
    strict = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(out)]
    done = subprocess.run([compiler, str(source), *flags, *strict], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the install compiled, where it is younger than all that it is made of."""
    installed = SOURCE.with_suffix(sysconfig.get_config_var("EXT_SUFFIX"))
    made_of = SOURCE, ROOT / "pyproject.toml"
    if installed.is_file() and installed.stat().st_mtime > max(path.stat().st_mtime for path in made_of):
        return installed
    return compiled(SOURCE, tmp_path_factory.mktemp("native") / "step.so")


@pytest.fixture(scope="module")
def native(built: Path) -> Any:
    return library.load(built)


@pytest.fixture(scope="module")
def paths(native: Any, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, int]]:
    """A library and a path of it: the three above AVX2 with their instructions written out for it, the portable one
    with fused multiply-adds, then all that this CPU runs."""
    own = [(native, path) for path in range(len(library.PATHS)) if native.palaver_runs(path)]
    folder = tmp_path_factory.mktemp("written-out")
    if library.ARM or len(own) == 1:
        compiled(SOURCE, folder / "step.so", "-fsyntax-only")  # what the install compiled has had no -Werror
        return own
    text = SOURCE.read_text()
    for target in ("avxvnni", "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni", "avx512bf16"):
        parts = text.split(f'target("{target}")')
        assert len(parts) == 2, "only the path's target names its instructions"
        text = 'target("avx2,fma,f16c")'.join(parts)
    parts = text.split("{ return a * b + c; }")
    assert len(parts) == 2, "only the portable path's fused multiply-add is none"
    text = "{ for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]); return c; }".join(parts)
    (folder / "step.cpp").write_text(text)
    more = "-include", str(Path(__file__).with_name("instructions.h")), "-Og"
    written_out = library.load(compiled(folder / "step.cpp", folder / "step.so", *more))
    return [*((written_out, path) for path in (0, 2, 3, 4)), *own]


def run(model: Model, ids: list[int], counts: list[int], mates: Callable[[], int] = lambda: 0) -> Tensor:
    """Logits of all positions, computed in steps of `counts` rows beside `mates()` rows of strangers."""
    kv, results, start = model.new_kv(len(ids)), [], 0
    for count in counts:
        before, after = mates(), mates()
        strangers = [Rows(model.new_kv(max(n, 1)), 0, n) for n in (before, after)]
        rows = [strangers[0], Rows(kv, start, count), strangers[1]]
        everything = ids[:before] + ids[start : start + count] + ids[:after]
        wanted = list(range(before, before + count))
        results.append(model.forward(Batch(everything, [r for r in rows if r.count], wanted))[0].clone())
        start += count
    return torch.cat(results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_path_batch_cut_and_thread_count_gives_the_same_bits(
    checkpoint: Make, paths: list[tuple[Any, int]], shape: str, dtype: torch.dtype
) -> None:
    models = [NativeGPT2(weights.load(checkpoint(shape)), native, dtype, path) for native, path in paths]
    config = models[0].config
    [ids] = prompts([min(config.n_positions, 170)], config.vocab_size)
    reached = run(next((m for m in models if m.path == 1), models[-1]), ids, [len(ids)])
    exact = run(NativeGPT2(weights.load(checkpoint(shape)), paths[-1][0], torch.float32), ids, [len(ids)])
    assert reached.isfinite().all() and reached.std() > 0.1
    rng = random.Random(shape)
    for model in models:
        whole = run(model, ids, [len(ids)])
        if model.path == 0 and model.native is paths[-1][0] and not library.ARM:  # without fused multiply-adds
            near = {torch.int8: 0.03, torch.bfloat16: 0.01, torch.float32: 1e-5}
            assert float((whole - reached).std() / reached.std()) < near[dtype]
        elif model.path == 4 and dtype is torch.bfloat16:  # rounds to bfloat16 what meets bfloat16
            assert float((whole - exact).std() / exact.std()) < 0.03
        else:
            assert torch.equal(whole, reached)
        for rows in range(1, 21):
            assert torch.equal(run(model, ids[:rows], [rows]), whole[:rows])
        for threads in (1, 2):
            torch.set_num_threads(threads)
            counts: list[int] = []
            while (left := len(ids) - sum(counts)) > 0:
                counts.append(min(rng.choice([1, 1, 2, 3, 5, 17, 50]), left))
            assert torch.equal(run(model, ids, counts, lambda: rng.choice([0, 0, 1, 2, 3, 6, 13])), whole)


def test_threads_that_help_go_with_the_one_that_asked(native: Any) -> None:
    weight, packed = torch.randn(64, 320), torch.empty(64, 320)
    here, seen = Path("/proc/self/task"), list[int]()

    def threads_here(wanted: int) -> int:
        """The kernel lets go of one a moment after it was joined."""
        for _ in range(500):
            if len(list(here.iterdir())) == wanted:
                break
            time.sleep(0.01)
        return len(list(here.iterdir()))

    def ask() -> None:
        for threads in (4, 1, 3):
            native.palaver_pack(weight.data_ptr(), 0, 320, 1, 64, 320, packed.data_ptr(), None, 2, threads)
            seen.append(threads_here(before + threads))

    before, thread = len(list(here.iterdir())), threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert seen == [before + 4, before + 1, before + 3]
    assert threads_here(before) == before, "threads are left"


FEW_THREADS = """
import ctypes, re, resource, sys
from pathlib import Path
from core.engine.native.library import load

library = load(Path(sys.argv[1]))
x, totals = (ctypes.c_float * 6400)(), (ctypes.c_double * 64)()

def sums(threads):
    library.palaver_logsumexp(x, 64, 100, 100, totals, threads, 0)
    return [round(total, 3) for total in totals] == [4.605] * 64, len(list(Path("/proc/self/task").iterdir()))

size = 1024 * int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
resource.setrlimit(resource.RLIMIT_AS, (size + 3 * stack // 2, -1))  # of one thread more
print(sums(8), sums(8), sums(2), sums(1))
"""


def test_threads_that_are_not_to_be_had_are_done_without(native: Any) -> None:
    command = ["bash", "-c", 'ulimit -s 65536; exec "$@"', "-", sys.executable, "-c", FEW_THREADS, native._name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "(True, 2) (True, 2) (True, 2) (True, 1)\n", done.stderr


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_have_the_logits_that_they_have_among_all(
    checkpoint: Make, paths: list[tuple[Any, int]], dtype: torch.dtype
) -> None:
    """The last layer computes wanted rows alone, but everybody's keys and values."""
    [ids] = prompts([23], 301)
    for native, path in paths:
        model = NativeGPT2(weights.load(checkpoint("odd")), native, dtype, path)

        def step(wanted: list[int], model: NativeGPT2 = model) -> tuple[Tensor, Tensor]:
            kvs = [model.new_kv(16) for _ in range(3)]
            for kv in kvs:
                kv.pages[0].zero_()
            rows = [Rows(kv, 0, count) for kv, count in zip(kvs, (9, 1, 13), strict=True)]
            return model.forward(Batch(ids, rows, wanted))[0].clone(), torch.stack([kv.pages[0] for kv in kvs])

        whole, kv = step(list(range(23)))
        for wanted in [], [8], [9], [22], [8, 0, 22], [0, 3, 4, 5, 6, 10, 11, 12, 13, 14]:
            logits, same_kv = step(wanted)
            assert torch.equal(logits, whole[wanted]) and torch.equal(same_kv, kv)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_forked_sequence_goes_on_with_the_same_bits(checkpoint: Make, native: Any, dtype: torch.dtype) -> None:
    model = NativeGPT2(weights.load(checkpoint("odd")), native, dtype)
    [ids] = prompts([60], 301)
    whole = run(model, ids, [60])
    for at in (1, 15, 16, 17, 40):
        source, fork = model.new_kv(60), model.new_kv(128)
        for page in fork.pages:
            page.view(torch.uint8).fill_(255)  # NaN; what stands behind the prefix is never looked at
        model.forward(Batch(ids[:50], [Rows(source, 0, 50)], []))
        model.copy_kv(source, fork, at)
        rest, _ = model.forward(Batch(ids[at:], [Rows(fork, at, 60 - at)], list(range(60 - at))))
        assert torch.equal(rest, whole[at:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_that_grows_goes_on_in_its_place_and_its_pages_serve_another(
    checkpoint: Make, paths: list[tuple[Any, int]], dtype: torch.dtype
) -> None:
    [ids] = prompts([240], 384)
    for native, path in paths:
        model = NativeGPT2(weights.load(checkpoint("plain")), native, dtype, path)
        whole, kv, start, results = run(model, ids, [240]), model.new_kv(1), 0, []
        for end in (100, 128, 129, 240):
            kv = model.grow_kv(kv, end, start)
            results.append(
                model.forward(Batch(ids[start:end], [Rows(kv, start, end - start)], [*range(end - start)]))[0].clone()
            )
            start = end
        assert torch.equal(torch.cat(results), whole)
        taken = {page.data_ptr() for page in kv.pages}
        fork = model.new_kv(200)
        model.copy_kv(kv, fork, 150)
        assert torch.equal(run_on(model, fork, ids, 150), whole[150:])
        del kv
        again = model.new_kv(256)
        assert {page.data_ptr() for page in again.pages} == taken and len(taken) == 2
        assert torch.equal(run_on(model, again, ids, 0), whole)


def run_on(model: NativeGPT2, kv: Any, ids: list[int], start: int) -> Tensor:
    """The logits from `start` on, of what `kv` has so far."""
    count = len(ids) - start
    return model.forward(Batch(ids[start:], [Rows(kv, start, count)], list(range(count))))[0].clone()


@pytest.mark.parametrize("shape", ["odd", "plain"])
def test_a_step_sums_up_its_logits(checkpoint: Make, paths: list[tuple[Any, int]], shape: str) -> None:
    """As whoever sums them up later, bit for bit, and a draw from its maxima is the draw."""
    for native, path in paths:
        model = NativeGPT2(weights.load(checkpoint(shape)), native, torch.int8, path)
        vocab = model.config.vocab_size
        [ids] = prompts([40], vocab)
        for wanted in ([39], list(range(0, 40, 3)), list(range(40))):
            logits, summary = model.forward(Batch(ids, [Rows(model.new_kv(40), 0, 40)], wanted))
            assert summary.totals == pytest.approx(logits.double().logsumexp(1).tolist(), rel=3e-7)
            for threads in (1, 2):
                later = (ctypes.c_double * len(wanted))()
                places = logits.data_ptr(), len(wanted), logits.stride(0), vocab
                native.palaver_logsumexp(*places, ctypes.addressof(later), threads, path)
                assert summary.totals == later[:]
            for seed, (row, tops) in enumerate(zip(logits, summary.tops, strict=True)):
                for k, banned in itertools.product((1, 3, 40, vocab - 2), (-1, int(row.argmax()), 256)):
                    knobs = seed, 0.8, 0.9, vocab, k, banned, 7
                    draws = b"".join(library.DRAW.pack(row.data_ptr(), top, *knobs) for top in (tops, 0) * 3)
                    for count, threads in ((1, 1), (6, 2)):
                        drawn = (ctypes.c_int32 * count)(*[-1] * count)
                        native.palaver_draw(draws, count, drawn, threads, path)
                        assert len(set(drawn)) == 1 and drawn[0] not in (banned, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_goes_on_with_what_another_precision_left(
    checkpoint: Make, paths: list[tuple[Any, int]], dtype: torch.dtype
) -> None:
    """As the draft does: it stays near, with the same bits in any batch and on all paths whose rounding is one."""
    folder, [ids] = checkpoint("deep"), prompts([90], 517)
    results = {}
    for native, path in paths:
        model = NativeGPT2(weights.load(folder), native, dtype, path)
        draft = NativeGPT2(weights.load(folder), native, torch.int8, path, dtype)
        exact, whole, cut = (model.new_kv(90) for _ in range(3))
        want = model.forward(Batch(ids, [Rows(exact, 0, 90)], list(range(70, 90))))[0].clone()
        for kv in (whole, cut):
            model.forward(Batch(ids[:70], [Rows(kv, 0, 70)], []))
        got = draft.forward(Batch(ids[70:], [Rows(whole, 70, 20)], list(range(20))))[0].clone()
        assert float((got - want).std() / want.std()) < 0.06
        for start, count in (70, 1), (71, 2), (73, 17):
            rows = Rows(draft.new_kv(3), 0, 3), Rows(cut, start, count)
            batch = Batch(ids[:3] + ids[start : start + count], rows, list(range(3, 3 + count)))
            assert torch.equal(draft.forward(batch)[0], got[start - 70 : start - 70 + count])
        model.forward(Batch(ids[70:], [Rows(whole, 70, 20)], []))
        [one], [other] = whole.pages, exact.pages
        assert torch.equal(one[:, :, :, :80], other[:, :, :, :80]), "the model writes over what the draft wrote"
        results[path] = got
    if dtype is torch.float32:  # the portable path's bfloat16 and float32 differ by themselves
        assert all(torch.equal(results[path], results[1]) for path in results if path in (2, 3))


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_close_to_transformers_and_to_torch_with_the_same_weights(
    checkpoint: Make, native: Any, shape: str
) -> None:
    """Relative to the spread of the logits. Random weights forgive least: nothing in them is redundant."""
    folder = checkpoint(shape)
    config = read_config(folder / "config.json")
    [ids] = prompts([min(150, config.n_positions)], config.vocab_size)
    got = run(NativeGPT2(weights.load(folder), native), ids, [len(ids)])
    want = reference(folder)(torch.tensor([ids])).logits[0]
    same_weights = run(GPT2(rounded(weights.load(folder)), CPU, torch.float32), ids, [len(ids)])
    assert float((got - want).std() / want.std()) < 0.06
    assert float((got - same_weights).std() / want.std()) < 0.04
    exact = run(NativeGPT2(weights.load(folder), native, torch.float32), ids, [len(ids)])
    assert float((exact - want).abs().max() / want.std()) < 1e-4
    half = run(NativeGPT2(weights.load(folder), native, torch.bfloat16), ids, [len(ids)])
    assert float((half - want).std() / want.std()) < 0.03


@pytest.mark.parametrize("shape", ["odd", "one-head", "deep"])
def test_keys_and_values_in_int8_are_nearly_those_in_float32(
    checkpoint: Make, paths: list[tuple[Any, int]], shape: str
) -> None:
    folder = checkpoint(shape)
    config = read_config(folder / "config.json")
    [ids] = prompts([min(300, config.n_positions)], config.vocab_size)
    for native, path in paths:
        exact, near = (
            run(NativeGPT2(weights.load(folder), native, torch.int8, path, dtype), ids, [len(ids)])
            for dtype in (torch.float32, torch.int8)
        )
        assert 0 < float((exact - near).std() / exact.std()) < 0.03


def test_the_sum_of_many_equal_values_is_not_too_large(checkpoint: Make, paths: list[tuple[Any, int]]) -> None:
    """Attention that is the same everywhere, over values of one size: what 32 bits hold has to do for all of them."""

    def level() -> weights.Checkpoint:
        loaded = weights.load(checkpoint("one-head", n_positions=2100))
        e = loaded.config.n_embd
        loaded.tensors["h.0.attn.c_attn.weight"] = torch.zeros(e, 3 * e)
        loaded.tensors["h.0.attn.c_attn.bias"] = torch.cat([torch.zeros(2 * e), torch.ones(e)])
        return loaded

    ids = [i % 290 for i in range(2100)]
    for native, path in paths:
        exact, near = (
            run(NativeGPT2(level(), native, torch.int8, path, dtype), ids, [2099, 1])
            for dtype in (torch.float32, torch.int8)
        )
        assert float((exact - near).std() / exact.std()) < 0.01


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_kept_in_the_16_bits_its_numbers_have_and_computes_the_same(
    checkpoint: Make, tmp_path: Path, paths: list[tuple[Any, int]], shape: str, stored: torch.dtype, monkeypatch: Any
) -> None:
    """In steps that read every weight once, that pass over it twice, and that make it to floats first. Also where they
    are saved in 32 bits."""
    short = checkpoint(shape, dtype=stored, head="own")
    shutil.copytree(short, tmp_path / "long")
    tensors = {name: tensor.float() for name, tensor in load_file(short / "model.safetensors").items()}
    save_file(tensors, tmp_path / "long/model.safetensors")
    for native, path in paths:
        models = [NativeGPT2(weights.load(at), native, torch.float32, path) for at in (short, tmp_path / "long")]
        with monkeypatch.context() as patch:
            patch.setattr(gpt2, "kept_in", lambda _: torch.float32)
            plain = NativeGPT2(weights.load(short), native, torch.float32, path)
        assert "kept" not in plain.how
        [ids] = prompts([70], plain.config.vocab_size)
        for model in models:
            assert model.how.startswith(f"cpu, float32 kept in {str(stored).removeprefix('torch.')}, native")
            for counts in ([1] * 3, [5, 16], [70]):
                some = ids[: sum(counts)]
                assert torch.equal(run(model, some, counts), run(plain, some, counts))


def test_float16_is_float32_of_rounded_weights(checkpoint: Make, tmp_path: Path, native: Any) -> None:
    shutil.copytree(checkpoint("odd", head="own"), tmp_path / "rounded")
    tensors = load_file(tmp_path / "rounded/model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and not name.endswith("wpe.weight"):
            tensors[name] = tensor.half().float()
    save_file(tensors, tmp_path / "rounded/model.safetensors")
    ids = prompts([20], 301)[0]
    model = NativeGPT2(weights.load(checkpoint("odd", head="own")), native, torch.float16)
    rounded = NativeGPT2(weights.load(tmp_path / "rounded"), native, torch.float32)
    assert model.how.startswith("cpu, float16, native") and rounded.stored is torch.float16
    assert torch.equal(run(model, ids, [9, 11]), run(rounded, ids, [20]))
    exact = NativeGPT2(weights.load(checkpoint("odd", head="own")), native, torch.float32)
    assert exact.stored is torch.float32 and not torch.equal(run(model, ids, [20]), run(exact, ids, [20]))


@pytest.mark.parametrize("name", ["wte", "h.1.mlp.c_fc", "lm_head"])
def test_float32_that_needs_its_32_bits_somewhere_has_them(
    checkpoint: Make, tmp_path: Path, native: Any, name: str
) -> None:
    shutil.copytree(checkpoint("inner", dtype=torch.float16, head="own"), tmp_path / "mixed")
    tensors = load_file(tmp_path / "mixed/model.safetensors")
    name = name if name == "lm_head" else f"transformer.{name}"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].float()
    tensors[f"{name}.weight"][-1, -1] = 1.0001
    save_file(tensors, tmp_path / "mixed/model.safetensors")
    [ids] = prompts([9], 333)
    model = NativeGPT2(weights.load(tmp_path / "mixed"), native, torch.float32)
    assert model.stored is torch.float32
    want = reference(tmp_path / "mixed")(torch.tensor([ids])).logits[0]
    assert float((run(model, ids, [9]) - want).abs().max() / want.std()) < 1e-5


def test_a_head_of_its_own(checkpoint: Make, native: Any) -> None:
    folder = checkpoint("plain", head="own")
    [ids] = prompts([30], 384)
    got, want = run(NativeGPT2(weights.load(folder), native), ids, [30]), reference(folder)(torch.tensor([ids]))
    assert float((got - want.logits[0]).std() / want.logits.std()) < 0.06


def test_quantised_weights_are_near_and_never_cut_off() -> None:
    weight = torch.randn(50, 70, generator=torch.Generator().manual_seed(0)) ** 3
    weight[3] = 0
    weight[4, 5] = 1e4
    near = dequantised(weight)
    assert near.shape == weight.shape and not near[3].any()
    step = weight.abs().max() / 127
    assert float((near - weight).abs().max()) < 0.51 * step
    assert float((near - weight)[5:].norm() / weight[5:].norm()) < 0.01


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (32, 64), (33, 95), (130, 40)])
def test_weights_are_packed_as_torch_would(native: Any, n: int, k: int, stored: torch.dtype) -> None:
    """Row after row, as an embedding stands, and column after column, as GPT-2's linear layers do."""
    weight = (torch.randn(n, k, generator=torch.Generator().manual_seed(n)) ** 5).to(stored)
    weight.view(-1)[::7] *= 1e-6  # below float16's normal numbers
    weight[n // 2] = 0
    weight[-1, -1] = -6e4
    groups, blocks = -(-n // 32), -(-k // 32)
    quants, scale = quantise(weight)
    bytes_ = (quants.short() + 128).to(torch.uint8).view(groups, 32, blocks, 8, 4).permute(0, 2, 3, 1, 4)
    columns = whole(weight).view(groups, 32, blocks, 32).permute(0, 2, 3, 1)
    pairs = whole(weight).bfloat16().view(groups, 32, blocks, 16, 2).permute(0, 2, 3, 1, 4)
    want = {torch.int8: bytes_, torch.bfloat16: pairs, torch.float32: columns}
    if stored is torch.float16:
        want[stored] = columns.half()
    for source in (weight, weight.T.contiguous().T):
        for dtype, packed in want.items():
            got = torch.empty(packed.shape, dtype=packed.dtype)
            scales = torch.empty(groups, blocks, 32, dtype=torch.bfloat16)
            native.palaver_pack(
                *(source.data_ptr(), SOURCES[stored], *source.stride(), n, k),
                *(got.data_ptr(), scales.data_ptr(), WEIGHTS[dtype], 2),
            )
            assert torch.equal(got, packed)
            if dtype is torch.int8:
                assert torch.equal(scales, scale.view(groups, 32, blocks).transpose(1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_spoils_its_own_row_only(
    checkpoint: Make, paths: list[tuple[Any, int]], dtype: torch.dtype
) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        for native, path in paths:
            loaded = weights.load(checkpoint("inner"))
            good = NativeGPT2(weights.load(checkpoint("inner")), native, dtype, path)
            positions = loaded.tensors.pop("wpe.weight").clone()
            positions[7, 3] = bad
            loaded.tensors["wpe.weight"] = positions
            model = NativeGPT2(loaded, native, dtype, path)
            kv, short = model.new_kv(64), model.new_kv(64)
            batch = Batch([5] * 12, [Rows(short, 0, 4), Rows(kv, 0, 8)], list(range(12)))
            logits, found = model.forward(batch)
            logits = logits.clone()
            assert [total == total for total in found.totals] == [True] * 11 + [False]
            clean, _ = good.forward(
                Batch([5] * 12, [Rows(good.new_kv(8), 0, 4), Rows(good.new_kv(8), 0, 8)], [*range(12)])
            )
            assert torch.equal(logits[:11], clean[:11])
            assert not logits[11].isfinite().any()
            again, _ = model.forward(Batch([5] * 2, [Rows(short, 4, 1), Rows(kv, 8, 1)], [0, 1]))
            assert again[0].isfinite().all() and not again[1].isfinite().any()  # its keys stay bad; nobody else's do


def test_weights_are_packed_once_and_the_originals_freed(checkpoint: Make, native: Any) -> None:
    loaded = weights.load(checkpoint("deep"))
    numbers = sum(tensor.numel() for tensor in loaded.tensors.values())
    model = NativeGPT2(loaded, native)
    assert not loaded.tensors
    assert sum(tensor.nbytes for tensor in model._alive) < 2.1 * numbers  # wpe stays float32: here a third of all
    assert all(tensor.dtype != torch.float32 or tensor.numel() <= 1024 * 32 for tensor in model._alive)
    exact = NativeGPT2(weights.load(checkpoint("deep")), native, torch.float32)
    assert sum(tensor.nbytes for tensor in exact._alive) < 4.4 * numbers  # once each; the rest is padding


def test_without_the_library_torch_computes(checkpoint: Make, native: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    [ids] = prompts([40], 384)
    monkeypatch.setattr(library, "open_library", lambda: native)
    fast = {dtype: choice.build(checkpoint("plain"), CPU, dtype) for dtype in DTYPES}
    monkeypatch.setattr(library, "open_library", lambda: None)
    monkeypatch.setattr(choice, "multiplies_int8", lambda: False)
    for dtype, far in zip(DTYPES, (0.04, 0.02, 1e-5), strict=True):
        name = str(dtype).removeprefix("torch.")
        assert f"{name}, native" in fast[dtype].how
        slow = choice.build(checkpoint("plain"), CPU, dtype)
        assert name in slow.how and "torch" in slow.how and "native" not in slow.how
        a, b = run(fast[dtype], ids, [40]), run(slow, ids, [40])
        assert float((a - b).std() / b.std()) < far
        assert torch.equal(run(slow, ids, [3, 1, 36], lambda: 5), b)


def test_a_processor_without_a_path_of_its_own_computes_floats_in_torch(
    checkpoint: Make, native: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "open_library", lambda: native)
    monkeypatch.setattr(library, "is_fast", lambda: False)
    ways = [choice.build(checkpoint("plain"), CPU, dtype).how for dtype in DTYPES]
    assert [("native" in how) for how in ways] == [True, False, False]


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_auto_is_the_fastest_by_rule(checkpoint: Make, monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": has_bfloat16})
    monkeypatch.setattr(choice, "multiplies_int8", multiplies_int8.__wrapped__)
    without = torch.bfloat16 if has_bfloat16 else torch.float32
    paths = {None: without, "portable": without, "AVX2": torch.int8, "AVX-VNNI": torch.int8}
    for path, dtype in paths.items():
        found = path and SimpleNamespace(palaver_best_path=lambda path=path: library.PATHS.index(path))
        monkeypatch.setattr(library, "open_library", lambda found=found: found)
        assert choice.choose_dtype("auto", CPU, EMBEDDED) is dtype
        assert choice.choose_dtype("auto", CPU, checkpoint("plain")) is torch.float32
    assert choice.choose_dtype("int8", CPU, EMBEDDED) is torch.int8
    monkeypatch.setattr(library, "open_library", lambda: None)
    monkeypatch.setattr(choice, "multiplies_int8", lambda: True)
    assert choice.choose_dtype("auto", CPU, EMBEDDED) is torch.int8


def test_auto_on_cuda_is_bfloat16_where_the_hardware_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    for has, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert choice.choose_dtype("auto", cuda, EMBEDDED) is dtype
    with pytest.raises(BadCheckpoint, match="int8 is for CPUs"):
        choice.choose_dtype("int8", cuda, EMBEDDED)


def test_what_cannot_be_loaded_is_told_and_left_out(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    open_fresh = library.open_library.__wrapped__
    assert open_fresh() is None
    (tmp_path / "step.x.so").write_bytes(b"\x7fELF and then nothing")
    with caplog.at_level(logging.WARNING):
        assert open_fresh() is None
    assert "step.x.so cannot be used" in caplog.text
    shutil.copy(built, tmp_path / "step.y.so")
    assert open_fresh() is not None
    monkeypatch.setattr(library, "LAYOUT", 0)
    assert open_fresh() is None
    assert "another version" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.setenv("NATIVE", "0")
    assert open_fresh() is None


def test_memory_is_ones_own_and_asks_for_large_pages() -> None:
    arena = Arena()
    sizes = [3, 1000, ARENA + 1, 5]
    tensors = [arena.empty((size,), torch.uint8).fill_(i) for i, size in enumerate(sizes)]
    assert all(bool((tensor == i).all()) for i, tensor in enumerate(tensors))  # none lies on another
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
    maps = re.findall(r"^(\w+)-(\w+) (\S+).*?^VmFlags: ([^\n]*)", Path("/proc/self/smaps").read_text(), re.M | re.S)
    for tensor in tensors[1:3]:
        [(access, flags)] = [
            (access, flags) for a, b, access, flags in maps if int(a, 16) <= tensor.data_ptr() < int(b, 16)
        ]
        assert access == "rw-p", "shared memory has no large pages, as a rule"
        assert "hg" in flags.split() or not Path("/sys/kernel/mm/transparent_hugepage").exists()
