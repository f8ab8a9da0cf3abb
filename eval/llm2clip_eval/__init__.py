"""Measure vision towers: retrieval now, and what the comparison of two of them means."""
