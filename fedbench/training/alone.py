"""Executes LocalTasks: the local training of a round's clients.

`execute` trains one client with a stock optimiser, through whatever form `fedbench.forward.feed` gives a batch: padded,
which is the reference and says what local training *is*, or packed, which is held against it. `execute_all` does so
for the clients of a round (`fedbench.training.cohort`): over worker processes, or fused (`fedbench.training.fused`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from fedbench.api.local import LocalResult, LocalTask
from fedbench.data.examples import Batch
from fedbench.errors import FedbenchError
from fedbench.forward.feed import forward
from fedbench.machine.device import Execution
from fedbench.training.common import has_dropout, made, observing, refuse_fixed, refuse_unknown, result_of
from fedbench.training.zeroth_order import estimate

KNOWN = frozenset(
    (
        *("frozen", "tunables", "data", "batches", "optimiser", "loss", "clip_norm", "penalty"),
        *("gradient_offset", "rank_mask", "observers", "observe_padding", "seed"),
        *("fixed", "mean_gradient", "zeroth_order"),
    )
)
"""The fields of a task that `execute` honours."""


@contextmanager
def tunable(
    module: nn.Module, values: Mapping[str, Tensor], fixed: Mapping[str, Tensor] | None = None
) -> Iterator[dict[str, nn.Parameter]]:
    """Put `values` into the named parameters of `module` and let only those require a gradient, inside the block.

    `fixed` is put in place too, and requires none. After the block all parameters are what they were before it.
    Raises FedbenchError for a name that is no parameter, a shape that does not fit, and what `fixed` may not hold.
    """
    parameters, fixed = dict(module.named_parameters()), fixed or {}
    for word, given in (("tunable", values), ("fixed", fixed)):
        for name, value in given.items():
            if name not in parameters:
                raise FedbenchError(
                    f"{word} {name!r} is no parameter of the model; known are e.g. {next(iter(parameters))!r}"
                )
            if parameters[name].shape != value.shape:
                raise FedbenchError(
                    f"{word} {name!r} is {list(value.shape)}, the model's is {list(parameters[name].shape)}"
                )
    refuse_fixed(module, values, fixed)
    chosen = {name: p for name, p in parameters.items() if name in values}  # in the model's order, whoever sent them
    written = {**chosen, **{name: parameters[name] for name in fixed}}
    before = {name: p.requires_grad for name, p in parameters.items()}
    own = {name: p.detach().clone() for name, p in written.items()}
    try:
        with torch.no_grad():
            for name, p in written.items():
                p.copy_(values[name] if name in values else fixed[name])
        for name, p in parameters.items():
            p.requires_grad_(name in chosen)
        yield chosen
    finally:
        with torch.no_grad():
            for name, p in written.items():
                p.copy_(own[name])
        for name, p in parameters.items():
            p.requires_grad_(before[name])
            p.grad = None


def execute(task: LocalTask, execution: Execution) -> LocalResult:
    """Train one client: a step of its trainer for each of the task's batches, in order. Returns CPU tensors.

    Raises FedbenchError for a task with a field set that is not among `KNOWN`, for a trainer that is none, and when a
    loss is not finite, naming the step.
    """
    refuse_unknown(task, KNOWN, execution.executor)
    module, device = task.frozen.module, execution.device
    if not task.batches:
        raise FedbenchError("a client has no rows to train on; raise the split's min_size")
    if task.zeroth_order is not None and len(task.zeroth_order.seeds) != len(task.batches):
        raise FedbenchError(
            f"a client's task has seeds of {len(task.zeroth_order.seeds)} steps, but batches of {len(task.batches)}"
        )
    dropping = has_dropout(module)
    devices = [device] if device.type == "cuda" else []
    fork = torch.random.fork_rng(devices, enabled=dropping)
    mask: list[Tensor | None] = [None]  # of the batch under way; None where every position counts

    def real(output: Tensor) -> Sequence[Tensor]:
        return [output.flatten(0, -2) if mask[0] is None else output[mask[0].bool()]]

    with (
        fork,
        forward(module, execution, gradients=task.zeroth_order is None) as passing,
        tunable(module, task.tunables, task.fixed) as parameters,
        observing(module, [task], real) as (seen,),
    ):
        if dropping:
            torch.manual_seed(task.seed)
        module.train(dropping)
        received = {n: v.to(device) for n, v in task.tunables.items()} if task.penalty else {}
        offset = {n: v.to(device) for n, v in (task.gradient_offset or {}).items()}
        rank = {n: v.to(device) for n, v in (task.rank_mask or {}).items()}
        values = list(parameters.values())
        optimiser = made(task.optimiser, values)
        losses, row_losses = [], task.row_losses
        padded = task.observe_padding or task.objective.padded
        sums = {n: torch.zeros_like(p) for n, p in parameters.items()} if task.mean_gradient else {}
        slopes: list[Tensor] = []

        def loss_of(batch: Batch) -> tuple[Tensor, Tensor]:
            """What a step minimises, and of that the part that is no penalty."""
            # A packed batch has no padding to observe.
            fed = passing.feeding(batch, observed=task.observers, padded=padded)
            with execution.autocast(), fed as (inputs, mask[0]):
                if task.observe_padding:
                    mask[0] = None
                outputs = module(**inputs).logits
            loss = row_losses(outputs.float(), batch.labels).mean()
            return (loss + task.penalty(parameters, received) if task.penalty else loss), loss.detach()

        for number, indices in enumerate(task.batches):
            batch = task.data.batch(indices, device)
            optimiser.zero_grad()
            if task.zeroth_order is None:
                whole, loss = loss_of(batch)
                whole.backward()
            else:
                of_step = task.zeroth_order.seeds[number], task.zeroth_order.scale
                along, loss = estimate(parameters, partial(loss_of, batch), *of_step)
                slopes.append(along)
            losses.append(loss)
            for name in sums:
                if (grad := parameters[name].grad) is not None:
                    sums[name].add_(grad)
            for name, value in offset.items():
                grad = parameters[name].grad
                parameters[name].grad = value.clone() if grad is None else grad + value
            for name, value in rank.items():
                if (grad := parameters[name].grad) is not None:
                    grad.mul_(value)
            if task.clip_norm is not None:
                nn.utils.clip_grad_norm_(values, task.clip_norm)
            optimiser.step()
            if rank:
                with torch.no_grad():
                    for name, value in rank.items():
                        parameters[name].mul_(value)
        module.eval()
        # Each result owns its memory, on the CPU: the next client trains in the same module.
        tuned = {n: p.detach().to("cpu", copy=True) for n, p in parameters.items()}
        means = {n: total.div(len(losses)).to("cpu", copy=True) for n, total in sums.items()}
        found = torch.stack(slopes).cpu() if slopes else None
    return replace(result_of(tuned, torch.stack(losses).cpu(), seen), mean_gradient=means, slopes=found)
