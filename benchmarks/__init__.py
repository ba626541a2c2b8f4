"""Workloads, one clock for both frameworks, and the report."""
