"""FedOT: offsite-tuning (Xiao et al. 2023) in a federation, as FedPFT compares against it.

The first and last layers are the adapter, tuned with LoRA; the middle is an emulator of fewer layers, distilled at the
server on public data and frozen at the clients. Plug-in puts the tuned layers back around the FM's full middle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from fedbench.api.context import ServerContext
from fedbench.api.messages import Source
from fedbench.api.sides import Server
from fedbench.data.examples import Examples
from fedbench.errors import FedbenchError
from fedbench.methods._distillation import ProxyServer, distil_once, required
from fedbench.methods._layerwise import LayerLoss, Schedule
from fedbench.methods.fedavg_lora import LoraMethod
from fedbench.methods.fedpft import FedPFT
from fedbench.models.build import build
from fedbench.models.foundation import FoundationModel
from fedbench.models.parts import Parts
from fedbench.models.weights import frozen_state, load_frozen, tunable_names


class FedOT(LoraMethod):
    """FedOT's shape, `front`-`emulator`-`back` layers (l-n-r), and its distillation.

    emulator: layers of it; None keeps half the middle. "fedpft" keeps as many as bring what a client holds nearest to
    what it holds in fedpft, as fedpft's defaults are.
    """

    name: ClassVar[str] = "fedot"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    front: int = Field(1, ge=1)
    emulator: Annotated[int, Field(ge=1)] | Literal["fedpft"] | None = None
    back: int = Field(1, ge=1)
    distil_steps: int = Field(200, ge=0)
    distil_batch: int = Field(32, ge=1)
    distil_lr: float = Field(6e-4, gt=0)

    def server(self, fm: FoundationModel, public: Examples | None, ctx: ServerContext) -> Server:
        return FedOTServer(self, fm, required(self, public), ctx)


def uniform(middle: Sequence[int], keep: int) -> list[int]:
    """`keep` of the middle layers at an even stride, first and last among them (Xiao et al. 2023, section 4.1)."""
    if keep == 1:
        return [middle[(len(middle) - 1) // 2]]
    return [middle[round(i * (len(middle) - 1) / (keep - 1))] for i in range(keep)]


class FedOTServer(ProxyServer):
    """Keeps the FM and a shallower proxy of it: adapter layers around an emulator."""

    method: FedOT

    def __init__(self, method: FedOT, fm: FoundationModel, public: Examples, ctx: ServerContext) -> None:
        super().__init__(method, fm, public, ctx)
        layers = Parts(self.full).count
        middle = range(method.front, layers - method.back)
        keep = max(1, len(middle) // 2)
        self.matched: str | None = None
        if isinstance(method.emulator, int):
            keep = method.emulator
        elif method.emulator == "fedpft" and middle:
            keep, self.matched = self._match(middle, fm)
        if not 1 <= keep <= len(middle):
            raise FedbenchError(
                f"fedot: {method.front}-{keep}-{method.back} does not fit an FM of {layers} layers; "
                f"set emulator between 1 and {max(1, len(middle))}, or front and back lower"
            )
        # origin[i]: the FM's layer that layer i of the proxy was taken from.
        self.origin = [*range(method.front), *uniform(middle, keep), *range(layers - method.back, layers)]
        self.emulated = range(method.front, method.front + keep)
        # Adapters in the layers that go back into the FM, and in those alone: the emulator is frozen.
        tuned = tuple(i for i in range(len(self.origin)) if i not in self.emulated)
        lora = replace(method.lora, layers=tuned)
        self.spec = fm.spec.with_layers(self.origin).with_lora(lora)
        self.model = build(self.spec).to(ctx.device)
        self.parts = Parts(self.model)
        whole, sources = frozen_state(self.full), self.fm_sources()
        load_frozen(self.model, {name: whole[sources[name].name] for name in frozen_state(self.model)})
        self._fm_names = {name: self._in_fm(name) for name in tunable_names(self.model)}
        self.values = {mine: self.initial[theirs] for mine, theirs in self._fm_names.items()}
        self.distilled = self._distil(fm)

    def _match(self, middle: range, fm: FoundationModel) -> tuple[int, str]:
        """The emulator's layers that come nearest to fedpft's parameters in the layers a client holds, and a note."""
        m, parts = self.method, Parts(self.full)
        if m.lora.on_ffns:
            raise FedbenchError(
                f"fedot: emulator 'fedpft' compares with fedpft, which has no LoRA on FFNs, but lora_targets is "
                f"{m.lora_targets!r}; give emulator a number of layers"
            )
        sizes = [{name: p.numel() for name, p in parts.layer(i).named_parameters()} for i in range(parts.count)]
        whole = [sum(size.values()) for size in sizes]
        bare = [sum(n for name, n in size.items() if ".lora_" not in name) for size in sizes]
        adapters = sum(whole[: m.front]) + sum(whole[parts.count - m.back :])
        held = {n: adapters + sum(bare[i] for i in uniform(middle, n)) for n in range(1, len(middle) + 1)}
        widths = FedPFT().widths(fm.spec.ffn_widths)
        # A neuron is a row of W1 with its bias, and a column of W2.
        numbers = {name: tensor.numel() for name, tensor in frozen_state(self.full).items()}
        target = sum(whole) - sum(
            (full - kept) * sum(numbers[slices.name] for slices in parts.neurons(i).values()) // full
            for i, (full, kept) in enumerate(zip(fm.spec.ffn_widths, widths, strict=True))
        )
        keep = min(held, key=lambda n: abs(held[n] - target))
        return keep, (
            f"fedot {m.front}-{keep}-{m.back}: {held[keep] / 1e6:.2f} M parameters in a client's layers with LoRA, "
            f"fedpft's {target / 1e6:.2f} M"
        )

    def notes(self) -> Sequence[str]:
        return [self.matched] if self.matched else []

    def _in_fm(self, name: str) -> str:
        """The FM's name of what the proxy calls `name`."""
        layer = self.parts.layer_of(name)
        if layer is None:
            return name
        path, original = self.parts.layer_path(layer), Parts(self.full).layer_path(self.origin[layer])
        return original + name.removeprefix(path)

    def _distil(self, fm: FoundationModel) -> list[dict[str, Any]]:
        m = self.method
        student_end = self.emulated[-1]
        teacher_end = self.origin[student_end + 1] - 1
        names = [n for n, _ in self.model.named_parameters() if self.parts.layer_of(n) in self.emulated]
        return distil_once(
            self.full,
            self.model,
            names,
            LayerLoss([(teacher_end, student_end)]),
            self.public,
            Schedule(m.distil_steps, m.distil_batch, m.distil_lr),
            self.ctx,
            {"method": [m.name, m.version], "layers": [self.origin, *self.emulated], "fm": fm.content_hash},
        )

    def fm_names(self) -> Mapping[str, str]:
        return self._fm_names

    def fm_sources(self) -> Mapping[str, Source]:
        return {name: Source(self._in_fm(name)) for name in frozen_state(self.model)}
