"""What several processes share of one library, step by step, and the claims that are judged by it."""
