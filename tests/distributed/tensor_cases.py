"""One rank of the tensor-parallel test: builds every case from the seed, runs a row, and gathers what it computed.

    torchrun --nproc-per-node N -m tests.distributed.tensor_cases OUT CASE...

Every case runs without and with sequence parallelism. Rank 0 writes the loss, the gathered weights, the gradients of
all ranks and what every parameter declares. It knows nothing of the serial result; no engine sums partial gradients.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from megatron_gemini.config.engine import ParallelConfig
from megatron_gemini.config.model import ModelConfig
from megatron_gemini.engine.distributed import end_process, leave
from megatron_gemini.kernels.attention.api import plan_attention
from megatron_gemini.kernels.losses.linear_cross_entropy import linear_cross_entropy
from megatron_gemini.kernels.rope import rope_cos_sin
from megatron_gemini.models.decoder import DecoderLayer
from megatron_gemini.parallel.parameters import initialize, placement_of
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology, build_topology
from tests.distributed.rows import CONFIG, LAYOUT, rows

CASES = {
    "mqa": {},
    "mqa-untied": {"tie_embeddings": False, "activation": "silu"},
    "gqa": {"kv_heads": 2},
    "gqa-untied": {"kv_heads": 2, "tie_embeddings": False, "qk_norm": False},
    "mha": {"kv_heads": 4},
}
ROW = rows(0)[3]  # a picture, speech, image codes and text


class Stack(nn.Module):
    """The decoder as its parts make it: embedding, media in the stream, layers, norm, head and loss."""

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.config, self.make = config, layers
        self.embedding = layers.embedding(LAYOUT.size, config.width, std=config.init_std)
        self.layers = nn.ModuleList(DecoderLayer(config, layers, index) for index in range(config.layers))
        self.norm = layers.norm(config.width, config.norm_eps)
        self.head = None if config.tie_embeddings else layers.embedding(LAYOUT.size, config.width, std=config.init_std)
        own = torch.isin(layers.stream(len(ROW.token_T)), media_positions())
        self.slots = own.nonzero().squeeze(1)
        self.media_OD = media_embeddings(config.width)[torch.isin(media_positions(), layers.stream(len(ROW.token_T)))]
        self.media_OD.requires_grad_()

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, logits of this rank's ids)."""
        h_SD = self.embedding(ROW.token_T) * self.config.width**0.5
        h_SD = h_SD.index_copy(0, self.slots, self.media_OD)
        cos_sin = rope_cos_sin(ROW.position_T, self.config.head_width, self.config.rope_theta, h_SD.dtype)
        plan = plan_attention(ROW.segment_T, ROW.span_T)
        for layer in self.layers:
            h_SD = layer(h_SD, cos_sin, plan, None)
        h_TD = self.make.gather_stream(self.norm(h_SD))
        head = self.embedding if self.head is None else self.head
        weighted = ROW.weight_T.nonzero().squeeze(1)
        h_TD = h_TD.index_select(0, weighted)
        targets = {"target_T": ROW.target_T[weighted], "weight_T": ROW.weight_T[weighted]}
        loss, _ = head(h_TD, fused=functools.partial(linear_cross_entropy, z_loss=1e-3, **targets))
        return loss, head.gather_logits(head(h_TD, as_head=True).detach())


def media_positions() -> torch.Tensor:
    return torch.cat([media.token_O for media in ROW.media.values()]).sort().values


def media_embeddings(width: int) -> torch.Tensor:
    return torch.randn(len(media_positions()), width, generator=torch.Generator().manual_seed(1))


def run(name: str, topology: Topology) -> tuple[Stack, torch.Tensor, torch.Tensor]:
    """The model after one forward and backward, the loss and the logits of the whole vocabulary."""
    model = Stack(dataclasses.replace(CONFIG.model, init_std=0.2, **CASES[name]), LayerFactory(topology))
    initialize(model, seed=7)
    loss, logits = model()
    loss.backward()
    return model, loss.detach(), logits


def of_all_ranks(tensor: torch.Tensor, topology: Topology) -> list[torch.Tensor]:
    pieces = [torch.empty_like(tensor) for _ in range(topology.tensor_size)]
    dist.all_gather(pieces, tensor.contiguous(), group=topology.tensor_group)
    return pieces


def media_gradient(model: Stack) -> torch.Tensor:
    """[O, D] of the whole row, zeros for the media of other ranks."""
    grad = torch.zeros_like(media_embeddings(model.config.width))
    own = torch.isin(media_positions(), model.make.stream(len(ROW.token_T)))
    grad[own] = model.media_OD.grad
    return grad


def gathered(name: str, topology: Topology) -> tuple[dict[str, torch.Tensor], dict[str, bool]]:
    """(tensors, whether each parameter that is not sharded is partial)."""
    model, loss, logits = run(name, topology)
    found = {"loss": loss, "logits": logits.contiguous()}
    found["media"] = torch.stack(of_all_ranks(media_gradient(model), topology))
    partial = {}
    for parameter_name, parameter in model.named_parameters():
        placement = placement_of(parameter)
        if placement.sharded_dim is None:
            partial[parameter_name] = placement.partial
        for kind, tensor in (("weight", parameter.detach()), ("grad", parameter.grad)):
            pieces = of_all_ranks(tensor, topology)
            whole = torch.stack(pieces) if placement.sharded_dim is None else torch.cat(pieces, placement.sharded_dim)
            found[f"{kind}/{parameter_name}"] = whole.contiguous()
    return found, partial


def main() -> None:
    out, *names = sys.argv[1:]
    torch.set_num_threads(1)
    topology = build_topology(ParallelConfig(int(os.environ["WORLD_SIZE"])), "gloo")
    for sequence in (False, True):
        topology = dataclasses.replace(topology, sequence=sequence)
        for name in names:
            result, partial = gathered(name, topology)
            if topology.rank == 0:
                save_file(result, Path(out) / f"{name}-{sequence}.safetensors")
                (Path(out) / f"{name}-{sequence}.json").write_text(json.dumps(partial))
    if topology.rank == 0:
        models = [Stack(CONFIG.model, LayerFactory(place)) for place in (Topology.serial(), topology)]
        (Path(out) / "names.json").write_text(json.dumps([sorted(model.state_dict()) for model in models]))
    leave()


if __name__ == "__main__":
    main()
    end_process()
