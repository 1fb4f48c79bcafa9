"""Many runs: grids of settings, and tables, statistics and figures of their results."""
