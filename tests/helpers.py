"""Small real things for tests: a random BERT with its tokenizer, saved as a checkpoint, and rows to train on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedbench.api.context import ClientContext, ServerContext
from fedbench.api.local import LocalResult, LocalTask
from fedbench.data.examples import Batch, Examples
from fedbench.forward.feed import Forward
from fedbench.forward.layout import Layout
from fedbench.machine.device import Execution
from fedbench.measures.exposure import Exposure, Exposures
from fedbench.measures.gradient import GradientErrors
from fedbench.measures.scores import Scores
from fedbench.models.cache import ModuleCache
from fedbench.models.foundation import FoundationModel
from fedbench.models.weights import get_tensors, tunable_names
from fedbench.models.zoo.load import load_fm
from fedbench.rng import Streams
from fedbench.run.hosts.side import ClientSide
from fedbench.run.loop import Run
from fedbench.run.request import RunRequest
from fedbench.scenario.tables import Federation
from fedbench.training import fused
from fedbench.training.alone import execute
from fedbench.training.cohort import execute_all
from fedbench.training.fused import execute_cohort

Invoke = Callable[..., tuple[int, str, str]]
"""The fixture `invoke`."""
PACKED, PADDED = Execution(), Execution(executor="reference")

WORDS = [
    *[
        "the",
        "a",
        "of",
        "and",
        "to",
        "in",
        "it",
        "is",
        "was",
        "for",
        "on",
        "with",
        "as",
        "film",
        "movie",
        "good",
        "bad",
        "great",
        "awful",
        "fine",
        "plot",
        "actor",
    ],
    *[
        "game",
        "team",
        "wins",
        "loses",
        "market",
        "stock",
        "rises",
        "falls",
        "chip",
        "phone",
        "space",
        "launch",
        "war",
        "peace",
        "talks",
        "minister",
    ],
]


def save_tiny_bert(
    folder: Path, layers: int = 3, hidden: int = 16, ffn: int = 24, seed: int = 0, first: Sequence[str] = ()
) -> Path:
    """A random BERT of a few thousand parameters with a WordPiece tokenizer, in the format of a real checkpoint."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    vocabulary = [*first, "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *(f"##{c}" for c in letters)]
    vocabulary = list(dict.fromkeys(vocabulary))
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=ffn,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizerFast(vocab={w: i for i, w in enumerate(vocabulary)}, do_lower_case=True).save_pretrained(folder)
    return folder


SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}


SPECIAL = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
DECODERS = ("gpt2", "llama", "qwen2", "qwen3")


def save_tiny_decoder(family: str, folder: Path, **changes: Any) -> None:
    """A random decoder with a head for its vocabulary, as they are published, and a tokenizer of bytes."""
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    words = ByteLevelBPETokenizer()
    words.train_from_iterator([" ".join(WORDS)] * 3, vocab_size=300, special_tokens=["<|endoftext|>"])
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    common = {**ends, "vocab_size": words.get_vocab_size(), "initializer_range": 0.2}
    rotary = {**SMALL, **common, "num_key_value_heads": 1, "max_position_embeddings": 64}
    config: Any = {
        "gpt2": lambda: transformers.GPT2Config(
            **(common | {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_inner": 24, "n_positions": 64} | changes)
        ),
        "llama": lambda: transformers.LlamaConfig(**(rotary | changes)),
        "qwen2": lambda: transformers.Qwen2Config(
            **(rotary | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2} | changes)
        ),
        "qwen3": lambda: transformers.Qwen3Config(**(rotary | {"head_dim": 12} | changes)),
    }[family]()
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_model(str(folder))
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(str(folder))
    tokenizer.save_pretrained(folder)


def save_tiny(family: str, folder: Path) -> Path:
    """A random checkpoint of the family, with tokenizer or image settings."""
    import transformers

    if family == "bert":
        return save_tiny_bert(folder)
    torch.manual_seed(0)
    if family == "vit":
        vit = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, initializer_range=0.2)
        transformers.ViTForImageClassification(vit).save_pretrained(folder)
        transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    elif family == "distilbert":
        sizes = {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24}
        distilbert = transformers.DistilBertConfig(
            **sizes, vocab_size=200, max_position_embeddings=64, sinusoidal_pos_embds=True, initializer_range=0.2
        )
        transformers.DistilBertForSequenceClassification(distilbert).save_pretrained(folder)
    elif family == "electra":  # embeddings narrower than the layers, as in the published ones
        electra = transformers.ElectraConfig(**SMALL, embedding_size=8, vocab_size=200, initializer_range=0.2)
        transformers.ElectraForSequenceClassification(electra).save_pretrained(folder)
    elif family == "mpnet":
        mpnet = transformers.MPNetConfig(**SMALL, vocab_size=200, max_position_embeddings=66, initializer_range=0.2)
        transformers.MPNetForMaskedLM(mpnet).save_pretrained(folder)
    elif family == "modernbert":
        modernbert = transformers.ModernBertConfig(
            **SMALL, **SPECIAL, vocab_size=200, max_position_embeddings=64, initializer_range=0.2, local_attention=6
        )
        transformers.ModernBertForMaskedLM(modernbert).save_pretrained(folder)
    elif family in DECODERS:
        save_tiny_decoder(family, folder)
        return folder
    else:
        # The padding token of the tokenizer below: positions are counted from it.
        sizes = {**SMALL, "max_position_embeddings": 66, "pad_token_id": 0}
        roberta = transformers.RobertaConfig(**sizes, vocab_size=200, initializer_range=0.2)
        transformers.RobertaForSequenceClassification(roberta).save_pretrained(folder)
    if family != "vit":
        save_tiny_bert(folder / "t", first=(["<s>"] if family == "mpnet" else []))  # any tokenizer will do
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / "t" / file).rename(folder / file)
    return folder


_FMS: dict[int, FoundationModel] = {}


def tiny_fm(layers: int = 3) -> FoundationModel:
    """A random 3-class BERT with `layers` layers, width 16, FFN 24; loaded once, built anew by each user."""
    import tempfile

    if layers not in _FMS:
        with tempfile.TemporaryDirectory() as folder:
            path = save_tiny_bert(Path(folder) / "bert", layers)
            _FMS[layers] = load_fm(str(path), 3, Path(folder))
    return _FMS[layers]


def random_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Random values of all tunables of a model, none of them zero."""
    generator = torch.Generator().manual_seed(3)
    found = get_tensors(model, tunable_names(model))
    return {n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in found.items()}


def _rows(n: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    tokens = [np.array([2, *rng.integers(5, 80, rng.integers(2, 12)), 3], dtype=np.int32) for _ in range(n)]
    return Examples(tokens=tokens, labels=torch.tensor(rng.integers(0, 3, n)))


def train_rows(n: int) -> Examples:
    """`n` labelled rows of random tokens, ragged, three classes."""
    return _rows(n, 1)


def public_rows(n: int = 32) -> Examples:
    """`n` rows of random tokens whose labels nobody reads."""
    return _rows(n, 2)


def logits(model: nn.Module, batch: Batch, packed: bool = True) -> Tensor:
    """The model's answer to one batch, outside of a block."""
    return Forward(model, packed).logits(batch)


def layer_outputs(model: nn.Module, batch: Batch, packed: bool = True) -> tuple[list[Tensor], Tensor | None]:
    """Hidden states after each layer for one batch, outside of a block, and the mask of real tokens."""
    return Forward(model, packed).layer_outputs(batch)


def context(cache: Path, rounds: int = 4, evaluate_every: int = 1) -> ServerContext:
    """A server's context: 4 clients of which half are sampled, batches of 4."""
    federation = Federation(fraction=0.5, rounds=rounds, batch_size=4)
    return ServerContext(Streams(0, "unit"), federation, Execution(), cache, evaluate_every, clients=4)


def smoke_request(folder: Path, method: str, scenario: str, fm: Path, **settings: str) -> RunRequest:
    """A run under the profile `smoke` whose data, records and cache all lie in `folder`."""
    return RunRequest(
        method=method,
        scenario=scenario,
        fm=str(fm),
        settings=settings,
        profile="smoke",
        device="cpu",
        data_dir=folder,
        results=folder / "runs",
        cache=folder / "cache",
    )


def server_of(run: Run) -> Any:
    """The method's server of a run whose sides are both here."""
    return run.host.server.server  # type: ignore[attr-defined]


def scores_of(run: Run) -> Scores:
    """What scores such a run."""
    scores: Scores = run.host.server.scores  # type: ignore[attr-defined]
    return scores


def clients_of(run: Run) -> ClientSide:
    """The clients' side of such a run."""
    assert isinstance(run.host.clients, ClientSide)
    return run.host.clients


def points_of(run: Run) -> list[dict[str, Any]]:
    """The points of gradient error that such a run has measured so far."""
    [errors] = [o for o in run.host.server.observers if isinstance(o, GradientErrors)]  # type: ignore[attr-defined]
    return errors.points


def exposure_of(run: Run) -> Exposure:
    """What such a run has exposed of the FM so far."""
    [exposures] = [o for o in run.host.server.observers if isinstance(o, Exposures)]  # type: ignore[attr-defined]
    return exposures.exposure


def answers_of(
    passing: Forward, batch: Batch, total: Callable[[Tensor], Tensor], layout: Layout | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs of a batch, and the gradients that `total` of them, a scalar, has for all that is tuned."""
    model = passing.model
    names = tunable_names(model)
    parameters = [model.get_parameter(name).requires_grad_() for name in names]
    try:
        with passing.feeding(batch, layout=layout) as (inputs, _):
            out: Tensor = model(**inputs).logits
        grads = torch.autograd.grad(total(out), parameters)
    finally:
        for p in parameters:
            p.requires_grad_(False)
    return out.detach(), dict(zip(names, grads, strict=True))


def on_every_executor(
    tasks: Sequence[LocalTask], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[LocalResult, LocalResult]]:
    """What each task gives by the reference, beside what it gives packed, and then fused with the others."""
    references = [execute(one, Execution(executor="reference")) for one in tasks]
    packed = [execute(one, Execution()) for one in tasks]
    monkeypatch.setattr(fused, "execute", None)  # nobody is trained alone
    together = execute_cohort(tasks, Execution(executor="fused"))
    for results in (packed, together):
        yield from zip(references, results, strict=True)


def updates_by(method: Any, executors: Sequence[str], cache: Path) -> list[list[dict[str, Tensor]]]:
    """Of two clients of a method on `tiny_fm`, from random tunables: their updates, by each of these executors."""
    ctx, modules = context(cache), ModuleCache(torch.device("cpu"))
    server: Any = method.server(tiny_fm(), None, ctx)
    server.values = random_values(server.full)
    outbox = server.broadcast(0, [0, 1])
    clients = [method.client(ClientContext(i, Streams(0, "unit"), ctx.federation, modules)) for i in (0, 1)]
    tasks = [client.task(0, outbox[i], train_rows(12)) for i, client in enumerate(clients)]
    updates = []
    for each in executors:
        found = dict(execute_all(tasks, Execution(executor=each, workers=1)))
        updates.append([{n: t - tasks[i].tunables[n] for n, t in found[i].tunables.items()} for i in (0, 1)])
    return updates
