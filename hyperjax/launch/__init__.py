"""Commands: from flags and configs to runs in folders, and pages about them."""
