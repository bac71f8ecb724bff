"""All that is touched of DeepSpeed's internals, checked with release 0.19 (`release.py`)."""
