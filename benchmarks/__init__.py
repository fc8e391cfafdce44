"""Side-by-side measurements: each prints what it compared, on what, and the ratio."""
