"""The next token: what is asked for, what a model answers, what it costs; against transformers and by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from helpers import DECODERS, answers_of, on_every_executor, random_values, save_tiny, save_tiny_bert, smoke_request
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fedbench.api.local import AdamW, LocalTask
from fedbench.check.suite import tensors_close
from fedbench.data.examples import Batch, Examples
from fedbench.data.rows import Part
from fedbench.errors import FedbenchError
from fedbench.forward.feed import Forward
from fedbench.machine.device import Execution
from fedbench.measures.accuracy import evaluate
from fedbench.measures.gradient import gradients
from fedbench.models import decoder
from fedbench.models.build import build
from fedbench.models.cache import Frozen
from fedbench.models.conversation import pieces
from fedbench.models.decoder import next_tokens
from fedbench.models.foundation import FoundationModel
from fedbench.models.reading import encode
from fedbench.models.spec import LoraSpec, ModelSpec
from fedbench.models.weights import get_tensors, set_tensors, tunable_names
from fedbench.models.zoo.load import load_fm
from fedbench.objectives.base import IGNORED
from fedbench.objectives.language import Language, without_given
from fedbench.objectives.named import LANGUAGE, objective_of
from fedbench.run.prepare import prepare
from fedbench.run.run import run
from fedbench.tables.asked import asked_measures
from fedbench.tables.report import _lines

CPU = torch.device("cpu")
TEXTS = [
    "the film is good", "a bad plot", "the market rises and falls and rises", "a team wins", "talks of peace and war",
    "it was fine", "space launch", "the actor in the movie was great as a minister on the phone", "a",
]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@cache
def fm_of(family: str) -> FoundationModel:
    with TemporaryDirectory() as folder:
        return load_fm(str(save_tiny(family, Path(folder) / "fm")), 3, Path(folder), head="vocabulary")


def model_of(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = fm_of(family).build(LoraSpec(2, 4), CPU)
    set_tensors(model, random_values(model))
    return model.to(dtype)


def texts(family: str = "llama", objective: str = "language", answers: bool = False) -> Examples:
    pairs = [*reversed(TEXTS)] if answers else None
    part = Part(np.zeros(len(TEXTS), dtype=np.int64), TEXTS, text_pairs=pairs)
    return encode(part, fm_of(family), 48, objective)


# ---------------------------------------------------------------- what a model answers


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("vocabulary", [11, 49152])
def test_losses_and_answers_in_pieces_are_those_of_all_logits_at_once(
    vocabulary: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "AT_ONCE", 7 * vocabulary)  # of 7 tokens
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 14, 64, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, 64, generator=generator, dtype=dtype) / 8
    targets = torch.randint(0, vocabulary, (3, 14), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = IGNORED
    found = next_tokens(hidden, weight, targets)
    logits = hidden @ weight.t()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    scale = torch.randn(losses.shape, generator=generator, dtype=dtype)
    assert (found[..., 0] - losses).abs().max() <= tolerance * losses.abs().max()
    asked = targets != IGNORED
    assert torch.equal(found[..., 1][asked].long(), logits.argmax(-1)[asked])
    assert not found[~asked].any()
    [mine] = torch.autograd.grad((found[..., 0] * scale).sum(), hidden)
    [theirs] = torch.autograd.grad((losses * scale).sum(), hidden)
    assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that anything computes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.held:
                self.numel = max(self.numel, tensor.numel())
        return out

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.held = {p.untyped_storage().data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_logits_of_a_large_vocabulary_are_never_there_all_at_once(training: bool) -> None:
    vocabulary, tokens = 49152, 400
    config = {**fm_of("llama").spec.config, "vocab_size": vocabulary, "max_position_embeddings": 128}
    model = build(ModelSpec("llama", config, (24,) * 3, LoraSpec(2, 4), head="vocabulary"))
    names = tunable_names(model)
    ids = torch.arange(tokens).view(4, -1)
    mask = torch.ones_like(ids)
    targets = torch.where(ids % 2 == 0, ids + 1, IGNORED)
    batch = Batch({"input_ids": ids, "attention_mask": mask}, targets, mask)
    with torch.set_grad_enabled(training), Largest(model) as largest:
        parameters = [model.get_parameter(name).requires_grad_(training) for name in names]
        losses = LANGUAGE["row"].losses(Forward(model).logits(batch), targets)
        if training:
            torch.autograd.grad(losses.sum(), parameters)
    assert losses.tolist() == pytest.approx([np.log(vocabulary)] * 4), "all words are as likely"
    asked = int((targets != IGNORED).sum())
    assert vocabulary < largest.numel <= decoder.AT_ONCE < asked * vocabulary


def test_rows_that_ask_for_nothing_have_no_gradient() -> None:
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    out = next_tokens(hidden, torch.randn(5, 4), torch.full((1, 3), IGNORED))
    assert not out.any() and out.shape == (1, 3, 2)


def answers(passing: Forward, rows: Examples) -> tuple[Tensor, dict[str, Tensor]]:
    batch = rows.batch(range(len(rows)))
    return answers_of(passing, batch, lambda out: LANGUAGE["row"].losses(out, batch.labels).sum())


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("short", [0, 128])
def test_packed_rows_are_padded_ones(
    family: str, dtype: torch.dtype, tolerance: float, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedbench.forward.layout.SHORT", short)
    model, rows = model_of(family, dtype), texts(family, answers=True)
    assert Forward(model).packed
    expected, wanted = answers(Forward(model, packed=False), rows)
    found, grads = answers(Forward(model), rows)
    assert (found - expected)[..., 0].abs().max() <= tolerance * expected[..., 0].abs().max()
    assert torch.equal(found[..., 1], expected[..., 1])
    assert tensors_close(grads, wanted, tolerance)


@pytest.mark.parametrize("family", DECODERS)
def test_perplexity_and_accuracy_are_those_of_transformers_row_by_row(family: str, tmp_path: Path) -> None:
    import transformers

    folder = save_tiny(family, tmp_path / "fm")
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = texts(family)
    fm = load_fm(str(folder), 1, tmp_path, head="vocabulary")
    assert tunable_names(fm.build(None, CPU)) == [], "the vocabulary's head is the model's own, and frozen"
    found = evaluate(fm.build(LoraSpec(2, 4), CPU), rows, 4, Execution())
    losses, right, shares = [], [], []
    for own in rows.tokens or ():
        ids = torch.from_numpy(own.astype(np.int64))
        with torch.no_grad():
            logits = stock(input_ids=ids[None]).logits[0, :-1]
        losses.append(F.cross_entropy(logits, ids[1:], reduction="none"))
        right.append(logits.argmax(-1) == ids[1:])
        shares.append(right[-1].double().mean().item())
    block = found.block()
    assert list(block) == ["accuracy", "perplexity", "tokens", "loss", "rows"]
    assert block["perplexity"] == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-5)
    assert block["accuracy"] == pytest.approx(torch.cat(right).double().mean().item())
    assert block["tokens"] == len(torch.cat(right))
    assert found.shares.tolist() == pytest.approx(shares)
    assert found.correct.tolist() == [share == 1 for share in shares]


# ---------------------------------------------------------------- what a loss is divided by


def test_a_row_counts_alike_or_a_token_does() -> None:
    outputs = torch.tensor([[[1.0, 0], [3.0, 0], [2.0, 0]], [[8.0, 0], [0.0, 0], [0.0, 0]]])
    targets = torch.tensor([[5, 6, 7], [8, IGNORED, IGNORED]])
    by_row, by_token = LANGUAGE["row"].losses(outputs, targets), LANGUAGE["batch"].losses(outputs, targets)
    assert by_row.tolist() == [2.0, 8.0]
    assert by_token.mean().item() == pytest.approx((1 + 3 + 2 + 8) / 4)
    for objective in LANGUAGE.values():
        assert objective.total(outputs, targets).item() == 14 and objective.count(targets) == 4
        assert objective_of(objective.name) is objective


def task(seed: int, objective: str) -> LocalTask:
    model = model_of("llama")
    values = {n: t.clone() for n, t in get_tensors(model, tunable_names(model)).items()}
    rng = np.random.default_rng(seed)
    batches = [rng.choice(len(TEXTS), 4, replace=False) for _ in range(3)]
    return LocalTask(Frozen("lm", shared()), values, texts(objective=objective), batches, AdamW(1e-3))


@cache
def shared() -> nn.Module:
    return model_of("llama")


@pytest.mark.parametrize("objective", [o.name for o in LANGUAGE.values()])
def test_clients_learn_alike_on_every_executor(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [task(seed, objective) for seed in range(3)]
    for reference, result in on_every_executor(tasks, monkeypatch):
        assert result.loss == pytest.approx(reference.loss, rel=1e-5)
        assert tensors_close(reference.tunables, result.tunables, 1e-3)


def test_gradients_are_of_the_mean_over_tokens() -> None:
    model, rows = model_of("gpt2"), texts("gpt2")
    names = tunable_names(model)[:2]
    found = gradients(model, names, rows, Execution(), size=4)
    everything = rows.batch(range(len(rows)))
    parameters = [model.get_parameter(name).requires_grad_() for name in names]
    losses = model(**everything.inputs, targets=everything.labels).logits[..., 0]
    expected = torch.autograd.grad(losses.sum() / (everything.labels != IGNORED).sum(), parameters)
    for name, value in zip(names, expected, strict=True):
        assert torch.allclose(found[name], value.double(), atol=1e-6)


# ---------------------------------------------------------------- what is asked for


def test_a_text_asks_for_each_token_that_follows_and_for_its_end() -> None:
    rows = texts()
    assert rows.tokens is not None
    first = rows.tokens[0].tolist()
    assert first[-1] == fm_of("llama").processor.eos_token_id
    assert rows.labels[0].tolist() == [*first[1:], *[IGNORED] * (rows.labels.shape[1] - len(first) + 1)]


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_of_an_answer_its_own_tokens_are_asked_for_and_no_others(template: str | None) -> None:
    fm = replace(fm_of("llama"))
    fm.processor.chat_template = template
    try:
        part = Part(np.zeros(2, dtype=np.int64), ["is it good", "a"], text_pairs=["it is fine", "bad"])
        answers, everything = encode(part, fm, 64, "language"), encode(part, fm, 64, "language", answers_only=False)
    finally:
        fm.processor.chat_template = None
    assert answers.tokens is not None and everything.tokens is not None
    asked = [int(t) for t in answers.labels[0] if t != IGNORED]
    wanted = "it is fine" + ("<|endoftext|>" if template is None else "</s>")
    assert fm.processor.decode(asked) == wanted
    whole = "is it good\n" if template is None else "<user>is it good</s><assistant>"
    assert fm.processor.decode(answers.tokens[0]) == whole + wanted
    assert [t.tolist() for t in answers.tokens] == [t.tolist() for t in everything.tokens]
    assert (everything.labels != IGNORED).sum(1).tolist() == [len(t) - 1 for t in everything.tokens]
    assert answers.content_hash() != everything.content_hash()


def test_given_tokens_are_hidden_by_hand() -> None:
    targets = torch.tensor([[2, 3, 4, IGNORED], [6, 7, 8, 9]])
    found = without_given(targets, [np.array([False, False, False, True]), np.ones(4, dtype=bool)])
    assert found.tolist() == [[IGNORED, IGNORED, 4, IGNORED], [6, 7, 8, 9]]


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    class Tokenizer:
        chat_template = "x"

        def apply_chat_template(self, turns: list[Any], **_: Any) -> str:
            return f"{len(turns)} turns"

    with pytest.raises(FedbenchError, match="writes a prompt in another way once it is answered"):
        pieces(Tokenizer(), (("user", "a"), ("assistant", "b")))


def test_rows_whose_answer_is_cut_off_are_named() -> None:
    part = Part(np.zeros(2, dtype=np.int64), ["a", "the market rises and falls and rises again"], text_pairs=["b", "c"])
    with pytest.raises(FedbenchError, match="1 of 2 rows have no token to predict, row 2 first: .*within 6 tokens"):
        encode(part, fm_of("llama"), 6, "language")


def test_an_encoder_predicts_no_next_token(tmp_path: Path) -> None:
    folder = save_tiny_bert(tmp_path / "bert")
    with pytest.raises(FedbenchError, match="a model of type bert predicts no next token, .*give --fm a decoder"):
        load_fm(str(folder), 3, tmp_path, head="vocabulary")
    with pytest.raises(FedbenchError, match="'vit-digits' reads images and predicts no next token"):
        load_fm("vit-digits", 3, tmp_path, head="vocabulary")


def test_a_specification_keeps_its_head_and_old_ones_say_nothing_of_it() -> None:
    spec = fm_of("llama").spec
    assert ModelSpec.from_json(spec.to_json()) == spec
    plain = replace(spec, head="classes")
    assert "head" not in json.loads(plain.to_json()) and ModelSpec.from_json(plain.to_json()) == plain


def test_the_vocabulary_of_tied_embeddings_is_held_once() -> None:
    tied, own = fm_of("gpt2"), fm_of("llama")
    assert not any("lm_head" in name for name in tied.state)
    assert "lm_head.weight" in own.state


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("method", ["fedavg-lora", "fedot", "fedpft"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_whole_run_reports_perplexity(method: str, family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "fm")
    extra = {"fedot": {"emulator": "1"}, "fedpft": {"r": "6", "t": "1"}}.get(method, {})
    settings = {"objective.kind": "language", "dataset.max_length": "60", **extra}
    record = run(prepare(smoke_request(tmp_path, method, "tweets-noniid", folder, **settings)))
    assert record.status == "complete"
    scores = record.accuracy.plug_in
    assert scores.macro_f1 is None and scores.rows == 60
    assert scores.perplexity == pytest.approx(np.exp(scores.loss), rel=1e-6)
    assert record.accuracy.untouched.perplexity is not None, "the model as it came predicts tokens too"
    assert scores.tokens > 60
    assert record.accuracy.plug_in.correct is None, "rows that are right as a whole say little"
    said = dict(_lines(record))["accuracy"]
    assert f"perplexity {scores.perplexity:,.4g}  ({scores.tokens:,} tokens of 60 test rows; last round)" in said
    assert asked_measures(["perplexity"], ())[0].read(record) == scores.perplexity
    if method == "fedpft":
        assert all(entry.weight > 0 for entry in record.distillation)


def test_language_has_its_place_in_a_runs_key_and_classification_has_none(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "fm")

    def identity(**settings: str) -> Any:
        return prepare(smoke_request(tmp_path, "fedavg-lora", "tweets-noniid", folder, **settings)).identity

    plain, language = identity(), identity(**{"objective.kind": "language"})
    by_token = identity(**{"objective.kind": "language", "objective.normalised": "batch"})
    assert "objective" not in plain["scenario"]
    assert language["scenario"]["objective"] == {"kind": "language", "loss_on": "answers", "normalised": "row"}
    hashes = [(each["fm_hash"], each["inputs_hash"]) for each in (plain, language, by_token)]
    assert hashes[0] != hashes[1] and hashes[1] != hashes[2]
    assert isinstance(LANGUAGE["row"], Language)
