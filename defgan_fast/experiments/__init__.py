"""One file per experiment; the demonstration is the first."""
