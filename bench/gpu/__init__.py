"""The GPU suite, one command: builds, tests, tunes and measures on the machine's GPU; python -m bench.gpu --help."""
