"""A role begins with weights of another checkpoint, by the same map of names and with the same errors as a run."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from megatron_gemini.checkpoint.directory import step_directory
from megatron_gemini.checkpoint.init_from import initialize
from megatron_gemini.checkpoint.load import load
from megatron_gemini.checkpoint.pieces import PieceReader
from megatron_gemini.checkpoint.run_state import RunState
from megatron_gemini.checkpoint.save import save
from megatron_gemini.config.init_from import InitFromConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import TokenLayout
from megatron_gemini.engine.roles import RoleSpec
from megatron_gemini.modalities.text.tokenizer import TextTokenizer
from megatron_gemini.models.stage import DecoderStage
from megatron_gemini.parallel.parameters import new_parameter, normal
from megatron_gemini.parallel.tensor.layers import LayerFactory
from tests.tiny_checkpoint import CONFIG, write_checkpoint
from tests.unit.checkpoint.still_engine import StillEngine


class RewardModel(DecoderStage):
    """The policy's decoder with another head."""

    def __init__(self, config: RunConfig, layout: TokenLayout, layers: LayerFactory) -> None:
        super().__init__(config, layout, layers)
        self.score = new_parameter(1, config.model.width, init=normal(0.1))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another seed than the engines'."""
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder, 1, seed=7)
    return folder


def engine(
    run: Path, *sections: InitFromConfig, saved: bool = False, own: tuple[InitFromConfig, ...] = ()
) -> StillEngine:
    """A policy with the role `reward`. own: what the policy begins with."""
    text_model = str(step_directory(run, 1) / "text.model")
    data = dataclasses.replace(CONFIG.data, text_model=text_model)
    config = dataclasses.replace(CONFIG, data=data, init_from=own)
    layout = TokenLayout(TextTokenizer(text_model).size, (("image", CONFIG.image_tokenizer.codes),))
    made = StillEngine(config, layout)

    def build(number: int) -> RewardModel:
        return RewardModel(config, layout, LayerFactory(made.topology))

    made.add_role(RoleSpec("reward", build, place="last", zero_stage=0, init_from=sections, saved=saved))
    return made


def weights(made: StillEngine) -> dict[str, torch.Tensor]:
    """Of the role, as they are now."""
    (part,) = made.roles["reward"].engines
    return {name: parameter.detach().clone() for name, parameter in part.module.named_parameters()}


def section(run: Path, **settings) -> InitFromConfig:
    return InitFromConfig(str(run), **settings)


def test_the_decoder_is_the_checkpoints_and_the_head_and_the_policy_keep_their_initial_values(run: Path) -> None:
    made = engine(run, section(run, module="decoder"))
    policy, before = made.weights(), weights(made)
    (line,) = initialize(made)
    reader = PieceReader(step_directory(run, 1))
    for name, weight in weights(made).items():
        assert torch.equal(weight, before[name] if name == "score" else reader.weight(name)), name
    assert all(torch.equal(weight, policy[name]) for name, weight in made.weights().items())
    assert line.startswith("initialized decoder of the role reward (")


def test_names_are_mapped_and_what_is_named_may_be_missing(run: Path) -> None:
    """A whole model, of which a role has a part and something of its own."""
    made = engine(run, section(run, allow_missing=("score",), ignore=("encoders", "connectors")))
    (line,) = initialize(made)
    assert line.startswith("initialized the role reward (")
    made = engine(run, section(run, module="decoder.norm.weight", source="decoder.layers.0.mlp.norm"))
    initialize(made)
    reader = PieceReader(step_directory(run, 1))
    assert torch.equal(weights(made)["decoder.norm.weight"], reader.weight("decoder.layers.0.mlp.norm"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, r"the checkpoint lacks score \(.*; the model has no place for connectors\..* and \d+ more"),
        ({"module": "score"}, r"source is score, and .* has no parameter below it"),
        ({"module": "head"}, r"module is head, and the model has no parameter below it; there are decoder, score"),
        ({"module": "decoder", "rename": ("layers.0=layers.1",)}, r"the checkpoint lacks decoder\.layers\.0\."),
        ({"module": "score", "source": "decoder.norm.weight"}, r"other shapes: decoder\.norm\.weight is \(32,\) there"),
    ],
)
def test_what_does_not_fit_is_told_in_a_line_and_nothing_is_changed(run: Path, settings: dict, said: str) -> None:
    """Also not the policy, whose own section would do."""
    made = engine(run, section(run, **settings), own=(section(run, module="encoders"),))
    policy, before = made.weights(), weights(made)
    with pytest.raises(ValueError, match=rf"^role reward, init_from\.0 \({step_directory(run, 1)}\): {said}") as caught:
        initialize(made)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(made).items())
    assert all(torch.equal(weight, policy[name]) for name, weight in made.weights().items())


def test_a_damaged_or_absent_checkpoint_is_told_with_the_roles_name(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^role reward, init_from\.0\.checkpoint: .*gone does not exist$"):
        initialize(engine(run, section(tmp_path / "gone")))
    damaged = shutil.copytree(run, tmp_path / "run")
    path = step_directory(damaged, 1) / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match=r"^role reward, init_from\.0: .* is not what was saved"):
        initialize(engine(run, section(damaged, module="decoder")))


def test_all_ranks_take_the_checkpoint_that_rank_0_found(run: Path, tmp_path: Path) -> None:
    found = shutil.copytree(step_directory(run, 1), tmp_path / "step-00000009")
    made = engine(run, section(run, module="decoder"))
    made.topology = dataclasses.replace(made.topology, rank=1)
    of_rank_0 = iter([[found], ["what rank 0 says that it began as"]])
    made.gather = lambda value: [next(of_rank_0) if value == [] else value]
    (line,) = initialize(made)
    assert line.endswith(f"from {found}")
    assert made.roles["reward"].origin == "what rank 0 says that it began as"


def test_the_origin_tells_another_checkpoint_and_another_map_but_not_a_copy(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    write_checkpoint(tmp_path / "other", 1, seed=8)
    origins = []
    for checkpoint, settings in (
        (run, {"module": "decoder"}),
        (copy, {"module": "decoder"}),
        (tmp_path / "other", {"module": "decoder"}),
        (run, {"module": "decoder", "ignore": ("norm",), "allow_missing": ("norm",)}),
        (run, {"ignore": ("encoders", "connectors"), "allow_missing": ("score",)}),
    ):
        made = engine(run, section(checkpoint, **settings))
        assert made.roles["reward"].origin == ""
        initialize(made)
        origins.append(made.roles["reward"].origin)
    assert origins[0] == origins[1]
    assert len(set(origins)) == 4
    assert all(f"the initial values of seed {CONFIG.train.seed}, and over them a checkpoint" in o for o in origins)


def saved_run(run: Path, folder: Path, saved: bool) -> tuple[Path, dict[str, torch.Tensor]]:
    """(the checkpoint of a run that began with the decoder of `run`, what its role then had)."""
    made = engine(run, section(run, module="decoder"), saved=saved)
    initialize(made)
    return save(made, folder, RunState(step=1), {}, keep=1), weights(made)


def test_a_frozen_role_is_made_again_where_a_run_goes_on(run: Path, tmp_path: Path) -> None:
    checkpoint, begun = saved_run(run, tmp_path, saved=False)
    again = engine(run, section(run, module="decoder"))
    told = load(again, checkpoint).told
    assert all(torch.equal(weight, begun[name]) for name, weight in weights(again).items())
    assert any(line.startswith("initialized decoder of the role reward") for line in told)
    with pytest.raises(ValueError, match=r"in .* the role reward is the initial values of seed"):
        load(engine(run), checkpoint)


def test_a_role_in_the_checkpoint_needs_its_origin_no_more_and_keeps_the_record_of_it(
    run: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(run, tmp_path / "source")
    beginning = section(source, module="decoder")
    made = engine(run, beginning, saved=True)
    initialize(made)
    checkpoint = save(made, tmp_path, RunState(step=1), {}, keep=1)
    shutil.rmtree(source)
    again = engine(run, beginning, saved=True)
    load(again, checkpoint)
    begun = weights(made)
    assert all(torch.equal(weight, begun[name]) for name, weight in weights(again).items())
    assert again.roles["reward"].origin == made.roles["reward"].origin != ""
    with pytest.raises(ValueError, match=r"^role reward, init_from\.0\.checkpoint: .* does not exist$"):
        load(engine(run, beginning), checkpoint)


def test_a_role_that_nobody_has_filled_does_not_run(run: Path) -> None:
    made = engine(run, section(run, module="decoder"))
    with pytest.raises(AssertionError, match="the role reward has not been filled"):
        made.roles["reward"].forward([])
