"""What is compared, each a program: ``python -m tests.benchmark.candidates.NAME UPSTREAM``."""
