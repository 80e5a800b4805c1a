"""Scoring: log-probabilities of given texts, exact answers to held-out prompts, preference accuracy."""
