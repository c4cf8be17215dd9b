"""What all servers of a fleet have used, for budgets: read from its database, kept and added up."""
