"""The report of a study: one HTML file that says what was asked, tried and found."""
