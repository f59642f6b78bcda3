"""Processes of our own: how they are started, led, asked, and ended."""
