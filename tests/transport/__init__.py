"""What talks to others: on an in-process bus, or over real servers."""
