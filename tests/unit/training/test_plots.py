"""The figure of the losses."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image

from megatron_gemini.training.plots import _curves, _smoothed, plot_losses

Figure = pytest.importorskip("matplotlib.figure").Figure


def test_a_figure_is_drawn_without_a_display(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("MPLBACKEND", raising=False)
    records: list[dict] = [
        {"step": s, "loss": 5 * 0.9**s, "loss_text": 4 * 0.9**s, "learning_rate": 1e-3} for s in range(30)
    ]
    records[7]["loss"] = None
    records[20]["validation_loss"] = 1.0
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (1200, 900)
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20


def test_a_file_without_losses_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no record of a loss"):
        plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_curves_are_sorted_by_modality_and_validation_losses_stay_apart():
    records: list[dict] = [
        {"step": 3, "loss": 1.0, "loss_image": 2.0, "validation_loss": 4.0, "validation_loss_image": 5.0}
    ]
    assert _curves(records, "loss") == {"": ([3], [1.0]), "image": ([3], [2.0])}
    assert _curves(records, "validation_loss") == {"": ([3], [4.0]), "image": ([3], [5.0])}


def test_smoothing_keeps_a_constant_and_steps_over_nan():
    assert _smoothed([2.0] * 200) == pytest.approx([2.0] * 200)
    smooth = _smoothed([2.0] * 100 + [math.nan] + [2.0] * 100)
    assert smooth == pytest.approx([2.0] * 201)
    assert _smoothed([1.0, 3.0]) == [1.0, 3.0]


def test_smoothing_is_over_a_fiftieth_of_the_curve():
    """With 200 values the newest one counts a quarter, less what the first values lack."""
    smooth = _smoothed([0.0] * 199 + [1.0])
    assert smooth[-1] == pytest.approx(0.25 / (1 - 0.75**200), rel=1e-12)


def test_every_axis_says_what_it_shows(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **settings: drawn.append(figure))
    records = [{"step": step, "loss": 1.0, "learning_rate": 0.1, "validation_loss": 2.0} for step in (0, 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    losses, rate = drawn[0].axes
    assert (losses.get_ylabel(), rate.get_ylabel(), rate.get_xlabel()) == (
        "loss (nats per target)",
        "learning rate",
        "step",
    )
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["all", "all, held out"]
    assert rate.get_ylim()[0] == 0
    assert not any(axes.spines[side].get_visible() for axes in (losses, rate) for side in ("top", "right"))
    assert losses.get_xlim() == rate.get_xlim()
    assert rate.lines[0].get_ydata().tolist() == [0.1, 0.1]
