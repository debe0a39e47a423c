"""What a run ends with on screen: one panel that says what came out, what it cost and what it gave away."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fedbench.errors import one_line
from fedbench.records.record import Record
from fedbench.records.schema import Accuracy, Compute, Personal, Residual, Score
from fedbench.tables.formats import MEGA, megabytes, signed
from fedbench.tables.statistics import binomial_standard_error


def summary(record: Record) -> RenderableType:
    """The panel of one record, complete or failed."""
    who = record.identity
    title = Text(one_line(f"{who.method} on {who.scenario}, {who.fm or 'FM unknown'}, seed {who.seed}"))
    if record.error:
        reason = Text(one_line(f"failed: {record.error.type}: {record.error.message}"))
        return Panel(reason, title=title, title_align="left", border_style="red", expand=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _lines(record):
        table.add_row(name, Text(one_line(text)))
    return Panel(table, title=title, title_align="left", expand=False)


def _lines(record: Record) -> list[tuple[str, str]]:
    lines = [*_accuracy(record.accuracy), *_uploads(record), ("traffic", _traffic(record))]
    if setup := record.communication.setup_bytes:
        clients = len({c for r in record.rounds for c in r.cohort})
        lines.append(("", f"of it set-up {_mb(setup)}, once for each of {clients} clients"))
    if refused := record.communication.refused:
        lines.append(("", f"{len(refused)} uploads refused; the reasons are in the record"))
    if error := record.gradient_error:
        start, mean, final = map(_two_digits, (error.start, error.mean, error.final))
        lines.append(("gradient error", f"{start} at the start, {mean} on average, {final} at the end"))
    if line := _distilled(record.distillation):
        lines.append(("distillation", line))
    if exposure := record.exposure:
        verbatim, near = exposure.verbatim, exposure.within_1_percent
        text = (
            f"{_percent(verbatim.all)} of the FM's weights at a client verbatim, {_percent(near.all)} within 1% "
            f"(without embeddings {_percent(verbatim.without_embeddings)}, {_percent(near.without_embeddings)})"
        )
        lines.append(("exposure", text))
    lines += _cost(record.compute)
    sizes, skew = record.partition.sizes, record.partition.skew
    if sizes and skew:
        lines.append(("split", split_line(sizes, skew.to_json())))
    return lines


def split_line(sizes: Sequence[int], skew: Mapping[str, float]) -> str:
    """How many clients there are, how large, and how unlike, in one line; `skew` as a record holds it."""
    text = (
        f"{len(sizes)} clients of {min(sizes)} to {max(sizes)} rows; mean total variation "
        f"{skew['mean_total_variation']:.2f}, Gini of sizes {skew['gini']:.2f}"
    )
    words = skew.get("mean_jensen_shannon")
    return text if words is None else f"{text}, Jensen-Shannon of words {words:.2f} bits"


def _accuracy(accuracy: Accuracy) -> list[tuple[str, str]]:
    plug_in, proxy, chosen = accuracy.plug_in, accuracy.proxy, accuracy.selection
    if plug_in is None and accuracy.personal:
        return [
            ("accuracy", "none of one model for all: clients have their own"),
            _personal(accuracy.personal),
        ]
    if plug_in is None or chosen is None:
        return [("accuracy", f"not available: {accuracy.unavailable}")]
    if plug_in.accuracy is None or plug_in.diverged:
        return [("accuracy", "none: the model diverged, its loss on the test set is not a finite number")]
    when = f"best round on validation ({chosen.round + 1})" if chosen.rule == "best" else "last round"
    if plug_in.perplexity is not None and plug_in.acc_norm is None:
        # Tokens of one row are not independent, so no standard error follows from how many there are.
        about = f"perplexity {plug_in.perplexity:,.4g}  ({plug_in.tokens or 0:,} tokens of {plug_in.rows:,} test rows"
    else:
        error = binomial_standard_error(plug_in.accuracy, plug_in.rows)
        tested = f"{plug_in.rows:,} test rows, standard error {100 * error:.2f} points"
        other = "macro-F1" if plug_in.acc_norm is None else "acc_norm"
        about = f"{other} {_percent(plug_in.macro_f1 if plug_in.acc_norm is None else plug_in.acc_norm)}  ({tested}"
    lines = [("accuracy", f"{_percent(plug_in.accuracy)} plug-in, {about}; {when})")]
    for name, score in (("plug-in", plug_in), ("proxy", proxy), ("FM untouched", accuracy.untouched)):
        if score and (written := _written(score)):
            lines.append(("", f"{written} of answers that the {name} wrote"))
    if proxy and proxy.diverged:
        lines.append(("", "none of the proxy: it diverged, its loss on the test set is not a finite number"))
    elif proxy:
        gap = "–" if accuracy.gap is None else signed(100 * accuracy.gap)
        text = f"{_percent(proxy.accuracy)} proxy; plug-in minus proxy {gap} points"
        lines.append(("", text))
    if (untouched := accuracy.untouched) and not untouched.diverged:
        more = "" if untouched.perplexity is None else f", perplexity {untouched.perplexity:,.4g}"
        lines.append(("", f"{_percent(untouched.accuracy)} FM untouched{more}"))
    for name, extra in (accuracy.extra_tests or {}).items():
        if not extra.plug_in.diverged:
            text = f"{_percent(extra.plug_in.accuracy)} plug-in on {name} ({extra.plug_in.rows:,} rows)"
            lines.append(("", text))
    if clients := accuracy.per_client:
        text = f"mean {_percent(clients.mean)} ± {100 * clients.std:.1f}, worst tenth {_percent(clients.worst_tenth)}"
        if rows := clients.rows:
            text += f"; {len(rows)} clients on {min(rows)} to {max(rows)} test rows of their own"
        lines.append(("per client", text))
    if accuracy.personal:
        lines.append(_personal(accuracy.personal))
    return lines


def _personal(models: Personal) -> tuple[str, str]:
    """What clients' own models reach, which is of other rows than the accuracy of one model."""
    rows = models.rows or [0]
    whose = "test rows drawn in its label shares" if models.drawn else "test rows of its own"
    text = (
        f"mean {_percent(models.mean)} ± {100 * models.std:.1f}, worst tenth {_percent(models.worst_tenth)}; models of "
        f"{len(models.values)} clients, each on {min(rows)} to {max(rows)} {whose}"
    )
    return "personal", text + (f"; {models.without} clients never trained" if models.without else "")


def _written(score: Score) -> str:
    """Scores of answers that a model wrote, in words; nothing where there are none."""
    shares = {"exact match": score.exact_match, "ROUGE-L": score.rouge_l}
    return ", ".join(f"{name} {_percent(share)}" for name, share in shares.items() if share is not None)


def _uploads(record: Record) -> list[tuple[str, str]]:
    """What has to be said where not every round had an upload."""
    if not (without := record.rounds_without_upload):
        return []
    return [("uploads", record.no_upload or f"none in {without} of {len(record.rounds)} rounds")]


def _traffic(record: Record) -> str:
    """Both directions, by kind where there is more than one."""
    parts = []
    for way, side in (("up", record.communication.up), ("down", record.communication.down)):
        if side is None:
            continue
        kinds = side.by_kind
        split = ", ".join(f"{kind} {_mb(kinds[kind].bytes)}" for kind in sorted(kinds)) if len(kinds) > 1 else ""
        parts.append(f"{way} {_mb(side.bytes)}" + (f" ({split})" if split else ""))
    return "; ".join(parts)


def _distilled(residuals: Sequence[Residual]) -> str:
    """The hidden residual, as the mean of the layers: before and after, and its course."""
    if not residuals or any(r.hidden is None for r in residuals):
        return ""
    after = _mean([r.hidden for r in residuals])
    text = f"residual {after:.3f}"
    if all(r.hidden_before is not None for r in residuals):
        text = f"residual {_mean([r.hidden_before for r in residuals]):.3f} before, {after:.3f} after"
    if (length := min(len(r.curve) for r in residuals)) > 1:
        text += "; " + " ".join(f"{_mean([r.curve[i] for r in residuals]):.3f}" for i in range(length))
    return text


def _mean(values: Sequence[float | None]) -> float:
    return statistics.fmean(value for value in values if value is not None)


def _cost(compute: Compute) -> list[tuple[str, str]]:
    lines = []
    trained, held = compute.trainable_parameters, compute.resident_parameters
    if held:
        steps = f"{compute.local_steps or 0:,} steps"
        if flops := compute.step_flops:
            steps += f" of {flops / 1e9:.1f} GFLOP"
        lines.append(("client", f"{held / MEGA:.2f} M parameters, {(trained or 0) / MEGA:.3f} M trained; {steps}"))
    seconds = compute.seconds
    longest = sorted(seconds.items(), key=lambda item: -item[1])[:4]
    split = ", ".join(f"{name} {value:.0f}" for name, value in longest if value >= 0.5)
    text = f"{sum(seconds.values()):.0f} s" + (f" ({split})" if split else "")
    if peak := compute.peak_memory_bytes:
        text += f"; peak memory {_mb(peak)}"
    lines.append(("time", text))
    return lines


def _two_digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"


def _mb(size: float) -> str:
    return f"{megabytes(size)} MB"
