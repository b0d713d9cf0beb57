"""What is compared, each a program: ``python -m tests.benchmark.candidates.NAME UPSTREAM PORT LOOP``.

They stop on SIGTERM by returning, so that a profile of them is written.
"""
