"""Which entries are trained: torch only, no peft."""
