"""Text data sets that live outside the project: AG News and GLUE, as files or from the hub."""

from __future__ import annotations

from fedbench.data.formats.text import TextSource
from fedbench.data.sets.dataset import DataSet

GLUE = ("nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c")
GLUE_NOTE = "GLUE's validation file is the test set, since the labels of its test file are not public"

AGNEWS = DataSet(
    name="agnews",
    about="AG News: topics of news (folder or hub)",
    classes=("World", "Sports", "Business", "Sci/Tech"),
    source=TextSource(
        folders=("ag_news", "agnews", "ag_news_csv", "AG_NEWS"),
        hub=("fancyzhx/ag_news", "eb185aade064a813bc0b7f42de02595523103ca4", None, "test"),
        train=("train", "train_5k"),
        test=("test",),
    ),
)

SST2 = DataSet(
    name="sst2",
    about="GLUE's SST-2: sentiment of sentences on films (folder or hub)",
    classes=("negative", "positive"),
    source=TextSource(
        folders=("sst2", "SST-2", "sst-2", "SST2"),
        hub=(*GLUE, "sst2", "validation"),
    ),
    note=GLUE_NOTE,
)

QNLI = DataSet(
    name="qnli",
    about="GLUE's QNLI: whether a sentence answers a question (folder or hub)",
    classes=("entailment", "not_entailment"),
    source=TextSource(
        folders=("qnli", "QNLI"),
        hub=(*GLUE, "qnli", "validation"),
        columns=(("question",), ("sentence",)),
    ),
    note=GLUE_NOTE,
)

MNLI = DataSet(
    name="mnli",
    about="GLUE's MNLI: whether a sentence follows from another (folder or hub)",
    classes=("entailment", "neutral", "contradiction"),
    source=TextSource(
        folders=("mnli", "MNLI"),
        hub=(*GLUE, "mnli", "validation_matched"),
        columns=(("sentence1", "premise"), ("sentence2", "hypothesis")),
        label=("gold_label", "label"),
        test=("validation_matched", "dev_matched"),
        extra_tests={"mismatched": (("validation_mismatched", "dev_mismatched"), "validation_mismatched")},
    ),
    test_name="matched",
    note=GLUE_NOTE,
)

QQP = DataSet(
    name="qqp",
    about="GLUE's QQP: whether two questions ask the same (folder or hub)",
    classes=("not_duplicate", "duplicate"),
    source=TextSource(
        folders=("qqp", "QQP"),
        hub=(*GLUE, "qqp", "validation"),
        columns=(("question1",), ("question2",)),
        label=("is_duplicate", "label"),
        broken_rows=True,
    ),
    note=GLUE_NOTE,
)
