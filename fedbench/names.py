"""Names of methods, scenarios and settings: what may be one, and which one was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from fedbench.errors import printable


def plugin_name(stem: str) -> str:
    """The name of a plugin whose file has this stem: `fedavg_lora` -> `fedavg-lora`."""
    return stem.replace("_", "-")


NAME = re.compile(r"[^\W_][\w.-]{0,99}")
"""Names become folders and file names, and are printed."""


def bad_name(name: str) -> str | None:
    """Why `name` cannot be a plugin's, a split's or a profile's name; None where it can."""
    if NAME.fullmatch(name):
        return None
    return f"{printable(name)!r} is no name: use up to 100 letters, digits, '.', '_' and '-', a letter or digit first"


SYNONYMS = {
    "lr": ("learning_rate", "learningrate", "eta", "local_lr", "client_lr", "step_size"),
    "lora_r": ("rank", "lora_rank", "r"),
    "weight_decay": ("wd",),
    "clip_norm": ("max_grad_norm", "grad_clip", "gradient_clip", "clip"),
    "clients": ("num_clients", "n_clients", "nr_clients", "total_clients"),
    "rounds": ("num_rounds", "n_rounds", "nr_rounds", "global_rounds", "comm_rounds", "communication_rounds"),
    "local_epochs": ("epochs", "num_epochs", "n_epochs", "local_ep"),
    "max_steps": ("steps", "local_steps", "num_steps"),
    "batch_size": ("batch", "bs", "local_bs", "train_batch_size"),
    "fraction": ("frac", "participation", "client_fraction", "fraction_fit", "sample_rate"),
    "alpha": ("beta", "concentration", "dirichlet_alpha", "dir_alpha"),
    "min_size": ("min_samples", "min_partition_size", "min_rows"),
    "max_length": ("max_len", "max_seq_len", "max_seq_length", "seq_len"),
    "every": ("eval_every", "evaluate_every"),
    "kind": ("partition", "partitioner"),
    "fm": ("model", "backbone", "foundation_model"),
    "name": ("dataset",),
}
"""What other projects call a setting, by its last name here."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A closing phrase for an error about an unknown name: the nearest known ones, else all of them.

    Of dotted names the last part counts too, as it is or as other projects call it.
    """
    names = sorted(known)
    last = _last(name).replace("-", "_").lower()
    meant = {last, *(ours for ours, theirs in SYNONYMS.items() if last in theirs)}
    close = [known for known in names if _last(known) in meant]
    if not close:
        likeness = {known: max(_likeness(name, known), _likeness(last, _last(known))) for known in names}
        best = max(likeness.values(), default=0.0)
        close = [k for k in sorted(names, key=lambda k: -likeness[k]) if likeness[k] >= max(0.5, best - 0.1)]
    if close:
        return "did you mean " + " or ".join(close[:3]) + "?"
    return "known: " + (", ".join(names) or "none")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()
