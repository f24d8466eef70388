"""The network laboratory behind `low_bandwidth.py`: namespaces, links, runs, readings, page."""
