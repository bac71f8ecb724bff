"""The cost of encoding an item, measured and fitted."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_gemini import plugins
from megatron_gemini.config.load import load_config
from megatron_gemini.config.run import RunConfig
from tests.unit.planning import toys
from tools.measure_encoders import fit, grids, main

CONSTANT = st.floats(0.01, 1e4)


@given(CONSTANT, CONSTANT, CONSTANT)
def test_the_fit_finds_the_constants_of_exact_costs(a, b, c):
    n = np.array([1, 4, 9, 25, 64, 144])
    found, error = fit(n.tolist(), (a * n**2 + b * n + c).tolist())
    np.testing.assert_allclose((found.quadratic, found.linear, found.constant), (a, b, c), rtol=1e-5)
    assert error < 1e-8


@given(st.lists(st.floats(0.5, 2.0), min_size=6, max_size=6))
def test_no_constant_is_negative_and_none_fits_better(noise):
    n = np.array([1, 4, 9, 25, 64, 144])
    cost = (0.01 * n**2 + n) * noise
    found, _ = fit(n.tolist(), cost.tolist())
    best = np.array((found.quadratic, found.linear, found.constant))
    assert (best >= 0).all()
    matrix = np.stack((n**2, n, n**0), 1) / cost[:, None]
    residual = np.square(matrix @ best - 1).sum()
    # The derivative tells an optimum under bounds: none in a constant that is used, none downwards at 0.
    slope = matrix.T @ (matrix @ best - 1)
    assert (np.abs(slope[best > 0]) < 1e-6 * np.abs(matrix).sum(0)[best > 0]).all() and (slope > -1e-6).all()
    assert residual <= len(n)


def test_the_largest_items_are_those_that_the_configuration_allows():
    config = RunConfig()
    vision, audio = grids(config, "vision"), grids(config, "audio")
    assert vision[-1] == (1, 16, 16) and audio[-1] == (3000, 1, 1)
    assert vision == sorted(set(vision)) and audio == sorted(set(audio))


def series_plugin(folder: Path) -> str:
    """A module of an encoder that no package knows, and its name; `sys.path` has the folder."""
    name = f"series_plugin_{folder.name}".replace("-", "_")
    (folder / f"{name}.py").write_text("from tests.unit.planning.toys import register\n\nregister()\n")
    return name


def test_items_of_a_plugins_encoder_have_several_lengths_up_to_the_longest():
    with toys.registered():
        found = grids(RunConfig(), "series")
    assert found[-1] == (1000, 1, 1) and len(found) == 6 and found == sorted(found)


def test_what_is_printed_is_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = "layers: 1, width: 16, heads: 2, mlp_width: 24"
    path = tmp_path / "run.yaml"
    path.write_text(
        "encoders:\n"
        f"  vision: {{{small}, max_side: 16, connector: {{frozen: true}}}}\n"
        f"  audio: {{{small}, mels: 8, max_seconds: 0.5, frozen: true}}\n"
    )
    assert main(["--config", str(path), "--repeats", "1", "--encoder_engines.chunk_tokens", "64"]) == 0
    costs = yaml.safe_load(capsys.readouterr().out)["encoders"]
    values = yaml.safe_load(path.read_text())
    values["encoders"] = {name: section | costs[name] for name, section in values["encoders"].items()}
    path.write_text(yaml.safe_dump(values))
    encoders = load_config(["--config", str(path)]).encoders
    assert encoders["vision"].cost.linear == costs["vision"]["cost"]["linear"]
    assert sum(costs["audio"]["cost"].values()) > 0


@pytest.mark.parametrize("frozen", [["--encoders.series.frozen"], []])
def test_a_plugins_encoder_is_measured_with_its_connector(frozen, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "_loaded", [])
    path = tmp_path / "run.yaml"
    path.write_text("encoders: {vision: {enabled: false}, audio: {enabled: false}, series: {longest: 40}}\n")
    options = ["--repeats", "1", "--encoder_engines.chunk_tokens", "64", *frozen]
    with contextlib.ExitStack() as stack:
        stack.callback(toys.unregister)
        assert main(["--config", str(path), "--plugin", series_plugin(tmp_path), *options]) == 0
    assert list(yaml.safe_load(capsys.readouterr().out)["encoders"]) == ["series"]


def test_a_plugin_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("")
    assert main(["--config", str(tmp_path / "run.yaml"), "--plugin", "no_such_plugin"]) == 2
    assert "the plugin no_such_plugin is not there" in capsys.readouterr().err


def test_a_mistake_in_the_settings_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("encoders: {vision: {patch: 0}}\n")
    assert main(["--config", str(config)]) == 2
    assert "encoders.vision.patch is 0" in capsys.readouterr().err
