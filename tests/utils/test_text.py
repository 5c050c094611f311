"""Numbers in tables and messages."""

from starfire_prune.utils.text import mean_of, number_text, spread_text


def test_the_mean_leaves_out_absent_numbers():
    assert (mean_of([1.0, None, 2.0]), mean_of([None])) == (1.5, None)


def test_numbers_are_written_with_their_digits_and_no_negative_zero():
    assert number_text(60.005, 1) == "60.0"
    assert number_text(-0.001) == "0.00"
    assert number_text(0.8, 2, sign=True) == "+0.80"
    assert number_text(None) == "-"


def test_means_have_a_deviation_where_there_are_several_runs():
    assert spread_text([50.0, 52.0], 2) == "51.00 ± 1.41"
    assert spread_text([50.0], 1) == "50.00"


def test_a_mean_of_fewer_runs_says_so():
    assert spread_text([50.0, None], 2) == "50.00 (1 of 2)"
    assert spread_text([None, None], 2) == "-"
