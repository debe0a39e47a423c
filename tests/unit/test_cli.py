"""The command line: what it loads, how it refuses, what it prints."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import Invoke, save_tiny_bert

from fedbench.cli.app import app
from fedbench.cli.options import pairs
from fedbench.errors import FedbenchError
from fedbench.machine.device import choose_device, choose_precision
from fedbench.run import run as running

HEAVY = {"torch", "transformers", "peft", "datasets", "pandas", "scipy", "sklearn"}


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("fm") / "bert", layers=2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["run", "--help"],
        ["list"],
        ["show", "tweets-noniid"],
        ["run", "--method", "fedpft", "--scenario", "x"],
    ],
)
def test_light_commands_load_nothing_heavy(arguments: Sequence[str]) -> None:
    assert not HEAVY & loaded(arguments)


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        # Where an option of its own is given, typer itself loads pydantic.
        (["list"], {"pydantic", "numpy", "fedbench.scenario.tables", "fedbench.records", "fedbench.run"}),
        (["--help"], {"numpy", "fedbench.registry", "fedbench.scenario"}),
        (["--version"], {"numpy", "fedbench.registry", "fedbench.scenario"}),
    ],
)
def test_what_answers_at_once_loads_only_what_it_needs(arguments: Sequence[str], unwanted: set[str]) -> None:
    assert not unwanted & loaded(arguments)


def loaded(arguments: Sequence[str]) -> set[str]:
    """The modules that a command has loaded when it is done."""
    program = (
        "import sys\n"
        f"sys.argv = ['fedbench', *{list(arguments)!r}]\n"
        "from fedbench.cli.app import app, main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('loaded', *sorted(sys.modules))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split()[1:])


def test_help_names_every_command_and_teaches_a_first_one(invoke: Invoke) -> None:
    code, out, _ = invoke("--help")
    assert code == 0
    assert all(command in out for command in ("run", "list", "show", "grid", "table", "check", "doctor"))
    assert "fedbench run --method fedpft --scenario tweets-noniid" in out


def test_every_command_has_a_file_of_its_own() -> None:
    found = {command.name: command.callback for command in app.registered_commands}
    assert len(found) == len(app.registered_commands) == 13
    for name, call in found.items():
        assert call is not None
        assert (call.__module__, call.__name__) == (f"fedbench.cli.{name}", f"{name}_command")
        assert call.__doc__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--method", "fedptf", "--scenario", "tweets-noniid"], "no method 'fedptf'; did you mean"),
        (["run", "--method", "fedpft", "--scenario", "tweets-nonid"], "did you mean tweets-noniid"),
        (["show", "minilm"], "did you mean minilm-l6"),
        (["run", "--method", "fedpft", "--scenario", "tweets-iid", "--silos", "2"], "the host 'here' has no silos"),
        (
            ["server", "--method", "fedpft", "--scenario", "tweets-iid", "--addresses", "README.md"],
            "--addresses README.md, line 2: not an address; write eid,rank,grpc_server_ip,grpc_server_port",
        ),
        (
            ["silo", "1", "--method", "fedpft", "--scenario", "tweets-iid", "--addresses", "no/such.csv"],
            "--addresses no/such.csv: cannot be read",
        ),
        (["show", "tweets-iid", "--set", "rounds"], "--set rounds: write it as key=value"),
        (["show", "tweets-iid", "--set", "rounds=1", "--rounds", "2"], "give one of them"),
        (["show", "tweets-iid", "--set", "federation.roundz=1"], "federation.rounds"),
        (["show", "fedpft", "--set", "no_such=1"], "--set no_such: fedpft has no such hyper-parameter"),
        (["check", "fedpft", "--plugin", "no/such.py"], "--plugin no/such.py: no such"),
        (["grid", "no-such-grid"], "no-such-grid"),
        (["table", "--results", "no/such/folder"], "no/such/folder"),
        (["report", "no/such/folder"], "no/such/folder: no such folder; name one with records in it"),
        (["report", "docs"], "docs: there are no records; make some with `fedbench run`"),
        (["report", "results", "-o", "docs"], "--out docs: a folder is there; name a file"),
        (["run", "--method", "fedpft", "--scenario", "tweets-iid", "--fm", ""], "--fm: an empty value; leave"),
        (["grid", "quickstart", "--fm", " "], "--fm: an empty value"),
        (["run", "--method", "fedpft", "--scenario", "tweets-iid", "--data-dir", ""], "--data-dir: an empty value"),
        (["list", "--plugin", ""], "--plugin: an empty value"),
        (["run", "--method", "x", "--scenario", "y", "--results", "pyproject.toml"], "a file is there, not a folder"),
        (["doctor", "--cache", "pyproject.toml"], "--cache pyproject.toml: a file is there, not a folder"),
        (["export", "record.json", "README.md"], "README.md: a file is there, not a folder"),
        (["export", "no/record.json", "out"], "no/record.json"),
        (["show", "tweets-iid", "--set", "rounds=1", "--set", "rounds=2"], "--set rounds: given twice"),
        (["show", "fedpft", "--set", "lr=1", "--set", "method.lr=2"], "--set method.lr: lr is set twice"),
        (["show", "fedpft", "--set", "learning_rate=1"], "did you mean lr?"),
        (["show", "fedpft", "--set", "method.learning_rate=1"], "did you mean lr?"),
        (["show", "fedpft", "--set", "num_clients=1"], "did you mean split.clients?"),
        (
            ["show", "fedpft", "--set", "lr=inf"],
            "hyper-parameter 'lr' of fedpft: input should be a finite number, not inf",
        ),
        (["show", "fedpft", "--set", "lr=NaN"], "hyper-parameter 'lr' of fedpft: input should be a finite number"),
        (["show", "fedpft", "--set", f"lr=1{'0' * 5000}"], "hyper-parameter 'lr' of fedpft: "),
        (["show", "fedpft", "--set", f"lr={'[' * 5000}"], "hyper-parameter 'lr' of fedpft: "),
        (
            ["show", "tweets-iid", "--set", "federation.fraction=nan"],
            "--set federation.fraction: input should be a fin",
        ),
        (["show", "tweets-iid", "--set", "federation.rounds=2024-05-01"], "is a date or a time"),
        (["show", "tweets-iid", "--profile", "two\nlines"], "no profile"),
        (["table", "--grid", "paper-iid", "--fm", "minilm"], "has no records of it; did you mean minilm-l6?"),
        (["table", "--within", "10"], "--within 10: write a number and a unit"),
        (["table", "--within", "2h"], "--within 2h: simulated time is that of one client profile; give --pro"),
        (["table", "--to", "80"], "--to 80: write a share or per cent of accuracy"),
        (["table", "--metric", "mb_upp"], "--metric mb_upp: no such measure; did you mean mb_up"),
        (["table", "--profile", "fone"], "--profile fone: no such client profile; did you mean phone"),
        (["table", "--profiles", "no/such.toml"], "no/such.toml: cannot be read"),
        (["table", "--results", "results", "--baseline", "fedpt"], "--baseline fedpt: no such method in these records"),
        (["table", "--results", "results", "--picture", "front.pdf"], "--picture front.pdf: name a file that ends in"),
        (["table", "--results", "docs", "--check"], "docs/tables: there are no tables"),
        (["table", "--grid", "paper-idd"], "there is no grid 'paper-idd'; did you mean paper-iid"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(invoke: Invoke, arguments: Sequence[str], message: str) -> None:
    code, _, err = invoke(*arguments)
    assert code == 2
    assert err.startswith("fedbench: ")
    assert message in err
    assert err.count("\n") == 1


def call_in_a_shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in which `fedbench` stands for this one, with bash's `pipefail`."""
    program = f'fedbench() {{ {shlex.quote(sys.executable)} -m fedbench.cli.app "$@"; }}; set -o pipefail; {command}'
    return subprocess.run(
        ["bash", "-c", program], env=os.environ | environment, capture_output=True, text=True, encoding="utf-8"
    )


@pytest.mark.skipif(os.name == "nt", reason="pipes as on POSIX")
@pytest.mark.parametrize("command", ["list", "show tweets-iid", "run --help"])
def test_a_reader_that_goes_is_no_error(command: str) -> None:
    """`true` reads nothing: whatever is written meets a closed pipe."""
    ran = call_in_a_shell(f"fedbench {command} | true")
    assert ran.returncode in (0, 141)
    assert ran.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_one_line() -> None:
    ran = call_in_a_shell("fedbench list methods > /dev/full")
    assert ran.returncode == 2
    assert ran.stderr == "fedbench: [Errno 28] No space left on device\n"


def test_a_terminal_that_knows_ascii_alone_gets_a_replacement(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('title = "Straße ±"\n[splits.iid]\nkind = "iid"\nclients = 2\n', "utf-8")
    ran = call_in_a_shell(f"fedbench list scenarios --plugin {tmp_path}/mine.toml", PYTHONIOENCODING="ascii")
    assert ran.returncode == 0, ran.stderr
    assert "Stra?e ?" in ran.stdout


def test_text_of_others_is_shown_as_it_is_written(invoke: Invoke, tmp_path: Path) -> None:
    """Neither what a terminal acts on nor what looks like mark-up of ours."""
    (tmp_path / "mine.toml").write_text(
        'title = "[red]T[/nothing]"\nfm = "[/x]"\n[dataset]\nname = "d"\n[federation]\n[evaluation]\n'
        '[splits.iid]\nkind = "iid"\nclients = 2\n'
    )
    for arguments in (["list", "scenarios"], ["show", "mine-iid"]):
        code, out, _ = invoke(*arguments, "--plugin", tmp_path / "mine.toml")
        assert code == 0
        assert "[red]T[/nothing]" in out
    (tmp_path / "[red]\x1b[2J[x]").mkdir()
    code, out, _ = invoke("doctor", "--data-dir", tmp_path, "--cache", tmp_path)
    assert code == 0
    assert r"[red]\x1b[2J[x]" in out


def test_a_plugin_is_named_when_the_method_is_in_none(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "file.py"
    path.write_text("class A(Base):\n    name = 'other-name'\n")
    code, _, err = invoke("run", "--method", "file", "--scenario", "tweets-iid", "--plugin", path)
    assert code == 2
    assert err.endswith(f"; --plugin {path} brings other-name\n")


def test_a_file_the_machine_refuses_is_one_line(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "some/cache")

    monkeypatch.setattr("fedbench.run.prepare.prepare", refuse)
    code, _, err = invoke("run", "--method", "fedpft", "--scenario", "tweets-iid", "--results", tmp_path)
    assert (code, err) == (2, "fedbench: some/cache: Permission denied\n")


def test_a_seed_that_no_table_holds_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    code, _, err = invoke("run", "--method", "fedpft", "--scenario", "tweets-iid", "--seed", 10**30)
    assert code == 2
    assert "too large; use at most 9223372036854775807" in err


@pytest.mark.parametrize("option", [["--seed", "-1"], ["--workers", "0"], ["--rounds", "-1"]])
def test_numbers_out_of_range_are_refused_by_name(invoke: Invoke, option: list[str]) -> None:
    code, _, err = invoke("run", "--method", "fedpft", "--scenario", "tweets-iid", *option)
    assert code == 2
    assert option[0] in err


def test_a_split_cannot_name_a_place_outside_the_results(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('title = "T"\n[splits."x/../../../../up"]\nkind = "iid"\nclients = 2\n')
    arguments = [
        "run",
        "--method",
        "head-only",
        "--scenario",
        "mine-x/../../../../up",
        "--results",
        tmp_path / "a" / "b",
    ]
    code, _, err = invoke(*arguments, "--plugin", tmp_path / "mine.toml")
    assert code == 2
    assert "splits: 'x/../../../../up' is no name" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.toml"]


def test_list_narrows(invoke: Invoke) -> None:
    code, out, _ = invoke("list", "methods")
    assert code == 0
    assert "fedpft" in out
    assert "tweets-noniid" not in out
    assert "minilm-l6" in invoke("list", "fms")[1]
    assert "tweets-noniid" in invoke("list", "scenarios")[1]


def test_list_check_shows_broken_plugins_and_goes_on(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "broken_here.py").write_text("import no_such_library_here\n")
    code, out, _ = invoke("list", "--plugin", tmp_path)
    assert code == 0
    assert "broken-here" in out
    assert "no_such_library_here" not in out
    code, out, _ = invoke("list", "methods", "--check", "--plugin", tmp_path)
    assert code == 0
    assert "No module named 'no_such_library_here'" in out
    assert "fedavg-lora" in out


def test_show_says_where_settings_come_from(invoke: Invoke) -> None:
    code, out, _ = invoke("show", "tweets-noniid", "--rounds", 3)
    assert code == 0
    rounds = next(line for line in out.splitlines() if line.startswith("federation.rounds"))
    assert rounds.split()[1] == "3"
    assert "--set" in rounds
    code, out, _ = invoke("show", "fedavg-lora", "--set", "lora_r=4")
    assert code == 0
    rank = next(line for line in out.splitlines() if line.startswith("lora_r"))
    assert rank.split() == ["lora_r", "4", "--set"]
    dropout = next(line for line in out.splitlines() if line.startswith("lora_dropout"))
    assert dropout.split()[-1] == "default"


def test_show_a_foundation_model(invoke: Invoke) -> None:
    code, out, _ = invoke("show", "minilm-l6")
    assert code == 0
    assert "MiniLM" in out


def run_arguments(results: Path, fm: Path) -> list[object]:
    return [
        "run", "--method", "fedavg-lora", "--scenario", "tweets-noniid", "--profile", "smoke", "--rounds", 1,
        "--fm", fm, "--device", "cpu", "--results", results,
    ]  # fmt: skip


def test_run_writes_a_record_and_again_compares(invoke: Invoke, tmp_path: Path, tiny_bert: Path) -> None:
    code, out, err = invoke(*run_arguments(tmp_path, tiny_bert))
    assert code == 0, err
    (path,) = tmp_path.glob("records/tweets-noniid/fedavg-lora/s0-*.json")
    assert str(path) in out
    assert json.loads(path.read_text())["status"] == "complete"

    code, out, _ = invoke(*run_arguments(tmp_path, tiny_bert))
    assert code == 0
    assert "identical to the record" in out

    record = json.loads(path.read_text())
    record["compute"]["local_steps"] += 1
    path.write_text(json.dumps(record))
    code, out, _ = invoke(*run_arguments(tmp_path, tiny_bert))
    assert code == 1
    assert "differs from the record that was there before in: compute.local_steps" in out

    code, out, _ = invoke("table", "--results", tmp_path)
    assert code == 0
    assert "fedavg-lora" in out
    assert "tweets-noniid" in out
    code, out, _ = invoke("table", "--results", tmp_path, "--format", "csv", "--scenario", "tweets-noniid")
    assert code == 0
    assert "," in out.splitlines()[0]


def test_a_table_beside_reported_figures_without_any_record(invoke: Invoke, tmp_path: Path) -> None:
    code, out, err = invoke("table", "--grid", "paper-iid", "--results", tmp_path, "--scenario", "mnli-iid")
    assert code == 0, err
    assert "80.7 / 81.6" in out
    assert "missing" in out
    assert "qnli" not in out
    code, out, err = invoke("table", "--grid", "paper-ablation", "--results", tmp_path, "--fm", "minilm-l6")
    assert code == 0, err
    assert "ours with minilm-l6, reported with roberta-base" in out


def test_precision_is_part_of_the_key_and_named_under_the_table(
    invoke: Invoke, tmp_path: Path, tiny_bert: Path
) -> None:
    code, _, err = invoke(*run_arguments(tmp_path, tiny_bert), "--precision", "bf16")
    assert code == 0, err
    (half,) = tmp_path.glob("records/tweets-noniid/fedavg-lora/s0-*.json")
    assert json.loads(half.read_text())["identity"]["precision"] == "bf16"
    assert "in bf16" in invoke("table", "--results", tmp_path)[1]
    invoke(*run_arguments(tmp_path, tiny_bert))
    paths = set(tmp_path.glob("records/tweets-noniid/fedavg-lora/s0-*.json"))
    assert len(paths) == 2
    (full,) = paths - {half}
    assert json.loads(full.read_text())["identity"]["precision"] == "fp32"
    code, _, err = invoke(*run_arguments(tmp_path, tiny_bert), "--precision", "fp16")
    assert code == 2
    assert "fp16" in err
    with pytest.raises(FedbenchError, match="--precision fp16: no such precision"):
        choose_precision("fp16", choose_device("cpu"))


def test_a_grid_at_another_fm_runs_every_cell_once(invoke: Invoke, tmp_path: Path, tiny_bert: Path) -> None:
    grid = tmp_path / "two.toml"
    grid.write_text(
        'methods = ["head-only"]\nscenarios = ["tweets-iid"]\nseeds = 1\nfms = ["bert-base", "roberta-base"]\n'
    )
    code, out, err = invoke(
        "grid", grid, "--fm", tiny_bert, "--profile", "smoke", "--device", "cpu", "--results", tmp_path / "runs"
    )
    assert code == 0, out + err
    assert "1 of 1 cells finished, 0 failed" in out
    (path,) = (tmp_path / "runs").glob("records/tweets-iid/head-only/*.json")
    assert json.loads(path.read_text())["identity"]["fm"] == tiny_bert.name
    code, out, _ = invoke("table", "--results", tmp_path / "runs", "--grid", grid, "--fm", tiny_bert, "--format", "csv")
    assert code == 0
    assert out.splitlines()[1].split(",")[4] == "complete"


def test_run_stopped_by_the_keyboard(
    invoke: Invoke, tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "run", stop)
    code, out, _ = invoke(*run_arguments(tmp_path, tiny_bert))
    assert code == 130
    assert "the same command goes on" in out


def test_missing_data_is_one_clear_line(invoke: Invoke, tmp_path: Path) -> None:
    code, _, err = invoke("run", "--method", "fedpft", "--scenario", "agnews-noniid", "--results", tmp_path)
    assert code == 2
    assert err.count("\n") == 1
    assert "--data-dir" in err


def test_doctor_says_what_is_there(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "ag_news").mkdir()
    code, out, _ = invoke("doctor", "--data-dir", tmp_path, "--cache", tmp_path / "none")
    assert code == 0
    assert "ag_news" in out
    assert "not made yet" in out
    assert "HF_HUB_OFFLINE is set" in out


def test_settings_pairs() -> None:
    assert pairs(["lr=1e-3", "a.b = c=d"], 2) == {"lr": "1e-3", "a.b": "c=d", "federation.rounds": "2"}
    with pytest.raises(FedbenchError, match="write it as key=value"):
        pairs(["=3"], None)
