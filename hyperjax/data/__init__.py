"""Images with labels, their split over clients, and a picture of that split."""
