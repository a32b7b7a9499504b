"""Decides: which replicas a set of devices is cut into and which sequences each replica gets. Imports no JAX."""
