"""Studies of whole papers: many runs, one table each."""
