"""What people see: each report takes values and shows or writes them."""
