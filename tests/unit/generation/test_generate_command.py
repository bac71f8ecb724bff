"""`megatron-gemini generate`: what it saves and prints, and one line for every mistake."""

import dataclasses
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import soundfile

from megatron_gemini.cli import run_command
from megatron_gemini.generate import main, parse, show
from megatron_gemini.generation.api import Drawing, Generator
from megatron_gemini.modalities.video.encode import encode_video
from megatron_gemini.registry import MODALITIES
from tests.cpu_time import children_use_less_than
from tests.extension.series import SERIES
from tests.tiny_checkpoint import CONFIG, write_checkpoint

SIZE = CONFIG.image_tokenizer.image_size


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    write_checkpoint(run, 1, seed=1)
    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Good and bad files of every kind."""
    folder = tmp_path_factory.mktemp("files")
    noise = np.random.default_rng(0)
    PIL.Image.fromarray(noise.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / "x.png")
    soundfile.write(folder / "x.wav", noise.normal(size=8000) * 0.1, 22050)
    soundfile.write(folder / "silent.wav", np.zeros(8000), 22050)
    (folder / "x.mp4").write_bytes(encode_video(noise.integers(0, 255, (3, 16, 16, 3), dtype=np.uint8), 2.0))
    for name in ("bad.png", "bad.wav", "bad.mp4"):
        (folder / name).write_bytes(b"not what the name says")
    (folder / "short.png").write_bytes((folder / "x.png").read_bytes()[:200])
    return folder


def test_items_keep_the_order_of_the_command_line() -> None:
    argv = "first --image a.png second --seed 7 --audio b.wav --video=c.mp4 --no-cache last --checkpoint d"
    options = parse([*argv.split(), "--", "--odd text"])
    assert options.items == [
        ("text", "first"),
        ("image", "a.png"),
        ("text", "second"),
        ("audio", "b.wav"),
        ("video", "c.mp4"),
        ("text", "last"),
        ("text", "--odd text"),
    ]
    assert (options.seed, options.no_cache, options.checkpoint) == (7, True, "d")


def test_a_modality_of_a_plugin_has_an_option_of_its_own(capsys) -> None:
    MODALITIES.register("series", SERIES)
    try:
        argv = ["--checkpoint", "d", "--series", "a.json", "what is this?"]
        assert parse(argv).items == [("series", "a.json"), ("text", "what is this?")]
        with pytest.raises(SystemExit):
            main(["--help"])
        assert "--series FILE" in capsys.readouterr().out
    finally:
        MODALITIES.unregister("series")


def test_an_image_is_saved_large_enough_to_look_at(run, tmp_path, capsys) -> None:
    out = tmp_path / "seven.png"
    assert main(["--checkpoint", str(run), "draw seven", "--answer", "image", "--out", str(out)]) == 0
    assert PIL.Image.open(out).size == (256, 256)
    assert capsys.readouterr().out == f"image saved to {out}\n"


def test_scale_one_keeps_the_size_of_the_model(run, tmp_path) -> None:
    out = tmp_path / "seven.png"
    main(["--checkpoint", str(run), "draw", "--answer", "image", "--scale", "1", "--out", str(out)])
    assert PIL.Image.open(out).size == (SIZE, SIZE)


def test_the_same_seed_draws_the_same_image_with_and_without_cache(run, tmp_path) -> None:
    drawn: list[bytes] = []
    for extra in ([], ["--no-cache"], ["--seed", "1"], ["--guidance", "3"]):
        out = tmp_path / f"{len(drawn)}.png"
        main(["--checkpoint", str(run), "draw", "--answer", "image", "--scale", "1", "--out", str(out), *extra])
        drawn.append(out.read_bytes())
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_every_kind_of_input_is_answered_in_text(run, files, capsys) -> None:
    names = ("--image", files / "x.png", "and", "--audio", files / "x.wav", "--video", files / "x.mp4", "what is this?")
    argv = ["--checkpoint", str(run), *map(str, names), "--answer", "text", "--max-tokens", "12"]
    assert main(argv) == 0
    first = capsys.readouterr().out
    main(argv)
    assert first == capsys.readouterr().out != ""


def test_an_asked_image_that_is_not_drawn_is_a_failure(run, tmp_path, capsys) -> None:
    out = tmp_path / "x.png"
    assert main(["--checkpoint", str(run), "one", "--answer", "text", "--max-tokens", "2", "--out", str(out)]) == 1
    assert "no image was drawn" in capsys.readouterr().err
    assert not out.exists()


@pytest.fixture(scope="module", params=["no codes", "no tokenizer"])
def run_without_drawings(tmp_path_factory, request) -> Path:
    """Of a model that has no image codes, and of one whose run did not name the tokenizer of its codes."""
    run = tmp_path_factory.mktemp("text")
    without = dataclasses.replace(CONFIG, image_tokenizer=dataclasses.replace(CONFIG.image_tokenizer, codes=0))
    if request.param == "no codes":
        write_checkpoint(run, 1, seed=1, config=without, draws=False)
    else:
        write_checkpoint(run, 1, seed=1, draws=False)
    return run


def test_a_model_that_cannot_draw_answers_in_text(run_without_drawings, capsys) -> None:
    assert run_command(main, ["--checkpoint", str(run_without_drawings), "what is this?", "--max-tokens", "12"]) == 0
    said = capsys.readouterr()
    assert said.out and not said.err


def test_an_image_asked_of_a_model_that_cannot_draw_is_told_so(run_without_drawings, tmp_path, capsys) -> None:
    asked = ["--checkpoint", str(run_without_drawings), "draw", "--max-tokens", "8", "--out", str(tmp_path / "x.png")]
    assert run_command(main, asked) == 2
    error = capsys.readouterr().err
    assert "this model makes no image" in error and "--answer image" not in error and error.count("\n") == 1
    assert run_command(main, [*asked[:-2], "--answer", "image"]) == 2
    error = capsys.readouterr().err
    assert "this model makes no image" in error and error.count("\n") == 1


class Terminal(io.StringIO):
    """What was on the screen after every write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


SPOKEN = ["what is this", "--answer", "text", "--max-tokens", "40", "--temperature", "2", "--seed", "5"]


def test_on_a_terminal_text_comes_in_parts_and_is_the_same(run, capsys, monkeypatch) -> None:
    main(["--checkpoint", str(run), *SPOKEN])
    whole = capsys.readouterr().out
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    main(["--checkpoint", str(run), *SPOKEN])
    assert terminal.getvalue() == whole
    assert sum(text != "" for text in terminal.writes) > 5


def test_pieces_are_shown_in_order_and_images_numbered_from_the_second(tmp_path, capsys) -> None:
    image = Drawing((1,), np.zeros((8, 8, 3), np.uint8))
    assert show(["a ", "seven", image, image, "and", " "], tmp_path / "x.png", 1) == 2
    first, second = tmp_path / "x.png", tmp_path / "x-2.png"
    assert capsys.readouterr().out == f"a seven\nimage saved to {first}\nimage saved to {second}\nand \n"
    assert first.is_file() and second.is_file()


def test_an_interrupted_answer_ends_its_line(run, capsys, monkeypatch) -> None:
    def interrupted(*given: object) -> Iterator[str]:
        yield "half a "
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "respond", interrupted)
    assert run_command(main, ["--checkpoint", str(run), "hello"]) == 130
    said = capsys.readouterr()
    assert said.out == "half a \n" and said.err == "megatron-gemini: interrupted\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "nothing was asked"),
        (["hello", "--sead", "3"], "no option --sead; did you mean --seed?"),
        (["hello", "--top-k", "many"], "--top-k"),
        (["hello", "--top-p", "2"], "top_p is 2"),
        (["hello", "--temperature", "-1"], "temperature is -1"),
        (["hello", "--out", "x.txt"], "x.txt is not the name of an image"),
        (["hello", "--out", "no/such/x.png"], "no/such does not exist"),
        (["hello", "--scale", "-2"], "--scale is -2"),
        (["hello", "--answer", "image", "--max-tokens", "3"], "max_tokens is 3"),
        (["hello", "--image"], "--image"),
        (["--image", "FILES/none.png", "hello"], "none.png does not exist"),
        (["--image", "FILES", "hello"], "is not a file"),
        (["--image", "FILES/bad.png", "hello"], "bad.png: not a readable"),
        (["--image", "FILES/short.png", "hello"], "short.png: the image cannot be decoded"),
        (["--audio", "FILES/bad.wav", "hello"], "bad.wav: not a readable"),
        (["--audio", "FILES/silent.wav", "hello"], "silent.wav: the audio is silent"),
        (["--video", "FILES/bad.mp4", "hello"], "bad.mp4: not a readable video"),
        (["--video", "FILES/x.wav", "hello"], "x.wav: "),
    ],
)
def test_a_mistake_is_told_in_one_line_with_status_2(run, files, capsys, argv, said) -> None:
    argv = ["--checkpoint", str(run), *(word.replace("FILES", str(files)) for word in argv)]
    assert run_command(main, argv) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("argv", [["hello"], ["hello", "--checkpoint", "/no/such/run"]])
def test_a_missing_checkpoint_is_told_in_one_line(argv, capsys) -> None:
    assert run_command(main, argv) == 2
    error = capsys.readouterr().err
    assert "checkpoint" in error and error.count("\n") == 1


def test_help_answers_in_under_a_second_without_torch() -> None:
    code = (
        "import sys\n"
        "from megatron_gemini.generate import main\n"
        "try:\n    main(['--help'])\n"
        "finally:\n    assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    with children_use_less_than(1.0):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for option in ("--temperature", "--top-k", "--guidance", "--no-cache", "default: 2.0"):
        assert option in result.stdout


def test_answering_imports_neither_deepspeed_nor_megatron_core(run, tmp_path) -> None:
    code = (
        "import sys\nfrom megatron_gemini.generate import main\n"
        f"main(['--checkpoint', {str(run)!r}, 'one', '--answer', 'image', '--out', {str(tmp_path / 'x.png')!r}])\n"
        "print([m for m in ('deepspeed', 'megatron.core', 'sklearn', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("[]\n")
