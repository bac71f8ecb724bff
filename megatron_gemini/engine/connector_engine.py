"""The engine of all connectors: one forward and one backward a step, over everything that this rank has encoded.

Connectors are small and follow their encoders on the same rank. They have one engine together, so that an encoder that
is frozen runs without a graph, and without a backward, while its connector trains.

Shape suffixes: X encoder embeddings of a rank, E encoder width, O embeddings for the decoder, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch

from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.encoder_engine import encoder_settings, engine_config
from megatron_gemini.engine.frozen import FrozenEngine
from megatron_gemini.engine.groups import EngineGroups
from megatron_gemini.engine.settings import JsonObject
from megatron_gemini.engine.zero import ZeroEngine
from megatron_gemini.models.encoders import Connectors, Encoded, is_frozen, output_width

Forward = Callable[[Mapping[str, Encoded]], dict[str, torch.Tensor]]


class ConnectorEngine:
    """Collective: every rank of the world calls every method in the same order, with or without items.

    decoder: DeepSpeed's dictionary of the decoder's engine. trained: the ZeRO engine of those that are trained, None if
    there is none. frozen: those that are not, whole on every rank, since gradients may pass through them.
    """

    def __init__(self, config: RunConfig, groups: EngineGroups, decoder: JsonObject, device: torch.device) -> None:
        self.config, self.device = config, device
        names = config.enabled_encoders
        fixed = [name for name in names if config.encoders[name].connector.frozen]
        free = [name for name in names if name not in fixed]
        self.names = names
        self.trained: ZeroEngine | None = None
        self.frozen: FrozenEngine | None = None
        if free:
            settings = encoder_settings(decoder, config, groups.data_size, _parameters(config, free))
            scales = {f"connectors.{name}.": config.encoders[name].connector.lr_scale for name in free}
            self.trained = ZeroEngine(
                lambda: Connectors(config, free), engine_config(config), groups, settings, device, scales
            )
        if fixed:
            # `_run` calls its module past DeepSpeed, so nothing would gather the weights that ZeRO-3 had divided.
            whole = dataclasses.replace(config.encoder_engines, zero_stage=0)
            of_whole = dataclasses.replace(config, encoder_engines=whole)
            settings = encoder_settings(decoder, of_whole, groups.data_size, _parameters(config, fixed))
            self.frozen = FrozenEngine(
                lambda: Connectors(config, fixed), engine_config(of_whole), groups, settings, device
            )
        self._parts = [(self.trained, free), (self.frozen, fixed)]
        self._inputs: dict[str, Encoded] = {}
        self._outputs: dict[str, torch.Tensor] = {}

    def forward(self, encoded: Mapping[str, Encoded], training: bool) -> dict[str, torch.Tensor]:
        """[O, D] without a graph, of what each encoder has given on this rank. training: `backward` follows."""
        # Every connector, also without items here: ZeRO gathers and reduces on all ranks at the same time.
        self._inputs = {name: self._leaf(name, encoded.get(name), training) for name in self.names}
        keep = training and not self.config.encoder_engines.recompute
        with torch.set_grad_enabled(keep):
            outputs = self._run()
        self._outputs = outputs if keep else {}
        # Nobody reads what the others gave: they ran for the collectives.
        return {name: outputs[name].detach() for name in encoded}

    def backward(self, grads: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """From gradients [O, D] of `forward`'s results to those [X, E] of what the trained encoders had given."""
        outputs = self._outputs or self._run()
        for engine, names in self._parts:
            # Scalars whose gradients are those given, or zero: handed the gradients themselves, DeepSpeed would divide
            # them by more than it should.
            pairs = [(outputs[name], grads.get(name)) for name in names]
            losses = [(y * (0 if grad is None else grad.to(y.dtype))).sum() for y, grad in pairs]
            if isinstance(engine, ZeroEngine):
                engine.backward(torch.stack(losses).sum(), boundary=True)
            # Only through it, to an encoder that is trained: its own weights want no gradient.
            elif losses and any(loss.requires_grad for loss in losses):
                torch.stack(losses).sum().backward()
        found = {name: each.e_XE.grad for name, each in self._inputs.items() if name in grads}
        self._inputs, self._outputs = {}, {}
        return {name: grad for name, grad in found.items() if grad is not None}

    def _run(self) -> dict[str, torch.Tensor]:
        outputs: dict[str, torch.Tensor] = {}
        for engine, names in self._parts:
            given = {name: self._inputs[name] for name in names}
            if isinstance(engine, ZeroEngine):
                outputs |= engine.forward(given)
            elif engine is not None:  # not its own forward, which would cut the graph of a trained encoder
                outputs |= engine.module(given)
        return outputs

    def _leaf(self, name: str, given: Encoded | None, training: bool) -> Encoded:
        """What a connector is given; a run of one embedding of zeros where this rank has encoded nothing."""
        wants = training and not is_frozen(self.config, name)
        if given is None:
            dtype = torch.bfloat16 if self.config.engine.precision == "bf16" else torch.float32
            nothing = torch.zeros(1, output_width(self.config, name), dtype=dtype, device=self.device)
            given = Encoded(nothing, torch.ones(1, dtype=torch.int64, device=self.device))
        return given._replace(e_XE=given.e_XE.detach().requires_grad_(wants))


def _parameters(config: RunConfig, names: Sequence[str]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Connectors(config, names).parameters())
