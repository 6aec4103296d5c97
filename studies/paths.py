"""Names of the files and folders inside a study's folder, `<out>/<study>/`.

The engine has names of its own: :data:`studies.engine.ledger.LEDGER`,
:data:`studies.engine.ledger_callback.ERRORS` and :data:`studies.engine.optuna_storage.JOURNAL`.
"""

SETTINGS = "study.json"
"""The settings, which `--resume` reads."""
CHECKPOINTS = "checkpoints"
"""A folder per trial with its saved states; in the storage, if the study has one."""
CONFIRM = "confirm"
"""Ledgers and journals of confirmations."""
MEMORY = "memory"
"""In the storage only: the copy of a search's ledger and journal."""
ARTIFACTS = "artifacts"
"""Pictures for Optuna Dashboard."""
DASHBOARD = "dashboard.json"
"""The W&B workspace of a study that runs offline."""
TRIALS = "trials.csv"
"""A row per trial."""
PARETO = "pareto.json"
"""The Pareto front."""
BUNDLES = "best"
"""A bundle per objective, the knee and the baseline."""
README = "README.md"
"""The study's page."""
REPORT = "report.html"
"""The study's report."""
