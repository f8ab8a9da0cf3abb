"""LLaVA-1.5 with any vision tower: pretraining, instruction tuning and exports that load everywhere."""
