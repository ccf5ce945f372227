"""What jobs take of the memory: counted without running them, then kept to by the runner."""
