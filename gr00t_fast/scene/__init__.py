"""What the cameras of a data set saw when its episodes began, and whether a live picture shows the same."""
