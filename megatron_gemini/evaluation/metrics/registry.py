"""The metrics by name. One comes in by a file in this folder and a line in `METRICS`, or from outside by `register`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from megatron_gemini.evaluation.metrics.code_usage import CODE_USAGE
from megatron_gemini.evaluation.metrics.copies import COPIES
from megatron_gemini.evaluation.metrics.diversity import DIVERSITY
from megatron_gemini.evaluation.metrics.error_rates import CER, WER
from megatron_gemini.evaluation.metrics.exact_match import EXACT_MATCH
from megatron_gemini.evaluation.metrics.inputs import Codes, CodeSets, ImagePairs, ImageSets, Inputs, Texts
from megatron_gemini.evaluation.metrics.psnr import PSNR
from megatron_gemini.evaluation.metrics.spec import MetricSpec, Score
from megatron_gemini.evaluation.metrics.ssim import SSIM

Metric = MetricSpec[Texts] | MetricSpec[ImagePairs] | MetricSpec[ImageSets] | MetricSpec[Codes] | MetricSpec[CodeSets]
METRICS: dict[str, Metric] = {
    "exact_match": EXACT_MATCH,
    "cer": CER,
    "wer": WER,
    "psnr": PSNR,
    "ssim": SSIM,
    "code_usage": CODE_USAGE,
    "diversity": DIVERSITY,
    "copies": COPIES,
}


def register(metric: Metric) -> None:
    """Adds a metric, which is then part of every evaluation. Raises ValueError for a name that is taken."""
    if metric.name in METRICS:
        raise ValueError(f"there is a metric {metric.name!r} already; give yours another name")
    METRICS[metric.name] = metric


def find(name: str) -> Metric:
    """The metric of this name. Raises ValueError that tells the nearest name for an unknown one."""
    if name not in METRICS:
        close = difflib.get_close_matches(name, METRICS, n=1)
        way_out = f"did you mean {close[0]}?" if close else f"there are {', '.join(METRICS)}"
        raise ValueError(f"there is no metric {name!r}; {way_out}")
    return METRICS[name]


def judge(subject: str, inputs: Inputs, names: Sequence[str] = ()) -> dict[str, Score]:
    """The figures SUBJECT_METRIC of all metrics that take such inputs, or of those that are named."""
    scores = {name: find(name).judge(inputs) for name in names or METRICS}
    return {f"{subject}_{name}": score for name, score in scores.items() if score is not None}
