"""How fast the proxy is beside others: ``python -m tests.benchmark``. See README.md."""
