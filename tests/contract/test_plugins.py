"""The doors for methods of others, used as the documentation says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Invoke, save_tiny_bert

import fedbench.scenarios

ROOT = Path(__file__).parents[2]


def documented_method() -> str:
    """The Python block of docs/adding-a-method.md."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/adding-a-method.md").read_text(), re.S | re.M)
    return str(code)


def call(python: Path | str, *arguments: object, cwd: Path) -> str:
    run = subprocess.run(
        [str(python), "-m", "fedbench.cli.app", *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def fm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("fm") / "bert")


@pytest.fixture
def here(invoke: Invoke) -> Callable[..., str]:
    """What the command line prints, called in this process."""

    def call(*arguments: object) -> str:
        code, out, err = invoke(*arguments)
        assert not code, (out, err)
        return out

    return call


def test_the_documented_method_is_short_and_runs_as_a_plugin(
    tmp_path: Path, fm: Path, monkeypatch: pytest.MonkeyPatch, here: Callable[..., str]
) -> None:
    code = documented_method()
    assert len(code.splitlines()) <= 40
    (tmp_path / "fedprox_lora.py").write_text(code)
    plugin = ("--plugin", "fedprox_lora.py")
    monkeypatch.chdir(tmp_path)
    listed = here("list", "methods", *plugin, "--check")
    assert "FedProx on LoRA adapters" in listed
    smoke = ("--scenario", "tweets-noniid", "--profile", "smoke", "--fm", fm, "--device", "cpu")
    for mu in (0, 10):
        here("run", "--method", "fedprox-lora", *plugin, *smoke, "--set", f"mu={mu}")
    assert len(list(tmp_path.glob("runs/records/tweets-noniid/fedprox-lora/s0-*.json"))) == 2
    assert "fedprox-lora" in here("table")


def test_the_documented_method_keeps_the_contract(
    tmp_path: Path, fm: Path, monkeypatch: pytest.MonkeyPatch, here: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fedprox_lora.py").write_text(documented_method())
    out = here("check", "fedprox-lora", "--plugin", "fedprox_lora.py", "--fm", fm)
    assert "fails" not in out


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """The interpreter of a fresh environment that sees the packages of this one, fedbench among them."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")}))
    # addsitedir rather than a bare path: an editable install lives in a .pth file of its own.
    (site / "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return python


@pytest.mark.skipif(os.name == "nt", reason="lays out the environment as on POSIX")
def test_a_distribution_with_entry_points(tmp_path: Path, scratch: Path, fm: Path) -> None:
    project = tmp_path / "project"
    package = project / "tiny_federated"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "fedprox.py").write_text(documented_method().replace("fedprox-lora", "tiny-prox"))
    tweets = (Path(fedbench.scenarios.__path__[0]) / "tweets.toml").read_text()
    (package / "short_texts.toml").write_text(tweets)
    (project / "pyproject.toml").write_text(
        textwrap.dedent(
            """
            [build-system]
            requires = ["setuptools"]
            build-backend = "setuptools.build_meta"
            [project]
            name = "tiny-federated"
            version = "1.0"
            description = "A method and a scenario of somebody else"
            [project.entry-points."fedbench.methods"]
            tiny-prox = "tiny_federated.fedprox:FedProxLora"
            [project.entry-points."fedbench.scenarios"]
            short-texts = "tiny_federated:short_texts.toml"
            [tool.setuptools]
            packages = ["tiny_federated"]
            package-data = { tiny_federated = ["*.toml"] }
            """
        )
    )
    pip = [sys.executable, "-m", "pip", "--python", scratch, "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", project], check=True)
    listed = call(scratch, "list", cwd=tmp_path)
    assert re.search(r"tiny-prox\s+A method and a scenario of somebody else\s+the package tiny-federated", listed)
    call(
        scratch, "run", "--method", "tiny-prox", "--scenario", "short-texts-noniid", "--profile", "smoke",
        "--fm", fm, "--device", "cpu", cwd=tmp_path,
    )  # fmt: skip
    assert list(tmp_path.glob("runs/records/short-texts-noniid/tiny-prox/s0-*.json"))
