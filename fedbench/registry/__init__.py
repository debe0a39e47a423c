"""Look-up by name of what can be added: methods, scenarios, data sets, model families and hosts, through three doors.

| kind | a plugin defines | built in: files of | entry points |
|---|---|---|---|
| method | a subclass of `Method` with a name | `methods/` | `fedbench.methods` |
| scenario | a TOML file | `scenarios/` | `fedbench.scenarios`: `package:file.toml` |
| data set | a module-level `DataSet(name="...", ...)` | `fedbench/data/sets/` | `fedbench.datasets` |
| family | a module-level `Family(name="...", ...)` | `fedbench/models/families/` | `fedbench.families` |
| host | a subclass of `Host` with a name | `fedbench/run/hosts/` | `fedbench.hosts` |

The third door is `--plugin`: a file, a folder or a module, which may bring several kinds.

Methods and hosts are called what their class says, `name: ClassVar[str] = "..."`. A scenario's name is its file's stem
and the name of its split. An entry point's key is the name of what it points to. Discovery parses and never imports, so
it neither loads torch nor fails on a broken plugin; the `load_` methods import.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbench.errors import FedbenchError
from fedbench.names import nearest
from fedbench.registry.doors import built_in, given, installed, require_whole
from fedbench.registry.entries import DATA_SETS, FAMILIES, HOSTS, METHODS, SCENARIOS, Entry, Kind, add
from fedbench.registry.importing import import_class, import_value
from fedbench.scenario.toml import split_names

if TYPE_CHECKING:
    from fedbench.api.sides import Method
    from fedbench.data.sets.dataset import DataSet
    from fedbench.models.families.family import Family


class Registry:
    """Everything reachable through the three doors; each kind is sorted by name.

    Raises FedbenchError if two plugins of one kind share a name, or if one of `plugins` (the values of `--plugin`)
    names nothing that exists.
    """

    def __init__(self, plugins: Sequence[str] = ()) -> None:
        require_whole()
        self._brought: dict[str, list[Entry]] = {plugin: [*given(plugin)] for plugin in plugins}
        self._others = [*installed(), *chain.from_iterable(self._brought.values())]
        self._found: dict[Kind, dict[str, Entry]] = {}
        for kind in dict.fromkeys(entry.kind for entry in self._others):  # what shares a name is told at once
            self._entries(kind)

    def _entries(self, kind: Kind) -> dict[str, Entry]:
        """All of a kind; its files are parsed when it is first asked for."""
        if kind not in self._found:
            found: dict[str, Entry] = {}
            for entry in chain(built_in(kind), (other for other in self._others if other.kind is kind)):
                add(found, entry)
            self._found[kind] = dict(sorted(found.items()))
        return self._found[kind]

    @property
    def methods(self) -> dict[str, Entry]:
        return self._entries(METHODS)

    @property
    def scenarios(self) -> dict[str, Entry]:
        return self._entries(SCENARIOS)

    @property
    def datasets(self) -> dict[str, Entry]:
        return self._entries(DATA_SETS)

    @property
    def families(self) -> dict[str, Entry]:
        return self._entries(FAMILIES)

    @property
    def hosts(self) -> dict[str, Entry]:
        return self._entries(HOSTS)

    def load_method(self, name: str) -> type[Method]:
        """The method's class; imports its module. Raises FedbenchError for an unknown or a broken method."""
        from fedbench.api.sides import Method

        return import_class(self.find_method(name), Method, "Method")

    def find_method(self, name: str) -> Entry:
        """Where the method is, without importing it. Raises FedbenchError for an unknown one."""
        return self._find(METHODS, name)

    def find_scenario(self, name: str) -> tuple[Path, str]:
        """The scenario's TOML file and split. Raises FedbenchError for an unknown or unreadable one.

        `name` may be a file itself: `reviews.toml`, whose first split it then is, or `reviews.toml:natural`.
        """
        if name not in self.scenarios and (file := _file(name)):
            return file
        for broken in self.scenarios.values():
            if broken.error and name not in self.scenarios and name.startswith(broken.name + "-"):
                raise FedbenchError(broken.error)
        entry = self._find(SCENARIOS, name)
        if entry.error or entry.path is None:
            raise FedbenchError(entry.error or f"the scenario {name!r} has no file")
        return entry.path, entry.split

    def load_dataset(self, name: str) -> DataSet:
        """The data set; imports its module, but reads no rows. Raises FedbenchError for an unknown or a broken one."""
        from fedbench.data.sets.dataset import DataSet

        return import_value(self._find(DATA_SETS, name), DataSet)

    def load_family(self, name: str) -> Family:
        """The description of a family; imports its module. Raises FedbenchError for an unknown or a broken one."""
        from fedbench.models.families.family import Family

        return import_value(self._find(FAMILIES, name), Family)

    def add_families(self) -> None:
        """Make the families of plugins known to the models of this process; each is imported when a model needs it.

        To be called once in every process that loads or builds models. Raises FedbenchError where a family is in use in
        this process by another description already.
        """
        from fedbench.models.families.known import add_family

        for name, entry in self.families.items():
            if entry.origin != "fedbench":
                add_family(name, partial(self.load_family, name))

    def load_host(self, name: str) -> Any:
        """The host's class; imports its module. Raises FedbenchError for an unknown or a broken host."""
        return import_class(self._find(HOSTS, name), object, "Host")

    def _find(self, kind: Kind, name: str) -> Entry:
        entries = self._entries(kind)
        if name not in entries:
            known = [known for known, entry in entries.items() if kind is not SCENARIOS or not entry.error]
            how = f"; {kind.page} says how to add one" if kind in (DATA_SETS, FAMILIES) else ""
            raise FedbenchError(f"there is no {kind.word} {name!r}; {nearest(name, known)}{how}{self._plugins()}")
        return entries[name]

    def _plugins(self) -> str:
        """What each `--plugin` brought, for an error about a name that is in none of them."""
        said = ""
        for plugin, entries in self._brought.items():
            said += f"; --plugin {plugin} brings {', '.join(entry.name for entry in entries) or 'nothing'}"
            said += "".join(f" ({entry.error})" for entry in entries if entry.error)
        return said


def _file(name: str) -> tuple[Path, str] | None:
    """The file and the split that a scenario's name says, where it is one of a file."""
    path, split = name, ""
    if ".toml:" in name:
        path, _, split = name.rpartition(":")
    if not path.endswith(".toml"):
        return None
    file = Path(path).expanduser()
    if not file.is_file():
        raise FedbenchError(f"--scenario {name}: no such file")
    known = split_names(file)
    if split and split not in known:
        raise FedbenchError(f"--scenario {name}: no split {split!r}; it has {', '.join(known)}")
    return file, split or known[0]
