"""Executes LocalTasks: the local training of a round's clients.

`execute` trains one client with a stock optimiser, through whatever form `fedbench.forward.feed` gives a batch: padded,
which is the reference and says what local training *is*, or packed, which is held against it. `execute_all` does so
for the clients of a round: over worker processes, or fused (`fedbench.training.fused`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedbench.api.local import LocalResult, LocalTask
from fedbench.errors import DivergedError, FedbenchError
from fedbench.forward.feed import feeding, packing
from fedbench.machine.workers import fork_map
from fedbench.models.linear import reordered, stock


def has_dropout(module: nn.Module) -> bool:
    """Whether any dropout of `module` would drop something in training mode."""
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules()) or any(
        value > 0
        for m in module.modules()
        if (config := getattr(m, "config", None)) is not None
        for name in ("attention_probs_dropout_prob", "attention_dropout")
        if isinstance(value := getattr(config, name, 0.0), (int, float))
    )


def autocast(device: torch.device, precision: str) -> Any:
    """The context of a forward pass: bf16 autocast for precision "bf16", nothing for "fp32"."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


@contextmanager
def tunable(module: nn.Module, values: dict[str, Tensor] | Any) -> Iterator[dict[str, nn.Parameter]]:
    """Put `values` into the named parameters of `module` and let only those require a gradient, inside the block.

    Raises FedbenchError for a name that is no parameter or a shape that does not fit.
    """
    parameters = dict(module.named_parameters())
    for name, value in values.items():
        if name not in parameters:
            raise FedbenchError(
                f"tunable {name!r} is no parameter of the model; known are e.g. {next(iter(parameters))!r}"
            )
        if parameters[name].shape != value.shape:
            raise FedbenchError(
                f"tunable {name!r} is {list(value.shape)}, the model's is {list(parameters[name].shape)}"
            )
    chosen = {name: p for name, p in parameters.items() if name in values}  # in the model's order, whoever sent them
    before = {name: p.requires_grad for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for name, p in chosen.items():
                p.copy_(values[name])
        for name, p in parameters.items():
            p.requires_grad_(name in chosen)
        yield chosen
    finally:
        for name, p in parameters.items():
            p.requires_grad_(before[name])
            p.grad = None


@dataclass
class Observed:
    """Of one client, by module path: the sum of its observer's statistic, and the tokens that went into it."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)


@contextmanager
def observing(
    module: nn.Module, tasks: Sequence[LocalTask], real: Callable[[Tensor], Sequence[Tensor]]
) -> Iterator[list[Observed]]:
    """What each client's observers make of its tokens that pass their modules inside the block.

    All tasks observe the same modules. `real` gives, of an activation of the batch under way, the tokens [n, d] of each
    client still training, which are the first of `tasks`.
    """
    seen = [Observed() for _ in tasks]

    def observe(path: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        with torch.no_grad():
            for task, own, share in zip(tasks, seen, real(output), strict=False):
                value = task.observers[path](share)
                own.sums[path] = own.sums[path] + value if path in own.sums else value
                own.tokens[path] = own.tokens.get(path, 0) + len(share)

    with ExitStack() as hooks:
        for path in tasks[0].observers:
            hooks.callback(module.get_submodule(path).register_forward_hook(partial(observe, path)).remove)
        yield seen


def result_of(tuned: dict[str, Tensor], losses: Tensor, seen: Observed) -> LocalResult:
    """What came of a task: tuned values in CPU memory of their own, the losses [steps] on the CPU, and what was seen.

    Raises DivergedError when one is not finite: such an update must never be averaged.
    """
    if not bool(torch.isfinite(losses).all()):
        step = int((~torch.isfinite(losses)).nonzero()[0])
        raise DivergedError(
            f"local training diverged: the loss of step {step} is {losses[step].item()}; lower lr, "
            "or refuse uploads that are too far off with federation.max_update_norm"
        )
    observed = {path: value.to("cpu", copy=True) for path, value in seen.sums.items()}
    return LocalResult(tuned, len(losses), float(losses.mean()), observed, max(seen.tokens.values(), default=0))


def execute(task: LocalTask, device: torch.device, precision: str = "fp32") -> LocalResult:
    """Train one client: AdamW over the task's batches, in order. Returns CPU tensors.

    Raises FedbenchError when a loss is not finite, naming the step.
    """
    module = task.frozen.module
    if not task.batches:
        raise FedbenchError("a client has no rows to train on; raise the split's min_size")
    dropping = has_dropout(module)
    devices = [device] if device.type == "cuda" else []
    fork = torch.random.fork_rng(devices, enabled=dropping)
    mask: list[Tensor | None] = [None]  # of the batch under way; None where every position counts

    def real(output: Tensor) -> Sequence[Tensor]:
        return [output.flatten(0, -2) if mask[0] is None else output[mask[0].bool()]]

    with (
        fork,
        reordered(module, gradients=True, precision=precision),
        packing(not (stock.get() or task.observe_padding)),  # a packed batch has no padding to observe
        tunable(module, task.tunables) as parameters,
        observing(module, [task], real) as (seen,),
    ):
        if dropping:
            torch.manual_seed(task.seed)
        module.train(dropping)
        received = {n: v.to(device) for n, v in task.tunables.items()} if task.penalty else {}
        offset = {n: v.to(device) for n, v in (task.gradient_offset or {}).items()}
        rank = {n: v.to(device) for n, v in (task.rank_mask or {}).items()}
        o = task.optimiser
        values = list(parameters.values())
        optimiser = torch.optim.AdamW(
            values, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True
        )
        losses = []
        for indices in task.batches:
            batch = task.data.batch(indices, device)
            with autocast(device, precision), feeding(module, batch, observed=task.observers) as (inputs, mask[0]):
                if task.observe_padding:
                    mask[0] = None
                logits = module(**inputs).logits
            loss = task.loss(logits.float(), batch.labels).mean()
            losses.append(loss.detach())
            if task.penalty:
                loss = loss + task.penalty(parameters, received)
            optimiser.zero_grad()
            loss.backward()
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
    return result_of(tuned, torch.stack(losses).cpu(), seen)


def most_tokens(task: LocalTask) -> int:
    """The most tokens that a task's observers can see: all positions of its padded batches, or of its images."""
    if task.data.tokens is not None:
        return sum(len(rows) * int(task.data.lengths[rows].max()) for rows in task.batches)
    config: Any = task.frozen.module.config
    return sum(map(len, task.batches)) * ((config.image_size // config.patch_size) ** 2 + 1)


def step_flops(task: LocalTask, device: torch.device) -> int:
    """Floating-point operations of one local step: forward and backward pass over the task's first batch, padded.

    Products and attention are counted, by torch; what goes element by element is not. Attention runs as plain products
    meanwhile: torch has no formula for the kernel that it takes on a CPU.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with packing(False), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        execute(replace(task, batches=task.batches[:1], observers={}), device)
    return int(counter.get_total_flops())


def execute_all(
    tasks: Sequence[LocalTask], device: torch.device, precision: str = "fp32", workers: int = 1, fused: bool = False
) -> Iterator[tuple[int, LocalResult]]:
    """Train the clients of a round; yields (index of the task, its result) as they are done.

    On a CPU one after another over `workers` processes, whose results are, to the bit, those of one; a round of one
    client has nothing to spread, and takes torch's own threads instead. `fused`: all together in this process.
    """

    def train(task: LocalTask) -> tuple[Any, ...]:
        r = execute(task, device, precision)
        # As numpy arrays a result passes between processes many times faster than as tensors.
        return _numpy(r.tunables), r.steps, r.loss, _numpy(r.observed), r.observed_tokens

    if fused:
        from fedbench.training.fused import execute_cohort

        yield from enumerate(execute_cohort(tasks, device, precision))
    elif device.type == "cpu" and len(tasks) > 1:
        costs = [float(sum(task.data.lengths[rows].sum() for rows in task.batches)) for task in tasks]
        # Here rather than in the workers, which then all use one copy.
        with reordered(*(task.frozen.module for task in tasks), gradients=True, precision=precision):
            for index, (tunables, steps, loss, observed, tokens) in fork_map(train, tasks, workers, costs):
                yield index, LocalResult(_tensors(tunables), steps, loss, _tensors(observed), tokens)
    else:
        for index, task in enumerate(tasks):
            yield index, execute(task, device, precision)


def _numpy(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
