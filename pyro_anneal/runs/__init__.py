"""What one call does."""
