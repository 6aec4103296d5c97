"""The results of a study: tables, bundles, its page and its report."""
