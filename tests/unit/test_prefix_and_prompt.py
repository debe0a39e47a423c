"""Prefix and prompt: against passes written by hand, row by row, and that they start and train as they should."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import context, logits, random_values, save_tiny, smoke_request, tiny_fm, train_rows, updates_by
from torch import Tensor, nn

from fedbench.check.suite import tensors_close
from fedbench.data.examples import Batch
from fedbench.errors import FedbenchError
from fedbench.forward.feed import Forward, forward
from fedbench.machine.device import Execution
from fedbench.methods.prefix import PrefixTuning
from fedbench.methods.prompt import PromptTuning
from fedbench.models.foundation import FoundationModel
from fedbench.models.parts import Parts, adds_tokens
from fedbench.models.prefix import Prefix
from fedbench.models.spec import LoraSpec, ModelSpec
from fedbench.models.weights import frozen_state, initial_tunables, set_tensors, tunable_names
from fedbench.models.zoo.load import load_fm
from fedbench.rng import Streams
from fedbench.run.hosts.make import make_server
from fedbench.run.prepare import prepare
from fedbench.run.run import run
from fedbench.scenario.tables import EvaluationSettings, ObjectiveSettings

CPU = torch.device("cpu")
ENCODERS = ("bert", "roberta", "distilbert", "electra")
DECODERS = ("llama", "gpt2", "qwen3")
N = 3


@pytest.fixture(scope="module")
def fms(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, FoundationModel] = {}

    def make(family: str) -> FoundationModel:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = load_fm(str(save_tiny(family, folder / "fm")), 3, folder)
        return made[family]

    return make


def batch_of(family: str) -> Batch:
    """Rows of different lengths; images for ViT."""
    if family == "vit":
        pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return Batch({"pixel_values": pixels}, torch.zeros(4, dtype=torch.int64), None)
    return train_rows(4).batch(np.arange(4), CPU)


def rows_of(batch: Batch) -> list[dict[str, Tensor]]:
    """Each row alone, without padding and without a mask."""
    if batch.mask is None:
        return [{"pixel_values": row[None]} for row in batch.inputs["pixel_values"]]
    lengths = batch.mask.sum(1).tolist()
    return [
        {name: value[i : i + 1, :n] for name, value in batch.inputs.items() if name != "attention_mask"}
        for i, n in enumerate(lengths)
    ]


def filled(fm: FoundationModel, spec: ModelSpec) -> nn.Module:
    model = fm.tuned(spec, CPU)
    set_tensors(model, random_values(model))
    return model


def plain_of(fm: FoundationModel, model: nn.Module) -> nn.Module:
    """The FM without prefix and prompt, with the head of `model`."""
    plain = fm.build(None, CPU)
    own = dict(model.named_parameters())
    set_tensors(plain, {n: own[n].detach() for n in tunable_names(plain)})
    return plain


def encoder_by_hand(plain: nn.Module, hidden: Tensor, prefixes: list[Prefix] | None) -> Tensor:
    """The layers of an encoder on one row's embeddings [1, T, d], written out."""
    parts, get = Parts(plain), plain.get_submodule
    config: Any = plain.config
    heads = config.num_attention_heads
    for i in range(parts.count):
        path = parts.layer_path(i)
        query, key, value, output = (get(p) for p in parts.attention_paths(i))
        normed = get(f"{path}.layernorm_before")(hidden) if parts.family.name == "vit" else hidden
        q, k, v = query(normed)[0], key(normed)[0], value(normed)[0]
        if prefixes:
            k, v = torch.cat([prefixes[i].keys, k]), torch.cat([prefixes[i].values, v])
        mixed = []
        for part in range(heads):
            columns = slice(part * q.shape[1] // heads, (part + 1) * q.shape[1] // heads)
            scores = q[:, columns] @ k[:, columns].T / (q.shape[1] // heads) ** 0.5
            mixed.append(scores.softmax(-1) @ v[:, columns])
        hidden = hidden + output(torch.cat(mixed, 1)[None])
        if parts.family.name == "vit":
            inner = get(f"{path}.layernorm_after")(hidden)
            hidden = hidden + parts.ffn_out(i)(nn.functional.gelu(parts.ffn_in(i)(inner)))
            continue
        hidden = get(f"{path}.{parts.family.attention_norm}")(hidden)
        wide = nn.functional.gelu(parts.ffn_in(i)(hidden))
        hidden = get(f"{path}.{parts.family.ffn_norm}")(hidden + parts.ffn_out(i)(wide))
    return hidden


def answers_by_hand(plain: nn.Module, batch: Batch, prefixes: list[Prefix] | None, prompt: Tensor | None) -> Tensor:
    """Logits of an encoder, row by row: transformers' embeddings and head around layers written out."""
    out, parts = [], Parts(plain)
    for row in rows_of(batch):
        start: list[Tensor] = []
        embeddings = plain.get_submodule(parts.family.embeddings)
        hook = embeddings.register_forward_hook(lambda _m, _i, output, start=start: start.append(output))
        plain(**row)
        hook.remove()
        hidden = start[0] if prompt is None else torch.cat([start[0], prompt[None]], 1)
        if hasattr(plain.get_submodule(parts.family.name), "embeddings_project"):
            hidden = plain.get_submodule("electra.embeddings_project")(hidden)
        hidden = encoder_by_hand(plain, hidden, prefixes)

        def put(_m: Any, _i: Any, output: Any, hidden: Tensor = hidden) -> Any:
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        hook = parts.layer(parts.count - 1).register_forward_hook(put)
        out.append(plain(**row).logits)
        hook.remove()
    return torch.cat(out)


@torch.no_grad()
@pytest.mark.parametrize("family", [*ENCODERS, "vit"])
def test_an_encoder_with_a_prefix_is_what_is_written_by_hand(family: str, fms: Any) -> None:
    fm, batch = fms(family), batch_of(family)
    model = filled(fm, fm.spec.with_prefix(N))
    prefixes = [m for m in model.modules() if isinstance(m, Prefix)]
    assert [p.keys.shape for p in prefixes] == [(N, 16)] * 3
    expected = answers_by_hand(plain_of(fm, model), batch, prefixes, None)
    assert torch.allclose(logits(model, batch), expected, atol=1e-5)
    assert not torch.allclose(logits(plain_of(fm, model), batch), expected, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("family", [*ENCODERS, "vit"])
def test_an_encoder_with_a_prompt_is_what_is_written_by_hand(family: str, fms: Any) -> None:
    fm, batch = fms(family), batch_of(family)
    model = filled(fm, fm.spec.with_prompt(N))
    [prompt] = [p for n, p in model.named_parameters() if ".prompt." in n]
    assert prompt.shape == (N, 8 if family == "electra" else 16), "as wide as the embeddings"
    expected = answers_by_hand(plain_of(fm, model), batch, None, prompt)
    assert torch.allclose(logits(model, batch), expected, atol=1e-5)
    assert not torch.allclose(logits(plain_of(fm, model), batch), expected, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_with_a_prefix_is_transformers_own_with_a_cache_of_it(family: str, fms: Any) -> None:
    from transformers import DynamicCache

    fm, batch = fms(family), batch_of(family)
    model = filled(fm, fm.spec.with_prefix(N))
    plain: Any = plain_of(fm, model)
    heads = getattr(plain.config, "num_key_value_heads", plain.config.num_attention_heads)
    body = plain.get_submodule(plain.base_model_prefix)
    out = []
    for row in rows_of(batch):
        cache = DynamicCache()
        for i, prefix in enumerate(m for m in model.modules() if isinstance(m, Prefix)):
            both = (p.unflatten(1, (heads, -1)).transpose(0, 1)[None] for p in (prefix.keys, prefix.values))
            cache.update(*both, i)
        length = row["input_ids"].shape[1]
        told = {"position_ids": torch.arange(length)[None], "attention_mask": torch.ones(1, N + length)}
        hidden = body(row["input_ids"], use_cache=True, past_key_values=cache, **told).last_hidden_state
        out.append(plain.score(hidden[:, -1]))
    assert torch.allclose(logits(model, batch), torch.cat(out), atol=1e-5)
    assert not torch.allclose(logits(plain, batch), torch.cat(out), atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_with_a_prompt_reads_embeddings_behind_it(family: str, fms: Any) -> None:
    fm, batch = fms(family), batch_of(family)
    model = filled(fm, fm.spec.with_prompt(N))
    [prompt] = [p for n, p in model.named_parameters() if ".prompt." in n]
    plain: Any = plain_of(fm, model)
    body = plain.get_submodule(plain.base_model_prefix)
    out = []
    for row in rows_of(batch):
        embedded = torch.cat([prompt[None], body.get_input_embeddings()(row["input_ids"])], 1)
        out.append(plain.score(body(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, -1]))
    assert torch.allclose(logits(model, batch), torch.cat(out), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("which", ["prefix", "prompt"])
def test_a_language_model_answers_each_token_of_its_own(which: str, tmp_path: Path) -> None:
    fm = load_fm(str(save_tiny("llama", tmp_path / "fm")), 3, tmp_path, (), "vocabulary")
    model: Any = fm.tuned(getattr(fm.spec, f"with_{which}")(N), CPU)
    set_tensors(model, random_values(model))
    tokens, targets = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]), torch.tensor([[6, 7, 8, -100], [10, 1, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    out = logits(model, Batch({"input_ids": tokens, "attention_mask": mask}, targets, mask))
    assert out.shape == (2, 4, 2)
    alone = Batch({"input_ids": tokens[1:, :2], "attention_mask": mask[1:, :2]}, targets[1:, :2], mask[1:, :2])
    assert torch.allclose(logits(model, alone), out[1:, :2], atol=1e-5), "padding changes nothing"
    if which == "prompt":
        plain: Any = fm.build(None, CPU)
        embedded = torch.cat([model.model.prompt.tokens[None], plain.model.embed_tokens(tokens[:1])], 1)
        hidden = plain.model(inputs_embeds=embedded, use_cache=False).last_hidden_state[0, N : N + 3]
        losses = nn.functional.cross_entropy(plain.lm_head(hidden), targets[0, :3], reduction="none")
        assert torch.allclose(out[0, :3, 0], losses, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("which", ["prefix", "prompt"])
@pytest.mark.parametrize("family", [*ENCODERS, "vit", *DECODERS])
def test_of_no_tokens_at_all_it_is_the_plain_model(family: str, which: str, fms: Any) -> None:
    fm, batch = fms(family), batch_of(family)
    model = filled(fm, getattr(fm.spec, f"with_{which}")(0))
    assert torch.allclose(logits(model, batch), logits(plain_of(fm, model), batch), atol=1e-5)


@torch.no_grad()
def test_a_prefix_is_seen_from_within_a_window_too(fms: Any) -> None:
    fm, batch = fms("modernbert"), batch_of("modernbert")
    model = filled(fm, fm.spec.with_prefix(N))
    alone = []
    for row in rows_of(batch):
        mask = torch.ones_like(row["input_ids"])
        alone.append(logits(model, Batch({**row, "attention_mask": mask}, batch.labels[:1], mask)))
    assert torch.allclose(logits(model, batch), torch.cat(alone), atol=1e-5)
    assert not torch.allclose(torch.cat(alone), logits(plain_of(fm, model), batch), atol=1e-2)


@pytest.mark.parametrize("method", [PrefixTuning(tokens=N), PromptTuning(tokens=N)])
def test_written_answers_are_refused_before_anything_is_trained(method: Any, tmp_path: Path) -> None:
    fm = load_fm(str(save_tiny("llama", tmp_path / "fm")), 3, tmp_path, (), "vocabulary")
    ctx = context(tmp_path)
    scenario = Namespace(
        federation=ctx.federation,
        evaluation=EvaluationSettings(),
        objective=ObjectiveSettings(kind="language", scores=("exact_match",), new_tokens=3),
        name="s",
    )
    brief: Any = Namespace(scenario=scenario, streams=ctx.streams, execution=Execution(), cache=tmp_path, seed=0)
    with pytest.raises(
        FedbenchError, match=f"{method.name}: its model writes no answers, as it has a prefix or a prompt"
    ):
        make_server(brief, method, fm, None, Namespace(probe=train_rows(2)), [[1]])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "which", "why"),
    [
        ("mpnet", "prefix", "computes attention in a way of its own"),
        ("mpnet", "prompt", "goes by distances of tokens"),
        ("modernbert", "prompt", "goes by distances of tokens"),
    ],
)
def test_a_family_that_cannot_have_it_is_refused(family: str, which: str, why: str, fms: Any) -> None:
    with pytest.raises(FedbenchError, match=f"{which}: a model of type {family} {why}"):
        fms(family).tuned(getattr(fms(family).spec, f"with_{which}")(N), CPU)


def test_a_prompt_that_leaves_no_room_for_a_decoders_row_is_refused(fms: Any) -> None:
    fm = fms("gpt2")
    model = filled(fm, fm.spec.with_prompt(60))
    with pytest.raises(FedbenchError, match="with a prompt of 60 are longer than the FM's 64 positions"):
        logits(model, batch_of("gpt2"))


@pytest.mark.parametrize("which", ["prefix", "prompt"])
def test_the_specification_says_so_and_decides_how_batches_are_fed(which: str) -> None:
    spec = getattr(tiny_fm().spec, f"with_{which}")(N)
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert which not in tiny_fm().spec.to_json()
    model = tiny_fm().tuned(spec, CPU)
    assert adds_tokens(model) and not Forward(model).packed and Forward(tiny_fm().build(None, CPU)).packed
    assert {n: t.shape for n, t in frozen_state(model).items()} == {n: t.shape for n, t in tiny_fm().state.items()}
    start = initial_tunables(model, Streams(0, "unit"))
    assert set(start) == set(tunable_names(model))
    assert all(bool(t.count_nonzero()) for n, t in start.items() if f".{which}." in n)
    with forward(model, Execution()) as passing, torch.no_grad():
        batch = batch_of("bert")
        assert torch.allclose(passing.logits(batch), logits(model, batch, packed=False), atol=1e-5)


def test_it_goes_together_with_lora() -> None:
    spec = tiny_fm().spec.with_lora(LoraSpec(2, 4)).with_prefix(N).with_prompt(N)
    names = tunable_names(tiny_fm().tuned(spec, CPU))
    assert all(any(word in name for name in names) for word in (".lora_A.", ".prefix.", ".prompt."))


@pytest.mark.parametrize("method", [PrefixTuning(tokens=N), PromptTuning(tokens=N)])
@pytest.mark.parametrize("executor", ["packed", "fused"])
def test_every_executor_trains_it_as_the_reference_does(method: Any, executor: str, tmp_path: Path) -> None:
    updates = updates_by(method, (executor, "reference"), tmp_path)
    assert all(tensors_close(b, a, 1e-3) for a, b in zip(*updates, strict=True))
    assert all(bool(t.count_nonzero()) for n, t in updates[0][0].items())


@pytest.mark.parametrize(("method", "trained"), [("prefix", 3 * 2 * 4 * 16), ("prompt", 4 * 16)])
def test_a_run_sends_tokens_and_head_alone(method: str, trained: int, tmp_path: Path) -> None:
    fm = save_tiny("bert", tmp_path / "bert")
    record = run(prepare(smoke_request(tmp_path, method, "tweets-noniid", fm, tokens="4")))
    assert record.compute.trainable_parameters == trained + 16 * 3 + 3
    assert record.aggregation_error is None
