"""Studies seen and controlled through the database: status, lists, controls, and pages kept fresh."""
