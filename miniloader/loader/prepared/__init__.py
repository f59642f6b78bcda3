"""Pages that were relocated beforehand: how they are used, and the file that they are kept in."""
