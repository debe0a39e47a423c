"""The tuned adapter of a run in peft's format, for use with plain transformers and peft on the base checkpoint.

A run keeps its tunables at <results>/adapters/<key12>.safetensors, beside the records. `export_adapter` turns them into
a folder that `peft.PeftModel.from_pretrained` reads: adapter_config.json and adapter_model.safetensors, head included.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fedbench.errors import FedbenchError
from fedbench.files import load_tensors, save_tensors
from fedbench.models.checkpoint import own_labels
from fedbench.models.decoder import NextToken
from fedbench.models.families.known import family_called
from fedbench.models.parts import family_of
from fedbench.models.spec import Head
from fedbench.models.weights import frozen_state, get_tensors, tunable_names
from fedbench.models.zoo.load import MINILM_HUB, load_fm
from fedbench.models.zoo.names import fetched_folder, fm_folder
from fedbench.models.zoo.packaged import PACKAGED
from fedbench.models.zoo.tiny_llama import tiny_llama_folder
from fedbench.records.record import Record
from fedbench.records.store import load


def adapter_path(results: Path, key: str) -> Path:
    """Where the tunables of the run of `key` lie under its results folder."""
    return results / "adapters" / f"{key[:12]}.safetensors"


@dataclass(frozen=True)
class Adapter:
    """What was tuned of an FM: LoRA and head by name, and what it fits."""

    tensors: Mapping[str, Tensor]
    about: Mapping[str, Any]


def adapter_of(model: nn.Module, untouched: Mapping[str, Tensor]) -> Adapter:
    """LoRA and head of a tuned FM. untouched: the FM's frozen weights as they came."""
    config: Any = model.config
    now = frozen_state(model)
    about = {
        "model_type": config.model_type,
        "num_labels": config.num_labels,
        "head": "vocabulary" if isinstance(model, NextToken) else "classes",
        "pad_token": config.pad_token_id if family_of(model).reads == "last" else None,
        # Rank and alpha of each linear layer with an adapter.
        "lora": {n: [m.r["default"], m.lora_alpha["default"]] for n, m in _adapted(model).items()},
        # Frozen weights that the method changed.
        "changed": sum(n in now and not torch.equal(now[n].cpu(), t.cpu()) for n, t in untouched.items()),
    }
    return Adapter(get_tensors(model, tunable_names(model)), about)


def keep_adapter(adapter: Adapter, path: Path, key: str) -> None:
    """Write what was tuned to `path`, atomically; `key` is the run's."""
    save_tensors(path, dict(adapter.tensors), {"fedbench": json.dumps({"key": key, **adapter.about})})


def _adapted(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@dataclass(frozen=True)
class Exported:
    """What was written: the base checkpoint it belongs to, and how to load that with transformers.

    base: hub id or folder. revision: of the hub's repository. architecture: an Auto class of transformers. pad_token:
    the number of the padding token that a decoder's head goes by, which checkpoints of decoders mostly leave out.
    """

    base: str
    revision: str | None
    architecture: str
    num_labels: int
    pad_token: int | None = None


def export_adapter(record: Path, folder: Path, cache: Path, fm: str | None = None) -> Exported:
    """Write the adapter of the run in the file `record` to `folder`, in peft's format.

    fm: the folder of the run's FM, for one that was given so: records do not say where folders lie. An FM without a
    checkpoint of its own (one pre-trained by fedbench, kept in `cache`) is written to `folder`/base. Raises
    FedbenchError where the record has no tuned adapter, where the run's file of it is gone, and where the FM is not at
    hand or another than that of the run.
    """
    from peft import LoraConfig

    run = load(record)
    # <results>/records/<scenario>/<method>/<file>
    if run.accuracy.plug_in is None and run.accuracy.personal is not None:
        raise FedbenchError(f"{record}: {run.identity.method} makes a model for each client, and none for all")
    path = adapter_path(Path(*record.resolve().parts[:-4]), run.key)
    if not path.is_file():
        raise FedbenchError(
            f"{record}: its adapter is not at {path}, where a run leaves it; make the run again with `fedbench run`"
        )
    tensors, metadata = load_tensors(path)
    about = json.loads(metadata["fedbench"])
    if about["key"] != run.key:
        raise FedbenchError(f"{path}: belongs to another run than {record}; make the run again with `fedbench run`")
    lora: Mapping[str, Any] = about["lora"]
    if not lora:
        raise FedbenchError(f"{record}: {run.identity.method} tunes no LoRA, so there is no adapter to export")
    if about.get("changed"):
        raise FedbenchError(
            f"{record}: {run.identity.method} changes {about['changed']} of the FM's own weights, "
            "which an adapter cannot hold"
        )
    family = family_called(about["model_type"])
    head: Head = about.get("head", "classes")
    base, revision = _base(run, about["num_labels"], folder, cache, fm, head)
    if head == "vocabulary":
        task_type, architecture = "CAUSAL_LM", "AutoModelForCausalLM"
    elif family.modality == "text":
        task_type, architecture = "SEQ_CLS", "AutoModelForSequenceClassification"
    else:
        task_type, architecture = None, "AutoModelForImageClassification"
    ranks, alphas = ({name: pair[i] for name, pair in lora.items()} for i in (0, 1))
    r, alpha = next(iter(lora.values()))
    config = LoraConfig(
        task_type=task_type,
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
        r=r,
        lora_alpha=alpha,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        target_modules=list(lora),
        modules_to_save=list(family.head) if head == "classes" else None,
        fan_in_fan_out=family.transposed,
    )
    config.save_pretrained(folder)
    named = {f"base_model.model.{name.replace('.default.', '.')}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return Exported(base, revision, architecture, about["num_labels"], about.get("pad_token"))


def _base(
    run: Record, num_labels: int, folder: Path, cache: Path, given: str | None, head: Head
) -> tuple[str, str | None]:
    """Hub id or folder of the checkpoint the adapter belongs to, and its revision."""
    name, origin = str(run.identity.fm), run.provenance.fm
    if given is None and name in PACKAGED:
        given = str(fetched_folder(cache, name))
    if given is None and name == "tiny-llama":
        given = str(tiny_llama_folder(cache)[0])
    if given is not None:
        path = fm_folder(given)
        if path is None:
            raise FedbenchError(f"--fm {given}: no such folder; give the folder of the checkpoint of {name}")
        # A head that was trained for the run's classes, which are not in the record, is part of what its hash is of.
        found = (load_fm(given, num_labels, cache, names, head).content_hash for names in ((), own_labels(path)))
        if (run.identity.fm_hash or "") not in found:
            raise FedbenchError(f"--fm {given}: not the checkpoint of this run, by its hash; give that of {name}")
        return str(path.resolve()), None
    if name == "minilm-l6":
        return MINILM_HUB, None
    if "revision" in origin:
        return origin["source"], origin["revision"]
    if name != "vit-digits":
        raise FedbenchError(
            f"the FM {name} was given as a folder, and a record does not say where that lies; give --fm PATH"
        )
    fm = load_fm(name, num_labels, cache, (), head)
    if fm.content_hash != run.identity.fm_hash:
        raise FedbenchError(f"the {name} in {cache} is another than that of this run; give --cache with the run's")
    plain: Any = fm.build(None, torch.device("cpu"))
    plain.save_pretrained(folder / "base")
    return str((folder / "base").resolve()), None
