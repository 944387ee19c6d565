"""Configuration as immutable values: what to quantize, how, and what a backend can run."""
