"""FLOPs: those that a model needs, and the most that a device gives. The standard library only, at import."""

from __future__ import annotations

import re

from megatron_gemini.config.model import ModelConfig
from megatron_gemini.config.run import RunConfig

# Dense bf16 tensor-core FLOP/s by torch's name of the device, from NVIDIA's data sheets (which print H100's and newer
# figures with sparsity: twice these). A name of two kinds takes the first that matches.
_PEAK_FLOPS = (
    (r"\bA100\b", 312e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH100\b", 989e12),
    (r"\bH200 NVL\b", 835e12),
    (r"\bH200\b", 989e12),
    (r"\bGH200\b", 989e12),
    (r"\bB200\b", 2250e12),
    (r"\bL40S\b", 362e12),
    (r"\bL4\b", 121e12),
    (r"\bA10\b", 125e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by `torch.cuda.get_device_name()`; None where it is not known."""
    if "MIG" in device_name:  # a slice of the card, whose name has the whole card's in it
        return None
    return next((flops for name, flops in _PEAK_FLOPS if re.search(name, device_name)), None)


def model_flops_per_token(model: ModelConfig, vocabulary: int, visible_keys: float, loss_share: float = 1.0) -> float:
    """FLOPs of forward and backward that the decoder needs for one token (PaLM, arXiv:2204.02311, appendix B).

    visible_keys: keys that a token attends to, on average: (n + 1) / 2 in a causal document of n tokens.
    loss_share: share of the tokens that have a target, which alone reach the head over the `vocabulary`.

    Six per weight of a matrix product, and 12 * layers * heads * head_width per visible key. Recomputation does not
    count, nor do the encoders, so a utilization from this is a lower bound where images or audio are read.
    """
    # Two matrices for queries and output, two of the key/value heads' width, and the MLP's gate, up and down. A weight
    # takes a multiplication and an addition in the forward and twice that in the backward, for the gradients of its
    # input and its own. A visible key takes them in two products, with the query and with the value: 2 * 6.
    queries = model.heads * model.head_width
    attention = 2 * model.width * queries + 2 * model.width * model.kv_heads * model.head_width
    weights = model.layers * (attention + 3 * model.width * model.mlp_width)
    head = loss_share * model.width * vocabulary
    return 6 * (weights + head) + 12 * model.layers * queries * visible_keys


def utilization(config: RunConfig, flops_per_token: float, tokens_per_second: float, devices: int) -> float | None:
    """Model FLOPs utilization (MFU) in [0, 1]: the FLOP/s that the model needs over the dense bf16 peak of `devices`.

    None without CUDA, on a device that is not in the table, and in fp32, which has another peak.
    """
    import torch

    if config.engine.precision != "bf16" or not torch.cuda.is_available():
        return None
    peak = peak_flops(torch.cuda.get_device_name())
    return None if peak is None else flops_per_token * tokens_per_second / (peak * devices)
