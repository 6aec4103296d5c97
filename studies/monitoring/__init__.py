"""The output of a running study: terminal, W&B, Optuna Dashboard."""
