"""Measure long-video models: needles, benchmarks, captions.

Layers, each usable alone: tasks (what is asked), a runner (records, one line a sample), metrics
(what the records say, and how surely), pages (tables and pictures of it).
"""
