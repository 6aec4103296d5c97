"""Whether the explanations are right: studies of many runs, each kept as a file of its own."""
