"""The registry: five kinds, three doors, names, collisions, broken plugins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers import DECODERS

from fedbench.errors import FedbenchError
from fedbench.grid.file import grid_names
from fedbench.names import bad_name, nearest, plugin_name
from fedbench.registry import Registry

ROOT = Path(__file__).parents[2]

METHOD = '''
"""A method of the user's own."""
from typing import ClassVar
from fedbench.methods.fedavg_lora import LoraMethod

class Mine(LoraMethod):
    """Declares nothing new."""
    name: ClassVar[str] = "{name}"
'''


def write_method(path: Path, name: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(METHOD.format(name=name or plugin_name(path.stem)))
    return path


def copy_scenario(path: Path) -> Path:
    """A scenario file that is known to be good, under another name."""
    source, _ = Registry().find_scenario("tweets-noniid")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source.read_bytes())
    return path


def test_built_in_methods_are_the_files_of_the_folder() -> None:
    import fedbench.methods

    registry = Registry()
    files = [p.stem for p in Path(fedbench.methods.__path__[0]).glob("*.py") if not p.stem.startswith("_")]
    assert list(registry.methods) == sorted(plugin_name(stem) for stem in files)
    assert {"fedpft", "fedot", "fedavg-lora", "head-only", "zero-shot", "centralised-lora"} <= set(registry.methods)
    assert all(entry.summary and not entry.error for entry in registry.methods.values())


def test_every_built_in_method_loads_under_its_own_name() -> None:
    registry = Registry()
    for name in registry.methods:
        method = registry.load_method(name)
        assert method.name == name
        assert method.__module__ == f"fedbench.methods.{name.replace('-', '_')}"


def test_built_in_scenarios_are_file_stem_and_split() -> None:
    registry = Registry()
    wanted = {f"{data}-{split}" for data in ("tweets", "agnews", "sst2", "digits") for split in ("iid", "noniid")}
    assert wanted <= set(registry.scenarios)
    assert not [entry for entry in registry.scenarios.values() if entry.error]
    path, split = registry.find_scenario("tweets-noniid")
    assert (path.name, split) == ("tweets.toml", "noniid")


def test_built_in_data_sets_and_families_load_under_their_own_names() -> None:
    registry = Registry()
    embedded = {"tweets", "digits", "mnist", "verses"}
    assert embedded | {"agnews", "sst2", "qnli", "mnli", "qqp", "cifar10", "cifar100", "flowers102"} == set(
        registry.datasets
    )
    encoders, decoders = {"bert", "distilbert", "electra", "modernbert", "mpnet", "roberta"}, set(DECODERS)
    assert set(registry.families) == encoders | decoders | {"vit"}
    for entries, load in ((registry.datasets, registry.load_dataset), (registry.families, registry.load_family)):
        for name, entry in entries.items():
            assert load(name).name == name  # type: ignore[attr-defined]
            assert entry.summary and not entry.error
    assert Registry().load_dataset("sst2") is registry.load_dataset("sst2")


def test_every_family_is_known_without_a_registry_too() -> None:
    from fedbench.models.families.known import FAMILIES, is_built_in

    built_in = {name for name in FAMILIES if is_built_in(name)}
    assert built_in == set(Registry().families)


def test_unknown_names_get_the_nearest() -> None:
    registry = Registry()
    with pytest.raises(FedbenchError, match="no method 'fedptf'; did you mean .*fedpft"):
        registry.load_method("fedptf")
    with pytest.raises(FedbenchError, match="no scenario 'tweets-nonid'; did you mean tweets-noniid"):
        registry.find_scenario("tweets-nonid")
    assert nearest("xyz", ["alpha", "beta"]) == "known: alpha, beta"
    assert nearest("xyz", []) == "known: none"


def test_plugin_file(tmp_path: Path) -> None:
    path = write_method(tmp_path / "from_a_file.py")
    registry = Registry([str(path)])
    assert registry.methods["from-a-file"].summary == "A method of the user's own."
    method = registry.load_method("from-a-file")
    assert method.name == "from-a-file"
    assert Registry([str(path)]).load_method("from-a-file") is method


def test_plugin_folder_with_methods_and_scenarios(tmp_path: Path) -> None:
    path = write_method(tmp_path / "in_a_folder.py")
    path.write_text("import neighbour_of_in_a_folder\n" + path.read_text())
    (tmp_path / "neighbour_of_in_a_folder.py").write_text("")
    (tmp_path / "_private.py").write_text("raise RuntimeError")
    copy_scenario(tmp_path / "my_tweets.toml")
    registry = Registry([str(tmp_path)])
    assert registry.load_method("in-a-folder").name == "in-a-folder"
    assert "-private" not in registry.methods
    assert registry.find_scenario("my-tweets-iid") == (tmp_path / "my_tweets.toml", "iid")


def test_plugin_module_and_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_method(tmp_path / "lonely_module.py")
    write_method(tmp_path / "some_package" / "packaged_method.py")
    (tmp_path / "some_package" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry(["lonely_module", "some_package"])
    assert registry.load_method("lonely-module").__module__ == "lonely_module"
    assert registry.load_method("packaged-method").__module__ == "some_package.packaged_method"
    direct = Registry(["some_package.packaged_method"])
    assert direct.load_method("packaged-method").__module__ == "some_package.packaged_method"


@pytest.mark.parametrize("plugin", ["no/such/file.py", "no_such_module", "no.such.module", "missing.toml"])
def test_plugin_that_does_not_exist(plugin: str) -> None:
    with pytest.raises(FedbenchError, match="no such .py or .toml file, folder or module"):
        Registry([plugin])


def test_two_plugins_of_one_name(tmp_path: Path) -> None:
    path = write_method(tmp_path / "fedavg_lora.py")
    with pytest.raises(FedbenchError, match="two plugins are called 'fedavg-lora': one of fedbench, one of --plugin"):
        Registry([str(path)])
    scenario = copy_scenario(tmp_path / "other" / "tweets.toml")
    with pytest.raises(FedbenchError, match="two plugins are called 'tweets-"):
        Registry([str(scenario)])


def test_the_same_file_twice_is_one_plugin(tmp_path: Path) -> None:
    path = write_method(tmp_path / "named_twice.py")
    assert "named-twice" in Registry([str(path), str(tmp_path)]).methods


def test_broken_plugins_are_listed_and_fail_only_when_used(tmp_path: Path) -> None:
    (tmp_path / "bad_syntax.py").write_text("def f(:\n")
    (tmp_path / "bad_import.py").write_text("import no_such_library_at_all\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "bad_table.toml").write_text("title = \n")
    (tmp_path / "no_method.py").write_text("")
    registry = Registry([str(tmp_path)])
    assert "cannot be parsed" in str(registry.methods["bad-syntax"].error)
    assert registry.load_method("fedavg-lora").name == "fedavg-lora"
    for name, reason in {
        "bad-syntax": "SyntaxError",
        "bad-import": "no_such_library_at_all",
        "exits": "SystemExit",
        "no-method": "defines no Method",
    }.items():
        with pytest.raises(FedbenchError, match=reason):
            registry.load_method(name)
    assert registry.scenarios["bad-table"].error
    with pytest.raises(FedbenchError, match=r"bad_table\.toml"):
        registry.find_scenario("bad-table-iid")


def test_the_class_and_not_the_file_names_a_method(tmp_path: Path) -> None:
    path = write_method(tmp_path / "experiment 7 (copy).py", "fedprox-lora")
    registry = Registry([str(path)])
    assert registry.load_method("fedprox-lora").name == "fedprox-lora"
    assert registry.find_method("fedprox-lora").summary == "A method of the user's own."
    with pytest.raises(FedbenchError, match="two plugins are called 'fedprox-lora'"):
        Registry([str(path), str(write_method(tmp_path / "again.py", "fedprox-lora"))])


def test_a_file_may_hold_several_methods_and_other_classes(tmp_path: Path) -> None:
    path = tmp_path / "family.py"
    path.write_text(
        METHOD.format(name="first")
        + textwrap.dedent(
            """
            class Helper:
                name = "no-method"

            class Second(Mine):
                name = "second"

            class Field(Mine):
                name: ClassVar[str] = "thi" + "rd"
            """
        )
    )
    registry = Registry([str(path)])
    assert {"first", "second"} <= set(registry.methods)
    assert not {"no-method", "family", "third"} & set(registry.methods)
    assert [registry.load_method(n).__name__ for n in ("first", "second")] == ["Mine", "Second"]


SEVERAL = '''
from dataclasses import replace

from fedbench.data.sets.dataset import DataSet
from fedbench.models.families.bert import BERT
from fedbench.models.families.family import Family
from fedbench.run.hosts.side import Host
from my_cluster import PlainHost


class Far(Host):
    """A computer far away."""

    name: ClassVar[str] = "far"


class Farther(Far):
    name = "farther"


class Plain(PlainHost):
    name = "plain"


ROWS = DataSet("my-rows", ("a", "b"), print)
MINE: Family = replace(BERT, name="my_bert")
NAME = "not-written-out"
UNNAMED = DataSet(name=NAME, classes=("a", "b"), source=print)
REVIEWED = replace(ROWS, name="of-no-type")
'''


def test_one_file_may_bring_several_kinds(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(METHOD.format(name="my-method") + SEVERAL)
    registry = Registry([str(tmp_path / "mine.py")])
    known = Registry()
    brought = {
        kind: set(getattr(registry, kind)) - set(getattr(known, kind))
        for kind in ("methods", "scenarios", "datasets", "families", "hosts")
    }
    assert brought == {
        "methods": {"my-method"},
        "scenarios": set(),
        "datasets": {"my-rows"},
        "families": {"my_bert"},
        "hosts": {"far", "farther", "plain"},
    }


def test_names_of_different_kinds_do_not_collide(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        METHOD.format(name="tweets")
        + "from fedbench.data.sets.dataset import DataSet\nD = DataSet(name='fedpft', classes=(), source=print)\n"
    )
    registry = Registry([str(tmp_path / "mine.py")])
    assert registry.load_method("tweets").name == registry.load_dataset("tweets").name == "tweets"
    assert registry.load_method("fedpft").name == registry.load_dataset("fedpft").name == "fedpft"


HOST = """
from abc import ABC, abstractmethod
from typing import ClassVar


class Host(ABC):
    name: ClassVar[str]

    @abstractmethod
    def start(self): ...


class Far(Host):
    name: ClassVar[str] = "far"

    def start(self):
        return "started"


class Half(Host):
    name: ClassVar[str] = "half"
"""


def test_a_plugin_brings_a_host(tmp_path: Path) -> None:
    (tmp_path / "cluster.py").write_text('"""Computers of a cluster."""\n' + HOST)
    registry = Registry([str(tmp_path / "cluster.py")])
    assert registry.hosts["far"].summary == "Computers of a cluster."
    assert not registry.methods.keys() & {"far", "half", "cluster"}
    assert registry.load_host("far")().start() == "started"
    with pytest.raises(FedbenchError, match="host 'half' of --plugin .*: Half does not define start"):
        registry.load_host("half")
    with pytest.raises(FedbenchError, match=r"no host 'fra'; did you mean far\?.*; --plugin .* brings far, half"):
        registry.load_host("fra")


def test_built_in_hosts_are_the_named_classes_of_their_folder() -> None:
    registry = Registry()
    for name, entry in registry.hosts.items():
        assert entry.module.startswith("fedbench.run.hosts.")
        assert registry.load_host(name).__module__ == entry.module


def test_a_value_of_another_type_or_name_is_said(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def DataSet(**fields): ...\nMINE = DataSet(name='mine')\n")
    with pytest.raises(FedbenchError, match=r'should define a DataSet\(name="mine", ...\); it defines no DataSet'):
        Registry([str(path)]).load_dataset("mine")


def test_a_plugin_that_cannot_be_parsed_is_said_where_what_it_brings_is_missed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("MINE = DataSet(\n")
    with pytest.raises(FedbenchError, match=r"no data set 'mine'.*brings mine \(.*mine\.py cannot be parsed: Syntax"):
        Registry([str(tmp_path / "mine.py")]).load_dataset("mine")


def test_an_unknown_name_is_answered_with_what_the_plugins_bring(tmp_path: Path) -> None:
    path, table = write_method(tmp_path / "mine.py", "brought"), copy_scenario(tmp_path / "data.toml")
    registry = Registry([str(path), str(table)])
    with pytest.raises(FedbenchError, match=r"no method 'mine'.*--plugin .*mine\.py brings brought; --plugin"):
        registry.find_method("mine")
    with pytest.raises(FedbenchError, match=r"no scenario 'data'.*data\.toml brings data-iid, data-noniid"):
        registry.find_scenario("data")


def test_a_method_without_its_two_sides_is_said(tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text(
        "from typing import ClassVar\nfrom fedbench.api.sides import Method\n"
        "class Half(Method):\n    name: ClassVar[str] = 'half'\n"
        "class Field(Method):\n    name: str = 'field'\n"
    )
    with pytest.raises(FedbenchError, match="'half' of --plugin .*: Half does not define client and server"):
        Registry([str(tmp_path / "half.py")]).load_method("half")
    (tmp_path / "field.py").write_text(
        "from fedbench.api.sides import Method\nclass A(Method):\n    name: str = 'field'\n"
    )
    with pytest.raises(FedbenchError, match=r'name: ClassVar\[str\] = "field"'):
        Registry([str(tmp_path / "field.py")]).load_method("field")


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", "\x1b[31mred", "-x", "x" * 101, "a b"])
def test_names_that_are_no_folders_are_refused(tmp_path: Path, name: str) -> None:
    write_method(tmp_path / "mine.py", name.replace("\x1b", "\\x1b"))
    registry = Registry([str(tmp_path / "mine.py")])
    assert name not in registry.methods
    with pytest.raises(FedbenchError, match="is no name") as caught:
        registry.load_method("mine")
    assert "\x1b" not in str(caught.value)
    assert bad_name(name)
    assert not any(map(bad_name, ["fedavg-lora", "données_2", "a.b", "7"]))


def test_names_from_entry_points_and_files_are_refused_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "[fedbench.methods]\n../up = tiny_plugins.code:Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FedbenchError, match="a method of the package tiny-plugins: '../up' is no name"):
        Registry().load_method("../up")
    copy_scenario(tmp_path / "two words.toml")
    with pytest.raises(FedbenchError, match="called as its file, and 'two words' is no name"):
        Registry([str(tmp_path / "two words.toml")]).find_scenario("two words-iid")


def test_text_of_a_plugin_cannot_act_on_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text('"""A \x1b]0;title\x07 of\u202e mine."""\n', encoding="utf-8")
    assert Registry([str(tmp_path)]).methods["mine"].summary == r"A \x1b]0;title\x07 of\u202e mine."


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("learning_rate", "lr"),
        ("num_clients", "split.clients"),
        ("epochs", "federation.local_epochs"),
        ("rank", "lora_r"),
        ("clients", "split.clients"),
        ("split.cleints", "split.clients"),
        ("fraktion", "federation.fraction"),
    ],
)
def test_what_others_call_a_setting_leads_to_ours(wrong: str, right: str) -> None:
    from fedbench.scenario.tables import KEYS

    assert nearest(wrong, ["lr", "lora_r", "lora_alpha", "weight_decay", *KEYS]) == f"did you mean {right}?"


def python(program: str, cwd: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run a program as in a folder, with `path` before what is installed, which lacks fedbench's editable finder."""
    # -S leaves out site-packages and with them the finder; the libraries come back as plain folders of modules.
    libraries = [entry for entry in sys.path if entry.endswith("site-packages")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*path, *libraries]))}
    return subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=cwd, env=environment, capture_output=True, text=True
    )


FIND = """
from fedbench.registry import Registry
from fedbench.grid.file import grid_names
import fedbench.methods, fedbench.scenarios
registry = Registry()
print(fedbench.__file__, len(registry.methods), len(registry.scenarios), len(grid_names()), fedbench.methods.__file__)
"""


def copy_source(target: Path, *folders: str) -> Path:
    """These folders of the checkout, without what Python has compiled."""
    for folder in folders:
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def test_methods_are_found_in_the_root_of_a_checkout_with_another_fedbench_installed(tmp_path: Path) -> None:
    clone = copy_source(tmp_path / "clone", "fedbench", "methods", "scenarios")
    wheel = copy_source(tmp_path / "wheel", "fedbench")
    for folder in ("methods", "scenarios"):
        (copy_source(tmp_path, folder) / folder).rename(wheel / "fedbench" / folder)
    registry = Registry()
    counts = [len(registry.methods), len(registry.scenarios), len(grid_names())]
    for cwd, home, beside in ((clone, clone / "fedbench", clone), (tmp_path, wheel / "fedbench", wheel / "fedbench")):
        ran = python(FIND, cwd, wheel)
        assert ran.returncode == 0, ran.stderr
        where, *found, methods = ran.stdout.split()
        assert Path(where) == home / "__init__.py"
        assert list(map(int, found)) == counts
        assert Path(methods) == beside / "methods" / "__init__.py"


def test_a_package_without_its_methods_says_so(tmp_path: Path) -> None:
    copy_source(tmp_path, "fedbench")
    ran = python("from fedbench.registry import Registry\nRegistry()", tmp_path)
    assert ran.returncode == 1
    assert "comes without fedbench.methods; install fedbench, or use a whole clone" in ran.stderr.splitlines()[-1]


def install(root: Path, entry_points: str) -> None:
    """What an installer leaves behind for a distribution with these entry points."""
    info = root / "tiny_plugins-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tiny-plugins\nVersion: 1.0\nSummary: Two tiny plugins\n"
    )
    (info / "entry_points.txt").write_text(textwrap.dedent(entry_points))


def test_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tiny_plugins"
    write_method(package / "code.py", "tiny")
    (package / "__init__.py").write_text("")
    copy_scenario(package / "tiny_tweets.toml")
    install(
        tmp_path,
        """
        [fedbench.methods]
        tiny = tiny_plugins.code:Mine
        [fedbench.scenarios]
        tiny-tweets = tiny_plugins:tiny_tweets.toml
        lost = tiny_plugins:nowhere.toml
        renamed = tiny_plugins:tiny_tweets.toml
        """,
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry()
    assert registry.methods["tiny"].summary == "Two tiny plugins"
    assert registry.methods["tiny"].origin == "the package tiny-plugins"
    assert "tiny_plugins.code" not in sys.modules
    assert registry.load_method("tiny").name == "tiny"
    assert registry.find_scenario("tiny-tweets-noniid") == (package / "tiny_tweets.toml", "noniid")
    for name in ("lost", "renamed"):
        with pytest.raises(FedbenchError, match=f"should be 'package:file.toml'.*called {name}.toml"):
            registry.find_scenario(f"{name}-iid")


def test_entry_points_of_data_sets_families_and_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "more_plugins"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "code.py").write_text(
        HOST
        + "from dataclasses import replace\n"
        + "from fedbench.data.sets.dataset import DataSet\n"
        + "from fedbench.models.families.bert import BERT\n"
        + "ROWS = DataSet('my_rows', ('a', 'b'), print)\nFAMILY = replace(BERT, name='big_bert')\n"
    )
    install(
        tmp_path,
        """
        [fedbench.datasets]
        my_rows = more_plugins.code:ROWS
        wrong = more_plugins.code:ROWS
        whole-module = more_plugins.code
        no/name = more_plugins.code:ROWS
        [fedbench.families]
        big_bert = more_plugins.code:FAMILY
        [fedbench.hosts]
        far = more_plugins.code:Far
        """,
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry()
    assert registry.datasets["my_rows"].origin == "the package tiny-plugins"
    assert "more_plugins.code" not in sys.modules
    assert registry.load_dataset("my_rows").classes == ("a", "b")
    assert registry.load_family("big_bert").architecture == "BertForSequenceClassification"
    assert registry.load_host("far").__name__ == "Far"
    for name in ("wrong", "whole-module"):
        with pytest.raises(FedbenchError, match=rf'should define a DataSet\(name="{name}", ...\); it defines my_rows'):
            registry.load_dataset(name)
    with pytest.raises(FedbenchError, match="a data set of the package tiny-plugins: 'no/name' is no name"):
        registry.load_dataset("no/name")


@pytest.mark.parametrize("folder", ["methods", "scenarios"])
def test_folders_refuse_another_name(folder: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", f"import {folder}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "import it under that name" in run.stderr


def test_every_built_in_method_says_what_its_server_needs_and_where_it_is_from() -> None:
    registry = Registry()
    for name, entry in registry.methods.items():
        assert entry.needs in ("sum", "each"), name
        assert entry.needs == registry.load_method(name).needs, name
    without = ("centralised-lora", "fedbiot-official", "fedex-lora-official", "head-only", "zero-shot")
    own = [n for n in registry.methods if not n.startswith("fedpft-") and n not in without]
    assert all(re.search(r"20\d\d|arXiv", registry.methods[name].summary) for name in own)


def test_methods_of_one_file_are_told_apart_by_their_own_words(tmp_path: Path) -> None:
    path = tmp_path / "two.py"
    path.write_text(
        '"""Two methods."""\n'
        'class A(Base):\n    """The first."""\n    name = "a"\n    needs = "sum"\n'
        'class B(Base):\n    """The second."""\n    name = "b"\n'
    )
    found = Registry((str(path),)).methods
    assert [(found[n].summary, found[n].needs) for n in "ab"] == [("The first.", "sum"), ("The second.", "")]
