"""Checkpoint folders in transformers' format: whether their files are whole, and their model one that runs here.

A setting or a tensor that a checkpoint has and the model built from it has not would be left out without a word, and
the result would be another model's. So whatever asks for that is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedbench.errors import FedbenchError
from fedbench.files import state_digest
from fedbench.models.build import as_computed_here
from fedbench.models.families.family import Family
from fedbench.models.families.known import family_called, is_built_in, is_known, unknown
from fedbench.models.families.refused import NOT_COMPUTED, WITHOUT_MEANING
from fedbench.models.foundation import FoundationModel
from fedbench.models.parts import Parts
from fedbench.models.reading import read_image_processor, read_tokenizer
from fedbench.models.spec import LAYER_KINDS, POOLING, Head, ModelSpec
from fedbench.models.weights import frozen_state
from fedbench.models.zoo.names import fm_label

_POINTER = b"version https://git-lfs"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where transformers looks for weights, in this order."""
_OTHERS = ("config.", "preprocessor_config.", "tokenizer", "vocab.", "merges.", "special_tokens", "added_tokens")
"""How the names of the other files it reads begin."""


def check_files(folder: Path) -> None:
    """Raise FedbenchError for what is there in name only: git-lfs pointers, empty files, missing or cut weights."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(_OTHERS) and path.is_file():
            _check_content(path)
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise FedbenchError(f"{folder} has no weights: it lacks {_WEIGHTS[0]} and {_WEIGHTS[2]}; fetch one of them")
    _check_content(found)
    shards = [found]
    if found.suffix == ".json":
        names = read_object(found).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise FedbenchError(f"{found} names no shards; fetch it again")
        shards = [folder / name for name in sorted(set(map(str, names.values())))]
        if missing := [shard.name for shard in shards if not shard.is_file()]:
            raise FedbenchError(
                f"{folder} lacks {len(missing)} of {len(shards)} shards that {found.name} names; fetch {missing[0]}"
            )
    for shard in shards:
        _check_content(shard)
        if shard.suffix == ".safetensors":
            _check_safetensors(shard)


def _check_content(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError as error:
        raise FedbenchError(f"cannot read {path}: {error.strerror}") from None
    if start == _POINTER:
        raise FedbenchError(f"{path} is a git-lfs pointer, not the file; run `git lfs pull` in {path.parent}")
    if not start:
        raise FedbenchError(f"{path} is empty; fetch it again")


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        # Opening compares the header with the file's length.
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise FedbenchError(f"{path} is damaged or cut short ({error}); fetch it again") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises FedbenchError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FedbenchError(f"cannot read {path}: {error}; give a folder in transformers' format") from None
    if not isinstance(found, dict):
        raise FedbenchError(f"{path} holds no JSON object; give a folder in transformers' format")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's configuration, of a family that is known and with nothing in it that would not be computed.

    Raises FedbenchError otherwise, naming the setting.
    """
    path = folder / "config.json"
    config = read_object(path)
    kind = config.get("model_type")
    if not isinstance(kind, str) or not is_known(kind):
        raise FedbenchError(f"{path}: {unknown(kind)}")
    family = family_called(kind)
    for setting, (plain, what) in NOT_COMPUTED.items():
        value = config.get(setting)
        if value and value != plain and setting not in family.computes:
            raise FedbenchError(f"{path}: {setting} {_short(value)} asks for {what}, which is not supported")
    if not config.get("quantization_config"):
        config.pop("quantization_config", None)  # transformers up to 5.9 reads it where it is null
    code = config.get("auto_map")
    if isinstance(code, dict) and any(str(name).startswith("AutoModel") for name in code):
        raise FedbenchError(f"{path}: auto_map asks for model code of the checkpoint's own, which is not run")
    _check_rotary(path, config)
    if family.padding_token not in (None, config.get("pad_token_id", family.padding_token)):
        raise FedbenchError(
            f"{path}: pad_token_id is {config['pad_token_id']}; a model of type {kind} counts positions from token "
            f"{family.padding_token}"
        )
    if family.position_offset == "after padding token" and type(config.get("pad_token_id", 1)) is not int:
        raise FedbenchError(f"{path}: pad_token_id is {config['pad_token_id']}; positions are counted from it")
    for side in ("image_size", "patch_size"):
        if isinstance(value := config.get(side), list):
            if not value or any(v != value[0] for v in value):
                raise FedbenchError(f"{path}: {side} {_short(value)} is no square, which is not supported")
            config[side] = value[0]
    from transformers.activations import ACT2FN

    activation = config.get(family.activation, "gelu")  # left out, it is transformers' own
    if not isinstance(activation, str) or activation not in ACT2FN:
        raise FedbenchError(f"{path}: {family.activation} {activation!r} is no activation known to transformers")
    return config


_ROTARY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions by which what a row is does not depend on the longest row beside it."""


def _check_rotary(path: Path, config: Mapping[str, Any]) -> None:
    """Raise FedbenchError for rotary positions that are stretched with the longest row of a batch."""
    for setting in ("rope_scaling", "rope_parameters"):
        given = config.get(setting)
        each = (
            given.values() if isinstance(given, dict) and all(isinstance(v, dict) for v in given.values()) else [given]
        )
        for found in each:
            kind = (found.get("rope_type") or found.get("type")) if isinstance(found, dict) else None
            if kind not in (None, *_ROTARY):
                raise FedbenchError(
                    f"{path}: {setting} asks for rotary positions of kind {kind!r}, which is not supported"
                )


def unused_settings(config: Mapping[str, Any]) -> list[str]:
    """The names of settings that are set, that the model makes no use of, and that are not known to have no meaning."""
    from transformers import AutoConfig

    used = AutoConfig.for_model(config["model_type"]).to_dict()
    known = {*used, *NOT_COMPUTED, *WITHOUT_MEANING}
    return sorted(name for name, value in config.items() if value and name not in known and not name.startswith("_"))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def label_names(config: Mapping[str, Any]) -> list[str]:
    """A checkpoint's own labels in order, from a mapping by number or a list; none where they are neither."""
    labels = config.get("id2label")
    if isinstance(labels, dict):
        labels = [labels.get(str(i)) for i in range(len(labels))]
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        return []
    return labels


def check_left_over(folder: Path, family: Family, names: Iterable[str]) -> None:
    """Raise FedbenchError where tensors that no part of the model took belong to the encoder.

    Those of other heads and of a pooler that classification does without are no part of it.
    """
    # Checkpoints of the bare model have no prefix; older ones of ViT keep their layers in an `encoder`.
    paths = [path.partition(".") for path in (family.embeddings, family.layers)]
    inside = {"encoder", "layernorm", *(rest.partition(".")[0] for _, _, rest in paths)}
    prefix = f"{paths[0][0]}."
    left = sorted(
        name
        for name in names
        if (name.removeprefix(prefix).partition(".")[0] in inside and not name.endswith(family.left_over))
        or any(part.startswith("lora_") for part in name.split("."))
    )
    if left:
        raise FedbenchError(
            f"{folder} holds {left[0]!r} ({len(left)} such tensors), which config.json gives the model no place for; "
            "merge adapters into the weights, or correct config.json"
        )


def _checkpoint(
    name: str,
    folder: Path,
    num_labels: int,
    provenance: dict[str, Any],
    class_names: tuple[str, ...] = (),
    head: Head = "classes",
) -> FoundationModel:
    """A FoundationModel from a checkpoint folder in transformers' format. Raises FedbenchError for any other."""
    try:
        check_files(folder)
        config = read_config(folder)
        spec = _spec_of(folder, config, num_labels, head)
        state, trained = _weights(folder, spec)
        spec, processor = _with_processor(folder, spec, state)
    except FedbenchError as error:
        raise FedbenchError(f"FM {name!r}: {error}") from None
    if head == "classes" and not _same_labels(config, class_names):
        trained = None
    # What is trained and adapted follows from the family's description; that of a plugin can change under its name.
    described = "" if is_built_in(spec.model_type) else spec.family.described()
    digest = hashlib.sha256((spec.to_json() + state_digest(state | (trained or {})) + described).encode()).hexdigest()
    label = fm_label(name)
    notes: tuple[str, ...] = ()
    if spec.family.modality == "text" and not spec.family.packed(spec.config.get(POOLING)):
        notes += (f"FM {label}: batches keep their padding, for {spec.family.name} is not packed; runs take longer",)
    if unused := unused_settings(config):
        notes += (f"FM {label}: config.json has settings that the model makes no use of: {', '.join(unused)}",)
    return FoundationModel(label, spec, state, processor, digest, trained, provenance, notes)


def _with_processor(folder: Path, spec: ModelSpec, state: Mapping[str, Tensor]) -> tuple[ModelSpec, Any]:
    """What reads inputs for a checkpoint, its tokenizer or image settings, and the specification that goes with it."""
    if spec.family.modality == "image":
        return spec, read_image_processor(folder / "preprocessor_config.json", spec)
    words = state[f"{spec.family.embeddings}.{spec.family.words}"]
    tokenizer = read_tokenizer(folder, spec, len(words))
    return _with_padding(spec, tokenizer), tokenizer


def without_weights(name: str, folder: Path, num_labels: int, head: Head = "classes") -> FoundationModel:
    """What reads rows for the checkpoint in a folder, which need not hold weights: tensors have shapes and no values.

    `content_hash` is empty. Raises FedbenchError for a folder that is not in transformers' format.
    """
    import transformers

    try:
        spec = _spec_of(folder, read_config(folder), num_labels, head)
        config = transformers.AutoConfig.for_model(spec.model_type, **spec.config)
        with torch.device("meta"):
            model = getattr(transformers, spec.architecture)(config)
            as_computed_here(model)
            state = frozen_state(model)
        spec, processor = _with_processor(folder, spec, state)
    except FedbenchError as error:
        raise FedbenchError(f"FM {name!r}: {error}") from None
    return FoundationModel(fm_label(name), spec, state, processor, "", provenance={"source": "without weights"})


def _with_padding(spec: ModelSpec, tokenizer: Any) -> ModelSpec:
    """A decoder's specification with the padding token that it is fed, which few of their checkpoints name.

    transformers' own head, in whatever is exported, goes by this number.
    """
    if spec.family.reads != "last":
        return spec
    return replace(spec, config={**spec.config, "pad_token_id": int(tokenizer.pad_token_id)})


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


def _spec_of(folder: Path, config: Mapping[str, Any], num_labels: int, head: Head) -> ModelSpec:
    try:
        spec = model_spec(config["model_type"], config, num_labels, head)
    except Exception as error:  # transformers checks settings in ways of its own, and raises as many kinds
        why = " ".join(str(error).split())
        raise FedbenchError(f"{folder / 'config.json'} cannot be a configuration: {why}") from None
    _ = spec.architecture  # which says where there is none
    return spec


def model_spec(model_type: str, config: Mapping[str, Any], num_labels: int, head: Head = "classes") -> ModelSpec:
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
    if head == "vocabulary":
        labels = {}
    family = family_called(model_type)
    if kinds := getattr(full, LAYER_KINDS, None):
        kept[LAYER_KINDS] = kinds  # written out, so that a model of some of the layers keeps theirs
    merged = json.loads(json.dumps({**kept, **labels, **family.dropout}))
    layers, width = int(getattr(full, family.layer_count)), getattr(full, family.ffn_width)
    if width is None:
        width = 4 * full.hidden_size  # what transformers takes where GPT-2's configuration says nothing
    width = int(width)
    return ModelSpec(model_type, merged, (width,) * layers, head=head)


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
            model, info = getattr(transformers, spec.architecture).from_pretrained(
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
    as_computed_here(model)
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
