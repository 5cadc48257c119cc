"""The kernels of a GPU, which Triton interprets where there is none, and the steps that are made of them."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib
import logging
import math
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from core.engine import choice, graphs, model, weights
from core.engine.base import SamplingParams
from core.engine.graphs import SCRATCH, Capture, GraphedGPT2
from core.engine.model import GPT2, TILE, Batch, Linear, Rows
from core.engine.sampler import Draw, Summary, draw, summarise
from core.engine.torch_engine import TorchEngine
from tests.checkpoints import SHAPES
from tests.core.engine.compiled import NAMES
from tests.core.engine.oracle import greedy, prompts, reference
from tests.core.engine.test_model import run

pytestmark = pytest.mark.usefixtures("inference", "unpacked", "in_one_order")
Make = Callable[..., Path]
ROOT = Path(__file__).parents[3]
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAR = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 0.03}
"""From Transformers' logits, relative to their spread. (Triton interprets no products of bfloat16.)"""
DTYPES = [torch.float32, torch.float16, torch.bfloat16][: 2 + (HERE.type == "cuda")]


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels read weights as they are, oneDNN has a layout of its own."""
    monkeypatch.setattr(model, "pack", lambda _: None)


@pytest.fixture
def in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton interprets, a product is numpy's, whose sums depend on the shape of the tile: here they do not. (And
    what a kernel calls does not prepare the language once more, which took a fifth of the time.)"""
    if HERE.type == "cpu":
        interpreter = importlib.import_module("triton.runtime.interpreter")
        languages, prepare = (interpreter.tl, interpreter.tl.core), interpreter._patch_lang
        unprepared = interpreter.tl.load

        def prepare_once(kernel: Any) -> Any:
            seen = [value for value in kernel.__globals__.values() if value in languages]
            return prepare(kernel) if any(language.load is unprepared for language in seen) else None

        monkeypatch.setattr(interpreter, "_patch_lang", prepare_once)

        def dot(_: Any, a: Any, b: Any, total: Any, *__: Any) -> Any:
            one, two = (x.data.astype(total.data.dtype) for x in (a, b))
            data = total.data + (one[..., :, :, None] * two[..., None, :, :]).sum(-2)
            return interpreter.TensorHandle(data, total.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def opened(folder: Path, dtype: torch.dtype = torch.float32, tokens: int = 1024, plain: bool = False) -> GraphedGPT2:
    return GraphedGPT2(GPT2(weights.load(folder), HERE, dtype, block=TILE), tokens, plain=plain)


def history(graphed: GraphedGPT2, lengths: list[int], seed: int = 0) -> list[Any]:
    """For each length keys and values, as some prompt might have left them, and room for 8 more."""
    rng, c = torch.Generator().manual_seed(seed), graphed.config
    kvs = [graphed.new_kv(n + 8) for n in lengths]
    for kv, n in zip(kvs, lengths, strict=True):
        numbers = torch.randn(c.n_layer, 2, n, c.n_embd, generator=rng)
        graphed.pool[:, :, kv.slots(0, n)] = numbers.to(graphed.pool)
    return kvs


@pytest.mark.parametrize(
    ("shape", "dtype", "plain"),
    [
        *((shape, torch.float32, False) for shape in SHAPES if shape != "odd"),
        *(("odd", dtype, plain) for dtype in DTYPES for plain in (False, True)),
    ],
)
def test_logits_are_those_of_transformers(checkpoint: Make, shape: str, dtype: torch.dtype, plain: bool) -> None:
    """In steps of few rows; of the odd shape the first has so many that the tiles are larger."""
    graphed, cut = opened(checkpoint(shape), dtype, plain=plain), 17 if shape == "odd" else 4
    ids = prompts([cut + 2], graphed.config.vocab_size)[0]
    kv = graphed.new_kv(len(ids))
    got = [graphed.forward(Batch(ids[:cut], [Rows(kv, 0, cut)], [3, cut - 1]))[0].clone()]
    got.append(graphed.forward(Batch(ids[cut:], [Rows(kv, cut, 2)], [0, 1]))[0].clone())
    want = reference(checkpoint(shape))(torch.tensor([ids])).logits[0, [3, cut - 1, cut, cut + 1]]
    assert float(((torch.cat(got) - want).std(1) / want.std(1)).max()) < FAR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_each_other_nor_on_how_they_are_cut(checkpoint: Make, dtype: torch.dtype) -> None:
    """Over a page's border, and behind more keys than attention takes at a time."""
    graphed = opened(checkpoint("deep", n_layer=2, n_head=2), dtype, tokens=2048)
    for start in (56, 190):
        ids, mates = prompts([8, 20], graphed.config.vocab_size)
        found = []
        for counts in ([8], [1, 1, 2, 4], [3, 5]):
            [kv, other], done, rows = history(graphed, [start, 30]), 0, list[Tensor]()
            for turn, count in enumerate(counts):
                beside = [1, 0, 20, 7][turn]
                batch = [Rows(kv, start + done, count), *([Rows(other, 30 - beside, beside)] if beside else [])]
                flat = ids[done : done + count] + mates[:beside]
                rows.append(graphed.forward(Batch(flat, batch, list(range(count))))[0].clone())
                done += count
            found.append(torch.cat(rows))
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_weights_that_come_all_at_once_make_the_same_numbers(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do where a kernel may start early; here none does."""
    monkeypatch.setattr(GraphedGPT2, "_launched", {"PDL": False})
    loop, at_once = (opened(checkpoint("relu", n_layer=1, n_embd=160), torch.float16) for _ in range(2))
    loop.early, at_once.early = False, True
    turns: Any = []
    linear = at_once.kernels.linear

    class Watched:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: (turns.append(options["C"]), linear[grid](*args, **options))

    at_once.kernels = SimpleNamespace(**vars(at_once.kernels) | {"linear": Watched()})  # type: ignore[assignment]
    [ids] = prompts([10], 300)
    assert torch.equal(run(at_once, ids, [9, 1]), run(loop, ids, [9, 1]))
    assert set(turns) == {0, 1, 2}


def test_a_step_of_more_rows_than_a_graph_has_is_cut(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sequences that stand on both sides of a cut, and of more than there was room for so far."""
    whole = opened(checkpoint("one-head"))
    monkeypatch.setattr(graphs, "MOST_ROWS", 4)
    cut = opened(checkpoint("one-head"))
    ids = prompts([10], 290)[0]
    wanted = [0, 3, 4, 7, 8, 9]
    (got, found), (want, found_whole) = (
        m.forward(Batch(ids, [Rows(m.new_kv(6), 0, 6), Rows(m.new_kv(4), 0, 4)], wanted)) for m in (cut, whole)
    )
    assert torch.equal(got, want) and found.totals == found_whole.totals
    assert max(rows for rows, _ in cut._graphs) == 4


def test_what_is_found_is_what_a_draw_needs(checkpoint: Make) -> None:
    """The totals and maxima are the logits' own, and with them the same is drawn."""
    graphed = opened(checkpoint("odd"))
    ids = prompts([4], 301)[0]
    logits, found = graphed.forward(Batch(ids, [Rows(graphed.new_kv(4), 0, 4)], list(range(4))))
    alone = summarise(logits)
    assert found.totals == pytest.approx(alone.totals, abs=1e-4)
    params = SamplingParams(temperature=1.0, top_k=3, top_p=0.9)
    for i, (row, tops) in enumerate(zip(logits.numpy(), found.tops, strict=True)):
        most = [float(row[j : j + 32].max()) for j in range(0, len(row), 32)]
        assert list((ctypes.c_float * len(most)).from_address(tops)) == most
        for seed in range(20):
            draws = [Draw(i, ids, params, seed, False, t) for t in (tops, 0)]
            assert len(set(draw(logits, draws, 256))) == 1


def decode(graphed: GraphedGPT2, kvs: list[Any], starts: list[int]) -> Tensor:
    """One token for each."""
    return found(graphed, kvs, starts)[0]


def found(graphed: GraphedGPT2, kvs: list[Any], starts: list[int]) -> tuple[Tensor, list[float]]:
    """Logits and totals of one token for each."""
    rows = [Rows(kv, start, 1) for kv, start in zip(kvs, starts, strict=True)]
    logits, summary = graphed.forward(Batch([5 + k for k in range(len(rows))], rows, list(range(len(rows)))))
    return logits.clone(), summary.totals


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, of numbers that are not finite
def test_padding_writes_to_nobodys_page_and_nobody_elses_numbers_are_read(checkpoint: Make) -> None:
    graphed, starts = opened(checkpoint("one-head")), [3, 70, 17]
    kvs = history(graphed, starts)
    before = graphed.pool.clone()
    clean = decode(graphed, kvs, starts)  # three rows in a graph of four
    changed = (graphed.pool != before).movedim(2, 0).flatten(1).any(1).nonzero().flatten().tolist()
    own = [int(kv.slots(start, 1)[0]) for kv, start in zip(kvs, starts, strict=True)]
    assert sorted(set(changed) - {SCRATCH * TILE}) == sorted(own)
    mine = [slot for kv, n in zip(kvs, starts, strict=True) for slot in kv.slots(0, n + 1).tolist()]
    graphed.pool[:, :, [slot for slot in range(graphed.pool.shape[2]) if slot not in mine]] = float("nan")
    assert torch.equal(decode(graphed, kvs, starts), clean)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_stays_where_it_is(checkpoint: Make) -> None:
    graphed, starts = opened(checkpoint("one-head")), [3, 70, 17]
    kvs = history(graphed, starts)
    clean = decode(graphed, kvs, starts)
    graphed.pool[:, :, kvs[1].slots(0, 1)] = float("nan")
    got, totals = found(graphed, kvs, starts)
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert not got[1].isfinite().any()
    assert [math.isnan(total) for total in totals] == [False, True, False]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_logit_without_an_end_has_no_total(checkpoint: Make, sign: int) -> None:
    graphed = opened(checkpoint("one-head"))
    weight: Any = graphed.eager.lm_head.weight
    weight[7] = 0.0
    weight[7, 0] = sign * float("inf")
    logits, totals = found(graphed, [graphed.new_kv(1)], [0])
    assert logits.isinf().sum() == 1
    assert math.isnan(totals[0])


def test_the_kernels_compile_for_gpus_that_are_not_here(checkpoint: Make, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = sys.executable, "-m", "tests.core.engine.compiled", str(checkpoint("plain"))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = Counter(tuple(line.split()[:2]) for line in done.stdout.splitlines())
    assert set(made) == {(kernel, gpu) for kernel in NAMES for gpu in ("75", "80", "90")}
    assert made["linear", "90"] >= 8 and made["norm", "90"] == 3
    assert all(int(line.split()[2]) <= 64 << 10 for line in done.stdout.splitlines()), "Turing has no more"
    assert all(int(line.split()[3]) <= 128 for line in done.stdout.splitlines()), "registers are too few"


@pytest.mark.parametrize("at", [1, 63, 64, 65])
def test_a_fork_has_the_prefix_and_nothing_else(checkpoint: Make, at: int) -> None:
    graphed = opened(checkpoint("one-head"))
    [source] = history(graphed, [80])
    want = decode(graphed, [source], [at])
    fork = graphed.new_kv(100)
    graphed.pool[:, :, source.slots(at, 88 - at)] = 1e4
    graphed.copy_kv(source, fork, at)
    graphed.pool[:, :, source.slots(0, 88)] = 1e4
    assert torch.equal(decode(graphed, [fork], [at]), want)


def test_room_that_reaches_over_the_last_position_does_no_harm(checkpoint: Make) -> None:
    """As a prompt has it that is prepared for."""
    graphed = opened(checkpoint("one-head"))
    few, much = graphed.new_kv(3), graphed.new_kv(130 + 256)
    assert torch.equal(decode(graphed, [much], [0]), decode(graphed, [few], [0]))
    for kv in (few, much):
        last = graphed.forward(Batch([5, 6], [Rows(kv, 0, 2)], [1]))[0].clone()
        assert torch.equal(last, graphed.forward(Batch([5, 6], [Rows(few, 0, 2)], [1]))[0])


def test_pages_are_given_back(checkpoint: Make) -> None:
    graphed = opened(checkpoint("plain"), tokens=4096)
    everything = sorted(graphed._free)
    rng, held = random.Random(3), list[Any]()
    for _ in range(3000):
        while held and (rng.random() < 0.4 or len(graphed._free) < 4):
            held.pop(rng.randrange(len(held)))
        held.append(graphed.new_kv(rng.randrange(1, 256)))
        taken = [n for kv in held for n in kv.numbers.tolist()]
        assert sorted(taken + graphed._free) == everything
    with pytest.raises(torch.OutOfMemoryError, match="no page of keys and values is free"):
        graphed.new_kv(100_000)
    held.clear()
    assert sorted(graphed._free) == everything
    assert SCRATCH not in everything


async def test_the_smallest_pool_serves_many_and_is_whole_again(
    engine: Callable[..., Coroutine[Any, Any, TorchEngine]], checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for one or two sequences; channels that grow, fork into candidates and push each other out."""
    monkeypatch.setattr(choice, "build", lambda folder, *_: opened(folder, tokens=128))
    e = await engine("one-head", max_running=4, token_budget=60)
    graphed: Any = e.core.runner.model

    async def talk(channel: int) -> None:
        history: list[int] = []
        for turn in range(2):
            history += prompts([3 + 20 * (channel == 1)], 256, seed=channel * 10 + turn)[0]
            params = SamplingParams(temperature=0, max_tokens=3, n=1 + turn % 2)
            for got in await e.generate(history, params, session=str(channel)):
                assert got.token_ids == greedy(checkpoint("one-head"), history, 3)
            history += [*got.token_ids, 256]

    await asyncio.gather(*map(talk, range(3)))
    for channel in range(3):
        await e.forget(str(channel))
    gc.collect()
    assert sorted(graphed._free) == list(range(1, graphed.pool.shape[2] // TILE))


def raising(error: Exception) -> Any:
    def fail(*_: Any) -> None:
        raise error

    return fail


def cuda_error(code: int, message: str) -> torch.AcceleratorError:
    error: Any = torch.AcceleratorError(message)
    error.error_code = code
    return error  # type: ignore[no-any-return]


def shifted(logits: Tensor, rows: int) -> Tensor:
    return logits * (1 + rows / 2**20)


FAULTS: dict[str, Callable[[Tensor, int], Any]] = {
    "not finite": lambda logits, _: logits.clone().fill_(float("inf")),
    "without graphs": lambda logits, _: logits.flip(1),
    "depend on how a prompt": shifted,
    "rows depend on how": lambda logits, _: shifted(logits, len(logits) > 16),
    "rows depend on": lambda logits, _: logits,
    "no compiler": lambda logits, _: raising(RuntimeError("no compiler"))(),
    "capture refused": lambda logits, _: raising(cuda_error(901, "capture refused"))(),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("always", [False, True])
def test_graphs_are_left_out_where_they_do_not_compute_the_same(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str, always: bool
) -> None:
    """First plainer ones are tried, then none. (What graphs compute is the eager model's here, and then spoilt.)"""
    eager = GPT2(weights.load(checkpoint("plain")), HERE, torch.float32, block=TILE)

    def forward(self: GraphedGPT2, batch: Batch) -> tuple[Tensor, Summary]:
        logits, found = eager.forward(batch)
        if not always and self.plain:
            return logits, found
        logits = FAULTS[fault](logits, len(batch.ids))
        totals = [total + len(logits) for total in found.totals] if fault == "rows depend on" else found.totals
        return logits, Summary(totals, found.tops)

    monkeypatch.setattr(GraphedGPT2, "new_kv", lambda _, capacity: eager.new_kv(capacity))
    monkeypatch.setattr(GraphedGPT2, "forward", forward)
    found: Any = choice.graphed(eager, 1024)
    said = [record.getMessage() for record in caplog.records]
    assert "plainer" in said[0] and fault in said[0]
    if always:
        assert found is eager and "CUDA graphs" not in found.how
        assert len(said) == 2 and "CUDA graphs are left out" in said[1] and fault in said[1]
    else:
        assert isinstance(found, GraphedGPT2) and found.plain and "CUDA graphs" in found.how
        assert len(said) == 1


@pytest.mark.parametrize(("positions", "common"), [(18, 0.0), (18, -3000.0), (2, 0.0)])
def test_graphs_are_taken_where_they_compute_the_same(
    checkpoint: Make, caplog: pytest.LogCaptureFixture, positions: int, common: float
) -> None:
    """Also where all logits have so much in common that the eager model's are rounded coarsely."""
    loaded = weights.load(checkpoint("one-head", n_positions=positions))
    head = loaded.tensors["wte.weight"].clone()
    loaded.tensors["ln_f.weight"][0], loaded.tensors["ln_f.bias"][0] = 0.0, 1.0
    head[:, 0] = common
    loaded.tensors["lm_head.weight"] = head
    eager = GPT2(loaded, HERE, torch.float16, block=TILE)
    eager.common, eager.lm_head = None, Linear(head.to(HERE, torch.float16), None, block=TILE)  # as on CUDA
    found: Any = choice.graphed(eager, 1024)
    assert isinstance(found, GraphedGPT2) and not found.plain and not caplog.records
    assert choice.cache_tokens(found, 1) == 1024


@pytest.mark.parametrize("agree", [False, True])
def test_where_a_gpu_has_neither_graphs_nor_rows_that_agree_the_log_says_so(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, agree: bool
) -> None:
    """Its logits are not rounded, as those of graphs are not."""
    eager = GPT2(weights.load(checkpoint("plain")), torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(choice, "GPT2", lambda *_, **__: eager)
    monkeypatch.setattr(choice, "rows_agree", lambda _: agree)
    monkeypatch.setenv("GRAPHS", "0")
    found: Any = choice.build(checkpoint("plain"), torch.device("cuda"), torch.bfloat16)
    assert isinstance(found, GPT2) and found.h is eager.h
    found.common = None  # as on CUDA
    [logits], _ = found.forward(Batch([5], [Rows(found.new_kv(1), 0, 1)], [0]))
    assert not torch.equal(logits, logits.bfloat16().float())
    assert ("rows depend on the batch" in caplog.text) is not agree


def test_a_lost_device_is_not_kept(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(GraphedGPT2, "_step", raising(cuda_error(700, "illegal address")))
    eager = GPT2(weights.load(checkpoint("plain")), HERE, torch.float32, block=TILE)
    with pytest.raises(torch.AcceleratorError):
        choice.graphed(eager, 1024)
    assert "GRAPHS=0" in caplog.text


@pytest.mark.parametrize("again", [None, 700])
def test_what_triton_raises_is_a_lost_device_where_torch_says_so_too(
    monkeypatch: pytest.MonkeyPatch, again: int | None
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", raising(cuda_error(again, "again")) if again else lambda: None)
    assert graphs.lost(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")) is bool(again)
    assert not graphs.lost(RuntimeError("another"))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory for a graph"), cuda_error(901, "no graph"), cuda_error(2, "full")]
)
def test_what_cannot_be_captured_is_launched(
    checkpoint: Make, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    graphed, other = opened(checkpoint("one-head")), opened(checkpoint("one-head"))
    captured: list[Any] = []

    def capture(step: Any) -> Any:
        if not graphed._graphs:
            raise error
        captured.append(step)
        return step

    graphed._capture = capture
    [ids] = prompts([9], 290)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(run(graphed, ids, [4, 1, 4]), run(other, ids, [4, 1, 4]))
    assert len(caplog.records) == 1 and str(error) in caplog.text
    assert len(captured) == len(graphed._graphs) - 1 == 1, "the next shape is captured"


@pytest.mark.parametrize("most", [1, 17, 256])
def test_no_step_takes_a_graph_that_was_not_made_at_start(most: int) -> None:
    made = graphs.shapes(most)
    for rows in range(1, most + 1):
        for wanted in range(rows + 1):
            assert graphs.shape(rows, wanted) in made
            assert rows <= graphs.shape(rows, wanted)[0] < 2 * rows
            assert wanted <= graphs.shape(rows, wanted)[1] <= max(1, graphs.shape(rows, wanted)[0])


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for torch.cuda, whose graph stays on its stream when its end raises, as torch's does."""

    def make_stream() -> Any:
        return SimpleNamespace(wait_stream=lambda _: None)

    @contextmanager
    def on(stream: Any) -> Iterator[None]:
        before, now[0] = now[0], stream
        try:
            yield
        finally:
            now[0] = before

    @contextmanager
    def capturing(*_: Any, stream: Any, **__: Any) -> Iterator[None]:
        now[0] = stream
        yield
        raise cuda_error(901, "the capture was invalidated")

    now = [todays := make_stream()]
    cuda = SimpleNamespace(
        device=lambda _: nullcontext(), Stream=make_stream, stream=on, graph=capturing, CUDAGraph=SimpleNamespace,
        current_stream=lambda: now[0],
    )  # fmt: skip
    monkeypatch.setattr(graphs, "torch", SimpleNamespace(cuda=cuda))
    with pytest.raises(torch.AcceleratorError):
        Capture(torch.device("cuda"))(lambda: None)
    assert now == [todays]
