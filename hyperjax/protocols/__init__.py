"""Published experiments as configs, each for every method."""
