"""What people see of a study while it runs."""
