"""How does a library of ours live in a process whose loader is glibc's?"""
