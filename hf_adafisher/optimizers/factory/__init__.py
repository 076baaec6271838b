"""Every optimizer by name: records, parameter groups and the factory."""
