"""Quantize PyTorch models for CPUs with pure functions over immutable graphs."""
