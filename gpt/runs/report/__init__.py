"""Tables and the HTML page about many runs."""
