"""Talking with a run: in the terminal, in the browser and over HTTP (chapter 14)."""
