"""What other libraries need to work with this one; each module is imported when it is asked for."""
