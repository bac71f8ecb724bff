"""Sections that a registry completes: one for every encoder, and those whose type their `kind` decides."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.config.encoders import AudioConfig, ConnectorConfig, CostConfig, EncoderConfig, VisionConfig
from megatron_gemini.config.load import config_from_dict, dump_config, load_config, read_config
from megatron_gemini.config.objective import ObjectiveConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import Chosen
from megatron_gemini.connectors.linear.spec import LinearConnectorConfig
from megatron_gemini.connectors.spec import ConnectorSpec
from megatron_gemini.modalities.spec import EncoderSpec
from megatron_gemini.objectives.image_tokenizer.spec import ImageTokenizerObjectiveConfig
from megatron_gemini.objectives.pretrain.spec import PretrainConfig
from megatron_gemini.objectives.spec import ObjectiveSpec
from megatron_gemini.registry import CONNECTORS, ENCODERS, OBJECTIVES, Registry

Spec = TypeVar("Spec", EncoderSpec, ConnectorSpec, ObjectiveSpec)


def entry(registry: Registry[Spec], name: str, section: type) -> Spec:
    """A built-in one with other settings, which are all that the configuration wants of it."""
    return dataclasses.replace(registry.entries()[0], name=name, section=section)


@dataclass(frozen=True)
class MixerConfig(ConnectorConfig):
    """A connector of a plugin."""

    kind: str = "mixer"
    heads: int = 4
    """How many mix."""


@dataclass(frozen=True)
class SeriesConfig(EncoderConfig):
    """An encoder of a plugin, which is off by default and has a connector of its own."""

    enabled: bool = False
    longest: int = 64
    """Numbers of the longest series."""
    labels: tuple[str, ...] = ()
    cost: CostConfig = field(default_factory=lambda: CostConfig(quadratic=0.0, linear=1.0, constant=2.0))
    connector: Annotated[ConnectorConfig, Chosen(CONNECTORS)] = field(default_factory=lambda: MixerConfig(heads=8))


@dataclass(frozen=True)
class PairsConfig(ObjectiveConfig):
    """An objective of a plugin, one of whose settings has the name of pretraining's and another type."""

    kind: str = "pairs"
    weights: tuple[float, ...] = (1.0, 2.0)
    beta: float = 0.1


PLUGIN = ((ENCODERS, "series", SeriesConfig), (CONNECTORS, "mixer", MixerConfig), (OBJECTIVES, "pairs", PairsConfig))


@pytest.fixture
def plugin() -> Iterator[None]:
    for registry, name, section in PLUGIN:
        registry.register(name, entry(registry, name, section))
    yield
    for registry, name, _ in PLUGIN:
        registry.unregister(name)


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_every_encoder_has_a_section_and_what_is_not_set_has_its_default(write):
    config = load_config(["--config", write("encoders: {vision: {width: 32}}")])
    assert config.encoders == {"vision": VisionConfig(width=32), "audio": AudioConfig()}
    assert config.enabled_encoders == ("vision", "audio")
    assert load_config(["--encoders.audio.no_enabled"]).enabled_encoders == ("vision",)


def test_settings_of_an_encoder_are_options():
    config = load_config(
        [
            *("--encoders.vision.width", "64", "--encoders.vision.frozen", "--encoders.vision.cost.linear", "2"),
            *("--encoders.vision.connector.lr_scale", "0.5"),
            *("--encoders.audio.connector.frozen", "--encoders.audio.no_frozen"),
        ]
    )
    vision = VisionConfig(
        width=64, frozen=True, cost=CostConfig(linear=2.0), connector=LinearConnectorConfig(lr_scale=0.5)
    )
    assert config.encoders == {"vision": vision, "audio": AudioConfig(connector=LinearConnectorConfig(frozen=True))}


def test_a_frozen_encoder_of_the_file_is_thawed_by_an_option(write):
    argv = ["--config", write("encoders: {vision: {frozen: true}}"), "--encoders.vision.no_frozen"]
    assert not load_config(argv).encoders["vision"].frozen


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("encoders: {vison: {width: 3}}", r"encoders\.vison is no setting; did you mean vision\?$"),
        ("encoders: {series: {width: 3}}", r"encoders\.series is no setting; there are vision, audio, and --plugin"),
        ("encoders: {vision: 3}", r"encoders\.vision is 3 \(int\); it is a section"),
        (
            "encoders: {vision: {widht: 3}}",
            r"encoders\.vision\.widht is no setting; did you mean encoders\.vision\.width",
        ),
        ("encoders: {vision: {connector: {knd: x}}}", r"encoders\.vision\.connector\.knd is no setting; did you mean"),
        (
            "encoders: {vision: {connector: {kind: liner}}}",
            r"encoders\.vision\.connector\.kind is 'liner'; did you mean lin",
        ),
        ("encoders: {vision: {connector: linear}}", r"encoders\.vision\.connector is 'linear'; it is a section"),
        ("objective: {kind: pretrian}", r"objective\.kind is 'pretrian'; did you mean pretrain\?$"),
        (
            "objective: {kind: dpo}",
            r"objective\.kind is 'dpo'; there are pretrain, image_tokenizer, and --plugin MODULE",
        ),
        (
            "objective: {images_per_step: 8}",
            r"objective\.images_per_step is no setting of objective\.kind pretrain; there are objective\.kind, "
            r"objective\.weights, objective\.z_loss$",
        ),
        (
            "objective: {kind: image_tokenizer, z_loss: 0}",
            r"objective\.z_loss is no setting of objective\.kind image_tokenizer; there are objective\.kind, "
            r"objective\.images_per_step$",
        ),
        ("objective: {weights: {image: high}}", r"objective\.weights\.image is 'high'; it must be a number"),
        ("objective: {weights: 3}", r"objective\.weights is 3 \(int\); it is a section"),
        ("data: {row_inputs: {vison: 1}}", r"data\.row_inputs\.vison is of no encoder; did you mean vision\?"),
        ("data: {row_inputs: {vision: 1.5}}", r"data\.row_inputs\.vision is 1\.5 \(float\); it must be a whole number"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_name_and_the_way_out(write, text, problem):
    path = write(text)
    with pytest.raises(ValueError, match=rf"^({path}: )?{problem}") as error:  # what sections check has no source
        load_config(["--config", path])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--encoders.vison.width", "3"], r"--encoders\.vison is no setting; did you mean vision\?$"),
        (
            ["--encoders.series.frozen"],
            r"--encoders\.series is no setting; there are vision, audio, and --plugin MODULE",
        ),
        (["--encoders.vision.no_frosen"], r"--encoders\.vision\.no_frosen is no setting; did you mean --encoders"),
        (["--objective.kind", "pretrian"], r"--objective\.kind is 'pretrian'; did you mean pretrain\?$"),
        (["--objective.kind"], r"--objective\.kind takes one value and got none$"),
        (
            ["--objective.images_per_step", "3"],
            r"--objective\.images_per_step is no setting of objective\.kind pretrain;",
        ),
        (["--objective.weights.image", "high"], r"--objective\.weights\.image is 'high'; it must be a number$"),
        (["--objective.weights", "0.3"], r"--objective\.weights is '0\.3'; it is a section"),
        (["--objective.weights.", "0.3"], r"--objective\.weights\. is no setting"),
        (["--objective.kind.kind", "pretrain"], r"--objective\.kind is \{'kind': 'pretrain'\} \(dict\); there are"),
        (["--objective.kind", "pretrain", "--objective.kind.kind", "x"], r"--objective\.kind\.kind is no setting"),
        (["--encoders.vision.connector", "linear"], r"--encoders\.vision\.connector is 'linear'; it is a section"),
        (["--plugins", "a"], r"--plugins is no setting; did you mean --plugin\?$"),
    ],
)
def test_a_mistake_in_an_option_is_told_with_its_name_and_the_way_out(argv, problem):
    with pytest.raises(ValueError, match=f"^{problem}"):
        load_config(argv)


def test_the_kind_may_stand_in_one_source_and_its_settings_in_another(write):
    kind = ["--objective.kind", "image_tokenizer"]
    expected = ImageTokenizerObjectiveConfig(images_per_step=8)
    assert load_config(["--config", write("objective: {images_per_step: 8}"), *kind]).objective == expected
    argv = ["--config", write("objective: {kind: image_tokenizer}"), "--objective.images_per_step", "8"]
    assert load_config(argv).objective == expected
    preset = {"tokens": {"objective": {"kind": "image_tokenizer"}}}.__getitem__
    assert load_config(["--preset", "tokens", "--objective.images_per_step", "8"], preset).objective == expected


def test_of_several_kinds_the_last_source_decides_and_what_belongs_to_the_other_is_refused(write):
    path = write("objective: {kind: image_tokenizer}")
    assert load_config(["--config", path, "--objective.kind", "pretrain"]).objective == PretrainConfig()
    path = write("objective: {kind: image_tokenizer, images_per_step: 8}")
    with pytest.raises(
        ValueError, match=rf"^{path}: objective\.images_per_step is no setting of objective\.kind pretr"
    ):
        load_config(["--config", path, "--objective.kind", "pretrain"])


def test_names_of_the_users_choice_are_options_and_go_over_the_files(write):
    path = write("objective: {weights: {text: 2, image: 0.3}}\ndata: {row_inputs: {audio: 100}}\n")
    argv = ["--config", path, "--objective.weights.image", "0.5", "--data.row_inputs.vision", "40"]
    config = load_config(argv)
    assert config.objective == PretrainConfig(weights={"text": 2.0, "image": 0.5})
    assert config.data.row_inputs == {"audio": 100, "vision": 40}


def test_a_plugins_encoder_connector_and_objective_have_settings_like_built_in_ones(plugin, write):
    path = write(
        "encoders:\n  series: {enabled: true, connector: {heads: 2}}\n  audio: {connector: {kind: mixer}}\n"
        "objective: {kind: pairs, weights: [3, 4]}\n"
    )
    argv = ["--config", path, "--encoders.series.longest", "9", "--encoders.series.labels", "a", "b"]
    config = load_config([*argv, "--objective.beta", "0.5", "--encoders.vision.connector.kind", "mixer"])
    series = SeriesConfig(enabled=True, longest=9, labels=("a", "b"), connector=MixerConfig(heads=2))
    assert config.encoders["series"] == series
    assert config.enabled_encoders == ("vision", "audio", "series")
    assert config.encoders["audio"].connector == config.encoders["vision"].connector == MixerConfig()
    assert config.objective == PairsConfig(weights=(3.0, 4.0), beta=0.5)


def test_two_objectives_may_have_a_setting_of_one_name_and_different_types(plugin):
    assert load_config(["--objective.weights.text", "3"]).objective == PretrainConfig(weights={"text": 3.0})
    argv = ["--objective.weights", "3", "--objective.kind", "pairs"]
    assert load_config(argv).objective == PairsConfig(weights=(3.0,))


def test_what_is_set_goes_over_the_defaults_of_the_section_around_it(plugin):
    """And not over those of its class: this encoder's connector has 8 heads, and its items have another cost."""
    series = load_config(["--encoders.series.connector.frozen", "--encoders.series.cost.linear", "5"]).encoders[
        "series"
    ]
    assert series.connector == MixerConfig(heads=8, frozen=True)
    assert series.cost == CostConfig(quadratic=0.0, linear=5.0, constant=2.0)
    another = load_config(["--encoders.series.connector.kind", "linear"]).encoders["series"]
    assert another.connector == LinearConnectorConfig()


def test_help_shows_a_plugins_settings_with_their_descriptions(plugin, capsys):
    with pytest.raises(SystemExit):
        load_config(["--objective.kind", "pairs", "--encoders.series.longest", "77", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for text in (
        "--encoders.series.longest INT Numbers of the longest series. (default: 77)",
        "--encoders.series.connector.heads INT How many mix. (default: 8)",
        "--encoders.series.connector.kind {linear,mixer}",
        "--objective.kind {pretrain,image_tokenizer,pairs}",
        "--objective.beta FLOAT (default: 0.1)",
        "An encoder of a plugin, which is off by default",
        "--encoders.vision.patch INT Pixels of a patch's side. (default: 4)",
        "The ViT that encodes images and the frames of clips",
    ):
        assert text in shown, text
    assert "--objective.z_loss" not in shown


def test_help_shows_names_of_the_users_choice_with_those_that_are_set(capsys):
    with pytest.raises(SystemExit):
        load_config(["--objective.weights.image", "0.3", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--objective.weights.NAME FLOAT Loss weight of each kind of target" in shown
    assert "(default: 'image 0.3')" in shown


def test_a_plugins_settings_are_saved_and_read_back_and_named_where_it_is_not_there(plugin, tmp_path):
    path = tmp_path / "config.yaml"
    config = load_config(["--encoders.series.enabled", "--objective.kind", "pairs"])
    path.write_text(dump_config(config))
    assert read_config(path) == config
    for registry, name, _ in PLUGIN:
        registry.unregister(name)
    try:
        with pytest.raises(
            ValueError, match=rf"^{path}: objective\.kind is 'pairs'; there are .* --plugin MODULE adds"
        ):
            read_config(path)
        path.write_text(path.read_text().replace("kind: pairs", "kind: pretrain"))
        series = rf"^3 mistakes: \(1\) {path}: encoders\.series is no setting; there are vision, audio, and"
        with pytest.raises(ValueError, match=series):  # the others are the settings of the plugin's objective
            read_config(path)
    finally:
        for registry, name, section in PLUGIN:
            registry.register(name, entry(registry, name, section))


def test_an_encoder_that_a_saved_configuration_does_not_name_was_not_there(tmp_path, plugin):
    """A plugin that came later, or is always installed, adds nothing to the model of an older checkpoint."""
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(RunConfig(encoders={"vision": VisionConfig(width=64)})))
    read = read_config(path)
    assert read.enabled_encoders == ("vision",)
    assert read.encoders["vision"] == VisionConfig(width=64)
    assert set(read.encoders) == {"vision", "audio", "series"}  # so that whoever asks for one is told that it is off


@settings(max_examples=50)
@given(
    vision=st.builds(
        VisionConfig,
        enabled=st.booleans(),
        frozen=st.booleans(),
        lr_scale=st.floats(0, 1e30),
        cost=st.builds(CostConfig, *[st.floats(0, 1e30)] * 3),
        connector=st.builds(LinearConnectorConfig, frozen=st.booleans(), lr_scale=st.floats(0, 1e30)),
    ),
    audio=st.builds(AudioConfig, enabled=st.booleans(), max_seconds=st.floats(1e-3, 1e6)),
    objective=st.one_of(
        st.builds(
            PretrainConfig,
            weights=st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1), st.floats(0, 1e30), max_size=3),
            z_loss=st.floats(0, 1),
        ),
        st.builds(ImageTokenizerObjectiveConfig, images_per_step=st.integers(1, 1000)),
    ),
)
def test_a_dumped_configuration_reads_back_equal(tmp_path_factory, vision, audio, objective):
    config = RunConfig(encoders={"vision": vision, "audio": audio}, objective=objective)
    path = tmp_path_factory.getbasetemp() / "sections.yaml"
    path.write_text(dump_config(config))
    assert read_config(path) == config
    assert config_from_dict(dataclasses.asdict(config)) == config


def test_a_plugins_objective_whose_kind_is_not_its_own_is_a_programmers_mistake():
    @dataclass(frozen=True)
    class Careless(EncoderConfig):
        connector: Annotated[ConnectorConfig, Chosen(CONNECTORS)] = field(default_factory=ConnectorConfig)

    ENCODERS.register("careless", entry(ENCODERS, "careless", Careless))
    try:
        with pytest.raises(AssertionError, match=r"Careless\.connector: the kind linear has another section"):
            load_config(["--encoders.careless.frozen"])
    finally:
        ENCODERS.unregister("careless")


def test_the_whole_configuration_and_its_specs_are_there_without_torch_and_media_libraries():
    code = (
        "import sys; from megatron_gemini.config.load import load_config; load_config([])\n"
        "print(sorted({'torch', 'numpy', 'av', 'soundfile', 'soxr', 'PIL', 'tyro'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
