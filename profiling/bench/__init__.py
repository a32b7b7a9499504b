"""Benchmarks that write down what they measured."""
