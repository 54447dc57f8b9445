"""Files, locks, signals, heartbeats, the terminal, this host."""
