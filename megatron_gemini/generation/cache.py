"""Keys and values of every layer for B sequences that grow by one token at a time.

Shape suffixes: T packed tokens, B sequences, N query heads, K key/value heads, G = N / K query heads that share
a key/value head, L positions of a sequence, H head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_gemini.kernels.attention.api import AttentionPlan, attention


class KVCache:
    """Preallocated keys and values, [B, K, L, H] a layer, in the dtype and on the device of the first call.

    The first pass through the decoder is a packed row of B whole prompts, in order; every later one is a row of
    exactly one token per sequence, at position `length_B` (int64[B]). `advance` closes a pass. Memory is bounded by
    the longest prompt and `new_tokens`; a call beyond that bound is a programmer's mistake.
    """

    def __init__(self, prompt_lengths: list[int], new_tokens: int) -> None:
        assert prompt_lengths and min(prompt_lengths) > 0, "every sequence needs a prompt of at least one token"
        self.length_B = torch.tensor(prompt_lengths)
        self.capacity = max(prompt_lengths) + new_tokens
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._prefilled = False
        # Which positions each sequence sees in this pass, that of its new token included; None until asked for.
        self._mask_BL: torch.Tensor | None = None

    def attend(
        self,
        layer: int,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        plan: AttentionPlan,
    ) -> torch.Tensor:
        """Attention of the row's queries to the row and to all that was kept before, [T, N, H]."""
        if not self._prefilled:
            self._store_prompts(layer, k_TKH, v_TKH)
            return attention(q_TNH, k_TKH, v_TKH, plan)
        k_BKLH, v_BKLH = self._layers[layer]
        assert q_TNH.shape[0] == k_BKLH.shape[0], "a decode pass feeds exactly one token per sequence"
        row_B = torch.arange(q_TNH.shape[0], device=q_TNH.device)
        k_BKLH[row_B, :, self.length_B] = k_TKH
        v_BKLH[row_B, :, self.length_B] = v_TKH
        # Made by the first layer of a pass and the same in all: reading the largest length waits for the device.
        if self._mask_BL is None:
            longest = int(self.length_B.max()) + 1
            assert longest <= self.capacity, "the cache is full"
            self._mask_BL = torch.arange(longest, device=self.length_B.device) <= self.length_B[:, None]
        mask_BL = self._mask_BL
        longest = mask_BL.shape[1]
        # The G query heads of one key/value head are that head's query rows, so keys and values are read once.
        q_BKGH = q_TNH.unflatten(1, (k_TKH.shape[1], -1))
        out_BKGH = F.scaled_dot_product_attention(
            q_BKGH, k_BKLH[:, :, :longest], v_BKLH[:, :, :longest], attn_mask=mask_BL[:, None, None]
        )
        return out_BKGH.flatten(1, 2)

    def advance(self) -> None:
        """Closes a pass: its tokens become part of every sequence."""
        # Not in place: the tensor was handed out as the positions of the pass.
        if self._prefilled:
            self.length_B = self.length_B + 1
        self._prefilled = True
        self._mask_BL = None

    def keep(self, row_B: torch.Tensor) -> None:
        """Keeps only the sequences of these rows (int64), in this order."""
        self.length_B = self.length_B[row_B]
        # Layer by layer, so that the copies take the memory of one layer and not of a second cache.
        for layer, (k_BKLH, v_BKLH) in self._layers.items():
            self._layers[layer] = (k_BKLH[row_B], v_BKLH[row_B])
        self._mask_BL = None

    def release(self) -> None:
        """Frees all keys and values, whoever still holds this object: a traceback holds the frames of a failed pass."""
        self._layers.clear()
        self._mask_BL = None

    def _store_prompts(self, layer: int, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> None:
        sequences = len(self.length_B)
        self.length_B = self.length_B.to(k_TKH.device)
        lengths = self.length_B.tolist()
        assert k_TKH.shape[0] == sum(lengths), "the first pass is the prompts back to back, without padding"
        kept = []
        # Room for all tokens at once: growing by concatenation would copy the whole cache for every token. Zeros and
        # not empty memory, since a masked position still has weight 0, and 0 times a NaN that lies there is NaN.
        for x_TKH in (k_TKH, v_TKH):
            x_BKLH = x_TKH.new_zeros(sequences, x_TKH.shape[1], self.capacity, x_TKH.shape[2])
            for row, x_LKH in enumerate(x_TKH.split(lengths)):
                x_BKLH[row, :, : lengths[row]] = x_LKH.transpose(0, 1)
            kept.append(x_BKLH)
        self._layers[layer] = (kept[0], kept[1])
