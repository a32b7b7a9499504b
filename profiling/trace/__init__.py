"""Reads XLA profiler traces without a device: what ran when on which device, of which kind, for which phase."""
