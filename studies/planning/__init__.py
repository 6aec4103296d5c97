"""What a study asks of a cluster, and what it will cost."""
