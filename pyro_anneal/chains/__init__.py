"""What path, what pilot, what loop: chains that anneal, and how they are tuned."""
