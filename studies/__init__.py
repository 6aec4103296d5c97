"""Distributed hyper-parameter studies over `batchcam`: Ray Tune schedules, Optuna proposes."""
