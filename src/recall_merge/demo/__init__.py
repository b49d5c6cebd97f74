"""The whole loop on a real small model, and its data."""
