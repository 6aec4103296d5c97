"""One training run: the step, the epochs, the evaluation."""
