"""What people see: tables, figures, pages and messages, each made of values alone."""
