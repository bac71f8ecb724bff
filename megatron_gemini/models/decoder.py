"""The decoder: pre-norm transformer layers with multi-query attention and a gated MLP, on one packed row.

Shape suffixes: T packed tokens, D model width, N query heads, K key/value heads, H head width, F MLP width,
V vocabulary. N, K, F, V and the T of h_TD are this rank's share of them; nothing here depends on how many ranks there
are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import nn

from megatron_gemini.config.model import ModelConfig
from megatron_gemini.kernels.attention.api import AttentionPlan, CrossAttentionPlan
from megatron_gemini.kernels.rope import CosSin, rope_cos_sin
from megatron_gemini.parallel.parameters import declare_tied
from megatron_gemini.parallel.recompute import NO_RECOMPUTE, Recompute, RecomputeContext
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.tensor.vocabulary import Vocabulary


def branch_std(config: ModelConfig) -> float:
    """Deviation of the weights that end a residual branch: the sum of all branches then does not grow with depth."""
    # A layer has two branches. With a variance of std^2 / (2 layers) each, all of them add what one of std^2 would.
    return config.init_std * (2 * config.layers) ** -0.5


class AttentionCache(Protocol):
    """Keys and values of earlier tokens, for generation."""

    def attend(
        self,
        layer_index: int,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        plan: AttentionPlan,
    ) -> torch.Tensor:
        """Store the new keys and values, and attend to all that the new queries may see: [T, N, H]."""
        ...


class Attention(nn.Module):
    """h + attention(norm(h)): multi-query (Shazeer, 2019) or grouped-query, with RoPE and, if asked for, QK-norm."""

    def __init__(self, config: ModelConfig, layers: LayerFactory, index: int) -> None:
        super().__init__()
        width, head_width, std = config.width, config.head_width, config.init_std
        self.index = index
        self.input = layers.attention_input(
            width, config.heads, config.kv_heads, head_width, eps=config.norm_eps, std=std
        )
        self.query_norm = self.key_norm = None
        if config.qk_norm:
            self.query_norm = layers.head_norm(head_width, config.norm_eps)
            self.key_norm = layers.head_norm(head_width, config.norm_eps)
        self.context = layers.context()
        self.output = layers.attention_output(config.heads * head_width, width, std=branch_std(config))

    def forward(
        self, h_TD: torch.Tensor, cos_sin: CosSin, plan: AttentionPlan, cache: AttentionCache | None
    ) -> torch.Tensor:
        q_TNH, k_TKH, v_TKH = self.input(h_TD)
        if self.query_norm is not None and self.key_norm is not None:
            q_TNH, k_TKH = self.query_norm(q_TNH), self.key_norm(k_TKH)
        # Before RoPE, for which the gathered keys have the order of the row, as `cos_sin` has. The norm is of one token
        # alone, so each context rank computes it for its own.
        k_TKH, v_TKH = self.context.gather(k_TKH, v_TKH)
        attend = None if cache is None else functools.partial(cache.attend, self.index)
        return self.output(h_TD, q_TNH, k_TKH, v_TKH, plan, cos_sin, attend)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layers: LayerFactory, index: int) -> None:
        super().__init__()
        self.attention = Attention(config, layers, index)
        self.mlp = layers.mlp(
            config.width,
            config.mlp_width,
            config.activation,
            eps=config.norm_eps,
            std=config.init_std,
            last_std=branch_std(config),
        )

    def forward(
        self,
        h_TD: torch.Tensor,
        cos_sin: CosSin,
        plan: AttentionPlan,
        cache: AttentionCache | None,
        recompute: RecomputeContext = NO_RECOMPUTE,
    ) -> torch.Tensor:
        # The context tells the halves apart: `selective` recomputes the first one alone, and a recomputed layer leaves
        # out the last product of the second, which nobody reads.
        return recompute.mlp(self.mlp, recompute.attention(self.attention, h_TD, cos_sin, plan, cache))


@dataclass(frozen=True)
class Part:
    """The share of the decoder that one pipeline stage holds: some layers, the embedding, the norm and head."""

    layers: range
    first: bool
    last: bool

    @staticmethod
    def whole(layers: int) -> Part:
        return Part(range(layers), first=True, last=True)


class Decoder(nn.Module):
    """Embedding, layers, final norm and head over `vocabulary` ids, or the `part` of them that a pipeline stage holds.

    The embedding is scaled by sqrt(D), as in Gemma. A tied head is the embedding module itself, called as head, so the
    weight is only ever used inside the module that owns it. A last stage that is not the first has a copy of it.
    Names of parameters are those of the whole decoder.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: int,
        layers: LayerFactory,
        part: Part | None = None,
        recompute: Recompute | None = None,
        readers: Mapping[int, Mapping[str, Callable[[], nn.Module]]] | None = None,
    ) -> None:
        """readers: makes the modules that read connectors' memories, by the layer before which they do."""
        super().__init__()
        part = part or Part.whole(config.layers)
        self.recompute = recompute or Recompute()
        self.config = config
        self.part = part
        self.embedding: Vocabulary | None = None
        self.norm: nn.Module | None = None
        self.head: Vocabulary | None = None
        if part.first or (part.last and config.tie_embeddings):
            self.embedding = layers.embedding(vocabulary, config.width, std=config.init_std)
        if self.embedding is not None and config.tie_embeddings and part.first != part.last:
            # The two stages' gradients are summed once a step. Both begin with the same values, which follow from seed
            # and name, so they take the same update to the bit. The copy does not count in the norm.
            declare_tied(self.embedding.weight, copy=part.last)
        # By the number in the whole decoder, where a list would count from 0 on every stage: names in a checkpoint do
        # not depend on the layout.
        self.layers = nn.ModuleDict({str(index): DecoderLayer(config, layers, index) for index in part.layers})
        self.readers = nn.ModuleDict(
            {
                str(index): nn.ModuleDict({name: build() for name, build in of_layer.items()})
                for index, of_layer in (readers or {}).items()
                if index in part.layers
            }
        )
        if part.last:
            self.norm = layers.norm(config.width, config.norm_eps)
        if part.last and not config.tie_embeddings:
            self.head = layers.embedding(vocabulary, config.width, std=config.init_std)

    def embed(self, token_T: torch.Tensor) -> torch.Tensor:
        """int64 ids -> h_TD, on the first stage."""
        assert self.embedding is not None, "a stage behind the first has no embedding"
        return self.embedding(token_T) * self.config.width**0.5

    def forward(
        self,
        h_TD: torch.Tensor,
        position_T: torch.Tensor,
        plan: AttentionPlan,
        cache: AttentionCache | None = None,
        memories: Mapping[str, tuple[torch.Tensor, CrossAttentionPlan]] | None = None,
    ) -> torch.Tensor:
        """Embedded tokens or the hidden states of the stage before -> hidden states; the last stage's are normed.

        position_T: of the whole row, also where this rank has only some of its tokens. memories: what readers read, by
        the names that they have: the row's memory [M, D] and its cross plan.
        """
        # Once for all layers, and outside what they recompute.
        cos_sin = rope_cos_sin(position_T, self.config.head_width, self.config.rope_theta, h_TD.dtype)
        # One context a forward: with offload it chains the regions, and each fetches the one before it.
        recompute = self.recompute.begin()
        readers = self.readers  # torch finds a module's children by a slow way: once, and not in every layer
        for index, layer in self.layers.items():
            if index in readers:
                for name, reader in cast("nn.ModuleDict", readers[index]).items():
                    h_TD = reader(h_TD, *(memories or {})[name])
            h_TD = recompute.layer(layer, h_TD, cos_sin, plan, cache)
        return h_TD if self.norm is None else self.norm(h_TD)

    @property
    def output_embedding(self) -> Vocabulary:
        """The last stage's head."""
        head = self.embedding if self.head is None else self.head
        assert head is not None, "a stage before the last has no head"
        return head

    def logits(self, h_TD: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., D] -> logits [..., V] of the ids that this rank holds (`Vocabulary.first` and on)."""
        return self.output_embedding(h_TD, as_head=True)
