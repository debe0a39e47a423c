"""Layer-level distillation: a student follows the outputs of a teacher's layers on unlabelled public rows.

The loss of FedPFT (Peng et al. 2024, sections 3.2 and 3.3) and its training loop. The rows of a step are cut into
pieces, and pieces are spread over processes; gradients are summed in the order of the pieces, so a result depends on
how a batch is cut, never on how many processes there were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from mmap import mmap

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbench.data.examples import Examples
from fedbench.errors import DivergedError
from fedbench.forward.feed import Forward, forward
from fedbench.machine.device import Execution
from fedbench.machine.memory import give_back
from fedbench.machine.workers import one_thread, team
from fedbench.models.parts import Parts

PIECES = 4
"""Pieces of a batch on a CPU: as many cores as can share a step, each with rows enough for its kernels to be fast."""


def real_tokens(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The real tokens [n, d] of hidden states [B, T, d]; without a mask all of them."""
    return hidden.flatten(0, -2) if mask is None else hidden[mask.bool()]


def hidden_loss(teacher: Tensor, student: Tensor, mask: Tensor | None) -> Tensor:
    """MSE of two hidden states [B, T, d] over real tokens, relative to the teacher's mean square."""
    teacher, student = real_tokens(teacher, mask), real_tokens(student, mask)
    return (student - teacher).square().mean() / teacher.square().mean()


def ffn_product(parts: Parts, layer: int) -> Tensor:
    """W2 · W1 of a layer's FFN, [d, d]: the linear part of what the FFN does; of a gated one, down · up."""
    up, down, _ = parts.ffn_weights(layer)
    return down @ up


def weight_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """MSE of two FFN products [d, d], relative to the teacher's mean square; the gradient reaches the student."""
    return (student - teacher).square().mean() / teacher.square().mean()


@dataclass(frozen=True)
class LayerLoss:
    """The mean over `pairs` of layers (the teacher's, the student's) of their hidden losses, plus a regulariser.

    regulariser: a scalar of the student's weights alone; None for none. answers: weight of the mean over rows of
    KL(teacher || student) of what the two models answer, which `__call__` knows nothing of.
    """

    pairs: Sequence[tuple[int, int]]
    regulariser: Callable[[], Tensor] | None = None
    answers: float = 0.0

    def __call__(self, teacher: Sequence[Tensor], student: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """The loss of a batch, from the outputs of all layers [B, T, d] and the mask of real tokens."""
        total = torch.stack([hidden_loss(teacher[t], student[s], mask) for t, s in self.pairs]).mean()
        return total if self.regulariser is None else total + self.regulariser()


def answer_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of classes by their logits [B, C], summed over rows."""
    ours, theirs = (x.float().log_softmax(-1) for x in (student, teacher))
    return F.kl_div(ours, theirs, reduction="sum", log_target=True)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A distillation run: AdamW, linear warm-up over `warmup` of the steps, then linear decay to 0."""

    steps: int
    batch_size: int
    lr: float
    warmup: float = 0.048
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def factor(self, step: int) -> float:
        """Share of `lr` at `step` (from 0)."""
        rise = max(1, math.ceil(self.warmup * self.steps))
        return (step + 1) / rise if step < rise else (self.steps - step) / max(1, self.steps - rise)


def public_batches(rows: int, schedule: Schedule, rng: np.random.Generator) -> list[np.ndarray]:
    """Row indices of each step: passes over fresh permutations of the public rows."""
    size = min(schedule.batch_size, rows)
    per_pass = rows // size
    out: list[np.ndarray] = []
    while len(out) < schedule.steps:
        order = rng.permutation(rows)
        out += [order[i * size : (i + 1) * size] for i in range(per_pass)]
    return out[: schedule.steps]


def distil(
    teacher: nn.Module,
    student: nn.Module,
    trainable: Sequence[str],
    loss: LayerLoss,
    public: Examples,
    schedule: Schedule,
    rng: np.random.Generator,
    execution: Execution,
    rows: Mapping[str, tuple[int, Tensor]] | None = None,
) -> np.ndarray:
    """Train the named parameters of `student` in place against `teacher` on unlabelled public rows.

    `rows` limits a parameter to an index along a dimension: (dim, index); everything else of it keeps its exact value,
    free of weight decay too. Returns the hidden loss of each pair at each step, [steps, pairs]. Raises DivergedError
    where one is not finite.
    """
    parameters, device = dict(student.named_parameters()), execution.device
    chosen = {name: parameters[name] for name in trainable}
    limits = {}
    for name, (dim, index) in (rows or {}).items():
        free = torch.zeros(chosen[name].shape[dim], dtype=torch.bool, device=device)
        free[index.to(device)] = True
        limits[name] = (
            free.unsqueeze(1) if dim == 0 and chosen[name].dim() == 2 else free,
            chosen[name].detach().clone(),
        )
    optimiser = torch.optim.AdamW(chosen.values(), lr=schedule.lr, weight_decay=schedule.weight_decay)
    teacher.eval()
    student.eval()
    batches = [_pieces(public, batch, device) for batch in public_batches(len(public), schedule, rng)]
    steps = _Steps(list(chosen.values()), loss, public, batches, execution)
    residuals = np.zeros((schedule.steps, len(loss.pairs)))
    try:
        for p in chosen.values():
            p.requires_grad_(True)
        with (
            forward(teacher, execution.exact) as theirs,
            forward(student, execution.exact, gradients=True) as ours,
            team(steps.work(theirs, ours), steps.members) as ask,
        ):
            ask(-1)
            for step in range(schedule.steps):
                ask(step)
                residuals[step] = steps.hidden.sum(0)
                if not np.isfinite(residuals[step]).all():
                    raise DivergedError(f"distillation diverged at step {step} of {schedule.steps}; lower its rate")
                with one_thread():
                    steps.put_gradients()
                    for name, (free, _) in limits.items():
                        if (grad := chosen[name].grad) is not None:
                            grad.mul_(free)
                    nn.utils.clip_grad_norm_(chosen.values(), schedule.clip_norm)
                    for group in optimiser.param_groups:
                        group["lr"] = schedule.lr * schedule.factor(step)
                    optimiser.step()
                    with torch.no_grad():
                        for name, (free, start) in limits.items():
                            chosen[name].copy_(torch.where(free, chosen[name], start))
    finally:
        steps.leave()
        for p in chosen.values():
            p.requires_grad_(False)
            p.grad = None
        give_back()
    return residuals


def _pieces(public: Examples, batch: np.ndarray, device: torch.device) -> list[np.ndarray]:
    """The rows of a batch in pieces of about as many tokens each, the same on every machine; on a GPU in one."""
    if device.type != "cpu":
        return [batch]
    costs = public.lengths[batch]
    return [batch[p] for p in _spread(costs, min(PIECES, len(batch)))]


def _spread(costs: Sequence[float] | np.ndarray, n: int) -> list[list[int]]:
    """Indices of `costs` in n groups of about equal sums: the costliest first, each to the lightest group so far."""
    groups: list[list[int]] = [[] for _ in range(n)]
    sums = [0.0] * n
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        lightest = sums.index(min(sums))
        groups[lightest].append(i)
        sums[lightest] += float(costs[i])
    return groups


class _Steps:
    """The steps of a distillation, in memory that the processes at work on them share.

    The trained parameters lie there from the start until `leave`. The loss of a pair is relative to the teacher's mean
    square over the whole batch, which takes all pieces: so the teacher's part of a step is done in the step before.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        loss: LayerLoss,
        public: Examples,
        batches: Sequence[Sequence[np.ndarray]],
        execution: Execution,
    ) -> None:
        self.parameters, self.loss, self.public, self.batches = parameters, loss, public, batches
        self.device = execution.device
        self.most = max(map(len, batches), default=1)
        """The most pieces that a batch has."""
        self.members = min(execution.workers, self.most)
        """The processes that share a step."""
        pairs, size = len(loss.pairs), sum(p.numel() for p in parameters)
        dtype = parameters[0].dtype
        # One row a piece, and the last for the regulariser.
        self.grads = self._shared((self.most + 1, size), dtype)
        self.norms = self._shared((2, self.most, pairs), torch.float64)
        self._hidden = self._shared((self.most, pairs), torch.float64)
        self.own = [p.data for p in parameters]
        for p, share in zip(parameters, self._views(self._shared((size,), dtype)), strict=True):
            p.data = share.copy_(p.data)

    @property
    def hidden(self) -> np.ndarray:
        """What each piece of the step last asked for adds to the hidden loss of each pair, [pieces, pairs]."""
        return self._hidden.cpu().numpy()

    def _shared(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=self.device)
        numel = math.prod(shape)
        return torch.frombuffer(mmap(-1, max(1, numel * dtype.itemsize)), dtype=dtype, count=numel).view(shape)

    def _views(self, flat: Tensor) -> list[Tensor]:
        """A vector of all parameters' elements as one tensor a parameter."""
        shares = flat.split([p.numel() for p in self.parameters])
        return [share.view(p.shape) for share, p in zip(shares, self.parameters, strict=True)]

    def put_gradients(self) -> None:
        """Give the parameters the gradients of the step last asked for."""
        for p, grad in zip(self.parameters, self._views(self.grads.sum(0)), strict=True):
            p.grad = grad

    def leave(self) -> None:
        """Let the parameters lie where they were before, with their present values."""
        for p, own in zip(self.parameters, self.own, strict=True):
            p.data = own.copy_(p.data)

    def work(self, theirs: Forward, ours: Forward) -> Callable[[int, int], None]:
        """What a member of the team does when asked for a step: its gradients, and the teacher's part of the next."""
        # Of the pieces that fell to this process: hidden states, mask, and answers where these count.
        targets: dict[int, tuple[list[Tensor], Tensor | None, Tensor | None]] = {}
        last = max(t for t, _ in self.loss.pairs), max(s for _, s in self.loss.pairs)

        def mine(member: int, step: int) -> list[int]:
            tokens = [float(self.public.lengths[piece].sum()) for piece in self.batches[step]]
            return _spread(tokens, self.members)[member]

        def train(step: int, piece: int) -> None:
            for p in self.parameters:
                p.grad = None
            target, mask, answers = targets.pop(piece)
            batch = self.public.batch(self.batches[step][piece], self.device)
            logits: Tensor | None = None
            if answers is None:
                states = ours.layer_outputs(batch, last[1])[0]
            else:
                states, _, logits = ours.layer_outputs_and_logits(batch)
            squares = [
                (real_tokens(states[s], mask) - t).square().sum()
                for t, (_, s) in zip(target, self.loss.pairs, strict=True)
            ]
            relative = torch.stack(squares) / self.norms[step % 2].sum(0).to(squares[0].dtype)
            self._hidden[piece] = relative.detach()
            loss = relative.mean()
            if answers is not None and logits is not None:
                rows = sum(map(len, self.batches[step]))
                loss = loss + self.loss.answers * answer_loss(answers, logits) / rows
            loss.backward()
            self._keep(piece)

        def teach(step: int, piece: int) -> None:
            with torch.no_grad():
                batch = self.public.batch(self.batches[step][piece], self.device)
                answers: Tensor | None = None
                if self.loss.answers:
                    states, mask, answers = theirs.layer_outputs_and_logits(batch)
                else:
                    states, mask = theirs.layer_outputs(batch, last[0])
                found = [real_tokens(states[t], mask) for t, _ in self.loss.pairs]
                targets[piece] = found, mask, answers
                self.norms[step % 2, piece] = torch.stack([t.square().sum() for t in found])

        def work(member: int, step: int) -> None:
            if step >= 0:
                for piece in mine(member, step):
                    train(step, piece)
                if self.loss.regulariser is not None and member == 0:
                    for p in self.parameters:
                        p.grad = None
                    value = self.loss.regulariser()
                    if value.requires_grad:  # a detached one, as of `fedpft-official`, moves nothing
                        value.backward()
                    self._keep(self.most)
            if step + 1 < len(self.batches):
                for piece in mine(member, step + 1):
                    teach(step + 1, piece)

        return work

    def _keep(self, row: int) -> None:
        """Put this process's gradients where all processes see them."""
        for p, share in zip(self.parameters, self._views(self.grads[row]), strict=True):
            share.zero_() if p.grad is None else share.copy_(p.grad)
