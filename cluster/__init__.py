"""How a Ray cluster that runs studies is started."""
