"""How many lanes a run has that asks for no number."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gemini.config.load import dump_config, load_config, read_config
from megatron_gemini.config.run import usual_lanes


@given(st.integers(1, 5000))
def test_every_rank_has_as_many_and_a_small_run_has_few(rows: int) -> None:
    lanes = usual_lanes(rows)
    assert lanes % rows == 0
    assert 8 <= lanes <= max(256, rows)


@pytest.mark.parametrize(
    ("arguments", "lanes"),
    [
        ([], 8),
        (["--train.rows_per_step", "6"], 24),
        (["--train.rows_per_step", "64"], 256),
        (["--train.rows_per_step", "96"], 192),
        (["--train.rows_per_step", "1024"], 1024),
        (["--train.rows_per_step", "1024", "--data.lanes", "16"], 16),
        (["--train.rows_per_step", "6", "--data.lanes", "0"], 24),
    ],
)
def test_the_number_follows_the_rows_and_is_what_a_checkpoint_holds(tmp_path, arguments: list[str], lanes: int) -> None:
    config = load_config(arguments)
    assert config.data.lanes == lanes
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert f"lanes: {lanes}\n" in path.read_text() and read_config(path) == config
