"""What happens when several processes do it?  Crews of worker processes, and what is proven with them."""
