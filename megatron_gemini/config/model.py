"""The decoder and the image code tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_gemini.config.check import at_least, divides, one_of, positive


@dataclass(frozen=True)
class ModelConfig:
    """The decoder: pre-norm, multi-query attention, gated MLP."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    """Query heads."""
    kv_heads: int = 1
    """Key/value heads: 1 is multi-query attention, more is grouped-query attention."""
    head_width: int = 32
    mlp_width: int = 384
    activation: Literal["gelu", "silu"] = "gelu"
    """Of the gate: GeGLU (tanh approximation, as in Gemma) or SwiGLU."""
    qk_norm: bool = True
    """RMSNorm on every query and key head, for stability with mixed modalities (Chameleon)."""
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    # As in Gemma. Image codes are ids of the same vocabulary, so that the one table reads and writes them too.
    tie_embeddings: bool = True
    # Narrow models set their own, near 1 / sqrt(width). At a width of 128 the loss of captions was 0.69 with 0.02 and
    # 0.22 with 0.1 after 125 to 150 steps (docs/log.md).
    init_std: float = 0.02

    def __post_init__(self) -> None:
        positive(self, "model", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width")
        positive(self, "model", "rope_theta", "norm_eps", "init_std")
        divides(self.kv_heads, self.heads, "model.kv_heads", "model.heads")
        divides(2, self.head_width, "2", "model.head_width")  # RoPE turns pairs of values
        one_of(self, "model", "activation", ("gelu", "silu"))


@dataclass(frozen=True)
class ImageTokenizerConfig:
    """The ViT-VQGAN that turns an image into discrete codes and back."""

    image_size: int = 16
    patch: int = 4
    width: int = 64
    layers: int = 2
    heads: int = 4
    mlp_width: int = 128
    codes: int = 64
    """Codebook size; 0 for a model that draws no images."""
    code_width: int = 4
    """Width of a code's unit vector: few dimensions keep all codes in use."""
    commitment: float = 0.25
    l2_weight: float = 1.0
    logit_laplace_weight: float = 0.1

    def __post_init__(self) -> None:
        positive(self, "image_tokenizer", "image_size", "patch", "width", "layers", "heads", "mlp_width", "code_width")
        at_least(self, "image_tokenizer", 0, "codes", "commitment", "l2_weight", "logit_laplace_weight")
        divides(self.patch, self.image_size, "image_tokenizer.patch", "image_tokenizer.image_size")
        divides(self.heads, self.width, "image_tokenizer.heads", "image_tokenizer.width")

    @property
    def codes_per_image(self) -> int:
        return (self.image_size // self.patch) ** 2
