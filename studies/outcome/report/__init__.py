"""The report of a study: one HTML file with its question, configurations and results."""
