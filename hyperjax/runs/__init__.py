"""What a run is: who is evaluated, its scores, and what it costs to reach them."""
