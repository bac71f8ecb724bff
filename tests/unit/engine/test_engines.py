"""What engines do alone in their process: with several ranks tests/distributed asks them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from megatron_gemini.engine.connector_engine import ConnectorEngine
from megatron_gemini.engine.deepspeed_config import deepspeed_config
from megatron_gemini.engine.engine import WholeModelEngine
from megatron_gemini.engine.groups import EngineGroups
from megatron_gemini.engine.multimodal import MultimodalEngine
from megatron_gemini.models.encoders import Encoded, output_width
from megatron_gemini.models.stage import parts
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology
from tests.distributed.rows import LAYOUT, with_layout
from tests.unit.engine.tiny_engines import Tiny, alone_in_the_world, config_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with alone_in_the_world():
        yield


class TinyLoss(Tiny):
    """As a model whose output has a loss."""

    def forward(self, x: torch.Tensor) -> SimpleNamespace:  # type: ignore[override]
        return SimpleNamespace(loss=super().forward(x))


def test_a_step_of_a_whole_model_has_the_gradient_of_its_losses_sum_over_their_weight() -> None:
    engine = WholeModelEngine(TinyLoss, config_of("plain"), Topology.serial(), CPU, 2)
    inputs, weight, outputs = [torch.linspace(-1, 1, 8), torch.linspace(0, 2, 8)], 4.0, []
    wanted = Tiny()
    for piece in engine.whole.owned():
        getattr(wanted, piece.name).data.view(-1).copy_(piece.master())
    engine.forward_backward(inputs, weight, outputs.append)
    losses = [wanted(x) for x in inputs]
    grads = torch.autograd.grad(sum(losses) / weight, list(wanted.parameters()))
    assert [float(output.loss) for output in outputs] == pytest.approx([float(loss) for loss in losses])
    norm = float(torch.cat([grad.flatten() for grad in grads]).norm())
    assert engine.step(0.1).norm == pytest.approx(norm)


def test_only_encoders_that_are_trained_are_handed_a_gradient() -> None:
    config = with_layout(frozen="vision", frozen_connectors="audio")
    connectors = ConnectorEngine(config, EngineGroups(), deepspeed_config(config, 1, 1), CPU)
    given = {
        name: Encoded(torch.ones(4, output_width(config, name)), torch.full((1,), 4)) for name in ("vision", "audio")
    }
    made = connectors.forward(given, training=True)
    grads = connectors.backward({name: torch.ones_like(e_OD) for name, e_OD in made.items()})
    assert {name: grad.shape for name, grad in grads.items()} == {"audio": given["audio"].e_XE.shape}


def test_a_memory_goes_to_the_pipeline_ranks_whose_layers_read_it() -> None:
    config, layers = with_layout(toy_connectors=True), LayerFactory(Topology.serial())

    def reading(stages: int, ranks: int) -> dict[str, list[int]]:
        engine = SimpleNamespace(config=config, layers=layers, topology=Topology(pipeline_size=ranks))
        return MultimodalEngine._reading(engine, parts(config, LAYOUT, stages))  # type: ignore[arg-type]

    # Of four layers the second and the last.
    assert [reading(4, 4), reading(4, 2), reading(2, 2)] == [{"vision": [1, 3]}, {"vision": [1]}, {"vision": [0, 1]}]
