"""A device that is not the CPU, for machines that have no other: `elsewhere`, whose tensors lie in CPU memory.

What a GPU refuses is refused: an operation on tensors of two devices, numpy on a tensor that lies there. So a method
that forgets to move a tensor fails here as it would on CUDA. It says nothing about CUDA's kernels.

As a script: runs methods on the CPU and here, with both executors, and prints what came out, as JSON.

    python elsewhere.py FOLDER METHOD...
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from helpers import points_of
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from fedbench.run.loop import Run
from fedbench.run.prepare import prepare
from fedbench.run.progress import Silent
from fedbench.run.record import finish
from fedbench.run.request import RunRequest

MIXES = ("copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_")
"""Operations that take tensors of the CPU beside those of another device, on CUDA too."""


class There(Tensor):
    """A tensor on `elsewhere`; `here` is the same on the CPU."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        make = torch.Tensor._make_wrapper_subclass
        made: There = make(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device="elsewhere:0"
        )  # fmt: skip
        made.here = here
        return made

    def __repr__(self) -> str:
        return f"There({self.here!r})"

    def tolist(self) -> Any:
        return self.here.tolist()

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`func` on the CPU, its results where they would lie. Raises RuntimeError for tensors of two devices."""
    name = func.overloadpacket.__name__
    if name == "_fused_sdp_choice":
        return 0  # attention from its parts: the fused kernels are those of real devices
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, There)]
    here = [x for x in tensors if not isinstance(x, There) and x.dim() > 0]
    if there and here and name not in MIXES:
        raise RuntimeError(f"{func}: {list(there[0].shape)} lies elsewhere, {list(here[0].shape)} on the CPU")
    target = kwargs.get("device")
    goes_there = bool(there) if target is None else torch.device(target).type == "elsewhere"
    kwargs = dict(kwargs) if target is None else {**kwargs, "device": torch.device("cpu")}
    a, k = tree_map(lambda x: x.here if isinstance(x, There) else x, (args, kwargs))
    out = func(*a, **k)
    if name == "copy_":
        return args[0]
    given = {id(x.here): x for x in there}  # what an operation in place gives back

    def place(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return given[id(x)] if id(x) in given else There(x) if goes_there else x

    return tree_map(place, out)


def register() -> torch.device:
    """Make the device known to torch, in this process and for good."""
    _setup_privateuseone_for_python_backend("elsewhere")
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: compute(func, args, kwargs), "PrivateUse1")
    register.library = library  # type: ignore[attr-defined]  # it is undone when collected
    made = torch.tensor

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        out = made(*args, **kwargs)
        return out if device is None else out.to(device)

    torch.tensor = tensor  # torch's own puts its numbers on a device in ways no device made of Python can follow
    torch.inference_mode = torch.no_grad  # type: ignore[assignment,misc]  # a wrapper has no tensors for inference
    return torch.device("elsewhere:0")


def run(request: RunRequest, device: torch.device | None) -> dict[str, list[float]]:
    """Losses, plug-in scores and gradient errors of all rounds, before and after a checkpoint."""
    prepared = prepare(request)
    if device is not None:
        prepared = dataclasses.replace(prepared, execution=dataclasses.replace(prepared.execution, device=device))
    first = Run(prepared, Silent())
    first.loop(None, until=2)
    first.checkpoint(request.results)
    again = Run(prepared, Silent())
    assert again.resume(request.results)
    again.loop(None)
    return {
        "loss": [r["loss"] for r in again.rounds],
        "plug-in": [r["plug_in_validation"] for r in again.rounds if "plug_in_validation" in r],
        "gradient error": [p["zero_filled"]["error"] for p in points_of(again)],
        "score": [finish(again).accuracy.plug_in.accuracy],
    }


def main() -> None:
    from helpers import smoke_request

    folder, methods = Path(sys.argv[1]), sys.argv[2:]
    device = register()
    out: dict[str, dict[str, Any]] = {}
    for method in methods:
        settings = {"fedpft": {"t": "1", "r": "6"}, "fedot": {"emulator": "1"}}.get(method, {})
        out[method] = {}
        for where, executor in (("cpu", "packed"), ("elsewhere", "packed"), ("elsewhere", "fused")):
            own = folder / method / where / executor
            own.mkdir(parents=True)
            asked = smoke_request(own, method, "tweets-noniid", folder / "bert", **settings)
            asked = dataclasses.replace(asked, executor=executor, workers=1, results=own)
            out[method][f"{where} {executor}"] = run(asked, device if where == "elsewhere" else None)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
