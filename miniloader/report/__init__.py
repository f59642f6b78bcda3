"""How does a person see it?  Text for terminals, JSON and HTML, made from what the other floors return."""
