"""The search engine: Ray schedules trials, Optuna proposes them, a ledger records them."""
