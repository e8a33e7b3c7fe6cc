"""Studies seen and steered through the database: status, lists, controls, and pages kept fresh."""
