"""What several test files need: tiny runs, and independent references."""
