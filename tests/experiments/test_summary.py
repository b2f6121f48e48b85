"""The end of a run, as its summary holds it."""

from experiments.summary import held_out_figures


def test_held_out_figures_of_a_row():
    row = {"loss": 1.0, "held_out_loss": 2.0, "held_out_bits_per_byte": 3.0}
    assert held_out_figures(row) == []  # the headline says it all
    row |= {"ema_held_out_loss/wiki": 4.0, "ema_held_out_bits_per_byte/wiki": 5.0}
    assert held_out_figures(row) == [
        {"set": "validation", "weights": "last", "bits_per_byte": 3.0, "loss": 2.0},
        {"set": "wiki", "weights": "EMA", "bits_per_byte": 5.0, "loss": 4.0},
    ]
