"""Reasoning texts written by a stronger model behind an OpenAI-compatible endpoint."""
