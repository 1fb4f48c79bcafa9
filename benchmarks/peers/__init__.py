"""One fixed piece of work in every simulator that is installed."""
