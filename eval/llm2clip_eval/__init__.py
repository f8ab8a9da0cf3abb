"""Measure vision towers, before LLaVA and in it, and say what the comparison of two of them means."""
