"""Pictures and pages of results. Nothing here computes what it shows."""
