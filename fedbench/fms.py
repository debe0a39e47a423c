"""Names of the foundation models that come with the project; importable without torch."""

from __future__ import annotations

FMS: dict[str, str] = {
    "minilm-l6": "all-MiniLM-L6-v2, BERT of 6 layers, width 384 (embedded: extra 'bundled')",
    "vit-digits": "ViT of 6 layers, width 64, pre-trained here on 5,000 MNIST images (embedded: extra 'bundled')",
    "bert-base": "google-bert/bert-base-uncased, 12 layers, width 768 (hub, hub cache or --fm PATH)",
    "roberta-base": "FacebookAI/roberta-base, 12 layers, width 768 (hub, hub cache or --fm PATH)",
    "distilbert-base": "distilbert/distilbert-base-uncased, 6 layers, width 768 (hub, hub cache or --fm PATH)",
    "vit-base": "google/vit-base-patch16-224-in21k, 12 layers, width 768 (hub, hub cache or --fm PATH)",
}
"""Name -> one line. Anything else is taken as a local checkpoint folder or a hub id."""
