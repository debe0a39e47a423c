"""Guards: what each side of a run must not load, and a way to make sure that it does not."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any


class Violation(AssertionError):
    """A clause of the contract does not hold."""


CLIENTS_DATA = (
    "fedbench.data.load:load_data",
    "fedbench.run.prepare:_load",
    "fedbench.run.prepare:prepare",
    "fedbench.data.sets.dataset:DataSet.read",
    "fedbench.data.sets.embedded:read_tweets",
    "fedbench.data.sets.embedded:read_digits",
    "fedbench.data.sets.verses:read_verses",
    "fedbench.data.own.source:own_data_set",
    "fedbench.data.formats.text:TextSource.__call__",
    "fedbench.data.formats.text:read_text_file",
    "fedbench.data.formats.images:ImageSource.__call__",
    "fedbench.data.sources:read_parquet",
)
"""What could load the clients' rows."""

THE_FM = (
    "fedbench.models.zoo.load:load_fm",
    "fedbench.models.checkpoint:_checkpoint",
    "fedbench.models.zoo.load:minilm_folder",
    "fedbench.models.zoo.vit_digits:vit_digits",
    "fedbench.run.prepare:_load",
    "fedbench.run.prepare:prepare",
    "fedbench.files:load_tensors",
    "transformers:PreTrainedModel.from_pretrained",
    "safetensors.torch:load_file",
    "safetensors:safe_open",
)
"""What could load the foundation model."""

_forbidden_calls: list[str] = []
"""Why calls in this process were forbidden; kept, as a method might catch what they raise."""


def _refuse(*_: Any, _why: str = "", **__: Any) -> Any:
    from fedbench.check.guards import Violation, _forbidden_calls  # this code runs in the place of another module's

    _forbidden_calls.append(_why)
    raise Violation(_why)


def forbid(doors: Sequence[str], why: str) -> None:
    """Let each of `doors`, "module:name", raise Violation(why) in this process, for whoever holds it already too.

    A name may stand for a function, a mapping of functions, or a class or method of another library. Raises LookupError
    for one that does not exist: a guard of nothing guards nothing.
    """
    for door in doors:
        module, _, path = door.partition(":")
        found: Any = importlib.import_module(module)
        owner, name = found, path
        for name in path.split("."):
            if not hasattr(found, name):
                raise LookupError(f"the contract forbids {door}, which does not exist")
            owner, found = found, getattr(found, name)
        for function in found.values() if isinstance(found, Mapping) else [found]:
            plain = inspect.unwrap(function)
            if inspect.isfunction(plain) and not plain.__closure__:
                # Its code rather than its name: other modules have imported the function, and tables hold it.
                plain.__code__, plain.__defaults__, plain.__kwdefaults__ = _refuse.__code__, None, {"_why": why}
            else:
                setattr(owner, name, partial(_refuse, _why=why))


@dataclass(frozen=True)
class Guard:
    """Keeps the process of one side from loading what is the other's; `why`: what it then says."""

    doors: tuple[str, ...]
    why: str

    def begin(self) -> None:
        """Close the doors of this process for good."""
        forbid(self.doors, self.why)

    def complaint(self) -> str | None:
        """What was tried all the same, if anything."""
        return _forbidden_calls[0] if _forbidden_calls else None
