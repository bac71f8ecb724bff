"""Modalities are known by their specs alone: control tokens, operations, and no heavy library to import them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import CONTROL_TOKENS, TokenLayout
from megatron_gemini.data.samples.document import build_document
from megatron_gemini.data.samples.items import Codes, Text
from megatron_gemini.data.samples.kinds import decode_item
from megatron_gemini.data.tasks.conversations import conversation
from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.modalities.code_ranges import code_ranges
from megatron_gemini.modalities.control_tokens import control_tokens
from megatron_gemini.modalities.spec import CodesSpec, ModalitySpec
from megatron_gemini.registry import MODALITIES

ROOT = Path(__file__).parents[3]
CODES = CodesSpec("sounds", ("sounds.json",), lambda config: 4, lambda config: 2, "sounds.codes")


class Letters:
    def encode(self, text):
        return [ord(letter) % 30 for letter in text]


@pytest.fixture
def register():
    names = []

    def add(name, **settings):
        MODALITIES.register(name, ModalitySpec(name=name, **settings))
        names.append(name)

    yield add
    for name in names:
        MODALITIES.unregister(name)


def test_the_document_lists_the_members_that_hold_each_modality():
    rows = re.findall(r"^\| (\w+) \| ((?:`\w+`(?:, )?)+) \|$", (ROOT / "docs/data.md").read_text(), re.M)
    listed = {name: tuple(re.findall(r"`(\w+)`", cell)) for name, cell in rows}
    assert {spec.name: listed[spec.name] for spec in MODALITIES.entries()} == {
        spec.name: spec.members for spec in MODALITIES.entries()
    }


def test_the_readme_names_endings_that_are_read():
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| task | members of a sample |") : text.index("Other endings are read as well")]
    read = {member for spec in MODALITIES.entries() for member in spec.members} | {"codes", "json"}
    assert set(re.findall(r"KEY\.(?:\d\.)?(\w+)", table)) <= read


def test_the_control_tokens_in_force_have_names():
    assert control_tokens() == {
        "image": "image",
        "image_begin": "image_begin",
        "image_end": "image_end",
        "video": "video",
        "audio": "audio",
    }


def test_plugins_take_the_next_free_control_tokens_in_the_order_of_their_registration(register):
    register("series", encoder="series")
    register("notes")  # read by the decoder itself, as text is
    register("sound", encoder="sound", codes=CODES)
    register("last", encoder="last", control="reserved_5")
    register("after", encoder="after")
    found = control_tokens()
    assert [found[name] for name in ("series", "sound", "sound_begin", "sound_end", "last", "after")] == [
        f"reserved_{number}" for number in (0, 1, 2, 3, 5, 4)
    ]
    assert "notes" not in found
    assert MODALITIES.get("sound").control == "reserved_1"
    assert set(found.values()) <= set(CONTROL_TOKENS)


def test_no_two_modalities_share_a_control_token_and_none_is_made_up(register):
    with pytest.raises(ValueError, match="'image' of the modality 'drawing' is another modality's"):
        register("drawing", encoder="vision", control="image")
    with pytest.raises(ValueError, match="'drawing' of the modality 'drawing' is none of"):
        register("drawing", encoder="vision", control="drawing")
    for number in range(6):
        register(f"m{number}", encoder="vision")
    with pytest.raises(ValueError, match="no control token is left for the modality 'm6'"):
        register("m6", encoder="vision")
    assert "m6" not in MODALITIES


def test_a_modality_that_is_taken_back_gives_its_token_back(register):
    before = control_tokens()
    MODALITIES.register("a", ModalitySpec(name="a", encoder="a"))
    MODALITIES.unregister("a")
    assert control_tokens() == before
    register("b", encoder="b")
    assert MODALITIES.get("b").control == "reserved_0"


BLOCKED = """
import importlib, sys
for name in ("torch", "av", "soundfile", "soxr", "PIL", "deepspeed", "sentencepiece", "pyarrow", "fsspec"):
    sys.modules[name] = None
from megatron_gemini import registry
for each in vars(registry).values():
    if isinstance(each, registry.Registry):
        each.entries()
for name in sys.argv[1:]:
    importlib.import_module(name)
from megatron_gemini.config.load import config_from_dict
config_from_dict({"data": {"sources": [{"shards": "x", "task": "chat", "fields": {"messages": ["json"]}}]}})
"""


def test_everything_that_is_registered_is_there_without_torch_and_without_a_media_library():
    files = [*ROOT.glob("megatron_gemini/**/spec.py"), *ROOT.glob("megatron_gemini/data/tasks/*.py")]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    assert len(modules) > 12
    done = subprocess.run([sys.executable, "-c", BLOCKED, *modules], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_modality_says_what_can_be_done_to_its_items_and_what_is_drawn_anew():
    found = {spec.name: {name: each.random for name, each in spec.operations.items()} for spec in MODALITIES.entries()}
    assert found == {
        "text": {},
        "image": {"resize": False, "crop": True},
        "video": {"resize": False, "frames": False},
        "audio": {"speed": True},
    }


def test_a_range_of_codes_of_a_plugin_stands_behind_the_images(register):
    config = RunConfig()
    before = TokenLayout(30, code_ranges(config))
    assert before.codes == (("image", config.image_tokenizer.codes),)
    register("sound", encoder="vision", codes=CODES)
    after = TokenLayout(30, code_ranges(config))
    assert after.codes == (*before.codes, ("sound", 4))
    assert after.code_range("image") == before.code_range("image")
    document = build_document(
        [Text("a")],
        [Codes("sound", (3, 1))],
        layout=after,
        text_tokenizer=Letters(),
        encoders=config.encoders,
        key="k",
    )
    first = after.code_range("sound").start
    begin, end = (after.control(token) for token in ("reserved_1", "reserved_2"))
    assert document.token_L[-5:-1].tolist() == [begin, first + 3, first + 1, end]
    assert [after.targets[kind] for kind in document.modality_L[-5:-1]] == ["text", "sound", "sound", "text"]
    assert decode_item("sounds", b'{"codes": [2, 0]}', config) == Codes("sound", (2, 0))
    assert conversation([{"role": "assistant", "content": [{"type": "sounds", "sounds": "x"}]}]) == [
        (True, [("sounds", "x")])
    ]
    with pytest.raises(BadSample, match=r"sound code 4; the codebook has 0\.\.3"):
        decode_item("sounds", b'{"codes": [2, 4]}', config)
