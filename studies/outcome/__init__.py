"""What a study leaves: tables, bundles, its page and its report."""
