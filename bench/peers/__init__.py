"""The encoder beside other engines, each in its best configuration: `python -m bench.peers --help`."""
