"""Named models of about 1B, 8B and 70B parameters, encoders included. Only numbers: importing this imports nothing.

Multi-query attention with heads of 256 as in Gemma-2B or 128, gated MLPs, tied embeddings. Vision after ViT-B, SigLIP's
So400m and a ViT-g; audio after the Conformers of USM, 24 x 1024 (0.6B) and 32 x 1536 (2B), or a smaller one. The image
tokenizer is Parti's ViT-VQGAN: 256 pixels, patches of 8, 1,024 codes an image out of 8,192. It is trained on its own
and not part of the count.
"""

from __future__ import annotations

import copy

from megatron_gemini.config.schema import Plain

TEXT_PIECES = 64_000
"""Size of the SentencePiece model that the parameter counts assume; yours decides."""

_IMAGE_TOKENIZER: dict[str, Plain] = {
    "image_size": 256,
    "patch": 8,
    "width": 512,
    "layers": 8,
    "heads": 8,
    "mlp_width": 2048,
    "codes": 8192,
    "code_width": 32,
}

# Each is within a tenth of the parameters that its name says. Heads and MLP widths divide by 8, the GPUs of a node: so
# many tensor-parallel ranks keep their traffic on NVLink.
PRESETS: dict[str, dict[str, Plain]] = {
    "1b": {
        "model": {
            "width": 2048,
            "layers": 18,
            "heads": 8,
            "kv_heads": 1,
            "head_width": 256,
            "mlp_width": 4608,
        },
        "encoders": {
            "vision": {
                "width": 768,
                "layers": 12,
                "heads": 12,
                "mlp_width": 3072,
                "patch": 16,
                "max_side": 512,
                "max_frames": 16,
            },
            "audio": {"width": 512, "layers": 12, "heads": 8, "mlp_width": 2048},
        },
        "image_tokenizer": _IMAGE_TOKENIZER,
    },
    "8b": {
        "model": {
            "width": 4096,
            "layers": 32,
            "heads": 16,
            "kv_heads": 1,
            "head_width": 256,
            "mlp_width": 14336,
            "rope_theta": 500000.0,
        },
        "encoders": {
            "vision": {
                "width": 1152,
                "layers": 27,
                "heads": 16,
                "mlp_width": 4304,
                "patch": 14,
                "max_side": 896,
                "max_frames": 32,
            },
            "audio": {"width": 1024, "layers": 24, "heads": 16, "mlp_width": 4096},
        },
        "image_tokenizer": _IMAGE_TOKENIZER,
    },
    "70b": {
        "model": {
            "width": 8192,
            "layers": 80,
            "heads": 64,
            "kv_heads": 1,
            "head_width": 128,
            "mlp_width": 28672,
            "rope_theta": 500000.0,
        },
        "encoders": {
            "vision": {
                "width": 1408,
                "layers": 40,
                "heads": 16,
                "mlp_width": 6144,
                "patch": 14,
                "max_side": 896,
                "max_frames": 32,
            },
            "audio": {"width": 1536, "layers": 32, "heads": 16, "mlp_width": 6144},
        },
        "image_tokenizer": _IMAGE_TOKENIZER,
    },
}


def preset(name: str) -> dict[str, Plain]:
    """Settings of a named model, nested as in a file, to be overridden by the user's own values.

    Raises ValueError for a name that is not a preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; choose one of {', '.join(PRESETS)}")
    return copy.deepcopy(PRESETS[name])  # the caller merges its own values into it
