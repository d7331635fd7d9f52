"""What can be done to one weight: the forms a weight can take, and the solvers that find their numbers."""
