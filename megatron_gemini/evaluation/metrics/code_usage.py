"""How much of a codebook is used."""

from __future__ import annotations

from megatron_gemini.evaluation.metrics.inputs import CodedImages
from megatron_gemini.evaluation.metrics.spec import MetricSpec


def code_usage(codes: CodedImages) -> float:
    """Share of the codebook that occurs in the images. A collapsed codebook (van den Oord et al. 2017) shows here."""
    return len({code for image in codes.images for code in image}) / codes.codebook


CODE_USAGE = MetricSpec("code_usage", CodedImages, code_usage, "higher", "{:.1%}", "codes that occur")
