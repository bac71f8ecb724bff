"""One encoder on the ZeRO engine of all ranks: the forwards of a step, and their backwards in the reverse order."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch

from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Media
from megatron_gemini.engine.frozen import FrozenEngine
from megatron_gemini.engine.groups import EngineGroups
from megatron_gemini.engine.settings import JsonObject, at_stage, second_engine, section
from megatron_gemini.engine.zero import ZeroEngine
from megatron_gemini.models.encoders import Encoders, dummy_media, is_frozen

_BUCKETS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size", "sub_group_size")
_DEFAULT_BUCKET = 500_000_000


def engine_config(config: RunConfig) -> RunConfig:
    """`config` with the ZeRO stage of the encoders, and without the offloading that the stage cannot have."""
    stage = config.encoder_engines.zero_stage
    stage = config.engine.zero_stage if stage < 0 else stage
    return dataclasses.replace(config, engine=at_stage(config.engine, stage))


def encoder_settings(decoder: JsonObject, config: RunConfig, world: int, parameters: int) -> JsonObject:
    """DeepSpeed's dictionary for an encoder of `parameters` elements, made from that of the decoder.

    Its batch keys are those of `world` data-parallel ranks, and no bucket is larger than the encoder.
    """
    settings = second_engine(decoder, engine_config(config).engine)
    zero = section(settings, "zero_optimization")
    for key in _BUCKETS:
        given = zero.get(key, _DEFAULT_BUCKET)
        # DeepSpeed allocates its buckets whole, whatever the size of the module.
        zero[key] = min(given, parameters) if isinstance(given, int | float) else given
    return settings | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the engine is told which backward is the last one
        "train_batch_size": world,
    }


class EncoderEngine:
    """One encoder of the model, divided over all ranks, and its work of a step.

    Each encoder has an engine of its own: ZeRO-3 adds to the gradients of the step before where a parameter is first
    used in a later backward than others, which encoders with different numbers of forwards would be.
    decoder: DeepSpeed's dictionary of the decoder's engine.
    """

    def __init__(
        self, config: RunConfig, name: str, groups: EngineGroups, decoder: JsonObject, device: torch.device
    ) -> None:
        self.config, self.name, self.device, self.trained = config, name, device, not is_frozen(config, name)
        self.recompute = config.encoder_engines.recompute
        # Without memory, only to be counted: an encoder that ZeRO-3 divides need not fit into a rank as a whole.
        with torch.device("meta"):
            parameters = sum(p.numel() for p in Encoders(config, (name,)).parameters())
        settings = encoder_settings(decoder, config, groups.data_size, parameters)
        ours, scales = engine_config(config), {"": config.encoders[name].lr_scale}
        self.engine: ZeroEngine[[str, Media], torch.Tensor] | FrozenEngine[[str, Media], torch.Tensor]
        if self.trained:
            self.engine = ZeroEngine(lambda: Encoders(config, (name,)), ours, groups, settings, device, scales)
        else:
            self.engine = FrozenEngine(lambda: Encoders(config, (name,)), ours, groups, settings, device)
        self._inputs: list[Media] = []
        self._graphs: list[torch.Tensor] = []

    def forward(self, chunks: Sequence[Media], forwards: int, training: bool) -> list[torch.Tensor]:
        """Embeddings [X, E] of each chunk, without a graph. forwards: how many every rank runs; dummies fill up.

        training: `backward` follows.
        """
        # As many on every rank: under ZeRO-3 the ranks wait for each other in each forward.
        inputs = [*chunks, *(dummy_media(self.config, self.name, self.device) for _ in range(forwards - len(chunks)))]
        keep = training and self.trained
        # Without graphs, a step holds one chunk's activations at a time: each chunk runs again in its backward.
        with self._held(forwards), torch.set_grad_enabled(keep and not self.recompute):
            outputs = [self.engine.forward(self.name, media) for media in inputs]
        if keep:
            self._inputs, self._graphs = inputs, [] if self.recompute else outputs
        return [output.detach() for output in outputs[: len(chunks)]]

    def backward(self, grads: Sequence[torch.Tensor]) -> None:
        """grads: of each chunk's embeddings, float. A dummy's gradient is zero, and so is all that comes of it."""
        last = len(self._inputs) - 1
        assert isinstance(self.engine, ZeroEngine), f"the encoder {self.name} is frozen"
        with self._held(len(self._inputs)):
            for number in range(last, -1, -1):
                media = self._inputs.pop()
                output = self._graphs.pop() if self._graphs else self.engine.forward(self.name, media)
                grad = grads[number] if number < len(grads) else torch.zeros_like(output)
                # A scalar whose gradient is `grad`: DeepSpeed would divide by more than it should if it were given it.
                self.engine.backward((output * grad.to(output.dtype)).sum(), boundary=number == 0)

    @contextlib.contextmanager
    def _held(self, forwards: int) -> Iterator[None]:
        """Under ZeRO-3, weights that several forwards need are gathered once for all of them."""
        # A single forward needs each layer once: DeepSpeed gathers and releases one after another, in less memory. Of
        # few weights, all in one go are faster.
        if not self.engine.gathers or (forwards < 2 and not self.engine.keeps):
            yield
            return
        self.engine.hold()
        try:
            yield
        finally:
            self.engine.release()
