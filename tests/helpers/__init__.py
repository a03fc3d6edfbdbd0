"""Helpers of several test files: tiny runs and independent references."""
