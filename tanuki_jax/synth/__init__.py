"""Synthetic data, made by rule (rules.py)."""
