"""One file per method and data set; flat, with every field a run can change."""
