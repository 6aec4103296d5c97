"""Permutation importance of the searched parameters for a metric of a study's trials."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.ensemble import RandomForestRegressor
from sklearn.inspection import permutation_importance
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold

MIN_TRIALS = 10
_FOLDS = 5
_ROUNDS = 4
"""Repetitions of the cross-validation, each with different folds."""
_TREES = 100


@dataclass(frozen=True)
class Importance:
    """How well a random forest predicts a metric, and the importance of each parameter.

    Attributes:
        explained: R² of the predictions for held-out trials. If it is 0 or less, the forest
            predicts no better than the mean, and the ranking has no meaning.
        rows: one per parameter, the most important one first. `parameter` is its name. `mean` is
            the increase of the squared error on held-out trials when the parameter's values are
            permuted, in units of the metric's variance, averaged over the folds; `low` and `high`
            are one standard deviation over the folds below and above.
    """

    explained: float
    rows: list[dict[str, Any]]


def importance(
    points: Sequence[Mapping[str, Any]], values: Sequence[float], seed: int = 0
) -> Importance | None:
    """Return the permutation importance of each parameter in a random forest (Breiman 2001).

    The importance is computed on held-out trials, by repeated cross-validation.

    Args:
        points: the parameters of each trial, numbers or strings.
        values: the metric of each trial.
        seed: of forests, folds and permutations.

    Returns:
        None if there are fewer than `MIN_TRIALS` trials, or no parameter or no metric differs
        between them.
    """
    table = pd.DataFrame(points)
    table = table.loc[:, table.nunique(dropna=False) > 1]
    target = np.asarray(values, dtype=float)
    if len(target) < MIN_TRIALS or table.empty or np.ptp(target) == 0:
        return None
    for name in table.columns[[not pd.api.types.is_numeric_dtype(dtype) for dtype in table.dtypes]]:
        table[name] = pd.factorize(table[name], sort=True)[0]
    features = table.to_numpy(dtype=float)
    increases, predicted, observed = [], [], []
    for repetition in range(_ROUNDS):
        folds = KFold(_FOLDS, shuffle=True, random_state=seed + repetition)
        for fitted, held_out in folds.split(features):
            forest = RandomForestRegressor(_TREES, random_state=seed + repetition)
            forest.fit(features[fitted], target[fitted])
            predicted.append(forest.predict(features[held_out]))
            observed.append(target[held_out])
            # Squared error instead of R²: R² has a large variance on the few trials of a fold.
            result = permutation_importance(
                forest,
                features[held_out],
                target[held_out],
                scoring="neg_mean_squared_error",
                n_repeats=8,
                random_state=seed + repetition,
            )
            increases.append(result.importances_mean / target.var())
    mean, deviation = np.mean(increases, axis=0), np.std(increases, axis=0)
    rows = [
        {
            "parameter": name,
            "mean": float(mean[column]),
            "low": float(mean[column] - deviation[column]),
            "high": float(mean[column] + deviation[column]),
        }
        for column, name in enumerate(table.columns)
    ]
    explained = float(r2_score(np.concatenate(observed), np.concatenate(predicted)))
    return Importance(explained, sorted(rows, key=lambda row: -row["mean"]))
