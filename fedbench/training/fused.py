"""Trains the clients of a round together, in one pass over the frozen backbone they share.

Clients of a round differ in their tunables (LoRA, head) and their rows; nearly all of the work is in the backbone,
which is the same for all. Their batches are laid end to end, client after client, and go through it as one; only the
modules that own tunables treat each client's part with that client's own values, stacked on a leading dimension. The
loss is the sum over clients of the mean over a client's own rows, so each client's gradient is what it would be alone;
clipping and the trainer's step work row by row on one matrix [clients, parameters].

The same mathematics as `fedbench.training.alone.execute`, client by client, which tests hold it to. It pays where a
batch of one client leaves the device idle: on a GPU, or on a CPU with threads to spare.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbench.api.local import LocalResult, LocalTask
from fedbench.data.examples import Batch, Examples
from fedbench.errors import FedbenchError
from fedbench.forward.feed import Forward, forward
from fedbench.forward.layout import Layout
from fedbench.machine.device import Execution
from fedbench.models.linear import FrozenLinear
from fedbench.training.alone import KNOWN, execute
from fedbench.training.common import has_dropout, observing, refuse_unknown, result_of, unknown_fields
from fedbench.training.rowwise import ROW_WISE

TOGETHER = KNOWN - {"observe_padding", "zeroth_order"}
"""The fields of a task that are honoured in a pass of several clients. (`seed` is of dropout, which keeps a task out.)

A new field is not among them before it is named here: what this file does not know is trained alone.
"""

CPU_TOKENS = 4096
"""Tokens in a pass on a CPU: more gain nothing there."""


def execute_cohort(
    tasks: Sequence[LocalTask],
    execution: Execution,
    chunk: int | None = None,
    segments: bool | None = None,
) -> list[LocalResult]:
    """Train every task as `training.alone.execute` does, together where they fit together; results in their order.

    Tasks fit together if they share backbone, names of tunables and of what is fixed, clipping, trainer, objective,
    observed modules, and whether they have a penalty; of a trainer's settings learning rate and weight decay may
    differ. Tasks with active dropout, with tunables in modules other than Linear and LayerNorm, with a trainer that is
    not in `training.rowwise.ROW_WISE`, or with a field set that is not among `TOGETHER` are trained one by one. Returns
    CPU tensors.

    chunk: most clients in a pass; None for what `clients_per_pass` says. segments: give all clients of a pass equal
    parts of it, which adds padding but takes far fewer calls; None for doing so on CUDA.

    Raises FedbenchError for a task with a field set that nobody here knows, before anything is trained, and when a
    loss is not finite, naming the step of that client.
    """
    for task in tasks:
        refuse_unknown(task, TOGETHER | KNOWN, execution.executor)
    if chunk is not None and chunk < 1:
        raise FedbenchError(f"chunk is {chunk}, expected a number of clients, at least 1")
    if segments is None:
        segments = execution.device.type == "cuda"
    groups: dict[Any, list[int]] = {}
    checked: dict[Any, bool] = {}
    for i, task in enumerate(tasks):
        groups.setdefault(_fusion_key(task, checked) or ("alone", i), []).append(i)
    results: dict[int, LocalResult] = {}
    for members in groups.values():
        if len(members) == 1:
            results[members[0]] = execute(tasks[members[0]], execution)
            continue
        # The longest first: those still training are then always the first rows.
        members.sort(key=lambda i: -len(tasks[i].batches))
        size = chunk or clients_per_pass([tasks[i] for i in members], execution)
        for start in range(0, len(members), size):
            part = members[start : start + size]
            trained = _train([tasks[i] for i in part], execution, segments)
            results |= zip(part, trained, strict=True)
    return [results[i] for i in range(len(tasks))]


def clients_per_pass(tasks: Sequence[LocalTask], execution: Execution) -> int:
    """How many of these clients to train in one pass, at least 1.

    On a CPU by `CPU_TOKENS`. On CUDA by memory: half of what is free, over the client's own state and what its largest
    batch keeps for the backward pass. A token keeps 4 bytes for each output of a Linear module; BERT and ViT were seen
    to keep 3.1 to 3.5, in fp32 and in bf16, whose casts are kept as well.
    """
    module, data, device = tasks[0].frozen.module, tasks[0].data, execution.device
    packed = Forward(module, execution.packed).packed and not tasks[0].objective.padded

    def tokens(task: LocalTask, rows: np.ndarray) -> int:
        lengths = task.data.lengths[rows]
        return int(lengths.sum() if packed else lengths.max() * len(lengths))

    most = max(tokens(task, rows) for task in tasks for rows in task.batches)
    if data.tokens is None:
        config: Any = module.config
        most *= (config.image_size // config.patch_size) ** 2 + 1
    if device.type != "cuda":
        return max(1, CPU_TOKENS // most)
    kept = most * 4 * sum(m.out_features for m in module.modules() if isinstance(m, nn.Linear))
    state = 6 * 4 * sum(v.numel() for v in tasks[0].tunables.values())  # value, gradient, moments, temporaries
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, int(free / 2 / (kept + state)))


# ---------------------------------------------------------------- which tasks fit together


def _owned(module: nn.Module, names: Collection[str]) -> dict[nn.Module, dict[str, str]]:
    """Modules that own tunables -> own name of the parameter -> tunable; a tied parameter has several owners."""
    known = {id(p): name for name, p in module.named_parameters() if name in names}
    return {
        m: own
        for m in module.modules()
        if (own := {role: known[id(p)] for role, p in m.named_parameters(recurse=False) if id(p) in known})
    }


def _supported(module: nn.Module) -> bool:
    # Exactly these types: a subclass may compute something else.
    return type(module) in _FORWARDS and (not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) == 1)


def _fusion_key(task: LocalTask, checked: dict[Any, bool]) -> Any:
    """What a task shares with those it can be trained with; None if it has to be trained alone.

    `checked` remembers what holds for all tasks of a module with the same tunables.
    """
    module, trainer = task.frozen.module, task.optimiser
    names, held = frozenset(task.tunables), frozenset(task.fixed)
    both = names | held
    if (module, both) not in checked:
        parameters = {n: p for n, p in module.named_parameters() if n in both}
        checked[module, both] = (
            len(parameters) == len(both) > 0
            and len({p.dtype for p in parameters.values()}) == 1
            and all(_supported(m) for m in _owned(module, both))
            and not has_dropout(module)
        )
    # What is wrong with a task (no rows, a tunable of another shape) `execute` says best.
    if not checked[module, both] or not names or names & held or not task.batches or unknown_fields(task, TOGETHER):
        return None
    # Exactly these types, here too: a trainer that extends one may step otherwise.
    if (step := ROW_WISE.get(type(trainer))) is None:
        return None
    if any(module.get_parameter(n).shape != v.shape for n, v in (*task.tunables.items(), *task.fixed.items())):
        return None
    data = task.data
    rows = data.objective, data.tokens is None, data.segments is None, data.pad_token, data.processor
    trained = task.clip_norm, step, step.shared(trainer), task.penalty is None
    return task.frozen.key, names, held, frozenset(task.observers), *trained, *rows


# ---------------------------------------------------------------- whose part of a pass is which


@dataclass(frozen=True)
class _Step:
    """The rows of one step of all clients still training, client after client.

    lengths: tokens of each of a client's rows; 1 for images. most: rows of the client that has most. slots: place of
    each row in the grid [k, most]. filled: what has a place for each row has one for each place of the grid; a client's
    first row takes those that are empty. layout: of the packed row; None where the batch is padded.
    """

    batch: Batch
    lengths: tuple[tuple[int, ...], ...]
    most: int
    slots: Tensor
    filled: bool
    layout: Layout | None

    @classmethod
    def of(cls, tasks: Sequence[LocalTask], number: int, device: torch.device, packed: bool, segments: bool) -> _Step:
        rows = [np.asarray(task.batches[number], dtype=np.int64) for task in tasks]
        most = max(map(len, rows))
        slots = np.concatenate([i * most + np.arange(len(own)) for i, own in enumerate(rows)])
        lengths = tuple(tuple(task.data.lengths[own].tolist()) for task, own in zip(tasks, rows, strict=True))
        if segments and not packed:
            rows = [np.pad(own, (0, most - len(own)), constant_values=own[0]) for own in rows]
        joined = Examples.joined([task.data.select(own) for task, own in zip(tasks, rows, strict=True)])
        batch = joined.batch(np.arange(len(joined)), device)
        layout = None
        if packed and batch.mask is not None:
            lay_out = Layout.of_segments if segments else Layout.of_clients
            layout = lay_out(lengths, batch.mask.shape[1], device)
        return cls(batch, lengths, most, torch.from_numpy(slots).to(device), segments, layout)

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows of each client."""
        return tuple(map(len, self.lengths))

    def rows(self, x: Tensor) -> Tensor:
        """The rows themselves of x, which has one for each of them or for each place of the grid."""
        return x if len(x) == len(self.slots) else x.index_select(0, self.slots)

    def sizes(self, positions: int) -> tuple[int, ...]:
        """Each client's share of the positions of an activation: of the packed row, or of rows of some positions."""
        if self.layout is not None and positions == sum(self.layout.sizes):
            return self.layout.sizes
        rows = (self.most,) * len(self.lengths) if self.filled else self.counts
        return tuple(positions // sum(rows) * n for n in rows)

    def real(self, x: Tensor) -> Sequence[Tensor]:
        """Each client's own real tokens [n, d] in an activation: packed [1, N, d], or [B, T, d]."""
        if self.layout is not None:
            return x[self.layout.real].split([sum(own) for own in self.lengths])
        if self.batch.mask is not None:
            return self.rows(x)[self.rows(self.batch.mask).bool()].split([sum(own) for own in self.lengths])
        return [share.flatten(0, -2) for share in self.rows(x).split(self.counts)]

    def losses(self, tasks: Sequence[LocalTask], outputs: Tensor) -> Tensor:
        """The mean loss of each client's rows, [k]."""
        outputs, targets = self.rows(outputs.float()), self.rows(self.batch.labels)
        if tasks[0].objective.row_by_row and all(task.loss == tasks[0].loss for task in tasks):
            each = tasks[0].row_losses(outputs, targets)
        else:
            shares = zip(tasks, outputs.split(self.counts), targets.split(self.counts), strict=True)
            each = torch.cat([task.row_losses(x, y) for task, x, y in shares])
        grid = each.new_zeros(len(tasks) * self.most).index_copy(0, self.slots, each)
        return grid.view(len(tasks), -1).sum(1) / torch.tensor(self.counts, device=each.device)


@dataclass
class _Pass:
    """The pass under way: its step, and the value of each tunable for each of its clients, [k, *shape]."""

    values: dict[str, Tensor]
    step: _Step | None = None

    def real(self, x: Tensor) -> Sequence[Tensor]:
        """Each client's own real tokens [n, d] in an activation."""
        assert self.step is not None
        return self.step.real(x)

    def apply(self, function: Callable[..., Tensor], x: Tensor, stacked: Mapping[str, Tensor]) -> Tensor:
        """`function` of x [k, n, d] and the stacked values; of all clients at once where they have equal shares."""
        assert self.step is not None
        flat = x.reshape(-1, x.shape[-1])
        sizes = self.step.sizes(len(flat))
        if len(set(sizes)) == 1:
            y = function(flat.view(len(sizes), sizes[0], -1), **stacked)
        else:
            own = zip(*(v.split(1) for v in stacked.values()), strict=True)
            shares = zip(flat.split(sizes), own, strict=True)
            y = torch.cat([function(share[None], **dict(zip(stacked, v, strict=True)))[0] for share, v in shares])
        return y.reshape(*x.shape[:-1], -1)


# ---------------------------------------------------------------- modules with a value for each client


def _linear(module: nn.Linear, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """A Linear on [k, n, in] with weights [k, out, in] and biases [k, out]; one not given is the module's own."""
    if weight is None:
        y = F.linear(x, module.weight, module.bias if bias is None else None)
        return y if bias is None else y + bias[:, None].to(y.dtype)
    own = module.bias if bias is None else bias[:, None]
    return torch.bmm(x, weight.mT) if own is None else torch.baddbmm(own, x, weight.mT)


def _layer_norm(module: nn.LayerNorm, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """A LayerNorm on [k, n, d] with weights and biases [k, d]; one not given is the module's own."""
    y = F.layer_norm(x, module.normalized_shape, module.weight if weight is None else None, None, module.eps)
    if weight is not None:
        y = y * weight[:, None]
    own = module.bias if bias is None else bias[:, None]
    return y if own is None else y + own


_FORWARDS: dict[type, Callable[..., Tensor]] = {nn.Linear: _linear, FrozenLinear: _linear, nn.LayerNorm: _layer_norm}


@contextmanager
def _stacked(module: nn.Module, under_way: _Pass) -> Iterator[None]:
    """Inside the block modules that own tunables compute with the values of the pass, and no parameter is trained."""

    def forward(owner: nn.Module, own: Mapping[str, str], x: Tensor) -> Tensor:
        stacked = {role: under_way.values[name] for role, name in own.items()}
        return under_way.apply(partial(_FORWARDS[type(owner)], owner), x, stacked)

    owned = _owned(module, under_way.values)
    before = [(p, p.requires_grad) for p in module.parameters()]
    try:
        module.requires_grad_(False)
        for owner, own in owned.items():
            owner.forward = partial(forward, owner, own)
        yield
    finally:
        for owner in owned:
            owner.__dict__.pop("forward", None)
        for p, required in before:
            p.requires_grad_(required)


# ---------------------------------------------------------------- the loop


class _Matrix:
    """Tensors by name as columns of a matrix [clients, P], on one device in one dtype."""

    def __init__(self, module: nn.Module, names: Collection[str], device: torch.device) -> None:
        # In the model's order, as in `execute`.
        self.shapes = {n: p.shape for n, p in module.named_parameters() if n in names}
        self.dtype, self.device = module.get_parameter(next(iter(self.shapes))).dtype, device
        ends = np.cumsum([0, *(shape.numel() for shape in self.shapes.values())]).tolist()
        self.columns = {n: slice(a, b) for n, a, b in zip(self.shapes, ends, ends[1:], strict=False)}
        self.width = ends[-1]

    def stack(self, given: Sequence[Mapping[str, Tensor] | None], default: float = 0.0) -> Tensor:
        """One row for each client, [C, P]; `default` where a tensor is not given."""
        out = torch.full((len(given), self.width), default, dtype=self.dtype)
        for row, tensors in zip(out, given, strict=True):
            for name, tensor in (tensors or {}).items():
                row[self.columns[name]].view(self.shapes[name]).copy_(tensor)
        return out.to(self.device)

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        """name -> [k, *shape], sharing the matrix's memory."""
        return {n: matrix[:, self.columns[n]].unflatten(1, shape) for n, shape in self.shapes.items()}


def _each(stacked: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of each client, of tensors [k, *shape]."""
    return [dict(zip(stacked, own, strict=True)) for own in zip(*(v.unbind() for v in stacked.values()), strict=True)]


def _train(tasks: Sequence[LocalTask], execution: Execution, segments: bool) -> list[LocalResult]:
    """Train clients that fit together, given in order of falling numbers of steps."""
    device = execution.device
    module, clip_norm = tasks[0].frozen.module, tasks[0].clip_norm
    matrix = _Matrix(module, tasks[0].tunables, device)
    values = matrix.stack([task.tunables for task in tasks])
    received = _each(matrix.views(values.clone())) if tasks[0].penalty else []
    offset = matrix.stack([t.gradient_offset for t in tasks]) if any(t.gradient_offset for t in tasks) else None
    rank = matrix.stack([task.rank_mask for task in tasks], 1.0) if any(task.rank_mask for task in tasks) else None
    optimiser = ROW_WISE[type(tasks[0].optimiser)]([task.optimiser for task in tasks], values)
    held = _Matrix(module, tasks[0].fixed, device) if tasks[0].fixed else None
    fixed = held.views(held.stack([task.fixed for task in tasks])) if held else {}
    under_way = _Pass(matrix.views(values) | fixed)
    sums = torch.zeros_like(values) if any(task.mean_gradient for task in tasks) else None
    padded = tasks[0].objective.padded
    curve: list[Tensor] = []
    k = 0
    with (
        forward(module, execution, gradients=True) as passing,
        _stacked(module, under_way),
        observing(module, tasks, under_way.real) as seen,
    ):
        module.eval()
        for number in range(len(tasks[0].batches)):
            active = [task for task in tasks if number < len(task.batches)]
            if len(active) != k:
                k = len(active)
                leaves = {n: v.requires_grad_() for n, v in matrix.views(values[:k].detach()).items()}
                under_way.values = leaves | {n: v[:k] for n, v in fixed.items()}
            under_way.step = step = _Step.of(active, number, device, passing.packed and not padded, segments)
            with (
                execution.autocast(),
                passing.feeding(step.batch, layout=step.layout, observed=tasks[0].observers, padded=padded) as fed,
            ):
                outputs = module(**fed[0]).logits
            losses = step.losses(active, outputs)
            curve.append(losses.detach())
            loss = losses.sum()
            for task, now, then in zip(active, _each(leaves) if received else [], received, strict=False):
                assert task.penalty is not None
                loss = loss + task.penalty(now, then)
            parts = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            if number == 0:
                # torch's optimisers leave a parameter without a gradient alone, decay included.
                for name in (n for n, part in zip(leaves, parts, strict=True) if part is None):
                    idle = [i for i, task in enumerate(tasks) if name not in (task.gradient_offset or {})]
                    optimiser.leave_alone(idle, matrix.columns[name])
            pairs = zip(leaves.values(), parts, strict=True)
            g = torch.cat([(torch.zeros_like(v) if p is None else p).flatten(1) for v, p in pairs], 1)
            if sums is not None:
                sums[:k].add_(g)
            if offset is not None:
                g.add_(offset[:k])
            if rank is not None:
                g.mul_(rank[:k])
            if clip_norm is not None:
                g.mul_((clip_norm / (torch.linalg.vector_norm(g, dim=1, keepdim=True) + 1e-6)).clamp_(max=1.0))
            optimiser.step(values[:k], g)
            if rank is not None:
                values[:k].mul_(rank[:k])
    curves = torch.nn.utils.rnn.pad_sequence(curve).cpu()  # [C, steps]: losses of a step are those of the first rows
    results = zip(tasks, _each(matrix.views(values.cpu())), curves, seen, strict=True)
    out = [
        result_of({n: v.clone() for n, v in tuned.items()}, losses[: len(task.batches)], own)
        for task, tuned, losses, own in results
    ]
    if sums is None:
        return out
    means = [
        {n: v.div(len(task.batches)) for n, v in total.items()} if task.mean_gradient else {}
        for task, total in zip(tasks, _each(matrix.views(sums.cpu())), strict=True)
    ]
    return [replace(result, mean_gradient=mean) for result, mean in zip(out, means, strict=True)]
