"""What of a configuration decides accuracy and SSIM, as far as the trials of a study can say."""

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
"""Times that the trials are cut into folds, each time otherwise."""
_TREES = 100


@dataclass(frozen=True)
class Importance:
    """How well a model of the trials predicts a metric, and what it needs for that.

    Attributes:
        explained: share of the variance of held-out trials that it predicts (R²); where it is 0 or
            less, it knows nothing, and neither does the ranking.
        rows: for each parameter its `parameter`, and `mean`, `low` and `high` of what is lost of
            R² on held-out trials when its values are exchanged among them: mean and standard
            deviation over the folds. The largest first.
    """

    explained: float
    rows: list[dict[str, Any]]


def importance(
    points: Sequence[Mapping[str, Any]], values: Sequence[float], seed: int = 0
) -> Importance | None:
    """Return what decides `values`, by permutation in a random forest (Breiman 2001).

    Trials on which it is judged are not those it was grown on.

    Args:
        points: of each trial the value of each parameter, numbers or words.
        values: of each trial the metric.
        seed: of forests, folds and permutations.

    Returns:
        None where there are fewer than `MIN_TRIALS` trials, or nothing differs between them.
    """
    table = pd.DataFrame(points)
    table = table.loc[:, table.nunique(dropna=False) > 1]
    target = np.asarray(values, dtype=float)
    if len(target) < MIN_TRIALS or table.empty or np.ptp(target) == 0:
        return None
    for name in table.columns[[not pd.api.types.is_numeric_dtype(kind) for kind in table.dtypes]]:
        table[name] = pd.factorize(table[name], sort=True)[0]
    features = table.to_numpy(dtype=float)
    losses, predicted, seen = [], [], []
    for turn in range(_ROUNDS):
        folds = KFold(_FOLDS, shuffle=True, random_state=seed + turn)
        for grown, held in folds.split(features):
            forest = RandomForestRegressor(_TREES, random_state=seed + turn)
            forest.fit(features[grown], target[grown])
            predicted.append(forest.predict(features[held]))
            seen.append(target[held])
            # Of a few trials R² would be wild: the squared error, in units of the variance of all.
            found = permutation_importance(
                forest,
                features[held],
                target[held],
                scoring="neg_mean_squared_error",
                n_repeats=8,
                random_state=seed + turn,
            )
            losses.append(found.importances_mean / target.var())
    mean, spread = np.mean(losses, axis=0), np.std(losses, axis=0)
    rows = [
        {
            "parameter": name,
            "mean": float(mean[column]),
            "low": float(mean[column] - spread[column]),
            "high": float(mean[column] + spread[column]),
        }
        for column, name in enumerate(table.columns)
    ]
    explained = float(r2_score(np.concatenate(seen), np.concatenate(predicted)))
    return Importance(explained, sorted(rows, key=lambda row: -row["mean"]))
