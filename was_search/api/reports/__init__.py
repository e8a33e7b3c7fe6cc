"""What steps show people: each takes values and a reporter, and returns nothing."""
