"""The parts of Optuna that are not public API and have no public equivalent, all in one place.

- `optuna.Trial(study, trial_id)`: Optuna documents the class, and says that users do not construct
  it. It is the only way to take up a trial that another process asked for, with the values that the
  trial already has. An interrupted trial is resumed with it.
- `BaseStorage.get_trial`, `get_study_id_from_name` and
  `get_trial_id_from_study_id_trial_number`: reading one trial through `Study` would read all.
- `BaseStorage.set_trial_intermediate_value`: `Trial.report` refuses studies of several objectives.

They may change with any minor version, so pyproject.toml allows one minor version of Optuna.
"""

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial


class StoredTrials:
    """The trials of a study, by their numbers.

    Args:
        study: the study.
        storage: where the study is kept.
    """

    def __init__(self, study: optuna.Study, storage: BaseStorage) -> None:
        self._study = study
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(study.study_name)

    def take_up(self, number: int) -> optuna.Trial:
        """Return a stored trial for further use; values that it has are not drawn again."""
        return optuna.Trial(self._study, self._id(number))

    def read(self, number: int) -> FrozenTrial:
        """Return a stored trial as it is."""
        return self._storage.get_trial(self._id(number))

    def set_intermediate_value(self, number: int, step: int, value: float) -> None:
        """Record an intermediate value of a trial."""
        self._storage.set_trial_intermediate_value(self._id(number), step, value)

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
