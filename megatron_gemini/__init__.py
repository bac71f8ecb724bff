"""Distributed training of natively multimodal, decoder-only transformers."""

__version__ = "0.1.0"
