"""What the proxies of fewer layers share: which layers clients hold, what is tuned, and where it goes back.

A proxy is `front` layers of the FM, an emulator of some of its middle, and `back` layers (l-n-r). The outer layers are
the adapter: they are tuned with LoRA, and plug-in puts them back around the FM's full middle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from fedbench.api.context import ServerContext
from fedbench.api.messages import Source
from fedbench.data.examples import Examples
from fedbench.errors import FedbenchError
from fedbench.methods._distillation import ProxyServer, distil_once
from fedbench.methods._layerwise import LayerLoss, Schedule, distil
from fedbench.methods.fedavg_lora import LoraMethod
from fedbench.methods.fedpft import FedPFT
from fedbench.models.build import build
from fedbench.models.foundation import FoundationModel
from fedbench.models.parts import Parts
from fedbench.models.spec import ModelSpec
from fedbench.models.weights import frozen_state, load_frozen, tunable_names

Emulator = Annotated[int, Field(ge=1)] | Literal["fedpft"] | None


class LayersMethod(LoraMethod):
    """The proxy's shape, `front`-`emulator`-`back` layers (l-n-r).

    emulator: layers of it; None keeps half the middle. "fedpft" keeps as many as bring what a client holds nearest to
    what it holds in fedpft, as fedpft's defaults are.
    """

    front: int = Field(1, ge=1)
    emulator: Emulator = "fedpft"
    back: int = Field(1, ge=1)


def uniform(middle: Sequence[int], keep: int) -> list[int]:
    """`keep` of the middle layers at an even stride, first and last among them (Xiao et al. 2023, section 4.1)."""
    if keep == 1:
        return [middle[(len(middle) - 1) // 2]]
    return [middle[round(i * (len(middle) - 1) / (keep - 1))] for i in range(keep)]


class LayersServer(ProxyServer):
    """Keeps the FM and a shallower proxy of it: adapter layers around an emulator.

    origin[i]: the FM's layer that layer i of the proxy was taken from. emulated: the proxy's layers of the emulator.
    """

    method: LayersMethod

    def __init__(self, method: LayersMethod, fm: FoundationModel, public: Examples, ctx: ServerContext) -> None:
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
                f"{method.name}: {method.front}-{keep}-{method.back} does not fit an FM of {layers} layers; "
                f"set emulator between 1 and {max(1, len(middle))}, or front and back lower"
            )
        self.emulated = range(method.front, method.front + keep)
        self.origin = [*range(method.front), *self.chosen(middle, keep), *range(layers - method.back, layers)]
        self.spec = self.shape(fm.spec.with_layers(self.origin))
        self.model = build(self.spec).to(ctx.device)
        self.parts = Parts(self.model)
        load_frozen(self.model, self.taken())
        self._fm_names = {name: self.in_fm(name) for name in tunable_names(self.model) if self.is_tuned(name)}
        self.values = {mine: self.initial[theirs] for mine, theirs in self._fm_names.items()}
        self.begin()
        self.distilled = self.distil(fm)

    def chosen(self, middle: range, keep: int) -> list[int]:
        """Which of the FM's middle layers make the emulator."""
        return uniform(middle, keep)

    def shape(self, spec: ModelSpec) -> ModelSpec:
        """The proxy with what is tuned: adapters in the layers that go back into the FM, as the emulator is frozen."""
        tuned = tuple(i for i in range(len(self.origin)) if i not in self.emulated)
        return spec.with_lora(replace(self.method.lora, layers=tuned))

    def taken(self) -> dict[str, Any]:
        """The proxy's frozen tensors, as they are in the FM."""
        whole, sources = frozen_state(self.full), self.fm_sources()
        return {name: whole[sources[name].name] for name in frozen_state(self.model)}

    def is_tuned(self, name: str) -> bool:
        """Whether clients train a tunable of the proxy, and send it in every round."""
        return True

    def begin(self) -> None:
        """What else has to be in place before the proxy is distilled."""

    def notes(self) -> Sequence[str]:
        return [self.matched] if self.matched else []

    def in_fm(self, name: str) -> str:
        """The FM's name of what the proxy calls `name`."""
        layer = self.parts.layer_of(name)
        if layer is None:
            return name
        path, original = self.parts.layer_path(layer), Parts(self.full).layer_path(self.origin[layer])
        return original + name.removeprefix(path)

    def stands_for(self, layer: int) -> int:
        """The last of the FM's layers that a layer of the emulator stands for: up to the next that is in the proxy."""
        return self.origin[layer + 1] - 1

    def pairs(self) -> list[tuple[int, int]]:
        """Layers whose outputs are compared, of the FM and of the proxy: the ends of middle and emulator."""
        return [(self.stands_for(self.emulated[-1]), self.emulated[-1])]

    def trained(self) -> list[str]:
        """The parameters that distillation moves: all of the emulator's."""
        return [n for n, _ in self.model.named_parameters() if self.parts.layer_of(n) in self.emulated]

    def schedule(self) -> Schedule:
        """Of the distillation before federated learning."""
        return Schedule(0, 1, 0.0)

    def distil(self, fm: FoundationModel) -> list[dict[str, Any]]:
        """Distil the emulator before federated learning; returns its residuals."""
        names, loss, schedule = self.trained(), self.loss(), self.schedule()
        return distil_once(self.full, self.model, names, loss, self.public, schedule, self.ctx, self.ingredients(fm))

    def distil_again(self, round: int, schedule: Schedule) -> None:
        """Distil the proxy on from where it is, towards the FM with the aggregated adapters, after a round."""
        rng = self.ctx.streams.numpy("alignment", round)
        teacher, student = self.put_in_fm(), self.put_in_proxy()
        distil(teacher, student, self.trained(), self.loss(), self.public, schedule, rng, self.ctx.execution)
        self.version += 1

    def loss(self) -> LayerLoss:
        """What distillation holds down."""
        return LayerLoss(self.pairs())

    def ingredients(self, fm: FoundationModel) -> dict[str, Any]:
        """What distillation before federated learning depends on, besides data and schedule."""
        m = self.method
        return {"method": [m.name, m.version], "layers": [self.origin, *self.emulated], "fm": fm.content_hash}

    def fm_names(self) -> Mapping[str, str]:
        return self._fm_names

    def fm_sources(self) -> Mapping[str, Source]:
        return {name: Source(self.in_fm(name)) for name in frozen_state(self.model)}

    def _match(self, middle: range, fm: FoundationModel) -> tuple[int, str]:
        """The emulator's layers that come nearest to fedpft's parameters in the layers a client holds, and a note."""
        m, parts = self.method, Parts(self.full)
        if m.lora.on_ffns:
            raise FedbenchError(
                f"{m.name}: emulator 'fedpft' compares with fedpft, which has no LoRA on FFNs, but lora_targets is "
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
            f"{m.name} {m.front}-{keep}-{m.back}: {held[keep] / 1e6:.2f} M parameters in a client's layers with LoRA, "
            f"fedpft's {target / 1e6:.2f} M"
        )
