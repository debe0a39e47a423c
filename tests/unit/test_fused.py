"""Clients trained together against the reference, one by one: updates, losses, observers; and what keeps them apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers import PACKED, PADDED, train_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedbench.api.local import AdamW, LocalResult, LocalTask
from fedbench.check.suite import tensors_close
from fedbench.data.examples import Examples
from fedbench.data.pixels import ImageProcessor
from fedbench.errors import FedbenchError
from fedbench.forward.layout import Layout
from fedbench.machine.device import Execution
from fedbench.methods.fedavg_lora import cross_entropy, weighted_mean
from fedbench.models.build import build
from fedbench.models.cache import Frozen
from fedbench.models.parts import Parts
from fedbench.models.spec import LoraSpec, ModelSpec
from fedbench.models.weights import get_tensors, tunable_names
from fedbench.training import fused
from fedbench.training.alone import execute
from fedbench.training.fused import adamw, clients_per_pass, execute_cohort

CPU = torch.device("cpu")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "num_labels": 3}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**SMALL, "vocab_size": 100, "max_position_embeddings": 40},
    "roberta": {**SMALL, "vocab_size": 100, "max_position_embeddings": 40, "pad_token_id": 1},
    "vit": {**SMALL, "image_size": 8, "patch_size": 4, "num_channels": 1},
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@cache
def model(family: str = "bert", dtype: torch.dtype = torch.float64, r: int = 2, dropout: float = 0.0) -> nn.Module:
    """A random classifier with LoRA; B is not zero, so that every tunable has a gradient from the first step on."""
    config = CONFIGS[family] | NO_DROPOUT
    built = build(ModelSpec(family, config, (24, 24), LoraSpec(r, 2.0 * r, dropout))).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in built.named_parameters():
            p.normal_(std=0.3, generator=generator)
            if "norm" in name.lower() and name.endswith("weight"):
                p.add_(1.0)
    return built


@cache
def rows(family: str, dtype: torch.dtype) -> Examples:
    if family != "vit":
        return replace(train_rows(40), pad_token=1 if family == "roberta" else 0)
    rng = np.random.default_rng(1)
    return Examples(torch.tensor(rng.integers(0, 3, 40)), pixels=torch.tensor(rng.normal(size=(40, 1, 8, 8))).to(dtype))


@cache
def start(family: str, dtype: torch.dtype, r: int) -> dict[str, Tensor]:
    """First values of the tunables: those in the model are whatever the last training left there."""
    built = model(family, dtype, r)
    return get_tensors(built, tunable_names(built))


def cohort(
    sizes: Sequence[Sequence[int]], family: str = "bert", dtype: torch.dtype = torch.float64, r: int = 2, **changes: Any
) -> list[LocalTask]:
    """A task for each client, whose batches have the given sizes."""
    built = model(family, dtype, r)
    data, rng = rows(family, dtype), np.random.default_rng(len(sizes))
    defaults: dict[str, Any] = {
        "frozen": Frozen(f"{family}{r}", built),
        "tunables": start(family, dtype, r),
        "data": data,
        "optimiser": AdamW(lr=1e-2),
        "loss": cross_entropy,
        "clip_norm": 1.0,
    }
    given = defaults | changes
    return [LocalTask(batches=[rng.choice(len(data), size, replace=False) for size in own], **given) for own in sizes]


def paired(data: Examples) -> Examples:
    """The same rows as pairs: the later half of each is its second segment."""
    return replace(data, segments=[np.repeat([0, 1], [len(r) // 2, len(r) - len(r) // 2]) for r in data.tokens or ()])


def coloured(data: Examples) -> Examples:
    """As many images in uint8, which become pixel values batch by batch."""
    stored = torch.tensor(np.random.default_rng(2).integers(0, 256, (len(data), 3, 8, 8)), dtype=torch.uint8)
    return replace(data, pixels=stored, processor=ImageProcessor(8, (0.5,), (0.5,), 1))


def update(task: LocalTask, result: LocalResult) -> dict[str, Tensor]:
    return {name: value - task.tunables[name] for name, value in result.tunables.items()}


def assert_equal(
    tasks: Sequence[LocalTask], found: Sequence[LocalResult], tolerance: float, execution: Execution = PACKED
) -> None:
    """Results are, task by task, those of the reference."""
    assert len(found) == len(tasks)
    for task, result in zip(tasks, found, strict=True):
        reference = execute(task, execution)
        assert list(result.tunables) == list(reference.tunables)
        assert tensors_close(update(task, reference), update(task, result), tolerance)
        assert result.steps == reference.steps
        assert result.loss == pytest.approx(reference.loss, rel=1e-5)
        assert result.observed_tokens == reference.observed_tokens
        assert result.observed.keys() == reference.observed.keys()
        assert all(torch.equal(result.observed[path], reference.observed[path]) for path in reference.observed)


@contextmanager
def no_client_alone() -> Iterator[None]:
    """Fails where a task is handed to the reference."""

    def refuse(*_: Any) -> LocalResult:
        raise AssertionError("a task was trained alone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "execute", refuse)
        yield


def pull(now: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([(value - received[name]).square().sum() for name, value in now.items()]).sum()


def varied(tasks: Sequence[LocalTask], options: set[str]) -> list[LocalTask]:
    """Tasks with options of the interface, and other values of them for each client."""
    generator = torch.Generator().manual_seed(0)

    def like(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        return {n: scale * torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in tensors.items()}

    out = []
    for i, task in enumerate(tasks):
        adapters = {n: t for n, t in task.tunables.items() if ".lora_A." in n}
        changes: dict[str, Any] = {}
        if "start" in options:
            moved = like(task.tunables, 0.1)
            changes["tunables"] = {n: t + moved[n] for n, t in task.tunables.items()}
        if "penalty" in options:
            changes["penalty"] = lambda now, received, weight=0.1 * (i + 1): weight * pull(now, received)
        if "offset" in options and i != 1:
            changes["gradient_offset"] = like(adapters, 0.1)
        if "rank" in options and i != 0:
            keep = torch.ones(len(next(iter(adapters.values()))), 1)
            keep[-1] = i % 2
            changes["rank_mask"] = dict.fromkeys(adapters, keep)
        if "optimiser" in options:
            changes["optimiser"] = AdamW(lr=1e-2 / (i + 1), weight_decay=0.1 * i)
        if "loss" in options:
            changes["loss"] = lambda x, y, scale=1.0 + i: cross_entropy(scale * x, y)
        if "no clip" in options:
            changes["clip_norm"] = None
        if "observers" in options:
            parts = Parts(task.frozen.module)
            paths = [parts.ffn_activation_path(layer) for layer in range(parts.count)]
            # A threshold away from 0, which an activation may equal but for rounding.
            changes["observers"] = {p: (lambda a, bound=0.05 * (i + 1): (a <= bound).sum(0)) for p in paths}
        out.append(replace(task, **changes))
    return out


OPTIONS = ("start", "penalty", "offset", "rank", "optimiser", "loss", "no clip", "observers")
COHORTS = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=2, max_size=5)
UNEQUAL = [[4, 4, 1], [4], [4, 4, 4, 2], [3, 3]]


@given(
    sizes=COHORTS,
    family=st.sampled_from(["bert", "roberta", "vit"]),
    r=st.integers(1, 3),
    packed=st.booleans(),
    segments=st.booleans(),
    chunk=st.sampled_from([None, 2, 3]),
    options=st.sets(st.sampled_from(OPTIONS)),
)
@settings(deadline=None, max_examples=40)
def test_a_cohort_equals_its_clients_one_by_one(
    sizes: list[list[int]], family: str, r: int, packed: bool, segments: bool, chunk: int | None, options: set[str]
) -> None:
    tasks = varied(cohort(sizes, family, r=r), options)
    execution = PACKED if packed else PADDED
    assert_equal(tasks, execute_cohort(tasks, execution, chunk=chunk, segments=segments), 1e-9, execution)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_single_precision_agrees_to_rounding(family: str, packed: bool, segments: bool) -> None:
    tasks = varied(cohort(UNEQUAL, family, torch.float32), {"start", "observers"})
    execution = PACKED if packed else PADDED
    with no_client_alone():
        found = execute_cohort(tasks, execution, segments=segments)
    assert_equal(tasks, found, 1e-4, execution)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize(("family", "encoded"), [("bert", paired), ("vit", coloured)])
def test_pairs_and_colour_images_reach_the_model(family: str, encoded: Any, segments: bool) -> None:
    plain = rows(family, torch.float32)
    tasks = cohort(UNEQUAL, family, torch.float32, data=encoded(plain))
    with no_client_alone():
        found = execute_cohort(tasks, Execution(), segments=segments)
    assert_equal(tasks, found, 1e-4)
    unlike = execute(replace(tasks[0], data=plain), Execution())
    assert not tensors_close(update(tasks[0], unlike), update(tasks[0], found[0]), 1e-2), "what was added tells nothing"


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_every_option_is_fused_and_changes_the_update(family: str, option: str) -> None:
    plain = cohort(UNEQUAL, family)
    tasks = varied(plain, {option})
    with no_client_alone():
        found = execute_cohort(tasks, Execution(), segments=True)
        without = execute_cohort(plain, Execution(), segments=True)
    assert_equal(tasks, found, 1e-9)
    i = 2  # neither of the clients that have no offset or rank mask
    same = tensors_close(update(plain[i], without[i]), update(tasks[i], found[i]), 1e-6)
    assert same == (option == "observers")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_rounds_of_fedavg_agree(dtype: torch.dtype, tolerance: float) -> None:
    tasks = cohort([[4, 4], [4, 4, 4], [2]], dtype=dtype)
    start = tasks[0].tunables
    finals = []
    for together in (False, True):
        values = start
        for _ in range(3):
            now = [replace(task, tunables=values) for task in tasks]
            results = execute_cohort(now, Execution()) if together else [execute(task, Execution()) for task in now]
            values = weighted_mean([r.tunables for r in results], [8, 12, 2])
        finals.append({n: v - start[n] for n, v in values.items()})
    assert tensors_close(*finals, tolerance)


@pytest.mark.parametrize("segments", [False, True])
def test_bf16_follows_the_reference(segments: bool) -> None:
    tasks = cohort(UNEQUAL, dtype=torch.float32)
    found = execute_cohort(tasks, Execution(precision="bf16"), segments=segments)
    for task, result in zip(tasks, found, strict=True):
        reference = execute(task, Execution(precision="bf16"))
        assert result.loss == pytest.approx(reference.loss, rel=0.03)
        assert all(t.dtype == torch.float32 for t in result.tunables.values())


@given(
    steps=st.integers(1, 6),
    lrs=st.lists(st.floats(1e-4, 0.5), min_size=1, max_size=3),
    decay=st.sampled_from([0.0, 0.1]),
    betas=st.sampled_from([(0.9, 0.999), (0.5, 0.7), (0.0, 0.9)]),
    eps=st.sampled_from([1e-8, 1e-3]),
)
@settings(deadline=None)
def test_adamw_is_torchs(steps: int, lrs: list[float], decay: float, betas: tuple[float, float], eps: float) -> None:
    generator = torch.Generator().manual_seed(steps)
    values = torch.randn(len(lrs), 7, dtype=torch.float64, generator=generator)
    rows = [nn.Parameter(row.clone()) for row in values]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(rows, lrs, strict=True)]
    reference = torch.optim.AdamW(groups, betas=betas, eps=eps, weight_decay=decay, foreach=False)
    first, second = torch.zeros_like(values), torch.zeros_like(values)
    lr = torch.tensor(lrs, dtype=torch.float64)[:, None]
    for step in range(1, steps + 1):
        grads = torch.randn(values.shape, dtype=torch.float64, generator=generator)
        for p, grad in zip(rows, grads, strict=True):
            p.grad = grad.clone()
        reference.step()
        adamw(values, grads, first, second, step, lr, torch.full_like(lr, decay), betas, eps)
    assert torch.allclose(values, torch.stack([p.detach() for p in rows]), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize(
    "ending",
    ["LayerNorm.weight", "LayerNorm.bias", "intermediate.dense.bias", "output.dense.weight", "pooler.dense.weight"],
)
def test_any_linear_or_layer_norm_can_be_tuned(ending: str, segments: bool) -> None:
    built = model()
    names = [n for n, _ in built.named_parameters() if n.endswith(ending)] + ["classifier.bias"]
    tasks = cohort(UNEQUAL, tunables=get_tensors(built, names))
    with no_client_alone():
        found = execute_cohort(tasks, Execution(), segments=segments)
    assert_equal(tasks, found, 1e-9)


def test_tunables_of_other_modules_and_dropout_are_trained_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    built = model()
    alone = []
    monkeypatch.setattr(fused, "execute", lambda task, *rest: alone.append(task) or execute(task, *rest))
    names = ["bert.embeddings.word_embeddings.weight", "classifier.bias"]
    tasks = cohort(UNEQUAL, tunables=get_tensors(built, names))
    assert_equal(tasks, execute_cohort(tasks, Execution()), 1e-9)
    assert len(alone) == len(tasks)
    dropping = model(dropout=0.5)
    tasks = cohort(UNEQUAL, frozen=Frozen("dropping", dropping), seed=3)
    assert_equal(tasks, execute_cohort(tasks, Execution()), 0.0)
    assert len(alone) == 2 * len(tasks)


def test_tasks_that_do_not_fit_together_keep_their_order() -> None:
    groups = [
        cohort([[4], [3, 3]]),
        cohort([[2, 2], [1]], "vit"),
        cohort([[4, 4], [3]], clip_norm=0.01),
        varied(cohort([[2], [2, 1]]), {"penalty"}),
    ]
    tasks = [task for pair in zip(*groups, strict=True) for task in pair]
    assert_equal(tasks, execute_cohort(tasks, Execution()), 1e-9)


def test_what_no_gradient_reaches_stays_even_with_weight_decay() -> None:
    built = build(ModelSpec("bert", CONFIGS["bert"] | NO_DROPOUT, (24, 24), LoraSpec(2, 4))).double()
    built.spare = nn.Linear(2, 2).double()
    names = [*tunable_names(built), "spare.weight", "spare.bias"]
    tasks = cohort(
        UNEQUAL,
        frozen=Frozen("spare", built),
        tunables=get_tensors(built, names),
        optimiser=AdamW(lr=1e-2, weight_decay=0.5),
    )
    tasks[1] = replace(tasks[1], gradient_offset={"spare.bias": torch.ones(2, dtype=torch.float64)})
    with no_client_alone():
        found = execute_cohort(tasks, Execution())
    assert_equal(tasks, found, 1e-9)
    assert torch.equal(found[0].tunables["spare.weight"], tasks[0].tunables["spare.weight"])
    assert not torch.equal(found[1].tunables["spare.bias"], tasks[1].tunables["spare.bias"])


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_client_that_diverges_spoils_no_other(family: str, packed: bool, segments: bool) -> None:
    tasks = cohort(UNEQUAL, family)
    lost = {n: torch.full_like(t, float("nan")) for n, t in tasks[0].tunables.items()}
    # Its loss hides what happened, so that training goes on and the others can be looked at.
    tasks[0] = replace(tasks[0], tunables=lost, loss=lambda x, y: torch.nan_to_num(x).sum(1))
    execution = PACKED if packed else PADDED
    found = execute_cohort(tasks, execution, segments=segments)
    assert_equal(tasks[1:], found[1:], 1e-9, execution)
    assert all(bool(v.isnan().all()) for v in found[0].tunables.values())


def test_a_diverged_client_is_an_error_that_names_its_step() -> None:
    tasks = cohort([[4], [4, 4, 4], [4, 4, 4, 4]])
    calls = []

    def breaks(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        return cross_entropy(logits, labels) * (float("inf") if len(calls) == 3 else 1.0)

    tasks[1] = replace(tasks[1], loss=breaks)
    with pytest.raises(FedbenchError, match="local training diverged: the loss of step 2 is inf; lower lr"):
        execute_cohort(tasks, Execution())


def test_bad_tasks_are_named_as_by_the_reference() -> None:
    tasks = cohort([[4], [4]])
    with pytest.raises(FedbenchError, match="chunk is 0, expected a number of clients"):
        execute_cohort(tasks, Execution(), chunk=0)
    for changes, message in (
        ({"batches": []}, "has no rows to train on"),
        ({"tunables": {"nothing": torch.zeros(1)}}, "'nothing' is no parameter"),
        ({"tunables": {"classifier.bias": torch.zeros(9)}}, "classifier.bias"),
    ):
        with pytest.raises(FedbenchError, match=message):
            execute_cohort([tasks[0], replace(tasks[1], **changes)], Execution())  # type: ignore[arg-type]
    assert execute_cohort([], Execution()) == []


def test_the_shared_module_is_left_as_it_was() -> None:
    tasks = varied(cohort(UNEQUAL, dtype=torch.float32), {"start"})
    module = tasks[0].frozen.module
    before = {n: p.clone() for n, p in module.named_parameters()}
    trained = execute_cohort(tasks, Execution())
    again = execute_cohort(tasks, Execution())
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    assert not any("forward" in m.__dict__ or m._forward_hooks for m in module.modules())
    assert not any(p.requires_grad or p.grad is not None for p in module.parameters())
    for a, b in zip(trained, again, strict=True):
        assert all(torch.equal(a.tunables[n], b.tunables[n]) for n in a.tunables)


@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=5),
    st.sampled_from(["segments", "buckets", "blocks"]),
)
@settings(deadline=None)
def test_a_layout_keeps_clients_together_and_tokens_in_their_rows(lengths: list[list[int]], kind: str) -> None:
    every = [n for own in lengths for n in own]
    width, most = max(every), max(map(len, lengths))
    segments = kind == "segments"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedbench.forward.layout.SHORT", 30 if kind == "blocks" else 0)
        layout = (Layout.of_segments if segments else Layout.of_clients)(lengths, width, CPU)
    row = np.repeat(np.arange(len(lengths)), [len(own) for own in lengths])  # client of each row
    client = np.repeat(np.arange(len(lengths)), layout.sizes)  # client of each packed place
    assert sum(layout.sizes) == layout.source.numel()
    assert np.array_equal(row[layout.source.numpy() // width], client), "padding included"
    real = layout.source[layout.real[0]]
    grid = torch.arange(width) < torch.tensor(every)[:, None]
    assert torch.equal(real.sort().values, grid.flatten().nonzero().squeeze(1))
    assert torch.equal(layout.position[layout.real[0]], real % width)
    starts = [i * width for i in range(len(every))]
    if segments:
        assert len(set(layout.sizes)) == 1
        assert sum(layout.sizes) == max(map(sum, lengths)) * len(lengths)
        left, starts = iter(starts), []
        for own in lengths:
            mine = [next(left) for _ in own]
            starts += mine + [mine[0]] * (most - len(own))
    assert layout.source[layout.first].tolist() == starts
    if kind == "blocks":
        assert all(len(set(client[b.start : b.start + b.length])) == 1 for b in layout.buckets), "of one client each"
        return
    # In the buckets each row is whole, in order, and filled up with its own tokens.
    places = layout.source if layout.gather is None else layout.source[layout.gather]
    for bucket in layout.buckets:
        held = places[bucket.start : bucket.start + bucket.rows * bucket.length].view(bucket.rows, bucket.length)
        mask = torch.ones_like(held, dtype=torch.bool) if bucket.mask is None else bucket.mask[:, 0, 0]
        for got, own in zip(held, mask, strict=True):
            begin, n = int(got[0]), int(own.sum())
            assert n == every[begin // width]
            assert torch.equal(got[:n], torch.arange(begin, begin + n))
            assert client_of(got[n:], width, row) <= {row[begin // width]}
    if layout.gather is not None and layout.scatter is not None:
        back = layout.gather[layout.scatter][layout.real[0]]
        assert torch.equal(back, layout.real[0].nonzero().squeeze(1))


def client_of(tokens: Tensor, width: int, row: np.ndarray) -> set[int]:
    return {int(row[int(t) // width]) for t in tokens}


def test_clients_in_a_pass_follow_from_tokens_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = cohort(UNEQUAL, dtype=torch.float32)
    most = max(int(t.data.lengths[b].sum()) for t in tasks for b in t.batches)
    monkeypatch.setattr(fused, "CPU_TOKENS", 3 * most)
    assert clients_per_pass(tasks, Execution()) == 3
    assert 1 <= clients_per_pass(tasks, PADDED) < 3
    monkeypatch.setattr(fused, "CPU_TOKENS", 1)
    assert clients_per_pass(tasks, Execution()) == 1
    found = []
    for free in (0, 2**20, 2**22):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device, free=free: (free, 2**30))
        found.append(clients_per_pass(tasks, Execution(torch.device("cuda"))))
    assert found[0] == 1 < found[1]
    assert found[2] == pytest.approx(4 * found[1], abs=4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_pass_keeps_no_more_than_is_estimated(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec(
        "bert",
        {**CONFIGS["bert"], **NO_DROPOUT, "hidden_size": 128, "max_position_embeddings": 64},
        (512, 512),
        LoraSpec(2, 4),
    )
    built = build(spec)
    data = Examples(torch.zeros(64, dtype=torch.long), [np.full(40, 5, dtype=np.int32)] * 64)
    values = get_tensors(built, tunable_names(built))
    tasks = cohort([[32], [32]], frozen=Frozen("wide", built), tunables=values, data=data)
    kept: dict[int, Tensor] = {}
    frozen = {p.untyped_storage().data_ptr() for p in built.parameters()}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in frozen:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        execute_cohort(tasks, Execution(precision=precision), segments=True)
    used = sum(x.untyped_storage().nbytes() for x in kept.values())
    # Half of what is free is taken. Of this model of two layers nearly half lies behind the last attention, where only
    # first tokens are kept, so the estimate is at most some twice what was used.
    for clients in (2, 6):
        # `used` is that of two clients.
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device, n=clients: (n * used, 2**40))
        assert clients / 4 <= clients_per_pass(tasks, Execution(torch.device("cuda"))) <= clients
