"""The registry: three doors, names, collisions, broken plugins."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fedbench.errors import FedbenchError
from fedbench.registry import Registry, nearest, plugin_name

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
    write_method(tmp_path / "wrong_name.py", "another-name")
    (tmp_path / "no_method.py").write_text("")
    registry = Registry([str(tmp_path)])
    assert "cannot be parsed" in str(registry.methods["bad-syntax"].error)
    assert registry.load_method("fedavg-lora").name == "fedavg-lora"
    for name, reason in {
        "bad-syntax": "SyntaxError",
        "bad-import": "no_such_library_at_all",
        "exits": "SystemExit",
        "wrong-name": "name = 'wrong-name'.*it defines another-name",
        "no-method": "defines no Method",
    }.items():
        with pytest.raises(FedbenchError, match=reason):
            registry.load_method(name)
    assert registry.scenarios["bad-table"].error
    with pytest.raises(FedbenchError, match=r"bad_table\.toml"):
        registry.find_scenario("bad-table-iid")


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


@pytest.mark.parametrize("folder", ["methods", "scenarios"])
def test_folders_refuse_another_name(folder: str) -> None:
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", f"import {folder}"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "import it under that name" in run.stderr
