"""Studies of many recorded runs that evaluate whether the explanations are right."""
