"""What the registry finds: the five kinds of things, and one entry for each thing, found but not imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedbench.errors import FedbenchError


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of thing that can be added.

    word: what messages call one. package: whose files hold those that are built in. group: of entry points. page: of
    the documentation, which says what one needs.
    """

    word: str
    package: str
    group: str
    page: str | None = None


METHODS = Kind("method", "fedbench.methods", "fedbench.methods", "docs/adding-a-method.md")
SCENARIOS = Kind("scenario", "fedbench.scenarios", "fedbench.scenarios")
DATA_SETS = Kind("data set", "fedbench.data.sets", "fedbench.datasets", "docs/adding-a-data-set.md")
FAMILIES = Kind("family", "fedbench.models.families", "fedbench.families", "docs/adding-a-family.md")
HOSTS = Kind("host", "fedbench.run.hosts", "fedbench.hosts")


@dataclass(frozen=True, slots=True)
class Entry:
    """Something that was found, not yet imported; `error` says why it cannot be used.

    `module` is what to import; `path` its file where known, which alone says what to load for a loose file;
    `attribute` names the class or the value in it where that is known. A scenario is the split `split` of the TOML
    file `path`. needs: what a method's class says that its server needs of uploads, "" where it says nothing.
    """

    kind: Kind
    name: str
    origin: str
    module: str = ""
    path: Path | None = None
    attribute: str | None = None
    split: str = ""
    summary: str = ""
    needs: str = ""
    error: str | None = None


def add(known: dict[str, Entry], entry: Entry) -> None:
    """Take in an entry; the same file may come through two doors, another plugin of its kind and name may not."""
    other = known.setdefault(entry.name, entry)
    if not _same(other, entry):
        raise FedbenchError(
            f"two plugins are called {entry.name!r}: one of {other.origin}, one of {entry.origin}; rename or remove one"
        )


def _same(a: Entry, b: Entry) -> bool:
    if a is b:
        return True
    if a.path is None or b.path is None:
        return bool(a.module) and (a.module, a.attribute) == (b.module, b.attribute)
    return a.path.resolve() == b.path.resolve() and (a.attribute, a.split) == (b.attribute, b.split)
