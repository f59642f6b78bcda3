"""Will it load there, and what does it need?  Programs and libraries of any root; nothing is mapped."""
