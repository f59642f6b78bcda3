"""Which pages of running processes are private, what they cost, and why."""
