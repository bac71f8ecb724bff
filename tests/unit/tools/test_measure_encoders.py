"""The cost of encoding an item, measured and fitted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_gemini.config.load import load_config
from megatron_gemini.config.run import RunConfig
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


def test_what_is_printed_is_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = "layers: 1, width: 16, heads: 2, mlp_width: 24"
    config = tmp_path / "run.yaml"
    sections = [f"vision: {{{small}, max_side: 16}}", f"audio: {{{small}, mels: 8, max_seconds: 0.5, frozen: true}}"]
    config.write_text(f"encoders: {{{', '.join(sections)}}}")
    assert main(["--config", str(config), "--repeats", "1", "--encoder_engines.chunk_tokens", "64"]) == 0
    printed = capsys.readouterr().out
    costs = yaml.safe_load(printed)["encoders"]
    config.write_text(printed)
    vision = load_config(["--config", str(config)]).encoders["vision"]
    assert vision.cost.linear == costs["vision"]["cost"]["linear"]
    assert sum(costs["audio"]["cost"].values()) > 0


def test_a_mistake_in_the_settings_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("encoders: {vision: {patch: 0}}\n")
    assert main(["--config", str(config)]) == 2
    assert "encoders.vision.patch is 0" in capsys.readouterr().err
