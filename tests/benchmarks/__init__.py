"""Programs that measure; see `python -m tests.benchmarks.NAME --help`. No test asserts a time."""
