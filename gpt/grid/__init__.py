"""Many runs from one command: cells, what became of them, the pool that runs them, the page about them."""
