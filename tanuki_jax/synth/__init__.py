"""Rows by rule (rules.py) and through models behind an API (make.py)."""
