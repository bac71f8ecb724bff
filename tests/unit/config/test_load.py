"""Settings from a file and the command line, and the errors of both."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.config.data import DataConfig, SourceConfig
from megatron_gemini.config.load import config_from_dict, dump_config, load_config, read_config
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import Section, setting_names
from megatron_gemini.config.training import OptimizerConfig, TrainConfig


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_an_empty_command_line_gives_the_defaults():
    assert load_config([]) == RunConfig()


def test_options_override_the_file_and_the_file_overrides_the_preset(write):
    path = write("preset: small\ntrain: {steps: 30}\nmodel: {layers: 5}\n")
    values = {"model": {"width": 64, "layers": 2}, "train": {"steps": 10, "seed": 3}}
    config = load_config(["--config", path, "--model.layers", "7"], presets={"small": values}.__getitem__)
    assert (config.model.width, config.model.layers) == (64, 7)
    assert (config.train.steps, config.train.seed) == (30, 3)


def test_the_command_line_names_another_preset_than_the_file(write):
    presets = {"a": {"model": {"layers": 1}}, "b": {"model": {"layers": 2}}}.__getitem__
    assert load_config(["--config", write("preset: a"), "--preset", "b"], presets).model.layers == 2


@pytest.mark.parametrize("text", ["preset: 8", "preset: a"])
def test_a_preset_that_cannot_be_had_is_an_error(write, text):
    with pytest.raises(ValueError, match="preset is"):
        load_config(["--config", write(text)])


def test_a_check_between_two_settings_sees_only_the_merged_whole(write):
    path = write("model: {kv_heads: 3}\n")  # does not divide the default 4 heads
    with pytest.raises(ValueError, match=r"model\.heads is 4, which model\.kv_heads \(3\) does not divide"):
        load_config(["--config", path])
    assert load_config(["--config", path, "--model.heads", "6"]).model.kv_heads == 3


@pytest.mark.parametrize(
    "argv",
    [
        ["--train.output-dir", "a/b", "--train.no-resume"],
        ["--train.output_dir=a/b", "--train.resume=false"],
        ["--train.output_dir", "x", "--train.no_resume", "--train.output_dir", "a/b"],
        ["--local_rank=1", "--train.output_dir", "a/b", "--train.resume", "false"],
        ["--local_rank", "1", "--deepspeed", "--train.output_dir", "a/b", "--train.no_resume"],
        ["--train.no_resume", "--local-rank", "1", "--train.output_dir", "a/b", "--debug"],
    ],
)
def test_one_setting_may_be_written_in_several_ways(argv):
    assert load_config(argv) == RunConfig(train=TrainConfig(output_dir="a/b", resume=False))


def test_deepspeeds_own_option_for_its_json_is_understood():
    assert load_config(["--deepspeed", "--deepspeed_config", "ds.json"]).engine.deepspeed_config == "ds.json"


def test_a_negative_number_is_a_value_and_its_check_speaks():
    with pytest.raises(ValueError, match=r"^train\.steps is -3; it must be greater than 0$"):
        load_config(["--train.steps", "-3"])


def test_items_of_a_list_come_from_the_file_and_may_be_changed_by_number(write):
    text = "data:\n  sources:\n  - {shards: a.tar, prompts: ['what?']}\n  - {shards: b.tar, task: text, weight: 2}\n"
    argv = ["--config", write(text), "--data.sources.1.weight", "0.5", "--data.sources.0.prompts", "who?", "why?"]
    assert load_config(argv).data.sources == (
        SourceConfig(shards="a.tar", prompts=("who?", "why?")),
        SourceConfig(shards="b.tar", task="text", weight=0.5),
    )
    with pytest.raises(
        ValueError, match=r"--data\.sources\.2 does not exist; the list in the file has the items 0 to 1"
    ):
        load_config([*argv, "--data.sources.2.weight", "1"])
    with pytest.raises(ValueError, match=r"--data\.validation\.0 does not exist; the list in the file is empty"):
        load_config([*argv, "--data.validation.0.weight", "1"])


def test_an_error_in_an_item_says_which(write):
    text = "data: {sources: [{shards: a.tar}, {shards: b.tar, weight: 0}]}"
    with pytest.raises(ValueError, match=r"^data\.sources\.1: data\.sources\.weight is 0\.0; it must be greater"):
        load_config(["--config", write(text)])


@pytest.mark.parametrize(
    ("option", "suggestion"),
    [
        ("--train.stesp", "--train.steps"),
        ("--trian.steps", "--train.steps"),
        ("--steps", "--train.steps"),
        ("--model.lr", "--optimizer.lr"),
        ("--data.sources.0.wieght", "--data.sources.0.weight"),
        ("--train.no_resum", "--train.resume"),
        ("--confg", "--config"),
    ],
)
def test_an_unknown_option_is_answered_with_the_nearest(option, suggestion):
    with pytest.raises(ValueError, match=rf"^{option} is no setting; did you mean {suggestion}\?$"):
        load_config([option, "3"])


@pytest.mark.parametrize(
    ("text", "name", "suggestion"),
    [
        ("train: {stesp: 3}", "train.stesp", "train.steps"),
        ("trian: {steps: 3}", "trian", "train"),
        ("steps: 3", "steps", "train.steps"),
        ("model: {lr: 3}", "model.lr", "optimizer.lr"),
        ("data: {sources: [{shards: a, tsk: text}]}", "data.sources.0.tsk", "data.sources.0.task"),
    ],
)
def test_an_unknown_key_is_answered_with_the_file_and_the_nearest(write, text, name, suggestion):
    path = write(text)
    with pytest.raises(ValueError, match=rf"^{path}: {name} is no setting; did you mean {suggestion}\?$"):
        load_config(["--config", path])


def test_a_name_near_to_nothing_is_answered_with_what_there_is():
    with pytest.raises(
        ValueError,
        match=r"^--logging\.qqqq is no setting; there are logging\.every, logging\.tensorboard, logging\.wandb_",
    ):
        load_config(["--logging.qqqq", "1"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('train: {steps: "ten"}', "train.steps is 'ten'; it must be a whole number"),
        ("train: {steps: 1.5}", r"train.steps is 1.5 \(float\); it must be a whole number"),
        ("train: {steps: true}", r"train.steps is True \(bool\); it must be a whole number"),
        ("optimizer: {lr: true}", r"optimizer.lr is True \(bool\); it must be a number"),
        ("optimizer: {lr: fast}", "optimizer.lr is 'fast'; it must be a number"),
        ("optimizer: {lr: .inf}", r"optimizer.lr is inf \(float\); it must be a finite number"),
        ("train: {resume: 1}", r"train.resume is 1 \(int\); it must be true or false"),
        ("train: {output_dir: 2024-01-02}", r"train.output_dir is .*\(date\); it must be text; put it in quotes"),
        ("schedule: {kind: cosin}", "schedule.kind is 'cosin'; choose one of cosine, linear, wsd"),
        ("schedule: {kind: }", r"schedule.kind is None \(NoneType\); choose one of"),
        ("objective: {kind: pretran}", r"objective.kind is 'pretran'; did you mean pretrain\?$"),
        (
            "objective: {kind: }",
            r"objective.kind is None \(NoneType\); there are pretrain, image_tokenizer, and --plugin",
        ),
        ("objective: {kind: [pretrain]}", r"objective.kind is \['pretrain'\] \(list\); "),
        ("train: [1]", r"train is \[1\] \(list\); it is a section"),
        ("data: {sources: {shards: a}}", "data.sources is .*; it must be a list of mappings, each with shards, task"),
        ("data: {sources: [{prompts: hello}]}", "data.sources.0.prompts is 'hello'; it must be a list"),
        ("data: {sources: [{prompts: [1]}]}", r"data.sources.0.prompts.0 is 1 \(int\); it must be text"),
    ],
)
def test_a_value_of_another_type_is_named_with_what_is_wanted(write, text, problem):
    path = write(text)
    with pytest.raises(ValueError, match=rf"^{path}: {problem}"):
        load_config(["--config", path])


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--train.steps", "ten"], "--train.steps is 'ten'; it must be a whole number"),
        (["--train.steps"], "--train.steps takes one value and got none"),
        (["--train.steps", "1", "2"], "--train.steps takes one value and got '1' '2'"),
        (["--train.resume", "maybe"], "--train.resume is 'maybe'; it must be true or false"),
        (["--optimizer.lr", "nan"], "--optimizer.lr is 'nan'; it must be a finite number"),
        (["--engine.precision", "fp16"], "--engine.precision is 'fp16'; choose one of fp32, bf16"),
        (["--train", "3"], "--train is '3'; it is a section"),
        (["--data.sources", "a.tar"], "--data.sources is a list of sections; write it in the file"),
        (["--data.sources.0", "a.tar"], "--data.sources.0 is 'a.tar'; it is a section"),
        (["--config"], "--config takes one value and got none"),
        (["run.yaml"], "'run.yaml' stands alone"),
        (["--deepspeed", "run.yaml"], "'run.yaml' stands alone"),
        (["--train.steps", "3", "--"], "'--' stands alone"),
        (["--train..steps", "3"], "--train..steps is no setting"),
    ],
)
def test_a_bad_option_is_named(argv, problem):
    with pytest.raises(ValueError, match=f"^{problem}"):
        load_config(argv)


@pytest.mark.parametrize("written", ["1e-3", "1.0e-3", "0.001", '"1e-3"'])
def test_a_number_without_a_dot_is_a_number_although_yaml_reads_text(write, written):
    assert load_config(["--config", write(f"optimizer: {{lr: {written}}}")]).optimizer.lr == 0.001


def test_a_whole_number_is_taken_where_a_fraction_may_stand(write):
    weight = load_config(["--config", write("optimizer: {weight_decay: 0}")]).optimizer.weight_decay
    assert isinstance(weight, float)


@pytest.mark.parametrize("text", ["", "# nothing\n", "train:\n  # steps: 3\n"])
def test_an_empty_file_or_section_changes_nothing(write, text):
    assert load_config(["--config", write(text)]) == RunConfig()


def test_the_environment_never_enters_a_configuration(write, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t")
    written = ("$WANDB_API_KEY", "${WANDB_API_KEY}", "${oc.env:WANDB_API_KEY}", "~/x", "%(WANDB_API_KEY)s")
    for value in written:
        from_file = load_config(["--config", write(f"train: {{output_dir: '{value}'}}")])
        from_option = load_config(["--train.output_dir", value])
        assert from_file.train.output_dir == from_option.train.output_dir == value
        assert "s3cr3t" not in dump_config(from_file)


def test_relative_paths_stay_as_written(write):
    argv = ["--config", write("data: {text_model: ../text.model}"), "--train.output_dir", "./runs//x"]
    config = load_config(argv)
    assert (config.data.text_model, config.train.output_dir) == ("../text.model", "./runs//x")


texts = st.text(st.characters(codec="utf-8"), max_size=20)
sources = st.builds(
    SourceConfig,
    shards=texts,
    task=st.sampled_from(["caption", "text"]),
    weight=st.floats(1e-30, 1e30),
    prompts=st.lists(texts, max_size=3).map(tuple),
    name=texts,
)


@settings(deadline=None, max_examples=50)
@given(
    sources=st.lists(sources, max_size=3).map(tuple),
    lr=st.floats(1e-300, 1e300),
    output_dir=texts,
    seed=st.integers(0, 2**63),
    resume=st.booleans(),
)
def test_a_dumped_configuration_reads_back_equal(tmp_path_factory, sources, lr, output_dir, seed, resume):
    config = RunConfig(
        data=DataConfig(sources=sources),
        optimizer=OptimizerConfig(lr=lr),
        train=TrainConfig(output_dir=output_dir, seed=seed, resume=resume),
    )
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(dump_config(config))
    assert read_config(path) == config
    assert config_from_dict(dataclasses.asdict(config)) == config


def test_a_setting_that_a_checkpoint_no_longer_has_is_named_with_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(RunConfig()) + "gone: {x: 1}\n")
    with pytest.raises(ValueError, match=rf"^{path}: gone is no setting"):
        read_config(path)


def test_help_shows_every_setting_with_the_value_it_has_now(write, capsys):
    with pytest.raises(SystemExit) as stop:
        load_config(["--config", write("train: {steps: 12345}"), "--optimizer.lr", "0.0625", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for name in setting_names(Section(RunConfig), {}):
        lists = ("data.sources", "data.validation", "data.curriculum", "init_from")
        shown_as = [f"--{name} ", f"--{name},", f"--{name}.NAME "]
        assert any(option in shown for option in shown_as) or name in lists, name
    assert "12345" in shown
    assert "0.0625" in shown
    assert "\x1b" not in shown


def test_help_shows_the_items_that_a_file_has(write, capsys):
    text = "data: {sources: [{shards: a.tar}, {shards: b.tar, weight: 0.0625, fields: {text: [caption, txt]}}]}"
    with pytest.raises(SystemExit):
        load_config(["--config", write(text), "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--data.sources.1.weight FLOAT Share of the documents drawn from here" in shown
    assert "(default: 0.0625)" in shown and "(default: a.tar)" in shown
    assert "--data.sources.1.fields.NAME STR ... Where a sample has its fields" in shown
    assert "(default: 'text caption txt')" in shown


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {widht: 3, layers: many}\ntrain: {stesp: 3}\n")
    with pytest.raises(ValueError) as raised:
        load_config(["--config", str(path)])
    message = str(raised.value)
    assert message.startswith("3 mistakes: (1) ") and "\n" not in message
    for words in ("model.widht is no setting", "model.layers is 'many'", "train.stesp is no setting"):
        assert words in message


def test_checks_of_all_sections_are_told_at_once(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {width: 0}\noptimizer: {lr: -1}\nencoders: {vision: {patch: 0}, audio: {mels: 0}}\n")
    with pytest.raises(ValueError, match=r"^4 mistakes: .*model\.width.*optimizer\.lr"):
        load_config(["--config", str(path)])
