"""Random faults over runs and comparisons."""
