"""The course. `python -m lessons` runs the tour and prints the table of contents."""
