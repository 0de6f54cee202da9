"""Mathematical equivalence."""
