"""Names of foundation models: those that come with the project, and what records call any other. Needs no torch."""

from __future__ import annotations

from pathlib import Path, PurePath

FMS: dict[str, str] = {
    "minilm-l6": "all-MiniLM-L6-v2, BERT of 6 layers, width 384 (embedded: extra 'bundled')",
    "vit-digits": "ViT of 6 layers, width 64, pre-trained here on 5,000 MNIST images (embedded: extra 'bundled')",
    "tiny-llama": "LLaMA of 6 layers, width 160, pre-trained here on Python's documentation (embedded)",
    "mpnet-base": "all-mpnet-base-v2, MPNet of 12 layers, width 768 (`fedbench fetch mpnet-base`)",
    "smollm2-135m": "SmolLM2-135M-Instruct in 4 bits, written out: LLaMA, 30 layers, width 576 (`fedbench fetch`)",
    "bert-base": "google-bert/bert-base-uncased, 12 layers, width 768 (hub, hub cache or --fm PATH)",
    "roberta-base": "FacebookAI/roberta-base, 12 layers, width 768 (hub, hub cache or --fm PATH)",
    "distilbert-base": "distilbert/distilbert-base-uncased, 6 layers, width 768 (hub, hub cache or --fm PATH)",
    "vit-base": "google/vit-base-patch16-224-in21k, 12 layers, width 768 (hub, hub cache or --fm PATH)",
}
"""Name -> one line. Anything else is taken as a local checkpoint folder or a hub id."""


def fetched_folder(cache: Path, name: str) -> Path:
    """Where a model of FMS lies once `fedbench fetch` brought it into the cache."""
    return cache / "fms" / name


def fm_label(given: str) -> str:
    """What records call the FM given as `given`: names and hub ids as they are, a folder by its own name.

    Where a folder lies is nobody's business but its owner's; which FM it is a record says by hash.
    """
    if given in FMS:
        return given
    folder = fm_folder(given)
    return folder.resolve().name or given if folder else recorded_label(given)


def fm_folder(given: str) -> Path | None:
    """The folder that `given` names; None where there is none."""
    try:
        path = Path(given).expanduser()
        return path if given and path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, a user who is not there, a null byte
        return None


def is_called(recorded: str, given: str) -> bool:
    """Whether a record that calls its FM `recorded` may be of the FM given as `given`.

    The record's name may be what was given, as older records have it.
    """
    return recorded == given or fm_label(given) == recorded_label(recorded)


def recorded_label(recorded: str) -> str:
    """The name of an FM by what a record holds: older ones may hold a path, of which the last part counts.

    Looks at no folder, for records are read on any machine.
    """
    path = recorded.startswith((".", "/", "~")) or recorded.endswith("/")
    return (PurePath(recorded).name or recorded) if path else recorded
