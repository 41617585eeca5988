"""What an operator sees of a cluster, as data, on a terminal and in a browser.

It imports `_session` and below. The model imports neither a user interface nor a web server.
"""
