"""What is annealed, and from where."""
