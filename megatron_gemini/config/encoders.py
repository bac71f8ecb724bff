"""The encoders of a model, by name, and what stands between each and the decoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from megatron_gemini.config.check import at_least, divides, positive
from megatron_gemini.config.schema import Chosen
from megatron_gemini.registry import CONNECTORS


@dataclass(frozen=True)
class CostConfig:
    """What an encoder's item costs: quadratic n^2 + linear n + constant, in any unit."""

    quadratic: float = 1.0
    linear: float = 3000.0
    constant: float = 30000.0

    def __post_init__(self) -> None:
        # With a negative one a larger item could seem the cheaper, and all would go to one rank.
        at_least(self, "cost", 0, "quadratic", "linear", "constant")


@dataclass(frozen=True)
class ConnectorConfig:
    """What every connector has; the others' own settings are in their folders."""

    kind: str = "linear"
    """Name of the connector, see `megatron_gemini/registry.py`."""
    frozen: bool = False
    """Not trained: its weights stay as they begin or were loaded."""
    lr_scale: float = 1.0
    """Its learning rate, as a multiple of optimizer.lr."""

    def __post_init__(self) -> None:
        at_least(self, "connector", 0, "lr_scale")


@dataclass(frozen=True)
class EncoderConfig:
    """What every encoder has. A plugin's should begin with `enabled: bool = False`, or it is in every model."""

    enabled: bool = True
    frozen: bool = False
    """Not trained: its weights stay as they begin or were loaded. Its connector has a switch of its own."""
    lr_scale: float = 1.0
    """Its learning rate, as a multiple of optimizer.lr."""
    cost: CostConfig = field(default_factory=CostConfig)
    """Of an item, to balance the ranks. n: encoder inputs that attend to each other (patches of a frame, frames of
    sound at the encoder's rate); an item of several such groups costs their sum."""
    connector: Annotated[ConnectorConfig, Chosen(CONNECTORS)] = field(
        default_factory=lambda: CONNECTORS.get("linear").section()
    )

    def __post_init__(self) -> None:
        at_least(self, "encoders", 0, "lr_scale")


@dataclass(frozen=True)
class VisionConfig(EncoderConfig):
    """The ViT that encodes images and the frames of clips, at native resolution."""

    width: int = 96
    layers: int = 2
    heads: int = 4
    mlp_width: int = 192
    patch: int = 4
    """Pixels of a patch's side."""
    max_side: int = 64
    """Longest side in pixels; a larger image is resized to it, keeping its aspect."""
    max_frames: int = 8
    """Frames of a clip; a longer clip is sampled evenly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        prefix = "encoders.vision"
        positive(self, prefix, "width", "layers", "heads", "mlp_width", "patch", "max_side", "max_frames")
        divides(self.heads, self.width, f"{prefix}.heads", f"{prefix}.width")
        # A half of the width tells the row and the other the column, each by as many sines as cosines.
        divides(4, self.width, "4 (the 2D positions)", f"{prefix}.width")
        divides(self.patch, self.max_side, f"{prefix}.patch", f"{prefix}.max_side")


@dataclass(frozen=True)
class AudioConfig(EncoderConfig):
    """The USM-style audio encoder: log-mel, two stride-2 convolutions, Conformer blocks, 25 Hz out."""

    width: int = 96
    layers: int = 2
    heads: int = 4
    mlp_width: int = 192
    kernel: int = 5
    """Width of the Conformer's depthwise convolution."""
    mels: int = 128
    max_seconds: float = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        prefix = "encoders.audio"
        positive(self, prefix, "width", "layers", "heads", "mlp_width", "kernel", "mels", "max_seconds")
        divides(self.heads, self.width, f"{prefix}.heads", f"{prefix}.width")
        if self.kernel % 2 == 0:
            raise ValueError(f"{prefix}.kernel is {self.kernel}; a centered convolution needs an odd width")


@dataclass(frozen=True)
class EncoderEnginesConfig:
    """The engines of encoders and connectors, which work on all ranks whatever the decoder's layout."""

    # Apart from the decoder's, since a pipeline often has ZeRO-1 and encoders of billions of parameters cannot: ZeRO-1
    # keeps whole gradients on every rank.
    zero_stage: int = -1
    """ZeRO stage of the encoders; -1 is engine.zero_stage."""
    recompute: bool = True
    """Run the encoders without a graph and again in the backward, so that a step's activations never live at once."""
    chunk_tokens: int = 4096
    """Encoder inputs (patches or log-mel frames) of the items in one forward; a longer item is alone."""

    def __post_init__(self) -> None:
        if self.zero_stage not in (-1, 0, 1, 2, 3):
            raise ValueError(
                f"encoder_engines.zero_stage is {self.zero_stage}; choose 0 to 3, or -1 for engine.zero_stage"
            )
        # No bound from above: on a GPU a larger chunk fills more of it, until the activations of one do not fit.
        positive(self, "encoder_engines", "chunk_tokens")
