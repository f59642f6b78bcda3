"""How is it taught?  One module a chapter; each runs for real, and each sentence is judged by the kernel."""
