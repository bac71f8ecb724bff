"""Bytes that autograd keeps of one microbatch, from what the nodes of `kernels` and the encoders save.

Not saved are parameters (a node keeps the parameter itself) and what all layers share (RoPE's angles, the attention
plan): less than a hundredth of a layer.

Shape suffixes of what is counted: T tokens of the row, C those of this context rank, S those of this rank's stream.
Of the model: D width, N query heads, K key/value heads, H head width, F MLP width, V vocabulary rows of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_gemini.config.engine import ParallelConfig
from megatron_gemini.config.model import ModelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.planning.parameters import key_heads_read, reading_layers
from megatron_gemini.registry import CONNECTORS, ENCODERS

FP32 = 4
CHUNK = 1 << 30
"""Bytes of a chunk of logits on a GPU, `kernels.head_chunks.CHUNK_BYTES`."""


@dataclass(frozen=True)
class RowShare:
    """A rank's share of a row. row, context, stream: T, C and S; tensor: tensor-parallel ranks; element: bytes.

    packed: the row holds documents of several lengths, as training rows do, so that attention works on copies.
    """

    row: int
    context: int
    stream: int
    tensor: int
    element: int
    packed: bool = True

    @staticmethod
    def of(config: RunConfig, packed: bool = True) -> RowShare:
        parallel: ParallelConfig = config.parallel
        row, element = config.data.row_tokens, 2 if config.engine.precision == "bf16" else FP32
        context = row // parallel.context
        stream = context // parallel.tensor if parallel.sequence else context
        return RowShare(row, context, stream, parallel.tensor, element, packed)


def layer_saved(model: ModelConfig, share: RowShare, recompute: str) -> float:
    """Bytes that one decoder layer keeps until its backward; what is computed again has kept its input alone."""
    again = share.stream * model.width * share.element
    if recompute == "full":
        return again
    # The gated MLP keeps gate, up, the activated gate, and their product.
    mlp = branch_saved(model, share) + 4 * share.context * model.mlp_width // share.tensor * share.element
    return mlp + (again if recompute == "selective" else attention_saved(model, share))


def layer_recomputed(model: ModelConfig, share: RowShare, recompute: str) -> float:
    """Bytes that recomputing one layer adds while its backward runs; one layer at a time."""
    return 0.0 if recompute == "none" else layer_saved(model, share, "none") - layer_saved(model, share, recompute)


def attention_saved(model: ModelConfig, share: RowShare) -> float:
    """The branch with norm, projections, attention and the output projection."""
    key_heads, heads = key_heads_read(model, share.tensor), model.heads // share.tensor
    queries, keys = heads * model.head_width, key_heads * model.head_width
    rotated = share.context * queries + share.row * keys  # RoPE writes new tensors, which attention saves
    gathered = share.row > share.context  # over the context ranks
    values = share.row * keys if share.packed or gathered else 0  # otherwise views of what was projected
    # Documents of several lengths are attended to in groups, and what comes out is put back in order: two tensors.
    out = share.context * queries * (2 if share.packed else 1)
    projected = 2 * share.context * keys  # keys with values, one product
    normalizers = share.context * heads * FP32  # the softmax's, a float32 for every query
    if model.qk_norm:  # the norms of the heads want what was projected, with a factor and a weight each
        projected += share.context * queries
        normalizers += (share.context * (heads + key_heads) + 2 * model.head_width) * FP32
    return branch_saved(model, share) + (rotated + values + out + projected) * share.element + normalizers


def branch_saved(model: ModelConfig, share: RowShare) -> float:
    """The beginning of a residual branch: its input, the norm's factor and its output."""
    return share.stream * (2 * model.width * share.element + FP32) + model.width * FP32


def loss_saved(model: ModelConfig, rows: int, share: RowShare, deferred: bool) -> float:
    """The final norm, and the head with its loss over `rows` ids. Every token counts as one with a target.

    deferred: as in breadth-first pipelines, hidden states are kept and the logits are made again in the backward;
    otherwise both gradients are made in the forward, and the head's is kept.
    """
    norm = share.stream * (model.width * share.element + FP32) + model.width * FP32
    hidden = share.context * model.width * share.element
    # Deferred, a token keeps its target in 8 bytes and two float32 of the softmax; its logits are made again.
    statistics = 4 * share.context * FP32 if deferred else 0
    return norm + hidden + (statistics if deferred else rows * model.width * share.element)


def loss_buffers(model: ModelConfig, rows: int, share: RowShare) -> float:
    """What the loss needs for a moment: a chunk of logits, the head's gradient, and in bf16 its sum in float32."""
    # Float32 logits are made chunk by chunk, each beside its gradient: whole ones would be the largest tensor of all.
    chunk = min(share.context * rows * FP32, CHUNK)
    return 2 * chunk + rows * model.width * ((FP32 if share.element < FP32 else 0) + share.element)


def encoder_saved(config: RunConfig, name: str, inputs: int, element: int) -> float:
    """Bytes that an encoder keeps of `inputs` in one forward with a graph; 0 if it is frozen."""
    section = config.encoders[name]
    return 0.0 if section.frozen else ENCODERS.get(name).saved_bytes(section, inputs, element)


def connector_saved(config: RunConfig, name: str, embeddings: int, element: int) -> float:
    """Bytes that an encoder's connector keeps of so many of its embeddings, which themselves count.

    A frozen connector of a trained encoder has a graph too: the gradients pass through it.
    """
    section = config.encoders[name]
    if section.frozen and section.connector.frozen:
        return 0.0
    spec, width = CONNECTORS.get(section.connector.kind), ENCODERS.get(name).output_width(section)
    return spec.saved_bytes(section.connector, width, config.model.width, embeddings, element)


def reader_saved(config: RunConfig, layers: range, share: RowShare, memory: int) -> float:
    """Bytes that the readers before these decoder layers keep of one row, each of `memory` embeddings."""
    kept = 0.0
    for name, reading in reading_layers(config).items():
        section, here = config.encoders[name].connector, len(set(layers).intersection(reading))
        reads = CONNECTORS.get(section.kind).reads
        if reads is not None:
            kept += here * reads.saved_bytes(section, config.model, share.stream, memory, share.tensor, share.element)
    return kept
