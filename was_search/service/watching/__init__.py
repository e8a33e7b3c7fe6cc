"""Looking at studies and steering them, from any machine that reaches the database."""
