"""The decoder: pre-norm transformer layers with multi-query attention and a gated MLP, on one packed row.

Shape suffixes: T packed tokens, D model width, N query heads, K key/value heads, H head width, F MLP width,
V vocabulary. N, K, F, V and the T of h_TD are this rank's where `Layers` divides them; nothing here depends on it.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
from torch import nn

from megatron_gemini.config.model import ModelConfig
from megatron_gemini.kernels.attention import AttentionPlan
from megatron_gemini.kernels.rope import Rotation, rotation
from megatron_gemini.parallel.layers import Layers


def branch_std(config: ModelConfig) -> float:
    """Deviation of the weights that end a residual branch: the sum of all branches then does not grow with depth."""
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

    def __init__(self, config: ModelConfig, layers: Layers, index: int) -> None:
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
        self.output = layers.attention_output(config.heads * head_width, width, std=branch_std(config))

    def forward(
        self, h_TD: torch.Tensor, turn: Rotation, plan: AttentionPlan, cache: AttentionCache | None
    ) -> torch.Tensor:
        q_TNH, k_TKH, v_TKH = self.input(h_TD)
        if self.query_norm is not None and self.key_norm is not None:
            q_TNH, k_TKH = self.query_norm(q_TNH), self.key_norm(k_TKH)
        attend = None if cache is None else functools.partial(cache.attend, self.index)
        return self.output(h_TD, q_TNH, k_TKH, v_TKH, plan, turn, attend)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layers: Layers, index: int) -> None:
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
        self, h_TD: torch.Tensor, turn: Rotation, plan: AttentionPlan, cache: AttentionCache | None
    ) -> torch.Tensor:
        return self.mlp(self.attention(h_TD, turn, plan, cache))


class Decoder(nn.Module):
    """Embedding, layers, final norm and head over `vocabulary` ids.

    The embedding is scaled by sqrt(D), as in Gemma. A tied head is the embedding module itself, called as head, so the
    weight is only ever used inside the module that owns it.
    """

    def __init__(self, config: ModelConfig, vocabulary: int, layers: Layers) -> None:
        super().__init__()
        self.config = config
        self.embedding = layers.embedding(vocabulary, config.width, std=config.init_std)
        self.layers = nn.ModuleList(DecoderLayer(config, layers, index) for index in range(config.layers))
        self.norm = layers.norm(config.width, config.norm_eps)
        self.head = None if config.tie_embeddings else layers.embedding(vocabulary, config.width, std=config.init_std)

    def embed(self, token_T: torch.Tensor) -> torch.Tensor:
        """int64 ids -> h_TD."""
        return self.embedding(token_T) * self.config.width**0.5

    def forward(
        self,
        h_TD: torch.Tensor,
        position_T: torch.Tensor,
        plan: AttentionPlan,
        cache: AttentionCache | None = None,
    ) -> torch.Tensor:
        """Embedded tokens -> hidden states after the final norm, both [T, D]."""
        turn = rotation(position_T, self.config.head_width, self.config.rope_theta, h_TD.dtype)
        for layer in self.layers:
            h_TD = layer(h_TD, turn, plan, cache)
        return self.norm(h_TD)

    @property
    def output_embedding(self) -> Any:
        """The head, a `parallel.layers.Vocabulary` or its divided form."""
        return self.embedding if self.head is None else self.head

    def logits(self, h_TD: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., D] -> logits [..., V] of the ids that this rank holds (see `Vocabulary.shard`)."""
        return self.output_embedding(h_TD, as_head=True)
