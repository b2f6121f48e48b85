"""The end of a run, as its summary holds it."""

from types import SimpleNamespace

from experiments.summary import held_out_figures, held_out_measures, training_loss
from experiments.sweep import measure


def test_held_out_figures_of_a_row():
    row = {"loss": 1.0, "held_out_loss": 2.0, "held_out_bits_per_byte": 3.0}
    assert held_out_figures(row) == []  # the headline says it all
    row |= {"ema_held_out_loss/wiki": 4.0, "ema_held_out_bits_per_byte/wiki": 5.0}
    assert held_out_figures(row) == [
        {"set": "validation", "weights": "last", "bits_per_byte": 3.0, "loss": 2.0},
        {"set": "wiki", "weights": "EMA", "bits_per_byte": 5.0, "loss": 4.0},
    ]


def test_runs_without_held_out_text_or_rows():
    nothing = SimpleNamespace(held_out={}, evaluate=lambda params: {})
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"event": "x", "loss": 9.0}]
    assert held_out_measures(nothing, None, None, rows) is None
    assert held_out_measures(nothing, None, None, []) is None
    assert (training_loss(rows), training_loss([])) == (2.5, None)


def test_sweeps_are_ranked_by_what_all_runs_have():
    held = {"bits_per_byte": 2.0, "loss": 5.0}
    bare, failed = {"bits_per_byte": None, "loss": 4.0}, {"bits_per_byte": None, "loss": None}
    for rows, by in (
        ([held, failed], "bits_per_byte"),
        ([held, bare], "loss"),
        ([bare, failed], "loss"),
        ([failed], "bits_per_byte"),
    ):
        assert measure(rows) == by
