"""Scoring, baselines, intervals and the report: what is said about a model, and how sure it is."""
