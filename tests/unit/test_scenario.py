"""Scenario files: every one of ours loads, and a mistake is named with its place and its fix."""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path

import pytest

import fedbench.scenarios
from fedbench.errors import FedbenchError
from fedbench.methods.fedpft import FedPFT
from fedbench.scenario.load import load_scenario
from fedbench.scenario.toml import split_names

FILES = sorted(Path(fedbench.scenarios.__path__[0]).glob("*.toml"))
MINIMAL = """
title = "T"
fm = "minilm-l6"
[dataset]
name = "tweets"
[splits.iid]
kind = "iid"
clients = 4
[federation]
rounds = 3
[evaluation]
every = 1
[profiles.smoke.federation]
rounds = 1
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_scenario_of_ours_loads_in_every_profile(path: Path) -> None:
    assert "iid" in split_names(path)
    profiles = tomllib.loads(path.read_text())["profiles"]
    assert "smoke" in profiles
    for split in split_names(path):
        for profile in (None, *profiles):
            scenario = load_scenario(path, split, profile)
            assert scenario.name == f"{path.stem}-{split}"
            assert scenario.federation.rounds >= 1


@pytest.mark.parametrize("name", ["qnli", "mnli", "qqp", "cifar10", "cifar100", "flowers102"])
def test_the_papers_scenarios_are_the_papers_and_their_profiles_are_not(name: str) -> None:
    path = next(p for p in FILES if p.stem == name)
    text = name in ("qnli", "mnli", "qqp")
    assert split_names(path) == (["iid", "dir1", "dir5", "dir10"] if text else ["iid", "dir"])
    whole, small, smoke = (load_scenario(path, "iid", profile) for profile in (None, "small", "smoke"))
    assert whole.fm == ("bert-base" if text else "vit-base")
    f = whole.federation
    assert (whole.split.clients, f.fraction, f.rounds, f.local_epochs, f.max_steps) == (100, 0.1, 100, 1, None)
    fedpft = FedPFT(**whole.methods["fedpft"])
    assert fedpft.retained(12) == (0, 11)
    assert (fedpft.lora_r, fedpft.lora_alpha, fedpft.lr, fedpft.lr_decay) == (8, 48, 8e-4, "linear")
    assert (fedpft.mu, fedpft.t, fedpft.p, fedpft.distil_lr) == (0.01, 10, 0.5, 6e-4)
    assert fedpft.align_lr == (6e-4 if text else 1e-3)
    assert {whole.methods[m]["lr"] for m in ("fedot", "fedavg-lora", "centralised-lora")} == {8e-4}
    assert small.fm == smoke.fm == ("minilm-l6" if text else "vit-digits")
    assert FedPFT(**small.methods["fedpft"]).retained(6) == (0, 5)
    assert FedPFT(**smoke.methods["fedpft"]).retained(3) == (0, 2)


@pytest.mark.parametrize("path", [p for p in FILES if p.stem in ("agnews", "sst2")], ids=lambda p: p.stem)
def test_the_papers_splits_do_not_touch_the_others(path: Path) -> None:
    for alpha in (1, 5, 10):
        scenario = load_scenario(path, f"dir{alpha}")
        assert (scenario.split.kind, scenario.split.alpha, scenario.split.clients) == ("dirichlet", alpha, 100)
        assert (scenario.federation.rounds, scenario.federation.fraction) == (100, 0.1)
    others = [load_scenario(path, split).federation.rounds for split in ("iid", "noniid")]
    assert max(others) < 100


def test_the_papers_splits_of_sst2_have_its_federation_and_its_settings() -> None:
    path = next(p for p in FILES if p.stem == "sst2")
    assert load_scenario(path, "paper-iid").split.kind == "iid"
    for split in ("paper-iid", "dir1", "dir5", "dir10"):
        whole, small = load_scenario(path, split), load_scenario(path, split, "small")
        f = whole.federation
        assert (whole.split.clients, f.fraction, f.rounds, f.local_epochs, f.max_steps) == (100, 0.1, 100, 1, None)
        fedpft = FedPFT(**whole.methods["fedpft"])
        assert (fedpft.lr, fedpft.lora_dropout, fedpft.t, fedpft.retained(12)) == (8e-4, 0.1, 10, (0, 11))
        assert (small.federation.rounds, small.federation.max_steps) == (12, 6)
    # The paper's settings do not reach the short splits, in whatever profile.
    for split, profile in itertools.product(("iid", "noniid"), (None, "small")):
        short = load_scenario(path, split, profile)
        assert (short.federation.rounds, short.federation.max_steps, short.evaluation.every) == (12, 6, 4)
        fedpft = FedPFT(**short.methods["fedpft"])
        assert (fedpft.lr, fedpft.lora_dropout, fedpft.t, fedpft.distil_steps) == (2e-3, 0.0, 4, 100)


def test_layers_win_in_order_and_say_where_a_value_came_from(file: Path) -> None:
    scenario = load_scenario(file, "iid", "smoke", {"federation.batch_size": "2"})
    assert (scenario.federation.rounds, scenario.federation.batch_size) == (1, 2)
    origin = scenario.provenance()
    assert origin["federation.rounds"] == (1, "mine.toml [profiles.smoke]")
    assert origin["federation.batch_size"] == (2, "--set")
    assert origin["split.clients"] == (4, "mine.toml [splits.iid]")
    assert origin["federation.dropout"] == (0.0, "default")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (("rounds = 3", "rouns = 3"), r"federation\.rouns: unknown field; did you mean federation\.rounds"),
        (("rounds = 3", "rounds = -1"), r"mine\.toml: federation\.rounds: .*greater than or equal to 0"),
        (("title", "titel"), "unknown field 'titel'; did you mean title"),
        (("[splits.iid]", "[dataset.iid]"), r"no \[splits\.NAME\] table"),
        (("[splits.iid]", "[splits.idd]"), r"no split 'iid'; it has idd"),
        (
            ('kind = "iid"\nclients', 'kind = "iid"\ncleints'),
            r"split\.cleints: unknown field; did you mean split\.clients",
        ),
        (("rounds = 3", "rounds = 3\nfraction = nan"), r"federation\.fraction: .*finite number, not nan"),
        (
            ("clients = 4", "clients = 4\nalpha = 1e308"),
            r"split\.alpha: .*less than or equal to 1000000000, not 1e\+308",
        ),
        (("[splits.iid]", '[splits."x/../../.."]'), r"splits: 'x/\.\./\.\./\.\.' is no name"),
        (("[profiles.smoke.", '[profiles."a b".'), r"profiles: 'a b' is no name"),
        (('title = "T"', "title = 2024-05-01"), r"title: 2024-05-01 is a date"),
        (
            ("rounds = 3", "rounds = 3\n[methods.m]\nlr = [1, 07:32:00]"),
            r"methods\.m\.lr\.1: 07:32:00 is a date",
        ),
        (("rounds = 3", "rounds = 3\n[methods]\nm = 3"), r"methods has to hold tables"),
        (('title = "T"', 'title = "\\u001b[31mT"'), r"title: text may not hold control characters"),
        (('title = "T"', '"\\u0007" = "T"'), r"a name may not hold control characters"),
        (('fm = "minilm-l6"', 'fm = ""'), r"fm: string should have at least 1 character"),
        (("rounds = 3", "rounds = " + "9" * 5000), r"not TOML: .*digits"),
        (("rounds = 3", "rounds = " + "[" * 5000), r"not TOML: "),
        (("title =", "title"), "not TOML"),
        (('kind = "iid"\nclients = 4', 'kind = "quantity"\nclients = 4\nalpha = inf'), r"split\.alpha: .*finite"),
        (("[splits.iid]", "[[splits]]"), r"splits has to hold tables, written as \[splits\.NAME\]"),
    ],
)
def test_a_mistake_is_named(file: Path, edit: tuple[str, str], says: str) -> None:
    file.write_text(MINIMAL.replace(*edit))
    with pytest.raises(FedbenchError, match=says):
        load_scenario(file, "iid")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("federation.round", "3", "did you mean federation.rounds"),
        ("federation.rounds", "many", "--set federation.rounds"),
        ("nonsense", "1", "no such setting"),
        ("methods.fedptf.t", "3", "no such setting"),
    ],
)
def test_a_bad_override_is_named(file: Path, key: str, value: str, says: str) -> None:
    with pytest.raises(FedbenchError, match=says):
        load_scenario(file, "iid", None, {key: value})


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("federation.fraction", "nan", r"--set federation\.fraction: input should be a finite number, not nan"),
        ("federation.rounds", "2024-05-01", "is a date or a time"),
        ("federation.rounds", "9" * 5000, "--set federation.rounds: "),
        ("split.num_clients", "3", r"did you mean split\.clients\?"),
        ("federation.rounds", "-1", r"greater than or equal to 0, not -1"),
    ],
)
def test_odd_overrides_are_one_line(file: Path, key: str, value: str, says: str) -> None:
    with pytest.raises(FedbenchError, match=says) as caught:
        load_scenario(file, "iid", None, {key: value})
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_read_over_and_another_encoding_named(file: Path) -> None:
    file.write_text(MINIMAL, encoding="utf-8-sig")
    assert load_scenario(file, "iid").title == "T"
    file.write_text(MINIMAL, encoding="utf-16")
    with pytest.raises(FedbenchError, match="not in UTF-8; save it as that"):
        load_scenario(file, "iid")
    with pytest.raises(FedbenchError, match="cannot be read: Is a directory"):
        load_scenario(file.parent, "iid")


def test_the_identity_leaves_out_title_and_methods(file: Path) -> None:
    before = load_scenario(file, "iid").identity()
    file.write_text(MINIMAL.replace('"T"', '"Another"') + "[methods.m]\nlr = 1.0\n")
    assert load_scenario(file, "iid").identity() == before
    file.write_text(MINIMAL.replace("rounds = 3", "rounds = 4"))
    assert load_scenario(file, "iid").identity() != before


def test_a_profile_that_is_no_table_is_an_error(file: Path) -> None:
    file.write_text(MINIMAL.replace("[profiles.smoke.federation]\nrounds = 1", "[profiles]\nsmoke = 1"))
    with pytest.raises(FedbenchError, match="profiles has to hold tables"):
        load_scenario(file, "iid", "smoke")


def test_an_unknown_profile_is_an_error(file: Path) -> None:
    with pytest.raises(FedbenchError, match="no profile 'big'; it has smoke"):
        load_scenario(file, "iid", "big")
