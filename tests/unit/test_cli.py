"""The command line: what it loads, how it refuses, what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from helpers import save_tiny_bert

from fedbench import cli, engine
from fedbench.errors import FedbenchError

HEAVY = {"torch", "transformers", "peft", "datasets", "pandas", "scipy", "sklearn"}
Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Calls the command line in this process: arguments -> (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedbench", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        code = end.value.code
        return int(code or 0), *capsys.readouterr()

    return call


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
    program = (
        "import sys\n"
        f"sys.argv = ['fedbench', *{list(arguments)!r}]\n"
        "from fedbench.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('loaded', *sorted(name for name in sys.modules if '.' not in name))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not HEAVY & set(run.stdout.splitlines()[-1].split()[1:])


def test_help_names_every_command_and_teaches_a_first_one(invoke: Invoke) -> None:
    code, out, _ = invoke("--help")
    assert code == 0
    assert all(command in out for command in ("run", "list", "show", "grid", "table", "check", "doctor"))
    assert "fedbench run --method fedpft --scenario tweets-noniid" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--method", "fedptf", "--scenario", "tweets-noniid"], "no method 'fedptf'; did you mean"),
        (["run", "--method", "fedpft", "--scenario", "tweets-nonid"], "did you mean tweets-noniid"),
        (["show", "minilm"], "did you mean minilm-l6"),
        (["show", "tweets-iid", "--set", "rounds"], "--set rounds: write it as key=value"),
        (["show", "tweets-iid", "--set", "rounds=1", "--rounds", "2"], "give one of them"),
        (["show", "tweets-iid", "--set", "federation.roundz=1"], "federation.rounds"),
        (["show", "fedpft", "--set", "no_such=1"], "--set no_such: fedpft has no such hyper-parameter"),
        (["check", "fedpft", "--plugin", "no/such.py"], "--plugin no/such.py: no such"),
        (["grid", "no-such-grid"], "no-such-grid"),
        (["table", "--results", "no/such/folder"], "no/such/folder"),
        (["table", "--grid", "paper-iid", "--fm", "minilm"], "has no records of it; did you mean minilm-l6?"),
        (["table", "--grid", "paper-idd"], "there is no grid 'paper-idd'; did you mean paper-iid"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(invoke: Invoke, arguments: Sequence[str], message: str) -> None:
    code, _, err = invoke(*arguments)
    assert code == 2
    assert err.startswith("fedbench: ")
    assert message in err
    assert err.count("\n") == 1


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
        engine.choose_precision("fp16", engine.choose_device("cpu"))


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

    monkeypatch.setattr(engine, "run", stop)
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
    assert cli._pairs(["lr=1e-3", "a.b = c=d"], 2) == {"lr": "1e-3", "a.b": "c=d", "federation.rounds": "2"}
    with pytest.raises(FedbenchError, match="write it as key=value"):
        cli._pairs(["=3"], None)
