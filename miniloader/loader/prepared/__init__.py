"""Pages that were relocated beforehand: how they are used, and where they are kept."""
