"""Encoders, connectors and objectives of a plugin are planned from their specs alone, as exactly as built-in ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_gemini.config.load import config_from_dict
from megatron_gemini.config.model import ModelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Media
from megatron_gemini.kernels.attention.plan import plan_cross_attention
from megatron_gemini.models.encoders import build_connector, build_encoder
from megatron_gemini.models.stage import DecoderStage, StageInput
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology
from megatron_gemini.planning.activations import (
    RowShare,
    connector_saved,
    encoder_saved,
    layer_saved,
    loss_saved,
    reader_saved,
)
from megatron_gemini.planning.job import Job
from megatron_gemini.planning.memory import MEDIA, rank_footprint
from megatron_gemini.planning.parameters import stages
from tests.extension.halving import HALVING
from tests.extension.reading import READING
from tests.extension.series import SERIES_ENCODER
from tests.unit.planning import toys
from tests.unit.planning.test_activations import LAYOUT, T, row, saved_bytes

ROOT = Path(__file__).parents[3]
MODEL = {"width": 64, "layers": 3, "heads": 4, "head_width": 16, "mlp_width": 96}


@pytest.fixture(autouse=True)
def plugin() -> Iterator[None]:
    with toys.registered():
        yield


def run_of(connector: str = "halve", series: dict | None = None, **sections) -> RunConfig:
    """A run whose only encoder is the plugin's."""
    off = {"enabled": False}
    values = {
        "model": MODEL,
        "encoders": {"vision": off, "audio": off, "series": {"connector": {"kind": connector}, **(series or {})}},
        "data": {"row_tokens": T, "lanes": 8},
        "image_tokenizer": {"codes": len(LAYOUT.code_range("image"))},
        "engine": {"zero_stage": 1, "offload_optimizer": "none"},
        "train": {"rows_per_step": 8},
    }
    return config_from_dict(values | sections)


def count(*modules: torch.nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def stage_of(config: RunConfig, loss=None) -> DecoderStage:
    stage = DecoderStage(config, LAYOUT, LayerFactory(Topology.serial()), loss=loss)
    initialize(stage, 0)
    return stage


@pytest.mark.parametrize("connector", ["halve", "recall"])
def test_parameters_are_counted_exactly_those_of_readers_in_the_decoders_stages(connector):
    config = run_of(connector)
    job = Job(config, 1, LAYOUT.size)
    encoder, projector = build_encoder(config, "series"), build_connector(config, "series")
    assert job.trained == [count(encoder), count(projector)]
    assert (job.frozen, job.frozen_connectors) == ([], 0)
    assert stages(config, LAYOUT.size)[0].parameters == count(stage_of(config))


def test_every_stage_of_a_pipeline_counts_the_readers_before_its_layers():
    whole = stages(run_of("recall"), LAYOUT.size)[0].parameters
    cut = stages(run_of("recall", parallel={"pipeline": 3}), LAYOUT.size)
    plain = stages(run_of("halve", parallel={"pipeline": 3}), LAYOUT.size)
    reader = MODEL["width"] ** 2 + 1
    assert [a.parameters - b.parameters for a, b in zip(cut, plain, strict=True)] == [reader, 0, reader]
    assert whole == stages(run_of("halve"), LAYOUT.size)[0].parameters + 2 * reader


def test_the_worked_example_of_a_plugin_has_the_parameters_and_activations_that_it_says():
    """The files of tests/extension, which the documents walk through."""
    encoder, section, inputs = SERIES_ENCODER.build(SERIES_ENCODER.section()), SERIES_ENCODER.section(), 160
    initialize(encoder, 0)
    media = Media(torch.ones(inputs, 4), torch.tensor([[16, 1, 1]] * 10), torch.zeros(10), torch.arange(inputs))
    assert SERIES_ENCODER.parameters(section) == count(encoder)
    found = saved_bytes(encoder, lambda: encoder(media))
    assert SERIES_ENCODER.saved_bytes(section, inputs, 4) == pytest.approx(found, rel=0.05)

    e_XE, lengths = torch.ones(inputs, 16).requires_grad_(), torch.tensor([16] * 10)
    for spec in (HALVING, READING):
        section = spec.section()
        connector = spec.build(section, 16, 64)
        initialize(connector, 0)
        assert spec.parameters(section, 16, 64) == count(connector)
        found = saved_bytes(connector, lambda connector=connector: connector(e_XE, lengths))
        assert spec.saved_bytes(section, 16, 64, inputs, 4) == pytest.approx(found, rel=0.05)

    model, memory = ModelConfig(**MODEL), 100
    reader = READING.reads.build(section, model, LayerFactory(Topology.serial()))
    initialize(reader, 0)
    assert READING.reads.parameters(section, model, 1) == count(reader)
    lengths = (100, 30, 90, 36)  # documents, each of which reads a quarter of the memory from its first token on
    segment_M = torch.arange(1, 5).repeat_interleave(memory // 4)
    after_M = torch.tensor([0, 100, 130, 220]).repeat_interleave(memory // 4)
    plan = plan_cross_attention(row(lengths).segment_T, segment_M, after_M)
    h_SD, memory_MD = torch.ones(T, 64).requires_grad_(), torch.ones(memory, 64).requires_grad_()
    found = saved_bytes(reader, lambda: reader(h_SD, memory_MD, plan))
    assert READING.reads.saved_bytes(section, model, T, memory, 1, 4) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("connector", ["halve", "recall"])
def test_activations_of_encoder_connector_and_reader_are_those_that_autograd_keeps(connector, dtype):
    config, inputs, size = run_of(connector), 200, dtype.itemsize
    encoder, projector = build_encoder(config, "series"), build_connector(config, "series")
    for module in (encoder, projector):
        initialize(module, 0)
        module.to(dtype)
    media = Media(torch.ones(inputs, 4), torch.tensor([[inputs, 1, 1]]), torch.zeros(1), torch.arange(inputs))
    found = saved_bytes(encoder, lambda: encoder(media))
    assert encoder_saved(config, "series", inputs, size) == pytest.approx(found, rel=0.05)

    e_XE = encoder(media).detach().requires_grad_()
    found = saved_bytes(projector, lambda: projector(e_XE, torch.tensor([inputs])))
    assert connector_saved(config, "series", inputs, size) == pytest.approx(found, rel=0.05)

    if connector == "recall":
        (reader,) = (module["series"].to(dtype) for module in list(stage_of(config).decoder.readers.values())[:1])
        h_SD, memory_MD = torch.ones(T, 64, dtype=dtype).requires_grad_(), torch.ones(50, 64, dtype=dtype)
        found = saved_bytes(reader, lambda: reader(h_SD, memory_MD.requires_grad_(), None))
        share = RowShare(T, T, T, 1, size)
        assert reader_saved(config, range(2), share, 50) == pytest.approx(found, rel=0.05)
        assert reader_saved(config, range(1, 2), share, 50) == 0


def test_an_objectives_own_loss_is_in_what_the_last_stage_keeps():
    one_layer = {"model": {**MODEL, "layers": 1}}
    config = run_of(objective={"kind": "quiet"}, **one_layer)
    stage = stage_of(config, toys.QuietLoss(len(LAYOUT.targets), config.objective.penalty))
    found = saved_bytes(stage, lambda: stage(row=StageInput(row((100, 30, 90, 36)))))
    share = RowShare.of(config)
    own = toys.QUIET.loss_bytes(config.objective, config.model, share.context, share.element)
    layers = config.model.layers * layer_saved(config.model, share, "none")
    assert layers + loss_saved(config.model, LAYOUT.size, share, False) + own == pytest.approx(found, rel=0.03)

    with_it, without = (rank_footprint(Job(each, 1, LAYOUT.size), 0).gpu for each in (config, run_of(**one_layer)))
    assert with_it.activations - without.activations == own > 0.05 * layers


def test_a_frozen_encoder_and_a_frozen_connector_have_weights_alone_and_the_connector_has_them_whole():
    frozen = {"frozen": True, "connector": {"kind": "halve", "frozen": True}}
    sharded = {"engine": {"zero_stage": 3, "offload_optimizer": "none"}}
    job = Job(run_of(series=frozen, **sharded), 4, LAYOUT.size)
    encoder, projector = (count(build(job.config, "series")) for build in (build_encoder, build_connector))
    assert (job.trained, job.frozen, job.frozen_connectors) == ([], [encoder], projector)
    bare = Job(run_of(series={"enabled": False}, **sharded), 4, LAYOUT.size)
    more = rank_footprint(job, 0).gpu.weights - rank_footprint(bare, 0).gpu.weights
    assert more == pytest.approx(4 * (encoder / 4 + projector))


def test_a_connector_trains_behind_a_frozen_encoder():
    job = Job(run_of(series={"frozen": True}), 1, LAYOUT.size)
    encoder, projector = (count(build(job.config, "series")) for build in (build_encoder, build_connector))
    assert (job.trained, job.frozen) == ([projector], [encoder])
    assert encoder_saved(job.config, "series", 100, 4) == 0 < connector_saved(job.config, "series", 100, 4)


def test_a_frozen_connector_behind_a_trained_encoder_keeps_what_its_backward_needs():
    job = Job(run_of(series={"connector": {"kind": "halve", "frozen": True}}), 1, LAYOUT.size)
    encoder, projector = (count(build(job.config, "series")) for build in (build_encoder, build_connector))
    assert (job.trained, job.frozen_connectors) == ([encoder], projector)
    assert connector_saved(job.config, "series", 100, 4) > 0
    both = run_of(series={"frozen": True, "connector": {"kind": "halve", "frozen": True}})
    assert connector_saved(both, "series", 100, 4) == 0


def test_all_trained_connectors_share_an_engine():
    every = config_from_dict({"model": MODEL})
    connectors = [count(build_connector(every, name)) for name in every.enabled_encoders]
    assert len(connectors) == 3
    assert Job(every, 1, LAYOUT.size).trained[-1] == sum(connectors)
    assert len(Job(every, 1, LAYOUT.size).trained) == 4


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_memory_lies_whole_on_the_ranks_that_read_it_and_on_no_other(rank):
    """Of three stages the first and the last have a reader; the embeddings of a stream lie on the first alone."""
    large = {"parallel": {"pipeline": 3, "context": 2}, "model": {**MODEL, "mlp_width": 960}}
    memory, stream = (Job(run_of(kind, **large), 6, LAYOUT.size) for kind in ("recall", "halve"))
    share = RowShare.of(memory.config)
    reads = {0: 1, 1: 0, 2: 1}[rank]
    waiting = {0: 3, 1: 2, 2: 1}[rank]
    embeddings = 2 * MEDIA * memory.microbatches * 64 * 4
    expected = embeddings * (reads * share.row - (rank == 0) * share.stream)
    expected += reads * waiting * reader_saved(memory.config, range(1), share, int(MEDIA * T))
    found = rank_footprint(memory, rank).gpu.activations - rank_footprint(stream, rank).gpu.activations
    assert found == pytest.approx(expected)


def test_connectors_keep_their_inputs_over_the_step_and_their_graph_in_its_backward():
    """Small chunks and a small decoder, so that the connectors of all media of the step decide."""
    engines = {"encoder_engines": {"chunk_tokens": 1}, "model": {**MODEL, "layers": 1}}
    small, large = (run_of(series={"connector": {"kind": "halve", "inner": n}}, **engines) for n in (400, 800))
    small, large = (rank_footprint(Job(config, 1, LAYOUT.size), 0).gpu.activations for config in (small, large))
    embeddings = int(MEDIA * 8 * T)
    assert large - small == pytest.approx(embeddings * 400 * 4)
    # The inputs over the step, and then the graph (with places of 8 bytes) and their gradient.
    assert small == pytest.approx(embeddings * ((24 + 2 * 24 + 400) * 4 + toys.INT64))


COMMAND = [
    *("plan", "--plugin", "a_plugin", "--model.width", "64", "--model.layers", "4", "--data.row_tokens", "512"),
    *("--train.rows_per_step", "8", "--encoders.series.connector.kind", "recall", "--objective.kind", "quiet"),
]


def command(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "a_plugin.py").write_text("from tests.unit.planning.toys import register\n\nregister()\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    line = [sys.executable, "-m", "megatron_gemini.cli", *COMMAND, *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_the_command_plans_with_a_plugin(tmp_path):
    out = tmp_path / "plan.yaml"
    result = command(tmp_path, "--gpus", "2", "--out", str(out))
    assert result.returncode == 0, result.stderr
    encoders = sum(Job(config_from_dict({"model": MODEL}), 1, LAYOUT.size).trained) / 1e9
    assert re.search(r"encoders (\d\.\d+) B", result.stdout)[1] == f"{encoders:.3f}"
    assert "kind: recall" in out.read_text() and "kind: quiet" in out.read_text()


def test_a_dry_run_builds_what_was_planned_with_a_plugin(tmp_path):
    layout = ("--parallel.tensor", "2", "--parallel.pipeline", "2", "--dry_run_rank", "3", "--world", "4")
    result = command(tmp_path, *layout)
    assert result.returncode == 0, result.stderr
    assert re.search(r"stage 1: layers .* parameters, as planned", result.stdout)
    assert re.search(r"encoders and connectors: [\d,]+ parameters, as planned", result.stdout)
