"""Check that losses get distinct colours while there are enough, and that more are no error."""

from itertools import combinations

import pytest

from batchcam.losses import TERMS
from studies.outcome.report.charts import loss_colours
from studies.space import SWITCHED

TITLES = [TERMS[name].title for name in SWITCHED]
COMBINATIONS = ["cross-entropy"] + [
    " + ".join(terms)
    for count in range(1, len(TITLES) + 1)
    for terms in combinations(TITLES, count)
]


def test_combinations_of_the_first_four_terms_have_colours_of_their_own() -> None:
    losses = ["cross-entropy"] + [
        " + ".join(terms) for count in range(1, 5) for terms in combinations(TITLES[:4], count)
    ]
    colours = loss_colours(losses)
    assert len(set(colours)) == len(losses) == 16
    assert loss_colours([losses[3]]) == [colours[3]]


@pytest.mark.parametrize("loss", COMBINATIONS)
def test_every_combination_has_a_colour_apart_from_that_of_the_baseline(loss: str) -> None:
    first, *rest = loss_colours(list(dict.fromkeys(["cross-entropy", loss])))
    assert first not in rest


def test_more_losses_than_colours_repeat_some() -> None:
    assert len(loss_colours(COMBINATIONS)) == len(COMBINATIONS) == 2 ** len(TITLES)
