"""The network laboratory behind `thin_link.py`: namespaces, shaped links, runs, readings, page."""
