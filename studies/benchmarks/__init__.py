"""Evidence for what a study decides: recorded learning curves, and what is replayed on them."""
