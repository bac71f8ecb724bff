"""How answers are sampled; the standard library only, so that `--help` shows the defaults at once."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_gemini.config.check import at_least, one_of, positive
from megatron_gemini.contracts import TEXT
from megatron_gemini.registry import MODALITIES

ANY = "any"


def answers() -> tuple[str, ...]:
    """What may be asked for: anything, text alone, or one item of a modality that is made as codes."""
    return (ANY, TEXT, *(spec.name for spec in MODALITIES.entries() if spec.codes is not None))


# The defaults of temperature and guidance are those at which the quickstart's drawings are judged.
@dataclass(frozen=True)
class SampleSettings:
    """Settings of one call; the same for every sequence in it."""

    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Sample from the k likeliest tokens only; 0 does not limit."""
    top_p: float = 1.0
    """Sample from the fewest likeliest tokens whose probabilities reach this sum; 1 does not limit."""
    seed: int = 0
    """Of sequence 0; sequence i of a call uses seed + i."""
    guidance: float = 2.0
    """Classifier-free guidance of codes: how far to move from the answer to no prompt; 1 is off."""
    max_tokens: int = 256
    """Most tokens of an answer, codes included."""
    answer: str = ANY
    """What may be answered: any, text (no codes), or a modality, such as image (one image and nothing else)."""
    cache: bool = True
    """Keep keys and values instead of computing the whole sequence again for every token. A model whose layers read
    memories beside the stream computes it again whatever this says."""

    def __post_init__(self) -> None:
        at_least(self, "generate", 0, "temperature", "top_k", "seed", "guidance")
        positive(self, "generate", "max_tokens", "top_p")
        one_of(self, "generate", "answer", answers())
        if self.top_p > 1:
            raise ValueError(f"generate.top_p is {self.top_p}; it is a share of the probability, at most 1")
