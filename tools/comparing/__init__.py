"""Parts of `tools/compare.py`: what runs are measured by, and the page that shows it."""
