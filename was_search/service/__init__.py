"""What people type and call. It composes all other packages, and nothing below imports it."""
