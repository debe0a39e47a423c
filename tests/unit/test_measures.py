"""Gradient error, exposure, accuracy and random streams, on cases small enough to check by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import PADDED, tiny_fm, train_rows

from fedbench.api.local import AdamW, LocalTask
from fedbench.api.messages import Source
from fedbench.errors import DivergedError
from fedbench.machine.device import Execution
from fedbench.machine.memory import peak_memory, reset_peak
from fedbench.measures.accuracy import Evaluation, evaluate, per_client
from fedbench.measures.cost import step_flops
from fedbench.measures.exposure import Exposure
from fedbench.measures.gradient import aggregation_error, compare, gradient_error, gradients
from fedbench.models.cache import Frozen
from fedbench.objectives.classification import cross_entropy
from fedbench.records.text import pack_correct
from fedbench.rng import Streams


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_floating_point_operations_of_a_step_by_hand() -> None:
    """Of a BERT whose head alone is tuned: three layers of width 16 with 2 heads and FFN 24, three classes."""
    fm = tiny_fm()
    model = fm.build(None, torch.device("cpu"))
    data = train_rows(8)
    rows, width = 4, 3
    batches = [np.arange(rows), np.arange(rows, 2 * rows)]
    length = max(len(tokens) for tokens in (data.tokens or ())[:rows])
    task = LocalTask(
        frozen=Frozen("m", model),
        tunables={name: torch.zeros_like(p) for name, p in model.named_parameters() if name.startswith("classifier")},
        data=data,
        batches=batches,
        optimiser=AdamW(lr=0.1),
        loss=cross_entropy,
    )
    tokens = rows * length
    projections, attention, ffn = 4 * 16 * 16, 2 * length * 16, 2 * 16 * 24
    forward = 3 * 2 * tokens * (projections + attention + ffn) + 2 * rows * 16 * 16 + 2 * rows * 16 * width
    assert step_flops(task, torch.device("cpu")) == forward + 2 * rows * 16 * width, "backward: the classifier's weight"


def test_relative_error_and_cosine_by_hand() -> None:
    assert compare({"w": t(3, 4)}, {"w": t(3, 4)}) == {"error": 0.0, "cosine": pytest.approx(1.0)}
    assert compare({"w": t(0, 5)}, {"w": t(5, 0)}) == {"error": pytest.approx(2**0.5), "cosine": pytest.approx(0.0)}
    assert compare({"w": t(-1, 0)}, {"w": t(1, 0)}) == {"error": pytest.approx(2.0), "cosine": pytest.approx(-1.0)}


def test_an_error_is_over_all_tensors_and_what_is_missing_counts_as_zero() -> None:
    fm = {"a": t(3, 0), "b": t(0, 4), "c": t(12)}
    # Off by 1, 4 and 12 of a gradient of length 13; what the proxy has besides counts for nothing.
    found = compare({"a": t(3, 1), "b": t(0, 0), "more": t(100)}, fm)
    assert found["error"] == pytest.approx((1 + 16 + 144) ** 0.5 / 13)
    assert found["cosine"] == pytest.approx(9 / (13 * 10**0.5))
    assert compare({"a": t(2, 0)}, {"a": t(0, 0)}) == {"error": None, "cosine": None}
    assert compare({"a": t(0, 0)}, {"a": t(0.5, 0)}) == {"error": 1.0, "cosine": None}


def test_a_gradient_is_that_of_the_mean_over_all_rows_and_leaves_the_model_as_it_was() -> None:
    model, rows, names = (
        tiny_fm().build(None, torch.device("cpu")),
        train_rows(7),
        ["classifier.bias", "classifier.weight"],
    )
    model.requires_grad_(False)
    model.get_parameter("classifier.bias").requires_grad_(True)
    model.train()
    found = gradients(model, names, rows, Execution(), size=3)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["classifier.bias"]
    assert not model.training, "dropout is off"
    assert {g.dtype for g in found.values()} == {torch.float64}
    assert list(found) == names
    # One row at a time there is neither padding nor a batch.
    model.requires_grad_(True)
    batches = [rows.batch(np.array([i]), torch.device("cpu")) for i in range(7)]
    loss = sum(cross_entropy(model(**b.inputs).logits, b.labels).sum() for b in batches) / 7
    for name, grad in zip(names, torch.autograd.grad(loss, [model.get_parameter(n) for n in names]), strict=True):
        assert torch.allclose(found[name].float(), grad, rtol=1e-4, atol=1e-6)


def test_averaging_factors_by_hand() -> None:
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.0]])
    clients = [{"q.lora_A.w": a, "q.lora_B.w": b}, {"q.lora_A.w": -a, "q.lora_B.w": -b}]
    # Both products are the same matrix, and the factors cancel: everything is lost.
    assert aggregation_error(clients, [1, 1]) == pytest.approx(1.0)
    # With shares 3/4 and 1/4 the mean factors are halves, and their product a quarter.
    assert aggregation_error(clients, [3, 1]) == pytest.approx(0.75)
    assert aggregation_error([clients[0], clients[0]], [2, 5]) == pytest.approx(0.0)
    assert aggregation_error([{"head": a}], [1]) is None
    # Over all pairs: half of what there is is lost, so is 1 / sqrt(2) of its length.
    both = [each | {f"v.{n.removeprefix('q.')}": abs(v) for n, v in each.items()} for each in clients]
    assert aggregation_error(both, [1, 1]) == pytest.approx(0.5**0.5)
    assert aggregation_error([{"q.lora_A.w": a, "q.lora_B.w": 0 * b}], [1]) is None


def test_what_the_proxy_lacks_counts_as_zero_only_when_zero_filled() -> None:
    layer = {"l0.a": 0, "l1.a": 1}
    block = gradient_error(
        {"l0.a": t(3), "head": t(0)}, {"l0.a": t(3), "l1.a": t(4), "head": t(0)}, layer.get, lambda n: n == "head"
    )
    assert block["restricted"]["error"] == 0.0
    assert block["zero_filled"]["error"] == pytest.approx(4 / 5)
    assert block["zero_filled"]["cosine"] == pytest.approx(3 / 5)
    assert block["head"] == {"error": None, "cosine": None}, "no reference, no number"
    assert block["lora"] == block["restricted"]
    parts = gradient_error({"l0.a": t(3), "head": t(2)}, {"l0.a": t(4), "head": t(1)}, layer.get, lambda n: n == "head")
    assert (parts["lora"]["error"], parts["head"]["error"]) == (1 / 4, 1.0)
    assert parts["restricted"]["error"] == pytest.approx((2 / 17) ** 0.5)
    reverse = {"l1.a": t(1), "l0.a": t(2), "l1.b": t(0)}
    sorted_layers = gradient_error({}, reverse, {**layer, "l1.b": 1}.get, lambda n: False)["layers"]
    assert [(each["layer"], each["error"]) for each in sorted_layers] == [(0, 1.0), (1, 1.0)]
    assert block["layers"] == [
        {"layer": 0, "error": 0.0, "cosine": pytest.approx(1.0)},
        {"layer": 1, "error": 1.0, "cosine": None},
    ]


def test_exposure_counts_elements_once_and_through_their_index() -> None:
    fm = {"emb.w": torch.ones(2, 2), "ffn.w": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])}
    exposure = Exposure(fm, "emb")
    row = {"sub.w": torch.tensor([[5.0, 6.03]])}
    exposure.observe(row, {"sub.w": Source("ffn.w", 0, torch.tensor([2]))})
    assert exposure.block()["verbatim"] == {"all": 1 / 10, "without_embeddings": 1 / 6}
    assert exposure.block()["within_1_percent"] == {"all": 2 / 10, "without_embeddings": 2 / 6}
    exposure.observe(row, {"sub.w": Source("ffn.w", 0, torch.tensor([2]))})
    exposure.observe({"emb.w": fm["emb.w"]}, {})
    assert exposure.block()["verbatim"] == {"all": 5 / 10, "without_embeddings": 1 / 6}
    again = Exposure(fm, "emb")
    again.restore(exposure.state())
    assert again.block() == exposure.block()


def test_exposure_through_columns() -> None:
    fm = {"w": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])}
    exposure = Exposure(fm, "emb")
    exposure.observe({"w": fm["w"][:, [0, 2]]}, {"w": Source("w", 1, torch.tensor([0, 2]))})
    assert exposure.block()["verbatim"]["all"] == 4 / 6


def test_what_is_no_part_of_the_fm_is_not_exposed_and_hides_nothing_behind_it() -> None:
    fm = {"w": torch.tensor([[-1.0, 2.0], [0.0, 4.0]]), "table": torch.arange(3), "embedding": torch.ones(4)}
    exposure = Exposure(fm, "embed")
    assert exposure.block()["verbatim"] == {"all": 0.0, "without_embeddings": 0.0}
    sent = {
        "lora": torch.ones(2),
        "table": torch.arange(3),
        "narrow": torch.ones(1, 1),
        "w": torch.tensor([[-1.005, 2.03], [1e-9, 4.0]]),
    }
    exposure.observe(sent, {"narrow": Source("w", 0, torch.tensor([0]))})
    # Of 8 elements: one is the same, and another is within 1%; a zero is near to itself alone.
    assert exposure.block()["verbatim"] == {"all": 1 / 8, "without_embeddings": 1 / 8}, "embed. is no part of it"
    assert exposure.block()["within_1_percent"]["all"] == 2 / 8
    exposure.observe({"w": torch.zeros(2, 2)}, {})
    assert exposure.block()["within_1_percent"]["all"] == 3 / 8, "what was sent stays sent"
    assert Exposure({}, "embed").block()["verbatim"] == {"all": 0.0, "without_embeddings": 0.0}


def test_an_fm_in_half_precision_is_near_it_and_verbatim_where_that_is_exact() -> None:
    fm = {"w": torch.tensor([1.0, 1.0 / 3.0])}
    exposure = Exposure(fm, "emb")
    exposure.observe({"w": fm["w"].half()}, {})
    assert exposure.block()["verbatim"]["all"] == 1 / 2
    assert exposure.block()["within_1_percent"]["all"] == 1.0


@pytest.mark.parametrize(
    "first", [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([2.0, 1.0])}], ids=["w", "turned"]
)
def test_a_tensor_that_is_out_whole_is_not_compared_again(first: dict[str, torch.Tensor]) -> None:
    exposure = Exposure({"w": torch.tensor([1.0, 2.0]), "v": torch.ones(2)}, "emb")
    exposure.observe(first, {"w": Source("w", 0, None if first["w"][0] == 1 else torch.tensor([1, 0]))})
    assert exposure.block()["verbatim"]["all"] == 1 / 2

    class Unread(torch.Tensor):
        def detach(self) -> torch.Tensor:
            raise AssertionError("looked at again")

    exposure.observe({"w": torch.zeros(2).as_subclass(Unread), "v": torch.ones(2)}, {})
    assert exposure.block()["verbatim"]["all"] == 1.0
    # A resumed run starts from masks that are not whole.
    exposure.restore({n: torch.zeros_like(m) for n, m in exposure.state().items()})
    exposure.observe({"w": torch.tensor([1.0, 2.0])}, {})
    assert exposure.block()["verbatim"]["all"] == 1 / 2


def test_what_comes_near_first_and_verbatim_later_is_verbatim_then() -> None:
    fm = {"w": torch.tensor([1.0, 2.0]), "v": torch.tensor([4.0])}
    exposure = Exposure(fm, "emb")
    exposure.observe({"w": torch.tensor([1.001, 2.001])}, {})
    assert [block["all"] for block in exposure.block().values()] == [0.0, 2 / 3]
    exposure.observe(fm, {})  # whole tensors, one behind the other
    assert [block["all"] for block in exposure.block().values()] == [1.0, 1.0]


def test_precision_is_that_of_the_forward_pass() -> None:
    model, rows = tiny_fm().build(None, torch.device("cpu")), train_rows(9)
    with torch.no_grad():
        model.get_parameter("classifier.weight").normal_(generator=torch.Generator().manual_seed(0))
    losses = [evaluate(model, rows, 4, Execution(precision=p)).loss for p in ("fp32", "fp32", "bf16")]
    assert losses[0] == losses[1]
    assert losses[2] != losses[1]
    assert losses[2] == pytest.approx(losses[1], rel=0.05)


def test_rows_without_finite_logits_are_counted_over_all_batches() -> None:
    model, rows = tiny_fm().build(None, torch.device("cpu")), train_rows(12)
    marked = [tokens for i, tokens in enumerate(rows.tokens or ()) if i in (0, 5, 11)]
    for tokens in marked:
        tokens[1] = 1  # the unknown word, which no other row has
    with torch.no_grad():
        model.get_parameter("bert.embeddings.word_embeddings.weight")[1] = float("nan")
    # Row by row: in a block of rows, zero times what is not a number is none either.
    with pytest.raises(DivergedError, match="^3 of 12 rows have logits that are not finite$"):
        evaluate(model, rows, 4, PADDED)


def test_a_model_is_scored_row_by_row_whatever_its_batches() -> None:
    model, rows = tiny_fm().build(None, torch.device("cpu")), train_rows(9)
    with torch.no_grad():
        model.get_parameter("classifier.weight").normal_(generator=torch.Generator().manual_seed(0))
        alone = torch.cat([model(**rows.batch(np.array([i]), torch.device("cpu")).inputs).logits for i in range(9)])
    model.train()
    found = evaluate(model, rows, 4, Execution())
    assert not model.training
    assert found.predicted.tolist() == alone.argmax(-1).tolist()
    assert found.predicted.dtype == np.int64
    assert len(set(found.predicted.tolist())) > 1
    assert found.labels.tolist() == rows.labels.tolist()
    assert found.loss == pytest.approx(cross_entropy(alone, rows.labels).mean().item(), rel=1e-4)
    block = found.block(rows=True)
    scores = {"accuracy": found.accuracy, **found.more_scores}
    assert list(scores) == ["accuracy", "macro_f1"]
    assert found.block() == scores | {"loss": found.loss, "rows": 9}
    assert block == found.block() | {"correct": pack_correct(found.correct)}


def test_macro_f1_of_a_class_that_is_never_found_is_0() -> None:
    # Class 0: precision 1/2, recall 1; class 1 is never answered.
    assert Evaluation(np.array([0, 0]), np.array([0, 1]), 0.5).more_scores["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


def test_classes_without_test_rows_and_clients_without_rows_say_nothing() -> None:
    test = Evaluation(np.array([0, 1, 1]), np.array([0, 0, 1]), 0.5)  # class 0: 1/2, class 1: 1, class 2: no row
    counts = [[1, 0, 7], [0, 1, 0], [0, 0, 5], [0, 0, 0], *[[1, 1, 0]] * 18]
    found = per_client(test, test.labels, counts)
    assert found["values"] == [0.5, 1.0] + [0.75] * 18
    assert found["mean"] == 0.75
    assert found["std"] == pytest.approx((2 * 0.25**2 / 20) ** 0.5)
    assert found["worst_tenth"] == (0.5 + 0.75) / 2, "a tenth of 20 clients are two"
    thirds = Evaluation(np.array([0, 0, 1]), np.array([0, 0, 0]), 0.5)
    assert per_client(thirds, thirds.labels, [[3]])["values"] == [0.666667]


def test_accuracy_by_client_weighs_classes_by_the_clients_labels() -> None:
    test = Evaluation(np.array([0, 0, 1, 0]), np.array([0, 0, 1, 1]), 0.5)  # class 0: 100%, class 1: 50%
    assert test.accuracy == 0.75
    assert test.more_scores["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    found = per_client(test, test.labels, [[4, 0], [0, 4], [2, 2]])
    assert found["values"] == [1.0, 0.5, 0.75]
    assert found["mean"] == 0.75
    assert found["worst_tenth"] == 0.5


def test_a_stream_is_its_name() -> None:
    streams = Streams(1, "s")
    first = streams.numpy("client", 3, 7).random(4)
    torch.rand(5)
    np.random.default_rng(0).random(3)
    assert np.array_equal(first, streams.numpy("client", 3, 7).random(4))
    names = [("client", 3, 7), ("client", 37), ("client", 7, 3), ("cohort", 3)]
    seeds = {streams.integer(*name) for name in names}
    seeds |= {Streams(2, "s").integer(*names[0]), Streams(1, "t").integer(*names[0])}
    assert len(seeds) == 6
    assert streams.integer("partition") == 4638982311281648264, "a stream never changes between versions"


def test_a_peak_is_since_the_run_began_and_counts_what_the_process_still_holds() -> None:
    device = torch.device("cpu")
    reset_peak(device)
    before = peak_memory(device)
    held = np.ones(200 << 17)  # each a float64
    reset_peak(device)
    after = peak_memory(device)
    assert before is not None
    assert after is not None
    assert after > before + (190 << 20)
    assert held.all()
