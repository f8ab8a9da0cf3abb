"""Train a CLIP vision tower against a large language model, end to end."""

__version__ = "0.1.0"
