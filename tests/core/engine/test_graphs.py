"""Steps from static buffers. Where there is no CUDA, a graph is played by the recorded operations, called again."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import random
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from core.engine import graphs, model_runner, weights
from core.engine.base import SamplingParams
from core.engine.graphs import FEWEST, MOST, SCRATCH, SHORT, ZEROS, Capture, GraphedGPT2, Places, Step, check
from core.engine.model import GPT2, TILE, Batch, Rows
from core.engine.torch_engine import TorchEngine
from tests.core.engine.oracle import greedy, prompts, reference
from tests.core.engine.test_model import run

pytestmark = pytest.mark.usefixtures("inference")
Make = Callable[..., Path]
FLOATS = [torch.float32, torch.bfloat16]
SHAPES = ["plain", "odd", "deep", "scaled", "unscaled"]
CASES = [
    ("cpu", shape, dtype, block) for shape in SHAPES for dtype in FLOATS for block in (0, 16)[: 1 + (shape == "odd")]
]
if torch.cuda.is_available():
    CASES += [("cuda", "plain", dtype, TILE) for dtype in (*FLOATS, torch.float16)]


class Recorded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A step's operations, replayed without a line of ours: what Python did in between does not happen again."""

    def __init__(self, step: Step) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        with self:
            step()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default), (
            "a graph cannot look at numbers, nor take them from Python"
        )
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        made: dict[int, Any] = {}

        def now(value: Any) -> Any:
            return made.get(id(value), value)

        for func, args, kwargs, out in self.calls:
            new = func(*tree_map(now, args), **tree_map(now, kwargs))
            made |= {id(a): b for a, b in zip(tree_leaves(out), tree_leaves(new), strict=True)}


def opened(folder: Path, dtype: torch.dtype = torch.float32, block: int = 0, tokens: int = 4096) -> GraphedGPT2:
    model = GraphedGPT2(GPT2(weights.load(folder), torch.device("cpu"), dtype, block=block), tokens)
    model._capture = lambda step: Recorded(step).replay
    return model


@pytest.mark.parametrize(("device", "shape", "dtype", "block"), CASES)
def test_rows_do_not_depend_on_each_other_nor_on_how_they_are_cut(
    checkpoint: Make, device: str, shape: str, dtype: torch.dtype, block: int
) -> None:
    eager = GPT2(weights.load(checkpoint(shape)), torch.device(device), dtype, block=block)
    model = GraphedGPT2(eager, 4096)
    if device == "cpu":
        model._capture = lambda step: Recorded(step).replay
    check(model, eager)
    [ids] = prompts([min(model.config.n_positions, 4 * TILE + 40)], model.config.vocab_size)
    whole = run(model, ids, [len(ids)])
    plain = run(eager, ids, [len(ids)])
    assert float((whole - plain).std() / plain.std()) < {torch.float32: 1e-5}.get(dtype, 0.02)
    rng = random.Random(shape)

    def mates() -> int:
        return rng.choice([0, 1, 3, SHORT, most])

    for most in (SHORT, 50):  # only short steps, and mixed ones
        counts: list[int] = []
        while (left := len(ids) - sum(counts)) > 0:
            counts.append(min(rng.choice([1, 1, 2, 3, SHORT, most]), left))
        assert torch.equal(run(model, ids, counts, mates), whole)
    assert not model.pool[:, :, ZEROS].any()


def test_greedy_is_transformers_over_the_tables_border(checkpoint: Make) -> None:
    model = opened(checkpoint("deep"))
    [ids] = prompts([4 * TILE - 3], 517)
    kv, start = model.new_kv(4 * TILE + 9), 0
    for _ in range(12):
        logits = model.forward(Batch(ids[start:], [Rows(kv, start, len(ids) - start)], [len(ids) - start - 1]))
        want = reference(checkpoint("deep"))(torch.tensor([ids])).logits[0, -1]
        assert int(logits.argmax()) == int(want.argmax())
        start = len(ids)
        ids.append(int(want.argmax()))
    assert sorted(model._graphs) == [(1, 4), (1, 8)]


def decode(model: GraphedGPT2, kvs: list[Any], starts: list[int], which: list[int]) -> Tensor:
    """One token for each."""
    rows = [Rows(kvs[k], starts[k], 1) for k in which]
    return model.forward(Batch([5 + k for k in which], rows, list(range(len(which)))))


def prefilled(model: GraphedGPT2, lengths: list[int]) -> list[Any]:
    kvs = [model.new_kv(n + 8) for n in lengths]
    for kv, ids in zip(kvs, prompts(lengths, model.config.vocab_size), strict=True):
        model.forward(Batch(ids, [Rows(kv, 0, len(ids))], []))
    return kvs


def test_hundreds_of_rows_are_what_each_is_alone(checkpoint: Make) -> None:
    model = opened(checkpoint("plain"), tokens=300 * TILE * 2)
    starts = [1 + 17 * k % 110 for k in range(MOST + 44)]
    kvs = prefilled(model, starts)
    order = random.Random(1).sample(range(len(kvs)), len(kvs))
    together = decode(model, kvs, starts, order)
    for i in range(0, len(order), 23):
        assert torch.equal(decode(model, kvs, starts, [order[i]])[0], together[i])
    wanted = model.forward(Batch([5, 6, 7], [Rows(kvs[k], starts[k], 1) for k in range(3)], [2, 0]))
    assert torch.equal(wanted, decode(model, kvs, starts, [2, 0]))
    assert {rows for rows, _ in model._graphs} <= {1 << i for i in range(9)}


@pytest.mark.parametrize("beside", [0, 40])
def test_the_wider_the_table_the_fewer_rows_at_once_and_the_device_is_waited_for_once(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch, beside: int
) -> None:
    """Sequences of 13 rows that are cut between two groups, in steps of few rows and beside a long prompt."""
    model, sizes, done = opened(checkpoint("deep"), tokens=8192), list[int](), list[str]()
    starts = [5] + 11 * [250] + 6 * [600]
    ids, places = prompts([13] * len(starts), 517), model._places

    def step(which: list[int], beside: int = 0) -> Tensor:
        rows = [Rows(model.new_kv(beside), 0, beside)] if beside else []
        rows += [Rows(model.new_kv(starts[k] + 13), starts[k], 13) for k in which]
        flat = [3] * beside + [i for k in which for i in ids[k]]
        return model.forward(Batch(flat, rows, list(range(beside, len(flat)))))

    def counted(table: Tensor) -> Places:
        sizes.append(len(table) * (table.shape[1] - 2))
        return places(table)

    def noted(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **more: [call(*args, **more), done.append(what)][0]  # type: ignore[func-returns-value]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", noted("to", torch.tensor))
        patch.setattr(model, "hidden", noted("run", model.hidden))
        patch.setattr(Tensor, "cpu", noted("from", Tensor.cpu))
        patch.setattr(model, "_places", counted)
        together = step(list(range(len(starts))), beside)
    assert [what for what, _ in itertools.groupby(done)] == ["to", "run", "from"]
    assert done.count("from") == 1
    assert max(sizes) == MOST * FEWEST
    for k in range(len(starts)):
        assert torch.equal(step([k]), together[13 * k : 13 * k + 13])


def test_padding_writes_to_nobodys_page_and_is_read_by_nobody(checkpoint: Make) -> None:
    model = opened(checkpoint("plain"))
    starts = [3, 70, 130]
    kvs = prefilled(model, starts)
    model.pool[:, :, SCRATCH] = 7.0
    before = model.pool.clone()
    clean = decode(model, kvs, starts, [0, 1, 2])  # three rows in a graph of four
    changed = (model.pool != before).flatten(2, 3).movedim(2, 0).flatten(1).any(1).nonzero().flatten().tolist()
    own = [kv.slots(start, 1)[0] for kv, start in zip(kvs, starts, strict=True)]
    assert changed == sorted([SCRATCH * TILE, *own])
    model.pool[:, :, [SCRATCH, *model._free]] = float("nan")
    assert torch.equal(decode(model, kvs, starts, [0, 1, 2]), clean)


@pytest.mark.parametrize("beside", [0, 40])
def test_what_is_not_finite_stays_where_it_is(checkpoint: Make, beside: int) -> None:
    """In steps of few rows, and beside a long prompt."""
    model = opened(checkpoint("plain"))
    starts, fresh = [3, 70, 130], prompts([beside], 384)[0]
    kvs = prefilled(model, starts)
    clean = decode(model, kvs, starts, [0, 1, 2])
    model.pool[:, :, kvs[1].numbers] = float("nan")
    rows = [Rows(model.new_kv(64), 0, beside)] if beside else []
    rows += [Rows(kvs[k], starts[k], 1) for k in range(3)]
    got = model.forward(Batch([*fresh, 5, 6, 7], rows, [beside, beside + 1, beside + 2]))
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert not got[1].isfinite().any()
    numbers = set(kvs[1].numbers)
    del kvs, rows
    again = [model.new_kv(TILE) for _ in range(len(model._free))]
    assert numbers < {n for kv in again for n in kv.numbers}
    assert model.pool[:, :, 2:].isfinite().all()


def test_a_fork_has_the_prefix_and_nothing_else(checkpoint: Make) -> None:
    model = opened(checkpoint("plain"))
    [ids] = prompts([100], 384)
    whole = run(model, ids, [100])
    for at in (1, 63, 64, 65, 90):
        source, fork = model.new_kv(100), model.new_kv(150)
        model.forward(Batch(ids, [Rows(source, 0, 100)], []))
        model.pool.flatten(2, 3)[:, :, source.slots(at, 100 - at)] = float("nan")
        model.copy_kv(source, fork, at)
        rest = model.forward(Batch(ids[at:], [Rows(fork, at, 100 - at)], list(range(100 - at))))
        assert torch.equal(rest, whole[at:])


def test_pages_are_given_back(checkpoint: Make) -> None:
    model = opened(checkpoint("plain"))
    everything = sorted(model._free)
    rng, held = random.Random(3), list[Any]()
    for _ in range(3000):
        while held and (rng.random() < 0.4 or len(model._free) < 4):
            held.pop(rng.randrange(len(held)))
        held.append(model.new_kv(rng.randrange(1, 256)))
        taken = [n for kv in held for n in kv.numbers]
        assert sorted(taken + model._free) == everything
    with pytest.raises(torch.OutOfMemoryError, match="pages wanted"):
        model.new_kv(100_000)
    held.clear()
    assert sorted(model._free) == everything
    assert not {ZEROS, SCRATCH} & set(everything)


async def test_the_smallest_pool_serves_many_and_is_whole_again(
    engine: Callable[..., Coroutine[Any, Any, TorchEngine]], checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for one or two sequences; channels that grow, slide, fork into candidates and push each other out."""
    monkeypatch.setattr(model_runner, "build", lambda folder, *_: opened(folder, tokens=256))
    e = await engine("odd", max_running=4, token_budget=60)
    model: Any = e.core.runner.model

    async def talk(channel: int) -> None:
        history: list[int] = []
        for turn in range(4):
            history += prompts([5 + 9 * channel], 256, seed=channel * 10 + turn)[0]
            history = history[-100:] if len(history) > 120 else history
            params = SamplingParams(temperature=0, max_tokens=9, n=1 + turn % 2)
            for got in await e.generate(history, params, session=str(channel)):
                assert got.token_ids == greedy(checkpoint("odd"), history, 9)
            history += [*got.token_ids, 256]

    await asyncio.gather(*map(talk, range(7)))
    for channel in range(7):
        await e.forget(str(channel))
    gc.collect()
    assert sorted(model._free) == list(range(2, model.pool.shape[2]))


def spoilt(model: GraphedGPT2, spoil: Callable[[int], object]) -> None:
    step = model._step

    def wrong(count: int, pages: int) -> None:
        step(count, pages)
        spoil(count)

    model._step = wrong  # type: ignore[method-assign]


def raising(error: Exception) -> Any:
    def fail(*_: Any) -> None:
        raise error

    return fail


def cuda_error(code: int, message: str) -> torch.AcceleratorError:
    error: Any = torch.AcceleratorError(message)
    error.error_code = code
    return error  # type: ignore[no-any-return]


FAULTS: dict[str, Callable[[GraphedGPT2], Any]] = {
    "not finite": lambda m: spoilt(m, lambda _: m._logits[:1].fill_(float("inf"))),
    "without graphs": lambda m: spoilt(m, lambda count: m._logits[:count].copy_(m._logits[:count].flip(1))),
    "depend on the batch": lambda m: spoilt(m, lambda count: m._logits[:count].mul_(1 + count / 2**20)),
    "out of graphs": lambda m: spoilt(m, raising(TypeError("out of graphs"))),
    "capture refused": lambda m: spoilt(m, raising(cuda_error(901, "capture refused"))),
}


@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_graphs_are_taken_where_they_compute_the_same_and_else_left_out(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    eager = GPT2(weights.load(checkpoint("plain")), torch.device("cpu"), torch.float32, block=16)
    whole = GraphedGPT2.__init__

    def made(self: GraphedGPT2, *args: Any) -> None:
        whole(self, *args)
        if fault:
            FAULTS[fault](self)

    monkeypatch.setattr(GraphedGPT2, "__init__", made)
    model = model_runner.graphed(eager, 1024)
    if fault:
        assert model is eager and "CUDA graphs" not in model.how
        assert len(caplog.records) == 1 and "CUDA graphs are left out" in caplog.text and fault in caplog.text
    else:
        assert isinstance(model, GraphedGPT2) and model.how == "cpu, float32, CUDA graphs" and not caplog.records
        assert model_runner.cache_tokens(model, 1) == 1024


@pytest.mark.parametrize("agree", [False, True])
def test_where_a_gpu_has_neither_graphs_nor_rows_that_agree_the_log_says_so(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, agree: bool
) -> None:
    eager = GPT2(weights.load(checkpoint("plain")), torch.device("cpu"), torch.float32)
    monkeypatch.setattr(model_runner, "agreeing", lambda *_: eager)
    monkeypatch.setattr(model_runner, "rows_agree", lambda _: agree)
    monkeypatch.setenv("GRAPHS", "0")
    assert model_runner.build(checkpoint("plain"), torch.device("cuda"), torch.float32) is eager
    assert ("rows depend on the batch" in caplog.text) is not agree


def test_a_lost_device_is_not_kept(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(GraphedGPT2, "_step", raising(cuda_error(700, "illegal address")))
    eager = GPT2(weights.load(checkpoint("plain")), torch.device("cpu"), torch.float32)
    with pytest.raises(torch.AcceleratorError):
        model_runner.graphed(eager, 1024)
    assert "GRAPHS=0" in caplog.text


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory for a graph"), cuda_error(901, "no graph"), cuda_error(2, "full")]
)
def test_what_cannot_be_captured_is_launched(
    checkpoint: Make, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    model, plain = opened(checkpoint("plain")), opened(checkpoint("plain"))
    model._capture = raising(error)
    [ids] = prompts([40], 384)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(run(model, ids, [16, 1, 7, 16]), run(plain, ids, [16, 1, 7, 16]))
    assert len(caplog.records) == 1 and str(error) in caplog.text


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
        device=lambda _: nullcontext(), graph_pool_handle=lambda: None, Stream=make_stream, stream=on, graph=capturing,
        CUDAGraph=SimpleNamespace, current_stream=lambda: now[0],
    )  # fmt: skip
    monkeypatch.setattr(graphs, "torch", SimpleNamespace(cuda=cuda))
    with pytest.raises(torch.AcceleratorError):
        Capture(torch.device("cuda"))(lambda: None)
    assert now == [todays]
