"""Packed execution against padded batches: outputs, gradients, observers, losses; and the local step's own rules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import PACKED, PADDED, layer_outputs, logits, tiny_fm, train_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbench.api.local import AdamW, LocalTask
from fedbench.check.suite import tensors_close
from fedbench.errors import FedbenchError
from fedbench.forward.layout import Layout
from fedbench.machine.device import Execution
from fedbench.measures.accuracy import evaluate
from fedbench.methods._layerwise import hidden_loss
from fedbench.methods.fedpft import zeros
from fedbench.models.cache import Frozen
from fedbench.models.parts import Parts
from fedbench.models.spec import LoraSpec
from fedbench.models.weights import frozen_state, get_tensors, initial_tunables, set_tensors, tunable_names
from fedbench.objectives.classification import cross_entropy
from fedbench.rng import Streams
from fedbench.training.alone import execute

CPU = torch.device("cpu")


def model(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    built = tiny_fm().build(LoraSpec(2, 4), CPU)
    set_tensors(built, initial_tunables(built, Streams(0, "unit")))
    return built.to(dtype)


def task(built: torch.nn.Module, **changes: object) -> LocalTask:
    rows = train_rows(11)
    defaults: dict[str, object] = {
        "frozen": Frozen("k", built),
        "tunables": get_tensors(built, tunable_names(built)),
        "data": rows,
        "batches": [np.arange(4), np.arange(4, 8), np.arange(8, 11)],
        "optimiser": AdamW(lr=1e-2),
        "loss": cross_entropy,
        "clip_norm": 1.0,
    }
    return LocalTask(**(defaults | changes))  # type: ignore[arg-type]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.booleans())
@settings(deadline=None)
def test_a_layout_holds_every_real_token_once(lengths: list[int], blocks: bool) -> None:
    width = max(lengths)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedbench.forward.layout.SHORT", 30 if blocks else 0)
        layout = Layout.of(mask)
    assert layout.blocks is blocks
    real = layout.source[layout.real[0]].sort().values
    assert torch.equal(real, mask.flatten().nonzero().squeeze(1))
    assert torch.equal(layout.source[layout.first], torch.arange(len(lengths)) * width)
    padding = 1 - layout.real.float().mean().item()
    assert padding <= (1 / 16 if blocks else 0.15 + 1e-6)
    if not blocks:
        assert sum(b.rows for b in layout.buckets) == len(lengths)
        return
    fill = int((~layout.real).sum())
    assert len(layout.source) == sum(lengths) + fill
    starts = [b.start + place for b in layout.buckets for place in b.starts.tolist()]
    assert starts == sorted(layout.first.tolist())
    for b in layout.buckets:
        assert b.length <= 64 + fill, "no row here is longer"
        row = layout.source[b.start : b.start + b.length] // width
        row[~layout.real[0, b.start : b.start + b.length]] = -1
        scored = torch.ones(b.length, b.length).bool() if b.mask is None else b.mask[0, 0] == 0
        assert torch.equal(scored, row[:, None] == row), "a token is scored against its row and nothing else"


def test_batches_are_filled_up_to_few_sizes() -> None:
    sizes = {len(Layout.of(torch.ones(1, tokens, dtype=torch.int64)).source) for tokens in range(1, 129)}
    assert sizes >= {1, 2, 31, 32, 34, 62, 64, 68, 124, 128}
    assert len(sizes) == 64


@given(rows=st.integers(1, 9), seed=st.integers(0, 99), short=st.sampled_from([0, 128]))
@settings(deadline=None, max_examples=25)
def test_packed_equals_padded_in_outputs_gradients_and_hidden_losses(rows: int, seed: int, short: int) -> None:
    built = model()
    batch = train_rows(40).batch(np.random.default_rng(seed).choice(40, rows, replace=False))
    names = tunable_names(built)
    parameters = [dict(built.named_parameters())[n].requires_grad_(True) for n in names]
    found = []
    for packed in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fedbench.forward.layout.SHORT", short)
            out = logits(built, batch, packed)
            grads = torch.autograd.grad(out.square().sum(), parameters)
            hidden, mask = layer_outputs(built, batch, packed)
        found.append((out, grads, [hidden_loss(h, 0.9 * h + 0.01, mask) for h in hidden]))
    (out, grads, losses), (out_p, grads_p, losses_p) = found
    assert torch.allclose(out, out_p, rtol=1e-10, atol=1e-12)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(grads, grads_p, strict=True))
    assert torch.allclose(torch.stack(losses), torch.stack(losses_p), rtol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_local_training_packed_equals_reference(dtype: torch.dtype, tolerance: float) -> None:
    built = model(dtype)
    parts = Parts(built)
    observers = {parts.ffn_activation_path(i): zeros("non-positive", 0.0) for i in range(3)}
    start = get_tensors(built, tunable_names(built))
    results = [execute(task(built, tunables=start, observers=observers), execution) for execution in (PADDED, PACKED)]
    reference, packed_result = ({n: t - start[n] for n, t in r.tunables.items()} for r in results)
    assert tensors_close(reference, packed_result, tolerance)
    assert results[0].observed_tokens == results[1].observed_tokens
    for path in observers:
        assert torch.equal(results[0].observed[path], results[1].observed[path])


@pytest.mark.parametrize("packed", [False, True])
def test_bf16_is_fp32_to_its_rounding(packed: bool) -> None:
    built = model(torch.float32)
    start = get_tensors(built, tunable_names(built))
    asked = [replace(PACKED if packed else PADDED, precision=precision) for precision in ("fp32", "bf16")]
    full, half = (execute(task(built, tunables=start), execution) for execution in asked)
    scores = [evaluate(built, train_rows(40), 16, execution).loss for execution in asked]
    assert half.loss != full.loss, "nothing was computed in bf16"
    assert half.loss == pytest.approx(full.loss, rel=0.02)
    assert scores[1] == pytest.approx(scores[0], rel=0.02)
    a, b = (torch.cat([(r.tunables[n] - start[n]).flatten() for n in start]) for r in (full, half))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.95
    assert all(t.dtype is torch.float32 for t in half.tunables.values())


def test_training_leaves_the_backbone_alone_and_is_repeatable() -> None:
    built = model(torch.float32)
    before = {n: t.clone() for n, t in frozen_state(built).items()}
    start = get_tensors(built, tunable_names(built))
    first = execute(task(built, tunables=start), Execution())
    again = execute(task(built, tunables=start), Execution())
    assert all(torch.equal(first.tunables[n], again.tunables[n]) for n in start)
    assert all(torch.equal(before[n], t) for n, t in frozen_state(built).items())
    assert not any(p.requires_grad for p in built.parameters())
    assert first.steps == 3


def test_one_step_is_adamw_by_hand() -> None:
    built = model()
    start = get_tensors(built, tunable_names(built))
    got = execute(task(built, tunables=start, batches=[np.arange(4)], clip_norm=None), Execution())
    set_tensors(built, start)
    parameters = {n: dict(built.named_parameters())[n].requires_grad_(True) for n in start}
    batch = train_rows(11).batch(np.arange(4))
    loss = cross_entropy(logits(built, batch).float(), batch.labels).mean()
    loss.backward()
    for name, p in parameters.items():
        # After one step both moment estimates are bias-corrected to g and g^2.
        assert p.grad is not None
        expected = start[name] - 1e-2 * p.grad / (p.grad.abs() + 1e-8)
        assert torch.allclose(got.tunables[name], expected, rtol=1e-9, atol=1e-12), name
        p.requires_grad_(False)
        p.grad = None


def test_penalty_offset_and_rank_mask_reach_the_step() -> None:
    built = model()
    start = get_tensors(built, tunable_names(built))
    name = next(n for n in start if ".lora_A." in n)
    plain = execute(task(built, tunables=start), Execution()).tunables
    mask = torch.ones_like(start[name])
    mask[1] = 0
    masked = execute(task(built, tunables=start, rank_mask={name: mask}), Execution()).tunables[name]
    assert not masked[1].any()
    assert masked[0].any()
    # A gradient far larger than any loss's fixes the direction of every AdamW step.
    pushed = execute(
        task(built, tunables=start, gradient_offset={name: torch.full_like(mask, 1e6)}), Execution()
    ).tunables
    assert (pushed[name] < start[name]).all()

    def pull(now: dict[str, torch.Tensor], received: dict[str, torch.Tensor]) -> torch.Tensor:
        return 1e6 * torch.stack([(v - received[n]).square().sum() for n, v in now.items()]).sum()

    held = execute(task(built, tunables=start, penalty=pull), Execution()).tunables
    moved = [sum((t[n] - start[n]).square().sum() for n in start) for t in (held, plain)]
    assert moved[0] < moved[1]


def test_clipping_bounds_the_whole_gradient() -> None:
    built = model()
    start = get_tensors(built, tunable_names(built))
    offset = {n: torch.full_like(t, 3.0) for n, t in start.items()}
    seen: list[float] = []
    original = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: object) -> None:
        grads = [p.grad for g in self.param_groups for p in g["params"]]
        seen.append(float(torch.stack([g.square().sum() for g in grads]).sum().sqrt()))
        original(self)

    torch.optim.AdamW.step = spy  # type: ignore[method-assign,assignment]
    try:
        execute(task(built, tunables=start, gradient_offset=offset, clip_norm=0.5), Execution())
    finally:
        torch.optim.AdamW.step = original  # type: ignore[method-assign]
    assert seen == pytest.approx([0.5] * 3, rel=1e-4)


def test_a_diverged_client_is_an_error_not_an_average() -> None:
    built = model(torch.float32)
    bad = {n: torch.full_like(t, float("nan")) for n, t in get_tensors(built, tunable_names(built)).items()}
    with pytest.raises(FedbenchError, match="the loss of step 0 is nan; lower lr"):
        execute(task(built, tunables=bad), Execution())


def test_unknown_or_misshapen_tunables_are_named() -> None:
    built = model(torch.float32)
    with pytest.raises(FedbenchError, match="'nothing' is no parameter"):
        execute(task(built, tunables={"nothing": torch.zeros(1)}), Execution())
    with pytest.raises(FedbenchError, match="classifier.bias"):
        execute(task(built, tunables={"classifier.bias": torch.zeros(9)}), Execution())


def test_evaluation_by_hand() -> None:
    built, rows = model(torch.float32), train_rows(10)
    found = evaluate(built, rows, 4, Execution())
    answers = []
    for i in range(10):
        with torch.no_grad():
            answers.append(int(built(**rows.batch([i]).inputs).logits.argmax()))
    assert found.predicted.tolist() == answers
    assert found.accuracy == pytest.approx(np.mean(np.array(answers) == rows.labels.numpy()))


@pytest.mark.parametrize("short", [0, 128])
def test_attention_dropout_leaves_rows_apart(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout that drops nothing a batch in training mode is what it is in evaluation mode."""
    monkeypatch.setattr("fedbench.forward.layout.SHORT", short)
    built, batch = model(), train_rows(9).batch(range(9))
    expected = logits(built, batch)
    for name, module in built.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 1e-12 if name.endswith("attention.self.dropout") else 0.0
    assert torch.allclose(logits(built.train(), batch), expected, rtol=1e-9, atol=1e-11)
