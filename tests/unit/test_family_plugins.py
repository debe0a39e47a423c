"""A model family of a plugin, written as docs/adding-a-family.md says, on a small checkpoint in the real format."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SMALL, logits, random_values, save_tiny_bert, smoke_request, train_rows

from fedbench.errors import FedbenchError
from fedbench.models.build import build
from fedbench.models.families import known
from fedbench.models.families.bert import BERT
from fedbench.models.foundation import FoundationModel
from fedbench.models.parts import Parts
from fedbench.models.spec import LoraSpec, ModelSpec
from fedbench.models.weights import set_tensors, tunable_names
from fedbench.models.zoo.load import load_fm
from fedbench.registry import Registry
from fedbench.run.prepare import prepare
from fedbench.run.run import run

PAGE = Path(__file__).parents[2] / "docs/adding-a-family.md"
CPU = torch.device("cpu")
TARGETS = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")


def documented_family() -> str:
    """The Python block of docs/adding-a-family.md."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    return str(code)


@pytest.fixture(autouse=True)
def _families_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plugin adds is known in the whole process, so each test gets tables of its own."""
    monkeypatch.setattr(known, "FAMILIES", dict(known.FAMILIES))
    monkeypatch.setattr(known, "_plugins", {})


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    (tmp_path / "ernie.py").write_text(documented_family())
    return tmp_path / "ernie.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ERNIE."""
    import transformers

    folder = tmp_path_factory.mktemp("ernie") / "checkpoint"
    config = transformers.ErnieConfig(**SMALL, vocab_size=200, initializer_range=0.2)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        transformers.ErnieForSequenceClassification(config).save_pretrained(folder)
    save_tiny_bert(folder / "t")  # any tokenizer will do
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "t" / file).rename(folder / file)
    return folder


def load(plugin: Path, checkpoint: Path) -> FoundationModel:
    Registry([str(plugin)]).add_families()
    return load_fm(str(checkpoint), 3, checkpoint)


def test_a_family_that_nobody_describes_is_answered_with_how_to_add_one(checkpoint: Path) -> None:
    with pytest.raises(
        FedbenchError,
        match="model_type 'ernie' is not supported; known: bert, distilbert, electra, .*vit; docs/adding-a-family.md",
    ):
        load_fm(str(checkpoint), 3, checkpoint)
    spec = ModelSpec("ernie", {}, (24,))
    with pytest.raises(FedbenchError, match="model_type 'ernie' is not supported"):
        build(spec)


def test_a_plugin_brings_a_family_whose_logits_are_those_of_transformers(plugin: Path, checkpoint: Path) -> None:
    import transformers

    fm = load(plugin, checkpoint)
    model = fm.build(LoraSpec(2, 4), CPU)
    values = random_values(model)
    set_tensors(model, values)
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(
        checkpoint, num_labels=3, ignore_mismatched_sizes=True
    ).eval()
    used = set()
    with torch.no_grad():
        for i in range(3):
            for path in (f"ernie.encoder.layer.{i}.{target}" for target in TARGETS):
                a, b = (f"{path}.lora_{side}.default.weight" for side in "AB")
                stock.get_submodule(path).weight += 4 / 2 * values[b] @ values[a]
                used |= {a, b}
        for part in ("weight", "bias"):
            getattr(stock.classifier, part).copy_(values[f"classifier.{part}"])
            used.add(f"classifier.{part}")
        assert used == set(values) == set(tunable_names(model)), "LoRA on every projection, and the whole head"
        batch = train_rows(8).batch(np.arange(8))
        expected = stock(**batch.inputs).logits
        for packed in (False, True):
            assert torch.allclose(logits(model, batch, packed), expected, rtol=1e-3, atol=1e-4)


def test_the_hooks_of_a_plugins_family_see_what_the_ffn_computes(plugin: Path, checkpoint: Path) -> None:
    model = load(plugin, checkpoint).build(None, CPU)
    parts = Parts(model)
    seen = {}
    for path in (parts.ffn_in_path(1), parts.ffn_activation_path(1), parts.ffn_out_path(1)):
        model.get_submodule(path).register_forward_hook(lambda _m, i, o, path=path: seen.update({path: (i[0], o)}))
    with torch.no_grad():
        logits(model, train_rows(4).batch(np.arange(4)), packed=False)
    wide, (_, active) = seen[parts.ffn_in_path(1)][1], seen[parts.ffn_activation_path(1)]
    assert torch.allclose(active, torch.nn.functional.gelu(wide), atol=1e-6)
    assert torch.equal(seen[parts.ffn_out_path(1)][0], active)


@pytest.mark.parametrize("method", ["fedavg-lora", "fedpft"])
def test_a_run_on_a_plugins_family_is_complete(tmp_path: Path, plugin: Path, checkpoint: Path, method: str) -> None:
    settings = {"t": "1", "r": "6"} if method == "fedpft" else {}
    asked = smoke_request(tmp_path, method, "tweets-noniid", checkpoint, **settings)
    record = run(prepare(replace(asked, plugins=(str(plugin),), workers=2)))
    assert record.status == "complete"
    assert record.accuracy.plug_in.rows == 60


def test_a_process_that_is_given_only_the_plugins_knows_their_families(plugin: Path, checkpoint: Path) -> None:
    fm = load(plugin, checkpoint)
    program = (
        "import sys\n"
        "from fedbench.registry import Registry\n"
        "from fedbench.models.spec import ModelSpec\n"
        "Registry([sys.argv[1]]).add_families()\n"
        "assert 'torch' not in sys.modules, 'nothing is imported before a model needs it'\n"
        "from fedbench.models.build import build\n"
        "print(type(build(ModelSpec.from_json(sys.argv[2]))).__name__)\n"
    )
    command = [sys.executable, "-c", program, str(plugin), fm.spec.to_json()]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.stdout.split() == ["ErnieForSequenceClassification"], ran.stderr


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("position_offset=0", "position_offset=3"),
        ('residual="attention.output"', 'residual="attention.self"'),
        ('ffn_norm="output.LayerNorm"', 'ffn_norm="attention.output.LayerNorm"'),
    ],
)
def test_a_description_that_gives_other_answers_than_transformers_is_refused(
    tmp_path: Path, plugin: Path, checkpoint: Path, right: str, wrong: str
) -> None:
    code = documented_family()
    assert right in code
    plugin.write_text(code.replace(right, wrong))
    asked = replace(smoke_request(tmp_path, "fedavg-lora", "tweets-noniid", checkpoint), plugins=(str(plugin),))
    with pytest.raises(FedbenchError, match="family 'ernie': its description gives other answers than transformers"):
        prepare(asked)


def test_a_path_that_leads_nowhere_is_an_error(plugin: Path, checkpoint: Path) -> None:
    plugin.write_text(documented_family().replace("intermediate.dense", "intermediate.up"))
    with pytest.raises(FedbenchError, match="has no ernie.encoder.layer.0.intermediate.up: its family's description"):
        load(plugin, checkpoint).build(None, CPU)


def test_the_description_is_part_of_the_fms_hash(tmp_path: Path, plugin: Path, checkpoint: Path) -> None:
    before = load(plugin, checkpoint).content_hash
    assert load_fm(str(checkpoint), 3, checkpoint).content_hash == before
    known.FAMILIES["ernie"] = replace(known.FAMILIES["ernie"], head=("classifier", "ernie.pooler"))
    assert load_fm(str(checkpoint), 3, checkpoint).content_hash != before


def test_two_descriptions_of_one_name_never_meet_in_one_process(tmp_path: Path, plugin: Path, checkpoint: Path) -> None:
    load(plugin, checkpoint)
    same, other = tmp_path / "same.py", tmp_path / "other.py"
    same.write_text(documented_family())
    Registry([str(same)]).add_families()
    other.write_text(documented_family().replace("token_types=True", "token_types=False"))
    with pytest.raises(FedbenchError, match="the family 'ernie' is described in two ways in one process"):
        Registry([str(other)]).add_families()
    with pytest.raises(FedbenchError, match="two plugins are called 'ernie'"):
        Registry([str(plugin), str(other)])


def test_a_broken_family_hurts_only_who_uses_it(tmp_path: Path, plugin: Path, checkpoint: Path) -> None:
    plugin.write_text("import no_such_library\n" + documented_family())
    Registry([str(plugin)]).add_families()
    assert load_fm(str(save_tiny_bert(tmp_path / "bert")), 3, tmp_path).family == BERT
    with pytest.raises(FedbenchError, match="family 'ernie' of --plugin .* cannot be imported: ModuleNotFoundError"):
        load_fm(str(checkpoint), 3, checkpoint)


def test_a_family_may_be_made_of_another(tmp_path: Path, plugin: Path, checkpoint: Path) -> None:
    fields = {"architecture": "ErnieForSequenceClassification", "embeddings": "ernie.embeddings"}
    given = ", ".join(f"{name}={value!r}" for name, value in {**fields, "layers": "ernie.encoder.layer"}.items())
    plugin.write_text(
        "from dataclasses import replace\n"
        "from fedbench.models.families.bert import BERT\n"
        "from fedbench.models.families.family import Family\n"
        f"ERNIE: Family = replace(BERT, name='ernie', {given})\n"
    )
    assert load(plugin, checkpoint).family == Registry([str(plugin)]).load_family("ernie")
