"""Gloo as fleet and the semi-auto engine call it; imported on CPUs only."""
