"""Measures: seconds and bytes of compiled micro-batch steps, fitted into the planner's cost table."""
