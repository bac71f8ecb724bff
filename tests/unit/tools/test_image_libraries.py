"""A container build stops when a library of its image was replaced or is missing."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from tools import image_libraries


@pytest.fixture
def image(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An image with all libraries; change the dictionary to change it."""
    versions = {"torch": "2.10.0a0+b4e4ee81d3.nv25.12", "apex": "0.1", "transformer_engine": "2.9", "flash_attn": "2.7"}
    monkeypatch.setattr(image_libraries, "installed", versions.get)
    monkeypatch.setattr(image_libraries, "has_module", lambda name: name.split(".")[0] in {*versions, "amp_C"})
    return versions


def test_nothing_is_wrong_with_an_untouched_image(image: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "image.txt"
    assert image_libraries.main(["record", str(file)]) == 0
    assert "torch==2.10.0a0+b4e4ee81d3.nv25.12\n" in file.read_text()
    assert image_libraries.main(["check", str(file)]) == 0


def test_a_replaced_torch_is_told(image: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "image.txt"
    image_libraries.main(["record", str(file)])
    image["torch"] = "2.13.0"
    assert image_libraries.main(["check", str(file)]) == 1
    assert capsys.readouterr().err == "error: torch was 2.10.0a0+b4e4ee81d3.nv25.12 and is 2.13.0\n"


@pytest.mark.parametrize("library", ["apex", "transformer_engine", "flash_attn"])
def test_an_image_without_a_library_is_refused(image: dict[str, str], tmp_path: Path, library: str) -> None:
    del image[library]
    file = tmp_path / "image.txt"
    image_libraries.main(["record", str(file)])
    assert f"{library} is missing from the image" in image_libraries.check(file)


def test_the_other_package_named_apex_is_no_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        image_libraries, "has_module", {"torch", "apex", "transformer_engine", "flash_attn"}.__contains__
    )
    assert image_libraries.missing() == ["apex.normalization", "amp_C"]


def test_versions_and_modules_are_those_of_this_interpreter() -> None:
    assert image_libraries.installed("pytest") == importlib.metadata.version("pytest")
    assert image_libraries.installed("no-such-distribution") is None
    assert image_libraries.has_module("torch.nn")
    assert not image_libraries.has_module("no_such_module.part")
