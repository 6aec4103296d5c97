"""Commands that measure the trainer and the study engine."""
