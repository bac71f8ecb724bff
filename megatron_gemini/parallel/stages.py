"""Which layers each pipeline stage holds: contiguous, and split by what they cost rather than by their number."""

from __future__ import annotations

from megatron_gemini.config.model import ModelConfig


def split_layers(layers: int, stages: int, layer_cost: float, head_cost: float) -> list[range]:
    """The layers of every stage, in order, such that the most expensive stage is as cheap as can be.

    The last stage also has the head and the loss, worth `head_cost`. Every stage has a layer. What does not divide goes
    to the later ones of the other stages, which keep fewer microbatches in flight.
    Raises ValueError for more stages than layers.
    """
    if stages > layers:
        raise ValueError(f"{stages} stages need as many layers, but there are {layers}; lower parallel.pipeline")
    # What follows divides by the number of the other stages.
    if stages == 1:
        return [range(layers)]

    def most_expensive(last: int) -> float:
        return max(-(-(layers - last) // (stages - 1)) * layer_cost, last * layer_cost + head_cost)

    # Only the last stage is different, so its number of layers decides. Of equally good ones the most: fewer layers on
    # the others are fewer activations of the microbatches that they keep in flight.
    last = min(range(1, layers - stages + 2), key=lambda count: (most_expensive(count), -count))
    even, rest = divmod(layers - last, stages - 1)
    counts = [even + (stage >= stages - 1 - rest) for stage in range(stages - 1)] + [last]
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def stage_layers(model: ModelConfig, vocabulary: int, row_tokens: int, stages: int) -> list[range]:
    """`split_layers` by the multiplications of one token, with an average document of a quarter of a row."""
    queries, keys = model.heads * model.head_width, model.kv_heads * model.head_width
    weights = model.width * (2 * queries + 2 * keys + 3 * model.mlp_width)
    layer = weights + 2 * queries * row_tokens / 8  # a causal token sees half of its document
    return split_layers(model.layers, stages, layer, model.width * vocabulary)
