"""Side by side with every peer: `python -m bench` for results and a page, `pytest bench --benchmark-only`."""
