"""Synthetic data: by rule (rules.py); from other models later."""
