"""Measurements that need no checkpoint: real shapes with made-up weights, and operations counted from the graph."""
