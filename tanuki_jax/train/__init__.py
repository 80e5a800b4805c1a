"""One train step and one loop for every stage."""
