"""LLaVA-1.5 with any vision tower."""
